// Vectors of the instruction set that a *_simd.cpp is compiled for, in the compiler's vector
// extension.
//
// The linker keeps one copy of an inline function. If copies for several instruction sets had the
// same name, it could keep one that this processor cannot run. So everything here and in *_simd.cpp
// has internal linkage or lives in the namespace of its instruction set, and nothing there calls an
// inline function of the standard library.
#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define CLAE_FAST_INLINE inline __attribute__((always_inline))

namespace clae_fast {
namespace CLAE_FAST_ISA {

// Tests set CLAE_FAST_WIDTH and CLAE_FAST_DOT_BF16, and so run on any processor the code that
// another instruction set would run.
#if defined(CLAE_FAST_WIDTH)
constexpr int kWidth = CLAE_FAST_WIDTH;
#elif defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

typedef float Vec __attribute__((vector_size(kWidth * 4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kWidth * 4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(kWidth * 4), may_alias));

CLAE_FAST_INLINE Vec splat(float x) { return x - Vec{}; }
CLAE_FAST_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
CLAE_FAST_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

#if defined(__AVX512BF16__) || defined(CLAE_FAST_DOT_BF16)
constexpr bool kDotBf16 = true;
#else
constexpr bool kDotBf16 = false;
#endif

// A lane holds two bf16 numbers; adds both of their products to the lane of acc.
CLAE_FAST_INLINE Vec dot_bf16(Vec acc, IVec a, IVec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const int32_t upper = int32_t(0xffff0000);
  acc += (Vec)(a << 16) * (Vec)(b << 16);
  return acc + (Vec)(a & upper) * (Vec)(b & upper);
#endif
}

CLAE_FAST_INLINE Vec maximum(Vec a, Vec b) { return a < b ? b : a; }
CLAE_FAST_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }

// Whether a bit is set in any lane.
CLAE_FAST_INLINE bool any(IVec v) {
  typedef int64_t Pairs __attribute__((vector_size(kWidth * 4)));
  int64_t bits = 0;
  for (int l = 0; l < kWidth / 2; ++l) bits |= ((Pairs)v)[l];
  return bits != 0;
}

// The largest lane.
CLAE_FAST_INLINE float horizontal_maximum(Vec v) {
  float largest = v[0];
  for (int l = 1; l < kWidth; ++l) largest = largest < v[l] ? v[l] : largest;
  return largest;
}

CLAE_FAST_INLINE float horizontal_sum(Vec v) {
  float sum = 0.f;
  for (int l = 0; l < kWidth; ++l) sum += v[l];
  return sum;
}

// 2^y for y <= 127 with a relative error of 1e-7. With `flush` it is exactly 0 below -126. NaN
// stays NaN.
template <bool flush>
CLAE_FAST_INLINE Vec exp2(Vec y) {
  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const Vec magic = splat(12582912.f);
  const Vec clamped = y < splat(-126.f) ? splat(-126.f) : y;
  const Vec shifted = clamped + magic;
  const Vec f = clamped - (shifted - magic);  // [-0.5, 0.5]
  Vec p = 1.534581097e-04f * f + 1.339993090e-03f;
  p = p * f + 9.618489072e-03f;
  p = p * f + 5.550328642e-02f;
  p = p * f + 2.402264625e-01f;
  p = p * f + 6.931471825e-01f;
  p = p * f + 1.000000000e+00f;
  // unsigned, because lanes that the caller will mask may be out of range and wrap around
  const Vec result = (Vec)((UVec)p + ((UVec)shifted << 23));
  return flush ? (y < splat(-126.f) ? Vec{} : result) : result;
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
