// The inner product of each instruction-set level, chosen by the compiler's target macros.
//
// A tile multiplies a few tokens with a block of channels over a stretch of k: several whole groups, or part of one.
// Activations are signed, weights unsigned (offset by 128), so the int32 sums of a group carry 128 * sum(a) too much;
// the caller starts them at minus that.
#pragma once
#include <cstring>

#include "amx.h"
#include "fourbits.h"
#include "kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace w8a8::cpu::W8A8_LEVEL {

// A tile has up to kRows tokens and as many of its task's blocks as there are registers for, kBlocks at most. A line is
// 32 bits for each channel of a block: four bytes of weights, or a sum.
#if defined(__AVX512F__)
constexpr int kRows = 6, kBlocks = 4;
constexpr int64_t tile_blocks(int64_t) { return kBlocks; }
struct Line { __m512i v; };
inline Line load(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store(void* p, Line x) { _mm512_storeu_si512(p, x.v); }
inline Line same(int32_t v) { return {_mm512_set1_epi32(v)}; }
#elif defined(__AVX2__)
constexpr int kRows = 6, kBlocks = 4;
constexpr int64_t tile_blocks(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
struct Line { __m256i lo, hi; };
inline Line load(const void* p) {
  const auto* half = (const __m256i*)p;
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
inline void store(void* p, Line x) {
  auto* half = (__m256i*)p;
  _mm256_storeu_si256(half, x.lo), _mm256_storeu_si256(half + 1, x.hi);
}
inline Line same(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
#else
constexpr int kRows = 4, kBlocks = 1;
constexpr int64_t tile_blocks(int64_t) { return kBlocks; }
struct Line { uint32_t v[kLanes]; };  // wraps like the others; the final sums fit
inline Line load(const void* p) {
  Line x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
inline void store(void* p, const Line& x) { std::memcpy(p, x.v, sizeof x.v); }
inline Line same(int32_t v) {
  Line x;
  for (uint32_t& lane : x.v) lane = v;
  return x;
}
#endif

inline int32_t four_bytes(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// Dot: four products for each channel, in `parts`. keep() puts four codes of a token where tokens() finds them.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Dot {
  using Code = int8_t;
  static constexpr int parts = 1;
  static void keep(const int8_t* four, Code* to) { std::memcpy(to, four, 4); }
  static Line weights(const uint8_t* p, int) { return load(p); }
  static Line tokens(const Code* p, int) { return same(four_bytes(p)); }
#if defined(__AVX512VNNI__)
  static void add(Line& s, Line w, Line t) { s.v = _mm512_dpbusd_epi32(s.v, w.v, t.v); }
#else
  static void add(Line& s, Line w, Line t) {
    s.lo = _mm256_dpbusd_avx_epi32(s.lo, w.lo, t.lo);
    s.hi = _mm256_dpbusd_avx_epi32(s.hi, w.hi, t.hi);
  }
#endif
};
#elif defined(__AVX2__)
// VPMADDUBSW would saturate, so products are of 16 bits: of the bytes with even k, and then of those with odd k. In
// assembly, because compilers reorder the sums so that there are not enough registers for them.
struct Dot {
  using Code = int16_t;
  static constexpr int parts = 2;
  static void keep(const int8_t* four, Code* to) {  // as k 0, 2, 1, 3
    const __m128i wide = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(four_bytes(four)));
    _mm_storel_epi64((__m128i*)to, _mm_shufflelo_epi16(wide, 0xd8));
  }
#if defined(__AVX512F__)
  static __m512i tokens(const Code* p, int part) { return same(four_bytes(p + 2 * part)).v; }
  static Line weights(const uint8_t* p, int part) {
    const __m512i w = load(p).v;
    return {part ? _mm512_srli_epi16(w, 8) : _mm512_and_si512(w, _mm512_set1_epi16(0xff))};
  }
  static void add(Line& s, Line w, __m512i t) {
    __m512i sum = s.v, product;
    asm("vpmaddwd %2, %3, %1; vpaddd %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(w.v), "v"(t));
    s.v = sum;
  }
#else
  static __m256i tokens(const Code* p, int part) { return same(four_bytes(p + 2 * part)).lo; }
  static Line weights(const uint8_t* p, int part) {
    static constexpr __m256i even = {0xff00ff00ff00ff, 0xff00ff00ff00ff, 0xff00ff00ff00ff, 0xff00ff00ff00ff};
    __m256i lo = load(p).lo, hi = load(p).hi;
    if (part) return {_mm256_srli_epi16(lo, 8), _mm256_srli_epi16(hi, 8)};
    asm("vpand %2, %0, %0; vpand %2, %1, %1" : "+x"(lo), "+x"(hi) : "m"(even));
    return {lo, hi};
  }
  static void add(Line& s, Line w, __m256i t) {
    __m256i lo = s.lo, hi = s.hi, product;
    asm("vpmaddwd %4, %2, %3; vpmaddwd %5, %2, %2; vpaddd %3, %0, %0; vpaddd %2, %1, %1"
        : "+x"(lo), "+x"(hi), "+x"(t), "=&x"(product)
        : "x"(w.lo), "x"(w.hi));
    s = {lo, hi};
  }
#endif
};
#else
struct Dot {
  using Code = int8_t;
  static constexpr int parts = 1;
  static void keep(const int8_t* four, Code* to) { std::memcpy(to, four, 4); }
  static const uint8_t* weights(const uint8_t* p, int) { return p; }
  static const Code* tokens(const Code* p, int) { return p; }
  static void add(Line& s, const uint8_t* w, const Code* t) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int k = 0; k < kDepth; ++k) s.v[lane] += (uint32_t)(w[lane * kDepth + k] * t[k]);
  }
};
#endif

struct TileArgs {
  const Dot::Code* a;  // [rows][groups * 4 * steps]
  const uint8_t* b;
  int64_t b_stride;        // bytes from one block of 16 channels to the next
  const uint8_t* m_and_o;  // where b has four bits: its Steps, from one block to the next with m_and_o_stride
  int64_t m_and_o_stride, m_and_o_width;
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
  bool ahead_four;          // bits: half a line a step
};

constexpr int kTaskBlocks = 2 * kBlocks, kColumns = kTaskBlocks * kLanes;

// Sums of a narrow group start at the bits of 1.5 * 2^23, and are then, reread as fp32, 1.5 * 2^23 + their value: to
// subtract that is cheaper than to convert. Narrow means |sum| < 2^22, which 255 products of at most 128 * 128 keep to.
constexpr int64_t kNarrow = 255;
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// What a tile is made for: any groups, narrow ones, or weights of four bits.
enum Kind { kAny, kNarrowGroups, kFourBits };

// out += float(sums) * a_scale * b_scale, rounding after each step as the reference does.
template <bool narrow>
void promote(const Line& sums, float a_scale, const float* b_scale, float* out) {
#if defined(__AVX512F__)
  __m512 product =
      narrow ? _mm512_sub_ps(_mm512_castsi512_ps(sums.v), _mm512_set1_ps(kMagic)) : _mm512_cvtepi32_ps(sums.v);
  product = _mm512_mul_ps(_mm512_mul_ps(product, _mm512_set1_ps(a_scale)), _mm512_loadu_ps(b_scale));
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), product));
#elif defined(__AVX2__)
  const __m256i halves[] = {sums.lo, sums.hi};
  for (int i = 0; i < 2; ++i, b_scale += 8, out += 8) {
    __m256 product =
        narrow ? _mm256_sub_ps(_mm256_castsi256_ps(halves[i]), _mm256_set1_ps(kMagic)) : _mm256_cvtepi32_ps(halves[i]);
    product = _mm256_mul_ps(_mm256_mul_ps(product, _mm256_set1_ps(a_scale)), _mm256_loadu_ps(b_scale));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), product));
  }
#else
  int32_t integers[kLanes];
  store(integers, sums);
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
inline __attribute__((always_inline)) void multiply(const TileArgs& t, const Dot::Code* a, const uint8_t* b,
                                                    Line (&sums)[rows][blocks]) {
  const int64_t a_stride = t.groups * t.steps * kDepth, done = b - t.b;
  for (int64_t k = 0; k < t.steps; ++k, a += kDepth, b += kLine) {
    if (prefetch) {
      const int64_t at = (done + k * kLine) >> t.ahead_four;
      __builtin_prefetch(t.ahead[0] + at);
      __builtin_prefetch(t.ahead[1] + at);
    }
#pragma GCC unroll 2
    for (int part = 0; part < Dot::parts; ++part) {
      decltype(Dot::weights(b, part)) w[blocks];
#pragma GCC unroll 4
      for (int v = 0; v < blocks; ++v) w[v] = Dot::weights(b + v * t.b_stride, part);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const auto x = Dot::tokens(a + r * a_stride, part);
#pragma GCC unroll 4
        for (int v = 0; v < blocks; ++v) Dot::add(sums[r][v], w[v], x);
      }
    }
  }
}

// The same where b has four bits: block by block, for the registers. How far to prefetch is measured; the processor by
// itself is late, as each line keeps it busy for longer.
template <int rows, int blocks>
inline __attribute__((always_inline)) void multiply_four(const TileArgs& t, Line (&sums)[rows][blocks]) {
  const int64_t a_stride = t.steps * kDepth;
  const Dot::Code* a = t.a;
  const uint8_t *b = t.b, *m_and_o = t.m_and_o;
  for (int64_t k = 0; k < t.steps * kDepth; k += t.m_and_o_width, m_and_o += 2 * kLanes) {
    Steps steps[blocks];
#pragma GCC unroll 4
    for (int v = 0; v < blocks; ++v) {
      __builtin_prefetch(m_and_o + v * t.m_and_o_stride + 2 * kLine);
      steps[v].load(m_and_o + v * t.m_and_o_stride);
    }
    for (int64_t i = 0; i < t.m_and_o_width; i += 2 * kDepth, a += 2 * kDepth, b += kLine) {
#pragma GCC unroll 4
      for (int v = 0; v < blocks; ++v) {
        alignas(64) uint8_t unpacked[2 * kLine];
        __builtin_prefetch(b + v * t.b_stride + 6 * kLine);
        steps[v].unpack(b + v * t.b_stride, unpacked);
#pragma GCC unroll 4
        for (int part = 0; part < 2 * Dot::parts; ++part) {
          const int half = part / Dot::parts;
          const auto w = Dot::weights(unpacked + half * kLine, part % Dot::parts);
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r)
            Dot::add(sums[r][v], w, Dot::tokens(a + r * a_stride + half * kDepth, part % Dot::parts));
        }
      }
    }
  }
}

template <int rows, int blocks, Kind kind>
void dot_tile(const TileArgs& t) {
  constexpr bool narrow = kind == kNarrowGroups;
  Line sums[rows][blocks];
  for (int64_t group = 0; group < t.groups; ++group) {
    const int32_t* start = t.start + group * t.start_stride;
    if (narrow || t.start)
      each<rows, blocks>([&](int r, int v, int) { sums[r][v] = same(start[r]); });
    else
      each<rows, blocks>([&](int r, int v, int at) { sums[r][v] = load(t.sums + at); });
    const Dot::Code* a = t.a + group * t.steps * kDepth;
    const uint8_t* b = t.b + group * t.steps * kLine;
    if constexpr (kind == kFourBits)
      multiply_four<rows, blocks>(t, sums);
    else if (t.ahead[0])
      multiply<rows, blocks, true>(t, a, b, sums);
    else
      multiply<rows, blocks, false>(t, a, b, sums);
    const float *a_scale = t.a_scale + group * t.a_scale_group, *b_scale = t.b_scale + group * t.b_scale_stride;
    if (narrow || t.out)
      each<rows, blocks>([&](int r, int v, int at) {
        promote<narrow>(sums[r][v], a_scale[r * t.a_scale_row], b_scale + v * kLanes, t.out + at);
      });
    else
      each<rows, blocks>([&](int r, int v, int at) { store(t.sums + at, sums[r][v]); });
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
        promote<narrow>(load(t.sums + at), a_scale[r * t.a_scale_row], b_scale + v * kLanes, t.out + at);
      }
  }
}
#endif

}  // namespace w8a8::cpu::W8A8_LEVEL
