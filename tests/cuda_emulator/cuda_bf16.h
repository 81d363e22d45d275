#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace cuda_emulator {

inline __nv_bfloat16 encode_bfloat16(float value, Rounding rounding) {
  if (std::isnan(value)) return {0x7fff};
  const float largest = __uint_as_float(0x7f7f0000);
  const float result = rounded(value, 8, -126, largest, rounding);
  return {uint16_t(__float_as_uint(result) >> 16)};
}

}  // namespace cuda_emulator

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(unsigned(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return cuda_emulator::encode_bfloat16(value, cuda_emulator::Rounding::nearest);
}
inline __nv_bfloat16 __float2bfloat16_rd(float value) {
  return cuda_emulator::encode_bfloat16(value, cuda_emulator::Rounding::down);
}
inline __nv_bfloat16 __float2bfloat16_ru(float value) {
  return cuda_emulator::encode_bfloat16(value, cuda_emulator::Rounding::up);
}
inline __nv_bfloat16 __float2bfloat16_rz(float value) {
  return cuda_emulator::encode_bfloat16(value, cuda_emulator::Rounding::zero);
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}
