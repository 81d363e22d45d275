// InfoNCE of anchors against keys: loss, and the wanted gradients of the raw rows, in one call.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace clae_fast {

struct InfoNceArgs {
  Rows anchor;  // [N, D]
  Rows keys;    // [M, D] of the same dtype
  // [N] the key that is the positive of each anchor; null where that is key i, M >= N
  const int64_t* positive;
  // [N] what each row counts in the gradients; null where all count the same
  const float* weight;
  int64_t N;
  int64_t M;
  int64_t D;
  float temperature;
  bool symmetric;  // the mean of both directions; M = N, all rows' mean, no positive
  bool mean;       // of all rows, or their losses and the gradients of the sum
  int threads;
  float* loss;               // [1], or [N] where it is not the mean
  float* danchor;            // [N, D] contiguous, null where it is not wanted
  float* dkeys;              // [M, D] contiguous, null where it is not wanted
  unsigned char* workspace;  // [info_nce_workspace(args)] bytes, 64-byte aligned
};

// Bytes of scratch, for arguments without memory where a gradient is wanted if it is not null:
// O(N D), and O(M D) where keys have a gradient.
int64_t info_nce_workspace(Isa isa, const InfoNceArgs& args);

void info_nce(Isa isa, const InfoNceArgs& args);

}  // namespace clae_fast
