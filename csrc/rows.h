#pragma once

#include <cstdint>

#include "dtype.h"

namespace clae_fast {

// A matrix whose rows lie `stride` elements apart, each in one piece.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;
};

}  // namespace clae_fast
