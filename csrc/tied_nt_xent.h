// The gradient of NT-Xent where both views are the same rows.
#pragma once

#include "args.h"

namespace clae_fast {

struct TiedNtXentArgs : CpuArgs {
  Rows z;  // [N, D]
  int64_t N;
  int64_t D;
  float temperature;
  float* dz;  // [N, D] contiguous
};

// The workspace grows as O(N D), never O(N^2).
int64_t tied_nt_xent(const TiedNtXentArgs& args);

}  // namespace clae_fast
