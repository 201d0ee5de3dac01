// Arithmetic in single precision, each operation rounded once, and 16-bit floats.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(int(bits)); }
inline unsigned __float_as_uint(float value) { return unsigned(__float_as_int(value)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __int2float_rn(int value) { return float(value); }
inline int __float2int_rn(float value) {  // saturating, ties to even, NaN to 0
  if (value != value) return 0;
  if (value >= 2147483648.f) return INT_MAX;
  if (value <= -2147483648.f) return INT_MIN;
  return int(nearbyintf(value));
}

namespace ptx {

inline uint32_t pack_bf16(float low, float high) {
  auto round = [](float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
inline uint32_t pack_fp16(float low, float high) {
  auto round = [](float x) -> uint32_t {
    uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
    float size = fabsf(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;
    if (size < 6.103515625e-05f) return sign | uint32_t(nearbyintf(size * 16777216.f));  // subnormal
    uint32_t bits = __float_as_uint(size) - (112u << 23);
    return sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13);
  };
  return round(low) | round(high) << 16;
}
inline float unpack_fp16(uint16_t bits) {
  float size = (bits & 0x7c00) == 0x7c00 ? __uint_as_float(0x7f800000u | (bits & 0x3ffu) << 13)
                                         : __uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f;
  return bits & 0x8000 ? -size : size;
}

}  // namespace ptx
