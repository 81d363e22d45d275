#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync(int line = __builtin_LINE()) const { cuda_emulator::meet_grid("grid.sync", line); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
