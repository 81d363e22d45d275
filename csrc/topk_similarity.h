// The k largest cosine similarities of each anchor among the keys, without a matrix of them all.
#pragma once

#include "args.h"

namespace clae_fast {

struct TopkSimilarityArgs : CpuArgs {
  Rows anchor;             // [N, D]
  Rows keys;               // [M, D] of the same dtype, M < 2^32
  const int64_t* exclude;  // [N, E] columns that a row must not return
  int64_t N;
  int64_t M;
  int64_t D;
  int64_t E;
  int64_t k;         // at most M - E
  float* values;     // [N, k] the largest first
  int64_t* indices;  // [N, k] their columns
};

// The workspace grows as O(N (D + k)).
int64_t topk_similarity(const TopkSimilarityArgs& args);

// Moves the k largest of `count` numbers to the front, the smallest of them to place k - 1. This
// and the next function are apart from topk_similarity_simd.cpp, because inline functions of the
// standard library must not be compiled there (simd.h says why).
void keep_largest(uint64_t* numbers, int64_t count, int64_t k);
void sort_descending(uint64_t* numbers, int64_t count);

}  // namespace clae_fast
