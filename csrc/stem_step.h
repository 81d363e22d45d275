// The step of linf_step along the input gradient of an encoder's first convolution, which is not
// stored:
//
//     out = clip(clip(x + alpha sign(dx), x - eps, x + eps), lo, hi)
//     dx[n, c, y, x] = sum over o, i, j, Y, X of weight[o, c, i, j] dy[n, o, Y, X]
//                      where y = stride Y - padding + i, x = stride X - padding + j
//
// with 3 input channels, a kernel of 3 and stride and padding 1, or of 7, stride 2 and padding 3.
#pragma once

#include <cstdint>

#include "linf_step.h"

namespace clae_fast {

// In elements, of [N, C, H, W].
struct StemStrides {
  int weight[4];
  int x[4];  // of out too
};

struct StemStepArgs {
  const void* dy;      // [N, dy_H, dy_W, C] of dy_dtype, fp16 or bf16, on 16-byte boundaries
  const void* weight;  // [C, 3, size, size] of weight_dtype, rounded to dy_dtype on the way
  const void* x;       // [N, 3, H, W] of x_dtype, fp32 or fp16
  void* out;           // as x
  DType dy_dtype;
  DType weight_dtype;  // fp32 or dy_dtype
  DType x_dtype;
  int N;
  int C;  // 64, 128 or 192
  int H;
  int W;
  int size;  // of the kernel, 3 or 7
  StemStrides strides;
  const float* bounds;  // [4, 3]: alpha, eps, lo, hi of each channel
};

// Enqueues one kernel on `stream`, a cudaStream_t, of the current device. The bounds lie on the
// device or on the host. Throws std::runtime_error.
void stem_step_cuda(const StemStepArgs& args, bool bounds_on_device, void* stream);

}  // namespace clae_fast
