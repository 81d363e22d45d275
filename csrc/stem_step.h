// The move of linf_step along the input gradient of an encoder's first convolution. That gradient
// is never stored:
//
//     out = clip(clip(x + alpha sign(dx), x - eps, x + eps), lo, hi)
//     dx[n, c, y, x] = sum over o, i, j, Y, X of weight[o, c, i, j] dy[n, o, Y, X]
//                      where y = stride Y - padding + i, x = stride X - padding + j
//
// The convolution has 3 input channels and either a kernel of 3, stride 1 and padding 1, or a
// kernel of 7, stride 2 and padding 3.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace clae_fast {

// Strides of [N, C, H, W], in elements.
struct StemStrides {
  int weight[4];
  int x[4];  // out has the same
};

struct StemStepArgs {
  const void* dy;      // [N, dy_H, dy_W, C] of dy_dtype, fp16 or bf16, aligned to 16 bytes
  const void* weight;  // [C, 3, size, size] of weight_dtype; the kernel rounds it to dy_dtype
  const void* x;       // [N, 3, H, W] of x_dtype, fp32 or fp16
  void* out;           // like x
  DType dy_dtype;
  DType weight_dtype;  // fp32 or dy_dtype
  DType x_dtype;
  int N;
  int C;  // 64, 128 or 192
  int H;
  int W;
  int size;  // of the convolution's kernel: 3 or 7
  StemStrides strides;
  const float* bounds;    // [4, 3]: alpha, eps, lo, hi of each channel
  bool bounds_on_device;  // otherwise they are on the host
  void* stream;           // a cudaStream_t of the current device
};

// Enqueues one kernel. Throws std::runtime_error.
void stem_step_cuda(const StemStepArgs& args);

}  // namespace clae_fast
