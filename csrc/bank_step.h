// One optimizer step of a bank of learnable keys: gradient, velocity and update, in place.
#pragma once

#include "args.h"

namespace clae_fast {

struct BankStepArgs : CpuArgs {
  float* bank;              // [K, D] contiguous
  float* velocity;          // [K, D] contiguous
  Rows anchor;              // [N, D]
  Rows keys;                // [N, D]; if `positive` is null, key i is the positive of anchor i
  const int64_t* positive;  // [N] which entry of the bank is each anchor's positive, or null
  const float* weight;      // [N] what each anchor counts; null for 1 / N
  const float* losses;      // [N] the anchors' losses; null where they are not known yet
  int64_t K;
  int64_t N;
  int64_t D;
  int64_t views;  // anchors and keys are made of so many views; an anchor meets its own view's keys
  float temperature;
  float lr;
  float momentum;
  float weight_decay;
};

// The workspace grows as O(N D).
int64_t bank_step(const BankStepArgs& args);

}  // namespace clae_fast
