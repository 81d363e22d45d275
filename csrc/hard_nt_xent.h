// NT-Xent with hard and debiased negatives: loss, and gradient of the raw projections, in one call.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace clae_fast {

struct HardNtXentArgs {
  Rows z0;  // [N, D]
  Rows z1;  // [N, D], of the same dtype
  int64_t N;
  int64_t D;
  float temperature;
  float beta;
  float tau_plus;
  bool detach_weights;
  int threads;
  float* loss;  // [1]
  float* dz;    // [2N, D] contiguous, d loss / d z0 above d loss / d z1; null for the loss alone
  unsigned char* workspace;  // [hard_nt_xent_workspace(...)] bytes, 64-byte aligned
};

// Bytes of scratch that the call takes: O(N D), never O(N^2).
int64_t hard_nt_xent_workspace(Isa isa, const HardNtXentArgs& args);

void hard_nt_xent(Isa isa, const HardNtXentArgs& args);

}  // namespace clae_fast
