// The instance softmax with a spreading term: loss, and gradient of the raw projections, in one
// call.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace clae_fast {

struct UelArgs {
  Rows z0;  // [N, D]
  Rows z1;  // [N, D], of the same dtype
  int64_t N;
  int64_t D;
  float temperature;
  int threads;
  float* loss;  // [1]
  float* dz;    // [2N, D] contiguous, d loss / d z0 above d loss / d z1; null for the loss alone
  unsigned char* workspace;  // [uel_workspace(...)] bytes, 64-byte aligned
};

// Bytes of scratch: O(N D), and a few rows of similarities for each thread.
int64_t uel_workspace(Isa isa, DType dtype, int64_t N, int64_t D, int threads, bool grad);

void uel(Isa isa, const UelArgs& args);

}  // namespace clae_fast
