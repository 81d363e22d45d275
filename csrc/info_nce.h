// InfoNCE of anchors against keys: the loss, and the wanted gradients by the raw rows.
#pragma once

#include "args.h"

namespace clae_fast {

struct InfoNceArgs : CpuArgs {
  Rows anchor;              // [N, D]
  Rows keys;                // [M, D] of the same dtype
  const int64_t* positive;  // [N] which key is each anchor's positive; null for key i, with M >= N
  const float* weight;      // [N] what each row counts in the gradients; null for all the same
  int64_t N;
  int64_t M;
  int64_t D;
  float temperature;
  bool symmetric;  // average both directions; needs M = N, `mean`, and no `positive` or `weight`
  bool mean;       // average the rows; otherwise each row's loss, and the gradients of their sum
  float* loss;     // [1], or [N] without `mean`
  float* danchor;  // [N, D] contiguous, may be null
  float* dkeys;    // [M, D] contiguous, may be null
};

// The workspace grows as O(N D), and as O((N + M) D) where keys have a gradient.
int64_t info_nce(const InfoNceArgs& args);

}  // namespace clae_fast
