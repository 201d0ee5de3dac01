// Weights of four bits as packed weights. In the compiler's own vectors, which are the same code at every level.
#pragma once
#include <cstring>

#include "kernels.h"

namespace w8a8::cpu::W8A8_LEVEL {

#if defined(__AVX512F__)
constexpr int kVector = 64;
#elif defined(__AVX2__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
constexpr int kVectors = kLine / kVector;
using Bytes = uint8_t __attribute__((vector_size(kVector / kDepth)));
using Lanes = uint32_t __attribute__((vector_size(kVector)));
using Pairs = uint16_t __attribute__((vector_size(kVector)));

// Unpacks `k` of a block: `codes` and `steps` from there on, with a step for every `width`.
inline void unpack_block(const uint8_t* codes, const uint8_t* steps, int64_t k, int64_t width, uint8_t* to) {
  for (int64_t group = 0; group < k; group += width, steps += 2 * kLanes) {
    Pairs m[kVectors], o[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      Bytes bytes[2];
      std::memcpy(&bytes[0], steps + i * sizeof(Bytes), sizeof(Bytes));
      std::memcpy(&bytes[1], steps + kLanes + i * sizeof(Bytes), sizeof(Bytes));
      const Lanes multiplier = __builtin_convertvector(bytes[0], Lanes);
      Lanes offset = __builtin_convertvector(bytes[1], Lanes);
      offset |= offset << 8;
      m[i] = (Pairs)(multiplier | multiplier << 16), o[i] = (Pairs)(offset | offset << 16);
    }
    // Two bytes at once: neither q * m nor q * m + o + 128 is above 255.
    for (int64_t i = 0; i < width; i += 2 * kDepth, codes += kLine, to += 2 * kLine)
      for (int j = 0; j < kVectors; ++j) {
        Pairs q;
        std::memcpy(&q, codes + j * kVector, kVector);
        const Pairs first = (q & 0x0f0f) * m[j] + o[j], second = (q >> 4 & 0x0f0f) * m[j] + o[j];
        std::memcpy(to + j * kVector, &first, kVector);
        std::memcpy(to + kLine + j * kVector, &second, kVector);
      }
  }
}

}  // namespace w8a8::cpu::W8A8_LEVEL
