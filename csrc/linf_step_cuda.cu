#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "linf_step.cuh"

namespace clae_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 8;  // neighbours in memory, a thread's

// loaded and stored 16 bytes at a time
template <class T>
struct alignas(16) Pack {
  T items[kItems];
};

// [4, channels] on the device, else by value
struct Bounds {
  const float* table;
  float values[4][kLinfChannels];
  int64_t channels;
  int64_t channel_stride;
};

struct Offsets {
  int64_t x;
  int64_t grad;
  int64_t x0;
};

// alpha, eps, lo and hi of a channel
struct ChannelBounds {
  float values[4];
};

__device__ ChannelBounds bounds_of(const Bounds& bounds, int64_t channel) {
  ChannelBounds found;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    if (bounds.table) {
      found.values[row] = bounds.table[row * bounds.channels + channel];
      continue;
    }
    float value = bounds.values[row][0];
    // selected, because lanes that index constants differently take turns
#pragma unroll
    for (int c = 1; c < kLinfChannels; ++c) value = channel == c ? bounds.values[row][c] : value;
    found.values[row] = value;
  }
  return found;
}

// The digits of element i, and where it lies.
__device__ Offsets locate(const LinfLayout& layout, int64_t i, int64_t (&digits)[4]) {
  Offsets at{0, 0, 0};
#pragma unroll
  for (int k = 3; k >= 0; --k) {
    digits[k] = i % layout.sizes[k];
    i /= layout.sizes[k];
    at.x += digits[k] * layout.x[k];
    at.grad += digits[k] * layout.grad[k];
    at.x0 += digits[k] * layout.x0[k];
  }
  return at;
}

// On to the next element.
__device__ void advance(const LinfLayout& layout, int64_t (&digits)[4], Offsets& at) {
#pragma unroll
  for (int k = 3; k >= 0; --k) {
    at.x += layout.x[k];
    at.grad += layout.grad[k];
    at.x0 += layout.x0[k];
    if (++digits[k] < layout.sizes[k]) return;
    digits[k] = 0;
    at.x -= layout.sizes[k] * layout.x[k];
    at.grad -= layout.sizes[k] * layout.grad[k];
    at.x0 -= layout.sizes[k] * layout.x0[k];
  }
}

// In memory every operand is as out where kPacked, else as `layout` says.
template <class X, class G, bool kPacked>
__global__ void linf_step_kernel(const X* __restrict__ x,
                                 const G* __restrict__ grad,
                                 const X* __restrict__ x0,
                                 X* __restrict__ out,  // [size]
                                 int64_t size,
                                 LinfLayout layout,
                                 Bounds bounds) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kItems;
  if (first >= size) return;
  const bool whole = first + kItems <= size;
  Pack<X> xs, x0s;
  Pack<G> grads;
  if (kPacked && whole) {
    xs = *reinterpret_cast<const Pack<X>*>(x + first);
    grads = *reinterpret_cast<const Pack<G>*>(grad + first);
    x0s = x0 == x ? xs : *reinterpret_cast<const Pack<X>*>(x0 + first);
  } else {
    int64_t digits[4];
    Offsets at{first, first, first};
    if (!kPacked) at = locate(layout, first, digits);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (first + item < size) {
        xs.items[item] = x[at.x];
        grads.items[item] = grad[at.grad];
        x0s.items[item] = x0[at.x0];
      }
      if (kPacked) {
        at = {at.x + 1, at.grad + 1, at.x0 + 1};
      } else {
        advance(layout, digits, at);
      }
    }
  }

  int64_t channel = 0, left = kItems;  // elements until the next channel
  if (bounds.channels > 1) {
    channel = first / bounds.channel_stride % bounds.channels;
    left = bounds.channel_stride - first % bounds.channel_stride;
  }
  ChannelBounds of = bounds_of(bounds, channel);
  Pack<X> outs;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const float centre = load(x0s.items[item]);
    const float y = stepped(load(xs.items[item]), load(grads.items[item]), centre, of.values[0],
                            of.values[1], of.values[2], of.values[3]);
    store(&outs.items[item], y, centre);
    if (--left == 0 && item + 1 < kItems) {
      left = bounds.channel_stride;
      if (++channel == bounds.channels) channel = 0;
      of = bounds_of(bounds, channel);
    }
  }
  // out is fresh memory, which is aligned
  if (whole) {
    *reinterpret_cast<Pack<X>*>(out + first) = outs;
  } else {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (first + item < size) out[first + item] = outs.items[item];
    }
  }
}

bool packed(const LinfStepArgs& args, const LinfLayout& layout) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return layout.sizes[3] == args.size && layout.x[3] == 1 && layout.grad[3] == 1 &&
         layout.x0[3] == 1 && aligned(args.x) && aligned(args.grad) && aligned(args.x0);
}

template <class X, class G>
cudaError_t launch(const LinfStepArgs& args,
                   const LinfLayout& layout,
                   const Bounds& bounds,
                   cudaStream_t stream) {
  constexpr int64_t kBlock = kThreads * kItems;
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned((args.size + kBlock - 1) / kBlock);
  config.blockDim = kThreads;
  config.stream = stream;
  const auto with = [&](auto* kernel) {
    return cudaLaunchKernelEx(&config, kernel, static_cast<const X*>(args.x),
                              static_cast<const G*>(args.grad), static_cast<const X*>(args.x0),
                              static_cast<X*>(args.out), args.size, layout, bounds);
  };
  return packed(args, layout) ? with(&linf_step_kernel<X, G, true>)
                              : with(&linf_step_kernel<X, G, false>);
}

template <class X>
cudaError_t launch_for_grad(const LinfStepArgs& args,
                            const LinfLayout& layout,
                            const Bounds& bounds,
                            cudaStream_t stream) {
  switch (args.grad_dtype) {
    case DType::fp32:
      return launch<X, float>(args, layout, bounds, stream);
    case DType::fp16:
      return launch<X, __half>(args, layout, bounds, stream);
    case DType::bf16:
      return launch<X, __nv_bfloat16>(args, layout, bounds, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_for_x(const LinfStepArgs& args,
                         const LinfLayout& layout,
                         const Bounds& bounds,
                         cudaStream_t stream) {
  switch (args.x_dtype) {
    case DType::fp32:
      return launch_for_grad<float>(args, layout, bounds, stream);
    case DType::fp16:
      return launch_for_grad<__half>(args, layout, bounds, stream);
    case DType::bf16:
      return launch_for_grad<__nv_bfloat16>(args, layout, bounds, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

void linf_step_cuda(const LinfStepArgs& args,
                    const LinfLayout& layout,
                    bool bounds_on_device,
                    void* stream) {
  if (args.size == 0) return;
  Bounds bounds{bounds_on_device ? args.bounds : nullptr, {}, args.channels, args.channel_stride};
  if (!bounds_on_device) {
    for (int row = 0; row < 4; ++row) {
      for (int64_t c = 0; c < args.channels; ++c) {
        bounds.values[row][c] = args.bounds[row * args.channels + c];
      }
    }
  }
  const cudaError_t error = launch_for_x(args, layout, bounds, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("linf_step: ") + cudaGetErrorString(error));
  }
}

}  // namespace clae_fast
