// The part of CUDA's language and runtime that csrc/ uses, on top of emulator.h.
#pragma once

#include <cmath>
#include <limits>
#include <map>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static __attribute__((section("cuda_shared")))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// threads that meet

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_emulator::meet_block("__syncthreads", line);
}

namespace cuda_emulator {

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("operations of a part of a warp are not emulated");
}

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, int line) {
  check_mask(mask);
  struct Operand {
    T value;
    int source;
    T result;
  } operand{value, source, value};
  meet_warp(what, line, operand, [](Operand** lanes, int count) {
    for (int i = 0; i < count; ++i) {
      const int source = lanes[i]->source;
      if (source < count) lanes[i]->result = lanes[source]->value;
    }
  });
  return operand.result;
}

inline int lane() { return int(current - &current->block->threads[current->first_of_warp]); }

}  // namespace cuda_emulator

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_emulator::check_mask(mask);
  int nothing = 0;
  cuda_emulator::meet_warp("__syncwarp", line, nothing, [](int**, int) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int base = cuda_emulator::lane() & -width;
  return cuda_emulator::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)), line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_emulator::lane();
  const int source = lane ^ bits;
  const bool inside = (source & -width) <= (lane & -width);
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_emulator::lane();
  const bool inside = (lane & (width - 1)) + by < width;
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, inside ? lane + by : lane, line);
}

inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  cuda_emulator::check_mask(mask);
  int any = predicate != 0;
  cuda_emulator::meet_warp("__any_sync", line, any, [](int** lanes, int count) {
    int all = 0;
    for (int i = 0; i < count; ++i) all |= *lanes[i];
    for (int i = 0; i < count; ++i) *lanes[i] = all;
  });
  return any;
}

// memory

inline void __threadfence() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

template <class T>
T atomicMin(T* address, T value) {
  const T before = *address;
  *address = std::min(before, value);
  return before;
}

// arithmetic

using std::isinf;
using std::isnan;
using std::max;
using std::min;

namespace cuda_emulator {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

enum class Rounding { nearest, down, up, zero };

// a + b, rounded as asked. Only the sign of `error` counts, and that is right even where the error
// itself is rounded.
inline float add(float a, float b, Rounding rounding) {
  const float sum = a + b;
  const float part = sum - a;
  const float error = (a - (sum - part)) + (b - part);
  if (std::isinf(sum) && std::isfinite(a) && std::isfinite(b)) {
    const float largest = std::copysign(std::numeric_limits<float>::max(), sum);
    return (rounding == Rounding::down) == (sum > 0) ? largest : sum;
  }
  if (rounding == Rounding::down) {
    if (sum == 0 && error == 0 && (std::signbit(a) != std::signbit(b))) return -0.f;
    return error < 0 ? std::nextafter(sum, -INFINITY) : sum;
  }
  return error > 0 ? std::nextafter(sum, INFINITY) : sum;
}

// `value` in a format of `digits` significant bits, exponents from `low` and numbers up to
// `largest`
inline float rounded(float value, int digits, int low, float largest, Rounding rounding) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(value), low) + 1 - digits);
  const double quotient = value / unit;
  const double whole = rounding == Rounding::nearest ? std::nearbyint(quotient)
                       : rounding == Rounding::down  ? std::floor(quotient)
                       : rounding == Rounding::up    ? std::ceil(quotient)
                                                     : std::trunc(quotient);
  const double result = std::copysign(whole * unit, value);
  if (std::abs(result) <= largest) return float(result);
  const bool away = rounding == Rounding::nearest || (rounding == Rounding::down && value < 0) ||
                    (rounding == Rounding::up && value > 0);
  return std::copysign(away ? INFINITY : largest, value);
}

}  // namespace cuda_emulator

inline float __fadd_rd(float a, float b) {
  return cuda_emulator::add(a, b, cuda_emulator::Rounding::down);
}
inline float __fadd_ru(float a, float b) {
  return cuda_emulator::add(a, b, cuda_emulator::Rounding::up);
}
inline float __fsub_rd(float a, float b) { return __fadd_rd(a, -b); }
inline float __fsub_ru(float a, float b) { return __fadd_ru(a, -b); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline int __float_as_int(float a) { return cuda_emulator::bit_cast<int>(a); }
inline float __int_as_float(int a) { return cuda_emulator::bit_cast<float>(a); }
inline unsigned __float_as_uint(float a) { return cuda_emulator::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return cuda_emulator::bit_cast<float>(a); }
// glibc declares these names for itself
#define __expf expf
#define __logf logf
#define __log2f log2f

// the runtime

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_emulator {

constexpr size_t kDefaultShared = 48 << 10;
inline std::map<const void*, size_t> shared_limits;  // of kernels that asked for more
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline int multiprocessors() { return std::stoi(setting("CUDA_EMULATOR_MULTIPROCESSORS", "4")); }

inline int shared_of_multiprocessor() {
  return std::stoi(setting("CUDA_EMULATOR_SHARED_MEMORY", "232448"));
}

inline int resident_blocks(size_t threads, size_t shared_bytes) {
  const size_t by_shared = (shared_of_multiprocessor() + 1024) / (shared_bytes + 1024);
  return int(std::min<size_t>(std::min<size_t>(2048 / threads, by_shared), 32));
}

template <class... Params, size_t... I>
cudaError_t start(void (*kernel)(Params...),
                  const cudaLaunchConfig_t& config,
                  const std::tuple<Params...>& params,
                  std::index_sequence<I...>) {
  const dim3 grid = config.gridDim;
  const size_t threads = size_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > 1024 || !blocks || grid.y > 65535 || grid.z > 65535) {
    return report(cudaErrorInvalidConfiguration);
  }
  const auto limit = shared_limits.find(reinterpret_cast<const void*>(kernel));
  if (config.dynamicSmemBytes > (limit == shared_limits.end() ? kDefaultShared : limit->second)) {
    return report(cudaErrorInvalidValue);
  }
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    cooperative |= config.attrs[i].val.cooperative != 0;
  }
  const int resident = resident_blocks(threads, config.dynamicSmemBytes);
  if (cooperative && blocks > size_t(resident) * multiprocessors()) {
    return report(cudaErrorCooperativeLaunchTooLarge);
  }
  run([&] { kernel(std::get<I>(params)...); }, grid, config.blockDim, config.dynamicSmemBytes,
      cooperative);
  return cudaSuccess;
}

}  // namespace cuda_emulator

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_emulator::last_error, cudaSuccess);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_emulator::multiprocessors()
                                                       : cuda_emulator::shared_of_multiprocessor();
  return cudaSuccess;
}

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_emulator::shared_of_multiprocessor()) {
    return cuda_emulator::report(cudaErrorInvalidValue);
  }
  cuda_emulator::shared_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                          T,
                                                          int threads,
                                                          size_t shared_bytes) {
  *blocks = cuda_emulator::resident_blocks(threads, shared_bytes);
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Params...),
                               Args&&... args) {
  return cuda_emulator::start(kernel, *config, std::tuple<Params...>(std::forward<Args>(args)...),
                              std::index_sequence_for<Params...>());
}

namespace cuda_emulator {

template <class... Params, size_t... I>
cudaError_t start(void (*kernel)(Params...),
                  const cudaLaunchConfig_t& config,
                  void** args,
                  std::index_sequence<I...> indices) {
  return start(kernel, config, std::tuple<Params...>(*static_cast<Params*>(args[I])...), indices);
}

}  // namespace cuda_emulator

template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...),
                             dim3 grid,
                             dim3 block,
                             void** args,
                             size_t shared_bytes = 0,
                             cudaStream_t stream = nullptr) {
  const cudaLaunchConfig_t config{grid, block, shared_bytes, stream, nullptr, 0};
  return cuda_emulator::start(kernel, config, args, std::index_sequence_for<Params...>());
}

template <class... Params>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Params...),
                                        dim3 grid,
                                        dim3 block,
                                        void** args,
                                        size_t shared_bytes = 0,
                                        cudaStream_t stream = nullptr) {
  cudaLaunchAttribute cooperative{cudaLaunchAttributeCooperative, {1}};
  const cudaLaunchConfig_t config{grid, block, shared_bytes, stream, &cooperative, 1};
  return cuda_emulator::start(kernel, config, args, std::index_sequence_for<Params...>());
}
