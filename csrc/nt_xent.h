// NT-Xent on the CPU: loss, and gradient of the raw projections, in one call.
#pragma once

#include <cstdint>

#include "isa.h"

namespace clae_fast {

struct NtXentArgs {
  const float* z0;  // [N, D], rows stride0 apart
  const float* z1;  // [N, D], rows stride1 apart
  int64_t stride0;
  int64_t stride1;
  int64_t N;
  int64_t D;
  float temperature;
  int threads;
  float* loss;  // [1]
  float* dz;    // [2N, D] contiguous, d loss / d z0 above d loss / d z1; null for the loss alone
  unsigned char* workspace;  // [nt_xent_workspace(...)] bytes, 64-byte aligned
};

// Bytes of scratch: O(N D), never O(N^2).
int64_t nt_xent_workspace(Isa isa, int64_t N, int64_t D, bool grad);

void nt_xent(Isa isa, const NtXentArgs& args);

}  // namespace clae_fast
