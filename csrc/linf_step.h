// One signed-gradient step, projected to the eps-ball around x0 and to [lo, hi]:
//
//     out = clip(clip(x + alpha sign(grad), x0 - eps, x0 + eps), lo, hi)
//
// in fp32, with the ball's bounds and the result rounded towards x0, so that |out - x0| <= eps
// holds exactly wherever x0 lies in [lo, hi]. sign(NaN) is 0; NaN in x or x0 stays NaN.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace clae_fast {

struct LinfStepArgs {
  const void* x;     // [size] of x_dtype
  const void* grad;  // [size] of grad_dtype
  const void* x0;    // [size] of x_dtype, x itself where the step starts at the centre
  void* out;         // [size] of x_dtype
  DType x_dtype;
  DType grad_dtype;
  int64_t size;
  const float* bounds;  // [4, channels]: alpha, eps, lo, hi
  // element i of out belongs to channel i / channel_stride % channels, true of every dense layout
  int64_t channels;
  int64_t channel_stride;
};

// Where element i of out lies in the operands: i is written in a mixed base of these sizes, the
// last digit fastest, and every digit multiplied by an operand's stride.
struct LinfLayout {
  int64_t sizes[4];
  int64_t x[4];
  int64_t grad[4];
  int64_t x0[4];
};

// All operands lie in memory as out does.
void linf_step_cpu(Isa isa, const LinfStepArgs& args, int threads);

// How many channels' bounds travel in a launch; those of more lie on the device.
constexpr int kLinfChannels = 4;

// Enqueues one kernel on `stream`, a cudaStream_t, of the current device. The bounds lie on the
// device or, of up to kLinfChannels channels, on the host. Throws std::runtime_error.
void linf_step_cuda(const LinfStepArgs& args,
                    const LinfLayout& layout,
                    bool bounds_on_device,
                    void* stream);

}  // namespace clae_fast
