// CUDA's errors as exceptions, for what csrc/*_cuda.cu do on the host.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace clae_fast {

// Throws std::runtime_error if an op's call of CUDA has failed.
inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

// An attribute of the current device.
inline int device_attribute(const char* op, cudaDeviceAttr attribute) {
  int device, value;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

}  // namespace clae_fast
