#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

struct alignas(4) __half2 {
  __half x, y;
};

namespace cuda_emulator {

inline float decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(1024 + fraction), exponent - 25)
                          : std::ldexp(float(fraction), -24));
}

inline const std::vector<float> halves = [] {
  std::vector<float> values(1 << 16);
  for (int bits = 0; bits < 1 << 16; ++bits) values[bits] = decode_half(uint16_t(bits));
  return values;
}();

inline __half encode_half(float value, Rounding rounding) {
  const float result = rounded(value, 11, -14, 65504.f, rounding);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::abs(result);
  if (std::isnan(value)) return {0x7fff};
  if (std::isinf(result)) return {uint16_t(sign | 0x7c00)};
  if (size < std::ldexp(1.f, -14)) return {uint16_t(sign | int(std::ldexp(size, 24)))};
  const int exponent = std::ilogb(size);
  const int fraction = int(std::ldexp(size, 10 - exponent)) - 1024;
  return {uint16_t(sign | (exponent + 15) << 10 | fraction)};
}

}  // namespace cuda_emulator

inline float __half2float(__half value) { return cuda_emulator::halves[value.bits]; }

inline __half __float2half_rn(float value) {
  return cuda_emulator::encode_half(value, cuda_emulator::Rounding::nearest);
}
inline __half __float2half_rd(float value) {
  return cuda_emulator::encode_half(value, cuda_emulator::Rounding::down);
}
inline __half __float2half_ru(float value) {
  return cuda_emulator::encode_half(value, cuda_emulator::Rounding::up);
}
inline __half __float2half_rz(float value) {
  return cuda_emulator::encode_half(value, cuda_emulator::Rounding::zero);
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline float2 __half22float2(__half2 value) {
  return {__half2float(value.x), __half2float(value.y)};
}
