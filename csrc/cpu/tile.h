// The inner product of each instruction-set level, chosen by the compiler's target macros.
//
// A tile multiplies a few tokens with a block of channels over a stretch of k: several whole groups, or part of one.
// Activations are signed, weights unsigned (offset by 128), so the int32 sums of a group carry 128 * sum(a) too much;
// the caller starts them at minus that.
#pragma once
#include <cstring>

#include "amx.h"
#include "kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace w8a8::cpu::W8A8_LEVEL {

struct TileArgs {
  const int8_t* a;  // [rows][groups * 4 * steps]
  const uint8_t* b;
  int64_t b_stride;       // bytes from one block of 16 channels to the next
  int64_t groups, steps;  // steps of four k in each; several groups only if they are narrow
  const int32_t* start;   // [groups][rows], the sums' first values, or null to go on with those in `sums`
  int64_t start_stride;
  int32_t* sums;         // [rows][kColumns], where the sums of an unfinished group stay
  float* out;            // [rows][kColumns] += sums * a_scale * b_scale group by group, or null: not finished
  const float* a_scale;  // [groups][rows] with these strides
  int64_t a_scale_group, a_scale_row;
  const float* b_scale;  // [groups][kColumns]
  int64_t b_scale_stride;
  const uint8_t* ahead[2];  // two runs of weights, one line a step, to prefetch meanwhile, or null
};

inline int32_t four(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// Dot<>: vectors for one token and one block of 16 channels.
#if defined(__AVX512VNNI__)
constexpr int kRows = 6, kBlocks = 4;
struct Dot {
  using Weights = __m512i;
  using Tokens = __m512i;
  using Sums = __m512i;
  static Weights weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Tokens tokens(const int8_t* p) { return _mm512_set1_epi32(four(p)); }
  static Sums set(int32_t v) { return _mm512_set1_epi32(v); }
  static Sums load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, Sums s) { _mm512_storeu_si512(p, s); }
  static void add(Sums& s, const Weights& w, const Tokens& t) { s = _mm512_dpbusd_epi32(s, w, t); }
};
#elif defined(__AVXVNNI__)
constexpr int kRows = 6, kBlocks = 1;
struct Dot {
  struct Weights { __m256i lo, hi; };
  using Tokens = __m256i;
  using Sums = Weights;
  static Weights weights(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
  }
  static Tokens tokens(const int8_t* p) { return _mm256_set1_epi32(four(p)); }
  static Sums set(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static Sums load(const int32_t* p) { return weights((const uint8_t*)p); }
  static void store(int32_t* p, const Sums& s) {
    _mm256_storeu_si256((__m256i*)p, s.lo);
    _mm256_storeu_si256((__m256i*)(p + 8), s.hi);
  }
  static void add(Sums& s, const Weights& w, const Tokens& t) {
    s.lo = _mm256_dpbusd_avx_epi32(s.lo, w.lo, t);
    s.hi = _mm256_dpbusd_avx_epi32(s.hi, w.hi, t);
  }
};
#elif defined(__AVX2__)
// VPMADDUBSW would saturate, so bytes are widened: each 32-bit sum holds k 0,1 or k 2,3 of one channel until store().
constexpr int kRows = 2, kBlocks = 1;
struct Dot {
  struct Weights { __m256i v[4]; };  // v[i]: channels 4 i .. 4 i + 3, as int16
  using Tokens = __m256i;
  using Sums = Weights;
  static Weights weights(const uint8_t* p) {
    Weights w;
    for (int i = 0; i < 4; ++i) w.v[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * i)));
    return w;
  }
  static Tokens tokens(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_set1_epi32(four(p))); }
  static Sums set(int32_t v) {  // in the even half of each pair
    __m256i pair = _mm256_set1_epi64x((uint32_t)v);
    return {{pair, pair, pair, pair}};
  }
  static Sums load(const int32_t* p) {
    Sums s;
    for (int i = 0; i < 4; ++i) s.v[i] = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)(p + 4 * i)));
    return s;
  }
  static void store(int32_t* p, const Sums& s) {
    for (int i = 0; i < 4; i += 2) {  // hadd works within 128-bit halves: put channels back in order
      __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(s.v[i], s.v[i + 1]), 0xd8);
      _mm256_storeu_si256((__m256i*)(p + 4 * i), sum);
    }
  }
  static void add(Sums& s, const Weights& w, const Tokens& t) {
    for (int i = 0; i < 4; ++i) s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(w.v[i], t));
  }
};
#else
constexpr int kRows = 4, kBlocks = 1;
struct Dot {
  using Weights = const uint8_t*;
  using Tokens = const int8_t*;
  struct Sums { uint32_t v[kLanes]; };  // wraps like the others; the final sums fit
  static Weights weights(const uint8_t* p) { return p; }
  static Tokens tokens(const int8_t* p) { return p; }
  static Sums set(int32_t v) {
    Sums s;
    for (uint32_t& x : s.v) x = v;
    return s;
  }
  static Sums load(const int32_t* p) {
    Sums s;
    std::memcpy(s.v, p, sizeof s.v);
    return s;
  }
  static void store(int32_t* p, const Sums& s) { std::memcpy(p, s.v, sizeof s.v); }
  static void add(Sums& s, Weights w, Tokens t) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int k = 0; k < kDepth; ++k) s.v[lane] += (uint32_t)(w[lane * kDepth + k] * t[k]);
  }
};
#endif

constexpr int kColumns = kBlocks * kLanes;

// Sums of a narrow group start at the bits of 1.5 * 2^23, and are then, reread as fp32, 1.5 * 2^23 + their value: to
// subtract that is cheaper than to convert. Narrow means |sum| < 2^22, which 255 products of at most 128 * 128 keep to.
constexpr int64_t kNarrow = 255;
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// out += float(sums) * a_scale * b_scale, rounding after each step as the reference does.
template <bool narrow>
void promote(const Dot::Sums& sums, float a_scale, const float* b_scale, float* out) {
#if defined(__AVX512F__)
  __m512 product = narrow ? _mm512_sub_ps(_mm512_castsi512_ps(sums), _mm512_set1_ps(kMagic)) : _mm512_cvtepi32_ps(sums);
  product = _mm512_mul_ps(_mm512_mul_ps(product, _mm512_set1_ps(a_scale)), _mm512_loadu_ps(b_scale));
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), product));
#else
  int32_t integers[kLanes];
  Dot::store(integers, sums);
  for (int i = 0; i < kLanes; ++i) {
    out[i] += (float)(narrow ? integers[i] - kMagicBits : integers[i]) * a_scale * b_scale[i];
  }
#endif
}

template <int rows, int blocks, class F>
inline __attribute__((always_inline)) void each(const F& f) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < blocks; ++v) f(r, v, r * kColumns + v * kLanes);
}

// sums += A B^T over t.steps steps.
template <int rows, int blocks, bool prefetch>
inline __attribute__((always_inline)) void multiply(const TileArgs& t, const int8_t* a, const uint8_t* b,
                                                    Dot::Sums (&sums)[rows][blocks]) {
  const int64_t a_stride = t.groups * t.steps * kDepth, done = b - t.b;
  for (int64_t k = 0; k < t.steps; ++k, a += kDepth, b += kLine) {
    if (prefetch) {
      __builtin_prefetch(t.ahead[0] + done + k * kLine);
      __builtin_prefetch(t.ahead[1] + done + k * kLine);
    }
    Dot::Weights w[blocks];
#pragma GCC unroll 4
    for (int v = 0; v < blocks; ++v) w[v] = Dot::weights(b + v * t.b_stride);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Dot::Tokens x = Dot::tokens(a + r * a_stride);
#pragma GCC unroll 4
      for (int v = 0; v < blocks; ++v) Dot::add(sums[r][v], w[v], x);
    }
  }
}

template <int rows, int blocks, bool narrow>
void dot_tile(const TileArgs& t) {
  Dot::Sums sums[rows][blocks];
  for (int64_t group = 0; group < t.groups; ++group) {
    const int32_t* start = t.start + group * t.start_stride;
    if (narrow || t.start)
      each<rows, blocks>([&](int r, int v, int) { sums[r][v] = Dot::set(start[r]); });
    else
      each<rows, blocks>([&](int r, int v, int at) { sums[r][v] = Dot::load(t.sums + at); });
    const int8_t* a = t.a + group * t.steps * kDepth;
    const uint8_t* b = t.b + group * t.steps * kLine;
    if (t.ahead[0])
      multiply<rows, blocks, true>(t, a, b, sums);
    else
      multiply<rows, blocks, false>(t, a, b, sums);
    const float *a_scale = t.a_scale + group * t.a_scale_group, *b_scale = t.b_scale + group * t.b_scale_stride;
    if (narrow || t.out)
      each<rows, blocks>([&](int r, int v, int at) {
        promote<narrow>(sums[r][v], a_scale[r * t.a_scale_row], b_scale + v * kLanes, t.out + at);
      });
    else
      each<rows, blocks>([&](int r, int v, int at) { Dot::store(t.sums + at, sums[r][v]); });
  }
}

#if W8A8_AMX
constexpr int64_t kAmxRows = 32, kAmxSteps = 16;  // one instruction takes 64 k

// dot_tile for 16 or 32 rows and groups of a multiple of 64.
template <bool narrow>
void amx_tile(int64_t rows, int64_t blocks, const TileArgs& t) {
  const int64_t a_stride = t.groups * t.steps * kDepth;
  for (int64_t group = 0; group < t.groups; ++group) {
    const int8_t* a = t.a + group * t.steps * kDepth;
    for (int64_t v = 0; v < blocks; v += 2) {
      const bool two = v + 1 < blocks, high = rows > 16;
      const uint8_t* b = t.b + v * t.b_stride + group * t.steps * kLine;
      int32_t* sums = t.sums + v * kLanes;
      if (narrow || t.start)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < (two ? 2 : 1) * kLanes; ++c)
            sums[r * kColumns + c] = t.start[group * t.start_stride + r];
      constexpr int64_t pitch = kColumns * 4, half = 16 * kColumns;
      W8A8_TILE_LOAD(0, sums, pitch);
      if (two) W8A8_TILE_LOAD(1, sums + kLanes, pitch);
      if (high) W8A8_TILE_LOAD(2, sums + half, pitch);
      if (high && two) W8A8_TILE_LOAD(3, sums + half + kLanes, pitch);
      for (int64_t k = 0; k < t.steps; k += kAmxSteps) {
        W8A8_TILE_LOAD(4, a + k * kDepth, a_stride);
        W8A8_TILE_LOAD(6, b + k * kLine, kLine);
        W8A8_TILE_DOT(0, 4, 6);
        if (two) {
          W8A8_TILE_LOAD(7, b + t.b_stride + k * kLine, kLine);
          W8A8_TILE_DOT(1, 4, 7);
        }
        if (high) {
          W8A8_TILE_LOAD(5, a + 16 * a_stride + k * kDepth, a_stride);
          W8A8_TILE_DOT(2, 5, 6);
          if (two) W8A8_TILE_DOT(3, 5, 7);
        }
      }
      W8A8_TILE_STORE(0, sums, pitch);
      if (two) W8A8_TILE_STORE(1, sums + kLanes, pitch);
      if (high) W8A8_TILE_STORE(2, sums + half, pitch);
      if (high && two) W8A8_TILE_STORE(3, sums + half + kLanes, pitch);
    }
    if (!narrow && !t.out) continue;
    const float *a_scale = t.a_scale + group * t.a_scale_group, *b_scale = t.b_scale + group * t.b_scale_stride;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < blocks; ++v) {
        const int64_t at = r * kColumns + v * kLanes;
        promote<narrow>(Dot::load(t.sums + at), a_scale[r * t.a_scale_row], b_scale + v * kLanes, t.out + at);
      }
  }
}
#endif

}  // namespace w8a8::cpu::W8A8_LEVEL
