#include "isa.h"

#include <algorithm>
#include <stdexcept>

namespace clae_fast {

std::vector<std::string> supported_isas() {
  std::vector<std::string> isas{"portable"};
#ifdef CLAE_FAST_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.emplace_back("avx2");
#endif
#ifdef CLAE_FAST_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    isas.emplace_back("avx512");
  }
#endif
  return isas;
}

Isa parse_isa(const std::string& name) {
  const auto isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), name) == isas.end()) {
    throw std::invalid_argument("isa must be one that this processor and build support, got " +
                                name);
  }
  if (name == "avx512") return Isa::avx512;
  return name == "avx2" ? Isa::avx2 : Isa::portable;
}

}  // namespace clae_fast
