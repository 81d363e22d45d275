#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "linf_step.h"

namespace clae_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 4;  // elements of a thread, so that several loads are under way at once

__device__ float load(float value) { return value; }
__device__ float load(__half value) { return __half2float(value); }
__device__ float load(__nv_bfloat16 value) { return __bfloat162float(value); }

// `value`, rounded towards `centre`, which the dtype of `out` can represent
__device__ void store(float* out, float value, float) { *out = value; }
__device__ void store(__half* out, float value, float centre) {
  *out = value > centre ? __float2half_rd(value) : __float2half_ru(value);
}
__device__ void store(__nv_bfloat16* out, float value, float centre) {
  *out = value > centre ? __float2bfloat16_rd(value) : __float2bfloat16_ru(value);
}

__device__ float stepped(float x, float grad, float x0, const LinfBounds& bounds) {
  float y = x + (grad > 0.f ? bounds.alpha : grad < 0.f ? -bounds.alpha : 0.f);
  y = x0 != x0 ? x0 : y;
  const float low = __fsub_ru(x0, bounds.eps);
  // rounding down makes -0 of x0 = -eps; adding 0 makes it the +0 of the other implementations
  const float high = __fadd_rd(x0, bounds.eps) + 0.f;
  y = y < low ? low : y;
  y = y > high ? high : y;
  y = y < bounds.lo ? bounds.lo : y;
  return y > bounds.hi ? bounds.hi : y;
}

// Index is int64_t only where it must be: the division by channel is much slower with it.
template <class X, class G, class Index>
__global__ void linf_step_kernel(const X* __restrict__ x,     // [size]
                                 const G* __restrict__ grad,  // [size]
                                 const X* __restrict__ x0,    // [size]
                                 X* __restrict__ out,         // [size]
                                 Index size,
                                 LinfBounds bounds,
                                 const float* __restrict__ per_channel,  // [4, channels] or null
                                 Index channels,
                                 Index channel_stride) {
  const Index first = Index(blockIdx.x) * (kThreads * kItems) + threadIdx.x;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const Index i = first + item * kThreads;
    if (i >= size) return;
    if (per_channel) {
      const float* channel = per_channel + i / channel_stride % channels;
      bounds = {channel[0], channel[channels], channel[2 * channels], channel[3 * channels]};
    }
    const float centre = load(x0[i]);
    store(out + i, stepped(load(x[i]), load(grad[i]), centre, bounds), centre);
  }
}

template <class X, class G, class Index>
void launch(const LinfStepArgs& args, cudaStream_t stream) {
  constexpr int64_t kBlock = kThreads * kItems;
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned((args.size + kBlock - 1) / kBlock);
  config.blockDim = kThreads;
  config.stream = stream;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, linf_step_kernel<X, G, Index>, static_cast<const X*>(args.x),
                         static_cast<const G*>(args.grad), static_cast<const X*>(args.x0),
                         static_cast<X*>(args.out), Index(args.size), args.bounds, args.per_channel,
                         Index(args.channels), Index(args.channel_stride));
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("linf_step: ") + cudaGetErrorString(error));
  }
}

template <class X, class G>
void launch_for_size(const LinfStepArgs& args, cudaStream_t stream) {
  // the last block may count past the size
  if (args.size <= INT32_MAX - kThreads * kItems) return launch<X, G, uint32_t>(args, stream);
  launch<X, G, int64_t>(args, stream);
}

template <class X>
void launch_for_grad(const LinfStepArgs& args, cudaStream_t stream) {
  switch (args.grad_dtype) {
    case DType::fp32:
      return launch_for_size<X, float>(args, stream);
    case DType::fp16:
      return launch_for_size<X, __half>(args, stream);
    case DType::bf16:
      return launch_for_size<X, __nv_bfloat16>(args, stream);
  }
}

void launch_for_x(const LinfStepArgs& args, cudaStream_t stream) {
  switch (args.x_dtype) {
    case DType::fp32:
      return launch_for_grad<float>(args, stream);
    case DType::fp16:
      return launch_for_grad<__half>(args, stream);
    case DType::bf16:
      return launch_for_grad<__nv_bfloat16>(args, stream);
  }
}

}  // namespace

void linf_step_cuda(const LinfStepArgs& args, void* stream) {
  if (args.size == 0) return;
  launch_for_x(args, static_cast<cudaStream_t>(stream));
}

}  // namespace clae_fast
