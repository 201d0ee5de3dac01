// Matrix fragments and products: ldmatrix, stmatrix, mma, wgmma.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "barriers.h"
#include "machine.h"

namespace ptx {

inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  struct Mine {
    const uint8_t* row;
    uint32_t* r;
  } mine{static_cast<const uint8_t*>(row), r};
  shared_address(row);
  emulate::warp_collective(&mine, [](void** all) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        const uint8_t* from = emulate::from_lane<Mine>(all, i * 8 + lane / 4)->row + lane % 4 * 4;
        memcpy(&emulate::from_lane<Mine>(all, lane)->r[i], from, 4);
      }
    }
  });
}
// Four 8x8 matrices of 16-bit values, transposed on the way: lane l holds (row l/4, columns 2(l%4), +1) of each.
inline void stmatrix_transposed(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  struct Mine {
    uint8_t* row;
    uint32_t r[4];
  } mine{static_cast<uint8_t*>(row), {r0, r1, r2, r3}};
  shared_address(row);
  emulate::warp_collective(&mine, [](void** all) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        for (unsigned half = 0; half < 2; ++half) {
          uint16_t value = uint16_t(emulate::from_lane<Mine>(all, lane)->r[i] >> 16 * half);
          memcpy(emulate::from_lane<Mine>(all, i * 8 + lane % 4 * 2 + half)->row + lane / 4 * 2, &value, 2);
        }
      }
    }
  });
}

inline void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  struct Mine {
    int d[4];
    uint32_t a[4], b[2];
  } mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulate::warp_collective(&mine, [](void** all) {
    int8_t a[16][32], b[8][32];
    for (unsigned lane = 0; lane < 32; ++lane) {
      Mine* from = emulate::from_lane<Mine>(all, lane);
      for (unsigned i = 0; i < 4; ++i) memcpy(&a[lane / 4 + i % 2 * 8][lane % 4 * 4 + i / 2 * 16], &from->a[i], 4);
      for (unsigned i = 0; i < 2; ++i) memcpy(&b[lane / 4][lane % 4 * 4 + i * 16], &from->b[i], 4);
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        int sum = 0;
        for (unsigned k = 0; k < 32; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[lane % 4 * 2 + i % 2][k];
        emulate::from_lane<Mine>(all, lane)->d[i] += sum;
      }
    }
  });
  for (unsigned i = 0; i < 4; ++i) d[i] = mine.d[i];
}

// wgmma: a thread computes its own part of the tile, so its warpgroup need not meet.
inline void wgmma_compute(emulate::Accumulator& sum) {
  const emulate::Wgmma op = sum.pending.front();
  sum.pending.erase(sum.pending.begin());
  const auto& me = emulate::self();
  auto row = [&me](uint64_t descriptor, unsigned r, int8_t* to) {  // 32 bytes of a row, K-major, 128-byte swizzle
    if (descriptor >> 62 != 1) emulate::fail("a wgmma descriptor without the 128-byte swizzle");
    uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    uint32_t at = (uint32_t(descriptor & 0x3fff) << 4) + r / 8 * stride + r % 8 * 128;
    for (unsigned half = 0; half < 2; ++half) {
      uint32_t plain = at + half * 16, swizzled = plain ^ (plain >> 7 & 7) << 4;
      if (swizzled + 16 > me.cta->shared_bytes) emulate::fail("a wgmma operand outside shared memory");
      memcpy(to + half * 16, me.cta->shared + swizzled, 16);
    }
  };
  unsigned lane = me.thread % 32, first = me.thread / 32 % 4 * 16 + lane / 4;
  int8_t a[2][32], b[32];
  row(op.a, first, a[0]);
  row(op.a, first + 8, a[1]);
  for (int j = 0; j < sum.size / 4; ++j) {
    for (int pair = 0; pair < 2; ++pair) {
      row(op.b, j * 8 + lane % 4 * 2 + pair, b);
      for (int half = 0; half < 2; ++half) {
        int dot = 0;
        for (int k = 0; k < 32; ++k) dot += a[half][k] * b[k];
        int& to = sum.value[j * 4 + half * 2 + pair];
        to = op.accumulate ? to + dot : dot;
      }
    }
  }
}

template <int SIZE>
void wgmma(int (&d)[SIZE], uint64_t a, uint64_t b, bool accumulate) {
  emulate::step();
  auto& me = emulate::self();
  emulate::Accumulator* sum = nullptr;
  for (auto& each : me.accumulators) {
    if (each.registers == d) sum = &each;
  }
  if (!sum) {
    me.accumulators.push_back({d, SIZE, std::vector<int>(d, d + SIZE), {}, 0});
    sum = &me.accumulators.back();
    emulate::poison(d, sizeof(d));
  }
  sum->pending.push_back({a, b, accumulate, me.wgmma_group});
  sum->last_group = me.wgmma_group;
  if (emulate::machine.chaos && emulate::machine.random.one_in(2)) {  // it may run at once, or as late as at the wait
    while (!sum->pending.empty()) wgmma_compute(*sum);
  }
}
template <int ROWS, int SIZE>
void wgmma_fence(int (&)[ROWS][SIZE]) {
  emulate::step();
}
inline void wgmma_commit() { emulate::self().wgmma_group += 1; }
template <int PENDING, int ROWS, int SIZE>
void wgmma_wait(int (&)[ROWS][SIZE]) {
  emulate::step();
  auto& me = emulate::self();
  for (auto& sum : me.accumulators) {
    while (!sum.pending.empty() && sum.pending.front().group + PENDING < me.wgmma_group) wgmma_compute(sum);
    if (sum.last_group + PENDING < me.wgmma_group) memcpy(sum.registers, sum.value.data(), sum.size * sizeof(int));
  }
  auto done = [&me](const emulate::Accumulator& sum) { return sum.last_group + PENDING < me.wgmma_group; };
  me.accumulators.erase(std::remove_if(me.accumulators.begin(), me.accumulators.end(), done), me.accumulators.end());
}

}  // namespace ptx
