// NT-Xent with hard and debiased negatives: the loss, and its gradient by the raw projections.
#pragma once

#include "args.h"

namespace clae_fast {

struct HardNtXentArgs : TwoViewsArgs {
  float beta;           // how much harder negatives count more; 0 for all the same
  float tau_plus;       // the share of false negatives
  bool detach_weights;  // whether the weights of the negatives are constants for the gradient
};

// The workspace grows as O(N D), never O(N^2).
int64_t hard_nt_xent(const HardNtXentArgs& args);

}  // namespace clae_fast
