#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_check.cuh"
#include "linf_step.cuh"

namespace clae_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 8;  // elements of a thread, which are neighbors in out

// The elements of a thread. The alignment lets them be loaded and stored 16 bytes at a time.
template <class T>
struct alignas(16) Pack {
  T items[kItems];
};

struct Offsets {
  int64_t x;
  int64_t grad;
  int64_t x0;
};

// Finds the digits of element i of out, and where it lies in the operands.
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

// Goes on to the next element.
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

// With kPacked all operands have the memory layout of out, otherwise `layout` says where they lie.
template <class X, class G, bool kPacked>
__global__ void linf_step_kernel(const X* __restrict__ x,
                                 const G* __restrict__ grad,
                                 const X* __restrict__ x0,
                                 X* __restrict__ out,  // [size]
                                 int64_t size,
                                 LinfLayout layout,
                                 Bounds bounds,
                                 int64_t channel_stride) {
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

  int64_t channel = 0;
  int64_t left = kItems;  // elements before the next channel
  if (bounds.channels > 1) {
    channel = first / channel_stride % bounds.channels;
    left = channel_stride - first % channel_stride;
  }
  ChannelBounds of = bounds_of(bounds, channel);
  Pack<X> outs;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const float center = load(x0s.items[item]);
    const float y = stepped(load(xs.items[item]), load(grads.items[item]), center, of);
    store(&outs.items[item], y, center);
    if (--left == 0 && item + 1 < kItems) {
      left = channel_stride;
      if (++channel == bounds.channels) channel = 0;
      of = bounds_of(bounds, channel);
    }
  }
  // out was just allocated, so it is aligned
  if (whole) {
    *reinterpret_cast<Pack<X>*>(out + first) = outs;
  } else {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (first + item < size) out[first + item] = outs.items[item];
    }
  }
}

// Whether kPacked may be set: all operands have the memory layout of out, and are aligned.
bool packed(const LinfStepCudaArgs& args) {
  const LinfLayout& layout = args.layout;
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return layout.sizes[3] == args.size && layout.x[3] == 1 && layout.grad[3] == 1 &&
         layout.x0[3] == 1 && aligned(args.x) && aligned(args.grad) && aligned(args.x0);
}

template <class X, class G>
void launch(const LinfStepCudaArgs& args) {
  constexpr int64_t kBlock = kThreads * kItems;
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned((args.size + kBlock - 1) / kBlock);
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(args.stream);
  const Bounds bounds(args.bounds, args.bounds_on_device, args.channels);
  const auto kernel = packed(args) ? &linf_step_kernel<X, G, true> : &linf_step_kernel<X, G, false>;
  check("linf_step", cudaLaunchKernelEx(&config, kernel, static_cast<const X*>(args.x),
                                        static_cast<const G*>(args.grad),
                                        static_cast<const X*>(args.x0), static_cast<X*>(args.out),
                                        args.size, args.layout, bounds, args.channel_stride));
}

}  // namespace

void linf_step_cuda(const LinfStepCudaArgs& args) {
  if (args.size == 0) return;
  with_type(args.x_dtype, [&](auto x) {
    with_type(args.grad_dtype, [&](auto grad) { launch<decltype(x), decltype(grad)>(args); });
  });
}

}  // namespace clae_fast
