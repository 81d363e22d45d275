// NT-Xent: loss, and gradient of the raw projections, in one call.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace clae_fast {

struct NtXentArgs {
  Rows z0;  // [N, D]
  Rows z1;  // [N, D], of the same dtype
  int64_t N;
  int64_t D;
  float temperature;
  int threads;
  float* loss;  // [1]
  float* dz;    // [2N, D] contiguous, d loss / d z0 above d loss / d z1; null for the loss alone
  unsigned char* workspace;  // [nt_xent_workspace(...)] bytes, 64-byte aligned
};

// Bytes of scratch: O(N D), never O(N^2).
int64_t nt_xent_workspace(Isa isa, DType dtype, int64_t N, int64_t D, bool grad);

void nt_xent(Isa isa, const NtXentArgs& args);

struct NtXentCudaArgs {
  const void* z0;  // [N, D] of dtype
  const void* z1;  // [N, D] of dtype
  DType dtype;
  int64_t row_stride0;  // in elements
  int64_t column_stride0;
  int64_t row_stride1;
  int64_t column_stride1;
  int64_t N;
  int64_t D;
  float temperature;
  float* loss;  // [1]
  float* dz;    // [2N, D] contiguous, d loss / d z0 above d loss / d z1; null for the loss alone
  unsigned char* workspace;  // [nt_xent_cuda_workspace(...)] bytes, 16-byte aligned
};

// Bytes of scratch on the current device, O(N D).
int64_t nt_xent_cuda_workspace(int64_t N, int64_t D, bool grad);

// Enqueues one cooperative kernel on `stream`, a cudaStream_t, of the current device, for sizes
// that nt_xent_cuda_takes() of clae_fast/_native.py accepts. Throws std::runtime_error.
void nt_xent_cuda(const NtXentCudaArgs& args, void* stream);

}  // namespace clae_fast
