#include <algorithm>
#include <functional>

#include "topk_similarity.h"

namespace clae_fast {

CLAE_FAST_DECLARE(int64_t topk_similarity_workspace(const TopkSimilarityArgs& args))
CLAE_FAST_DECLARE(void topk_similarity(const TopkSimilarityArgs& args))

int64_t topk_similarity_workspace(Isa isa, const TopkSimilarityArgs& args) {
  CLAE_FAST_DISPATCH(isa, topk_similarity_workspace(args))
}

void topk_similarity(Isa isa, const TopkSimilarityArgs& args) {
  CLAE_FAST_DISPATCH(isa, topk_similarity(args))
}

void keep_largest(uint64_t* numbers, int64_t count, int64_t k) {
  std::nth_element(numbers, numbers + k - 1, numbers + count, std::greater<>());
}

void sort_descending(uint64_t* numbers, int64_t count) {
  std::sort(numbers, numbers + count, std::greater<>());
}

}  // namespace clae_fast
