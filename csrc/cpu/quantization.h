// Floats of each kind, and their quantization: of tensors, and of the tokens of a product.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "tile.h"

namespace w8a8::cpu::W8A8_LEVEL {

// Floats

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

struct Fp32 {
  using Storage = uint32_t;
  static constexpr uint32_t magnitude = 0x7fffffff;
  static float widen(Storage bits) { return as_float(bits); }
  static Storage narrow(float f) { return as_bits(f); }
};
struct Bf16 {
  using Storage = uint16_t;
  static constexpr uint16_t magnitude = 0x7fff;
  static float widen(Storage bits) { return as_float((uint32_t)bits << 16); }
  // Not VCVTNEPS2BF16, which flushes denormals.
  static Storage narrow(float f) {
    uint32_t bits = as_bits(f);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return f != f ? 0x7fc0 : rounded;
  }
};
struct Fp16 {
  using Storage = uint16_t;
  static constexpr uint16_t magnitude = 0x7fff;
  // Without branches, so that loops become vectors.
  static float widen(Storage bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    // The exponent's bias differs by 112; the product also normalizes denormals.
    const uint32_t finite = as_bits(as_float(rest << 13) * 0x1p112f);
    return as_float(sign | finite | (rest >= 0x7c00 ? 0x7f800000 : 0));
  }
  static Storage narrow(float f) {
    const uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    const uint32_t normal = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
    const uint32_t denormal = as_bits(as_float(rest) + 0.5f) - 0x3f000000;  // rounded to its last place, 2^-24
    const uint32_t special = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    return sign | (rest >= 0x477ff000 ? special : rest < 0x38800000 ? denormal : normal);
  }
};

template <class T>
void widen(const typename T::Storage* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T::widen(from[i]);
}
template <class T>
void narrow(const float* from, typename T::Storage* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T::narrow(from[i]);
}
#if defined(__F16C__)  // which compilers do not find by themselves
template <>
inline void widen<Fp16>(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; ++i) to[i] = Fp16::widen(from[i]);
}
template <>
inline void narrow<Fp16>(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) to[i] = Fp16::narrow(from[i]);
}
#endif

// Calls f with the type of a Float.
template <class F>
void with_float(Float dtype, const F& f) {
  switch (dtype) {
    case Float::fp32: return f(Fp32{});
    case Float::bf16: return f(Bf16{});
    case Float::fp16: return f(Fp16{});
  }
}

// Quantization

template <class T>
void quantize_row(const typename T::Storage* x, int64_t width, int8_t* codes, float* scale) {
  // The largest magnitude as bits: infinity's are above every number's, and those of NaN above infinity's.
  typename T::Storage top = 0;
  for (int64_t i = 0; i < width; ++i) top = std::max<typename T::Storage>(top, x[i] & T::magnitude);
  const float amax = T::widen(top), ratio = 127.0f / amax;
  const float inverse = ratio <= 3.4028235e38f ? ratio : 0.0f;  // 0 if that is infinite or NaN
  *scale = amax / 127.0f;
  // Adding kMagic rounds half to even and leaves the integer in the low bits. (-ffp-contract=off: the contract rounds
  // the product first.)
  for (int64_t i = 0; i < width; ++i) codes[i] = (int8_t)as_bits(T::widen(x[i]) * inverse + kMagic);
}

void quantize(const Quantize& q, const Parallel& parallel) {
  with_float(q.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* x = static_cast<const typename T::Storage*>(q.x);
    parallel(q.rows, 1 + 32768 / std::max<int64_t>(q.width, 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        quantize_row<T>(x + r * q.width, q.width, q.codes + r * q.width, q.scale + r);
    });
  });
}

// x / (1 + exp(-x)) by the steps that reference.silu explains.
inline float silu(float x) {
  const float low = 87.0f < x ? 87.0f : x;
  const float shifted = std::fma(low, -1.44269502162933349609375f, kMagic), n = shifted - kMagic;
  const float r = std::fma(n, 1.9046542121259336e-09f, std::fma(n, -0.693147182464599609375f, -low));
  float power = std::fma(0.0013814539415761828f, r, 0.00836874544620514f);
  power = std::fma(power, r, 0.04166838899254799f);
  power = std::fma(power, r, 0.1666652113199234f);
  power = std::fma(power, r, 0.4999999403953552f);
  power = std::fma(std::fma(power, r, 1.0f), r, 1.0f);
  const float exponential = as_float(as_bits(power) + (as_bits(shifted) << 23));
  return x * (1.0f / (1.0f + (x < -87.0f ? INFINITY : exponential)));
}

constexpr int64_t kChunk = 256;  // channels that stay in the L1 cache as floats

// silu(gate) * up of one token.
template <class T>
void silu_mul(const typename T::Storage* gate, int64_t channels, typename T::Storage* row) {
  const auto* up = gate + channels;
  for (int64_t i = 0; i < channels; i += kChunk) {
    const int64_t count = std::min(kChunk, channels - i);
    float left[kChunk], right[kChunk];
    widen<T>(gate + i, left, count), widen<T>(up + i, right, count);
    for (int64_t j = 0; j < count; ++j) left[j] = silu(left[j]);
    narrow<T>(left, row + i, count), widen<T>(row + i, left, count);
    for (int64_t j = 0; j < count; ++j) left[j] *= right[j];
    narrow<T>(left, row + i, count);
  }
}

void silu_mul_quantize(const SiluMul& q, const Parallel& parallel) {
  with_float(q.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* x = static_cast<const typename T::Storage*>(q.x);
    parallel(q.tokens, 1 + 4096 / std::max<int64_t>(q.channels, 1), [&](int64_t begin, int64_t end) {
      std::vector<typename T::Storage> row(q.channels);
      for (int64_t t = begin; t < end; ++t) {
        silu_mul<T>(x + t * 2 * q.channels, q.channels, row.data());
        for (int64_t i = 0; i < q.channels; i += q.width) {
          const int64_t at = t * q.channels + i;
          quantize_row<T>(row.data() + i, q.width, q.codes + at, q.scale + at / q.width);
        }
      }
    });
  });
}

// What quantizes tokens for a product, one after the other, on one thread.
struct Quantizer {
  const Unquantized& x;
  int64_t channels, width;  // of a token, and what shares a scale
  std::vector<int8_t> codes;
  std::unique_ptr<uint8_t[]> activated;

  Quantizer(const Gemm& g) : x(g.x), channels(g.groups * g.width), width(channels / g.a_groups) {
    if (x.x) codes.resize(channels);
    if (x.x && x.silu_mul) activated.reset(new uint8_t[channels * sizeof(float)]);
  }
  const int8_t* operator()(int64_t token, float* scale) {
    with_float(x.dtype, [&](auto type) {
      using T = decltype(type);
      using Storage = typename T::Storage;
      const auto* row = static_cast<const Storage*>(x.x) + token * channels * (1 + x.silu_mul);
      if (x.silu_mul) {
        auto* made = reinterpret_cast<Storage*>(activated.get());
        silu_mul<T>(row, channels, made), row = made;
      }
      for (int64_t i = 0; i < channels; i += width) quantize_row<T>(row + i, width, codes.data() + i, scale++);
    });
    return codes.data();
  }
};

}  // namespace w8a8::cpu::W8A8_LEVEL
