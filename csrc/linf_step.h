// One signed-gradient step, projected to the eps-ball around x0 and to [lo, hi]:
//
//     out = clip(clip(x + alpha sign(grad), x0 - eps, x0 + eps), lo, hi)
//
// in fp32, with the ball's bounds and the result rounded towards x0, so that |out - x0| <= eps
// holds exactly wherever x0 lies in [lo, hi]. sign(NaN) is 0; NaN in x or x0 stays NaN.
#pragma once

#include <cstdint>

#include "isa.h"

namespace clae_fast {

enum class DType : int { fp32, fp16, bf16 };

struct LinfBounds {
  float alpha;
  float eps;
  float lo;
  float hi;
};

struct LinfStepArgs {
  const void* x;     // [size] of x_dtype
  const void* grad;  // [size] of grad_dtype
  const void* x0;    // [size] of x_dtype, x itself where the step starts at the centre
  void* out;         // [size] of x_dtype
  DType x_dtype;
  DType grad_dtype;
  int64_t size;
  LinfBounds bounds;         // where per_channel is null
  const float* per_channel;  // [4, channels]: alpha, eps, lo, hi; null for `bounds` everywhere
  // element i belongs to channel i / channel_stride % channels, true of every dense layout
  int64_t channels;
  int64_t channel_stride;
};

void linf_step_cpu(Isa isa, const LinfStepArgs& args, int threads);

// Enqueues on `stream`, a cudaStream_t, of the current device. Throws std::runtime_error.
void linf_step_cuda(const LinfStepArgs& args, void* stream);

}  // namespace clae_fast
