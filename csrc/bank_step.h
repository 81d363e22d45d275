// A step of a bank of learnable keys: gradient, velocity and update in one pass over it, in place.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace clae_fast {

struct BankStepArgs {
  float* bank;              // [K, D] contiguous
  float* velocity;          // [K, D] contiguous
  Rows anchor;              // [N, D]
  Rows keys;                // [N, D], key i the positive of anchor i, where `positive` is null
  const int64_t* positive;  // [N] the bank entry that is the positive of each anchor, or null
  const float* weight;      // [N] what each anchor counts, null for 1 / N
  const float* losses;      // [N] of the anchors, null where they are not known
  int64_t K;
  int64_t N;
  int64_t D;
  int64_t views;  // of anchors and keys; an anchor meets the keys of its own alone
  float temperature;
  float lr;
  float momentum;
  float weight_decay;
  int threads;
  unsigned char* workspace;  // [bank_step_workspace(args)] bytes, 64-byte aligned
};

// Bytes of scratch, for arguments without memory: O(N D).
int64_t bank_step_workspace(Isa isa, const BankStepArgs& args);

void bank_step(Isa isa, const BankStepArgs& args);

}  // namespace clae_fast
