// The instruction sets that *_simd.cpp is compiled for, and the choice of one at run time.
#pragma once

#include <string>
#include <vector>

namespace clae_fast {

enum class Isa { portable, avx2, avx512 };

// Compiled in and supported by this processor, worst first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument when `name` is not one of supported_isas().
Isa parse_isa(const std::string& name);

}  // namespace clae_fast

// Declares a function once for every instruction set, in the namespace named after it.
#define CLAE_FAST_DECLARE(...) \
  namespace portable {         \
  __VA_ARGS__;                 \
  }                            \
  namespace avx2 {             \
  __VA_ARGS__;                 \
  }                            \
  namespace avx512 {           \
  __VA_ARGS__;                 \
  }

#ifdef CLAE_FAST_HAS_AVX2
#define CLAE_FAST_CASE_AVX2(...) \
  case Isa::avx2:                \
    return avx2::__VA_ARGS__;
#else
#define CLAE_FAST_CASE_AVX2(...)
#endif
#ifdef CLAE_FAST_HAS_AVX512
#define CLAE_FAST_CASE_AVX512(...) \
  case Isa::avx512:                \
    return avx512::__VA_ARGS__;
#else
#define CLAE_FAST_CASE_AVX512(...)
#endif

// Returns the call, made in the namespace of `isa`.
#define CLAE_FAST_DISPATCH(isa, ...)   \
  switch (isa) {                       \
    CLAE_FAST_CASE_AVX512(__VA_ARGS__) \
    CLAE_FAST_CASE_AVX2(__VA_ARGS__)   \
    default:                           \
      return portable::__VA_ARGS__;    \
  }
