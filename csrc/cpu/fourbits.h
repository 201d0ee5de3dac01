// Weights of four bits as packed weights. In the compiler's own vectors, which are the same code at every level.
#pragma once
#include <cstring>

#include "kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace w8a8::cpu::W8A8_LEVEL {

// A line in vectors. widen() gives each of the first bytes 32 bits; compilers would take them one by one.
#if defined(__AVX512F__)
constexpr int kVector = 64;
using Lanes = uint32_t __attribute__((vector_size(kVector)));
inline Lanes widen(const uint8_t* p) { return (Lanes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#elif defined(__AVX2__)
constexpr int kVector = 32;
using Lanes = uint32_t __attribute__((vector_size(kVector)));
inline Lanes widen(const uint8_t* p) { return (Lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
constexpr int kVector = 16;
using Lanes = uint32_t __attribute__((vector_size(kVector)));
inline Lanes widen(const uint8_t* p) { return Lanes{p[0], p[1], p[2], p[3]}; }
#endif
using Pairs = uint16_t __attribute__((vector_size(kVector)));
constexpr int kVectors = kLine / kVector;

// An m and an o + 128 for each channel of a block.
struct Steps {
  Pairs m[kVectors], o[kVectors];

  void load(const uint8_t* both) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const Lanes first = widen(both + i * kVector / 4);
      Lanes second = widen(both + kLanes + i * kVector / 4);
      second |= second << 8;
      m[i] = (Pairs)(first | first << 16), o[i] = (Pairs)(second | second << 16);
    }
  }

  // Two lines of bytes from one of four bits. Two bytes at once: neither q * m nor q * m + o + 128 is above 255.
  void unpack(const uint8_t* line, uint8_t* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      Pairs q;
      std::memcpy(&q, line + i * kVector, kVector);
      const Pairs first = (q & 0x0f0f) * m[i] + o[i], second = (q >> 4 & 0x0f0f) * m[i] + o[i];
      std::memcpy(to + i * kVector, &first, kVector);
      std::memcpy(to + kLine + i * kVector, &second, kVector);
    }
  }
};

// Unpacks `k` of a block: `codes` and `steps` from there on, with a step for every `width`.
inline void unpack_block(const uint8_t* codes, const uint8_t* steps, int64_t k, int64_t width, uint8_t* to) {
  for (int64_t group = 0; group < k; group += width, steps += 2 * kLanes) {
    Steps mine;
    mine.load(steps);
    for (int64_t i = 0; i < width; i += 2 * kDepth, codes += kLine, to += 2 * kLine) mine.unpack(codes, to);
  }
}

}  // namespace w8a8::cpu::W8A8_LEVEL
