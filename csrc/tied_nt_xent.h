// The gradient of NT-Xent where both views are the same rows, in one call.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace clae_fast {

struct TiedNtXentArgs {
  Rows z;  // [N, D]
  int64_t N;
  int64_t D;
  float temperature;
  int threads;
  float* dz;                 // [N, D] contiguous
  unsigned char* workspace;  // [tied_nt_xent_workspace(...)] bytes, 64-byte aligned
};

// Bytes of scratch: O(N D), never O(N^2).
int64_t tied_nt_xent_workspace(Isa isa, DType dtype, int64_t N, int64_t D);

void tied_nt_xent(Isa isa, const TiedNtXentArgs& args);

}  // namespace clae_fast
