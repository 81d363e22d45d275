// NT-Xent: the loss, and its gradient by the raw projections.
#pragma once

#include "args.h"

namespace clae_fast {

// The workspace grows as O(N D), never O(N^2).
int64_t nt_xent(const TwoViewsArgs& args);

struct NtXentCudaArgs {
  const void* z0;  // [N, D] of dtype
  const void* z1;  // [N, D] of dtype
  DType dtype;
  int64_t row_stride0;  // strides count elements
  int64_t column_stride0;
  int64_t row_stride1;
  int64_t column_stride1;
  int64_t N;
  int64_t D;
  float temperature;
  float* loss;               // [1]
  float* dz;                 // as in TwoViewsArgs
  unsigned char* workspace;  // aligned to 16 bytes, O(N D)
  void* stream;              // a cudaStream_t of the current device
};

// Enqueues one cooperative kernel, for sizes that nt_xent_cuda_takes() of clae_fast/_native.py
// accepts. Without a workspace it returns the bytes that it needs, as CPU ops do. Throws
// std::runtime_error.
int64_t nt_xent_cuda(const NtXentCudaArgs& args);

}  // namespace clae_fast
