// The instance softmax with a spreading term: the loss, and its gradient by the raw projections.
#pragma once

#include "args.h"

namespace clae_fast {

// The workspace grows as O(N D), plus a few rows of similarities for each thread.
int64_t uel(const TwoViewsArgs& args);

}  // namespace clae_fast
