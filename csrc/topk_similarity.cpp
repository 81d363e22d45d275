#include "topk_similarity.h"

#include <algorithm>
#include <functional>

namespace clae_fast {

void keep_largest(uint64_t* numbers, int64_t count, int64_t k) {
  std::nth_element(numbers, numbers + k - 1, numbers + count, std::greater<>());
}

void sort_descending(uint64_t* numbers, int64_t count) {
  std::sort(numbers, numbers + count, std::greater<>());
}

}  // namespace clae_fast
