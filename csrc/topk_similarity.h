// The k largest cosine similarities of each anchor among the keys, without a matrix of them.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace clae_fast {

struct TopkSimilarityArgs {
  Rows anchor;             // [N, D]
  Rows keys;               // [M, D] of the same dtype, M < 2^32
  const int64_t* exclude;  // [N, E] columns that a row does not return
  int64_t N;
  int64_t M;
  int64_t D;
  int64_t E;
  int64_t k;  // at most M - E
  int threads;
  float* values;             // [N, k] the largest first
  int64_t* indices;          // [N, k] their columns
  unsigned char* workspace;  // [topk_similarity_workspace(...)] bytes, 64-byte aligned
};

// Bytes of scratch for arguments whose memory need not be there: O(N (D + k)).
int64_t topk_similarity_workspace(Isa isa, const TopkSimilarityArgs& args);

void topk_similarity(Isa isa, const TopkSimilarityArgs& args);

// For *_simd.cpp, which the standard library's inline functions must not be compiled in: moves the
// k largest of `count` numbers to the front, the last of them to their end.
void keep_largest(uint64_t* numbers, int64_t count, int64_t k);
void sort_descending(uint64_t* numbers, int64_t count);

}  // namespace clae_fast
