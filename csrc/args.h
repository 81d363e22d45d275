// Arguments that several ops share.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace clae_fast {

// What every op of *_simd.cpp is given besides its own operands.
//
// An op that needs scratch memory is called twice. The first time its workspace is null: the op
// computes nothing and returns how many bytes it needs. The second time it has that memory: the op
// runs and returns 0. A pointer to an output is null where the output is not wanted.
struct CpuArgs {
  Isa isa;
  int threads;               // the most threads that the op may use
  unsigned char* workspace;  // aligned to 64 bytes
};

// A matrix whose rows are each contiguous and begin `stride` elements apart.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;
};

// The operands of the losses that compare two views of a batch: nt_xent, hard_nt_xent and uel.
struct TwoViewsArgs : CpuArgs {
  Rows z0;  // [N, D]
  Rows z1;  // [N, D], of the same dtype
  int64_t N;
  int64_t D;
  float temperature;
  float* loss;  // [1]
  float* dz;    // [2N, D] contiguous, d loss / d z0 above d loss / d z1; may be null
};

}  // namespace clae_fast
