// The move of one element, for the kernels of linf_step and stem_step.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.cuh"
#include "linf_step.h"

namespace clae_fast {

// The bounds of all channels, in a kernel's arguments.
struct Bounds {
  const float* table;  // [4, channels] on the device, or null
  int64_t channels;
  float values[4][kLinfChannels];  // where there is no table

  Bounds(const float* bounds, bool on_device, int64_t channels)
      : table(on_device ? bounds : nullptr), channels(channels), values{} {
    for (int64_t i = 0; i < 4 * channels && !on_device; ++i) {
      values[i / channels][i % channels] = bounds[i];
    }
  }
};

// The bounds of one channel.
struct alignas(16) ChannelBounds {
  float alpha, eps, lo, hi;
};

__device__ inline ChannelBounds bounds_of(const Bounds& bounds, int64_t channel) {
  const auto bound = [&](int row) {
    if (bounds.table) return bounds.table[row * bounds.channels + channel];
    float value = bounds.values[row][0];
    // selected one by one: an array in the arguments that is indexed at run time is slow
#pragma unroll
    for (int c = 1; c < kLinfChannels; ++c) value = channel == c ? bounds.values[row][c] : value;
    return value;
  };
  return {bound(0), bound(1), bound(2), bound(3)};
}

// Stores `value` rounded towards `center`, which the dtype of `out` can represent.
__device__ inline void store(float* out, float value, float) { *out = value; }
__device__ inline void store(__half* out, float value, float center) {
  *out = value > center ? __float2half_rd(value) : __float2half_ru(value);
}
__device__ inline void store(__nv_bfloat16* out, float value, float center) {
  *out = value > center ? __float2bfloat16_rd(value) : __float2bfloat16_ru(value);
}

__device__ inline float stepped(float x, float grad, float x0, const ChannelBounds& bounds) {
  float y = x + (grad > 0.f ? bounds.alpha : grad < 0.f ? -bounds.alpha : 0.f);
  y = x0 != x0 ? x0 : y;
  const float low = __fsub_ru(x0, bounds.eps);
  // rounding down makes -0 of -eps + eps; adding 0 makes it +0, as in the other implementations
  const float high = __fadd_rd(x0, bounds.eps) + 0.f;
  y = y < low ? low : y;
  y = y > high ? high : y;
  y = y < bounds.lo ? bounds.lo : y;
  return y > bounds.hi ? bounds.hi : y;
}

}  // namespace clae_fast
