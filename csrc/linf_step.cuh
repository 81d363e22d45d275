// The step of one element, for the kernels that take it: linf_step, and stem_step behind a
// gradient.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.cuh"
#include "linf_step.h"

namespace clae_fast {

// `value`, rounded towards `centre`, which the dtype of `out` can represent
__device__ inline void store(float* out, float value, float) { *out = value; }
__device__ inline void store(__half* out, float value, float centre) {
  *out = value > centre ? __float2half_rd(value) : __float2half_ru(value);
}
__device__ inline void store(__nv_bfloat16* out, float value, float centre) {
  *out = value > centre ? __float2bfloat16_rd(value) : __float2bfloat16_ru(value);
}

__device__ inline float stepped(float x,
                                float grad,
                                float x0,
                                float alpha,
                                float eps,
                                float lo,
                                float hi) {
  float y = x + (grad > 0.f ? alpha : grad < 0.f ? -alpha : 0.f);
  y = x0 != x0 ? x0 : y;
  const float low = __fsub_ru(x0, eps);
  // rounding down makes -0 of x0 = -eps; adding 0 makes it the +0 of the other implementations
  const float high = __fadd_rd(x0, eps) + 0.f;
  y = y < low ? low : y;
  y = y > high ? high : y;
  y = y < lo ? lo : y;
  return y > hi ? hi : y;
}

}  // namespace clae_fast
