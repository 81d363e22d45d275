// One signed-gradient move, projected to the eps-ball around x0 and to [lo, hi]:
//
//     out = clip(clip(x + alpha sign(grad), x0 - eps, x0 + eps), lo, hi)
//
// It is computed in fp32. The ball's bounds and the result are rounded towards x0, so that
// |out - x0| <= eps holds exactly wherever x0 lies in [lo, hi]. sign(NaN) is 0; NaN in x or x0
// stays NaN.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace clae_fast {

struct LinfStep {
  const void* x;     // [size] of x_dtype
  const void* grad;  // [size] of grad_dtype
  const void* x0;    // [size] of x_dtype; x itself where the move starts at the center
  void* out;         // [size] of x_dtype
  DType x_dtype;
  DType grad_dtype;
  int64_t size;
  const float* bounds;  // [4, channels]: alpha, eps, lo, hi
  // In every dense layout, element i of out is in channel i / channel_stride % channels.
  int64_t channels;
  int64_t channel_stride;
};

struct LinfStepArgs : LinfStep {
  Isa isa;
  int threads;
};

// All operands have the memory layout of out.
void linf_step(const LinfStepArgs& args);

// Where element i of out lies in the operands. Take i's digits in a mixed base with these sizes,
// the last digit fastest; an operand's offset is the sum of the digits times its strides.
struct LinfLayout {
  int64_t sizes[4];
  int64_t x[4];
  int64_t grad[4];
  int64_t x0[4];
};

// For up to this many channels, the bounds fit into the arguments of a launch. With more channels
// they have to be on the device.
constexpr int kLinfChannels = 4;

struct LinfStepCudaArgs : LinfStep {
  LinfLayout layout;
  bool bounds_on_device;  // otherwise they are on the host, for at most kLinfChannels channels
  void* stream;           // a cudaStream_t of the current device
};

// Enqueues one kernel. Throws std::runtime_error.
void linf_step_cuda(const LinfStepCudaArgs& args);

}  // namespace clae_fast
