// Conversions between fp32 and 16-bit numbers, written with integers so that the compiler can
// vectorize loops over them.
#pragma once

#include <cstdint>

#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {

CLAE_FAST_INLINE int32_t to_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

CLAE_FAST_INLINE float from_bits(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

CLAE_FAST_INLINE float load_bf16(uint16_t half) { return from_bits(int32_t(half) << 16); }

CLAE_FAST_INLINE float load_fp16(uint16_t half) {
  const int32_t magnitude = half & 0x7fff;
  const int32_t sign = (int32_t(half) & 0x8000) << 16;
  // the exponent of fp32 is 112 above that of fp16, and for inf and NaN 224 above
  const int32_t bias = magnitude >= 0x7c00 ? 224 << 23 : 112 << 23;
  const int32_t normal = (magnitude << 13) + bias;
  const int32_t subnormal = to_bits(float(magnitude) * 0x1p-24f);
  return from_bits((magnitude < 0x0400 ? subnormal : normal) | sign);
}

// The fp16 number nearest to `value`; of two that are as near, the even one.
CLAE_FAST_INLINE uint16_t nearest_fp16(float value) {
  const int32_t magnitude = to_bits(value) & 0x7fffffff;
  const int32_t sign = int32_t(uint32_t(to_bits(value)) >> 16) & 0x8000;
  // fp32 numbers in [1/2, 1) are as far apart as subnormal fp16 numbers
  const int32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  const int32_t normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  int32_t half = magnitude < 113 << 23 ? subnormal : normal;
  // a number that would round to 2^16 or more becomes infinite
  half = magnitude < 0x477ff000 ? half : 0x7c00;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return uint16_t(half | sign);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
