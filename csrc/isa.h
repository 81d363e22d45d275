// The instruction sets that *_simd.cpp is compiled for, and the choice of one at run time.
#pragma once

#include <string>
#include <vector>

namespace clae_fast {

enum class Isa { portable, neon, avx2, avx512, avx512_bf16 };

// Compiled in and supported by this processor, worst first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument when `name` is not one of supported_isas().
Isa parse_isa(const std::string& name);

}  // namespace clae_fast

// What every processor of this architecture runs.
#if defined(__aarch64__)
#define CLAE_FAST_BASELINE neon
#else
#define CLAE_FAST_BASELINE portable
#endif

// Declares a function once for every instruction set, in the namespace named after it.
#define CLAE_FAST_DECLARE(...)   \
  namespace CLAE_FAST_BASELINE { \
  __VA_ARGS__;                   \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__;                   \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__;                   \
  }                              \
  namespace avx512_bf16 {        \
  __VA_ARGS__;                   \
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
#ifdef CLAE_FAST_HAS_AVX512_BF16
#define CLAE_FAST_CASE_AVX512_BF16(...) \
  case Isa::avx512_bf16:                \
    return avx512_bf16::__VA_ARGS__;
#else
#define CLAE_FAST_CASE_AVX512_BF16(...)
#endif

// Returns the call, made in the namespace of `isa`.
#define CLAE_FAST_DISPATCH(isa, ...)          \
  switch (isa) {                              \
    CLAE_FAST_CASE_AVX512_BF16(__VA_ARGS__)   \
    CLAE_FAST_CASE_AVX512(__VA_ARGS__)        \
    CLAE_FAST_CASE_AVX2(__VA_ARGS__)          \
    default:                                  \
      return CLAE_FAST_BASELINE::__VA_ARGS__; \
  }
