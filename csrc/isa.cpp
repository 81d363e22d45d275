#include "isa.h"

#include <stdexcept>

namespace clae_fast {
namespace {

struct Named {
  const char* name;
  Isa isa;
};

// What this build has and this processor can run, worst first.
std::vector<Named> supported() {
#if defined(__aarch64__)
  return {{"neon", Isa::neon}};
#else
  std::vector<Named> isas{{"portable", Isa::portable}};
#ifdef CLAE_FAST_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back({"avx2", Isa::avx2});
  }
#endif
  [[maybe_unused]] const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#ifdef CLAE_FAST_HAS_AVX512
  if (avx512) isas.push_back({"avx512", Isa::avx512});
#endif
#ifdef CLAE_FAST_HAS_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    isas.push_back({"avx512_bf16", Isa::avx512_bf16});
  }
#endif
  return isas;
#endif
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Named& each : supported()) names.emplace_back(each.name);
  return names;
}

Isa parse_isa(const std::string& name) {
  for (const Named& each : supported()) {
    if (name == each.name) return each.isa;
  }
  throw std::invalid_argument("isa must be one that this processor and build support, got " + name);
}

}  // namespace clae_fast
