// What CUDA C++ has beside C++: keywords, vectors, and the functions by which the threads of a CTA meet.
#pragma once

#include <algorithm>
#include <cstdint>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

namespace emulate {

template <class T>
T shuffle(T value, unsigned source) {
  struct Mine {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  warp_collective(&mine, [](void** all) {
    for (unsigned lane = 0; lane < std::min<size_t>(WARP, self().cta->fibres.size()); ++lane) {
      Mine* at = from_lane<Mine>(all, lane);
      at->result = from_lane<Mine>(all, at->source % WARP)->value;
    }
  });
  return mine.result;
}

}  // namespace emulate

inline void __syncthreads() { emulate::barrier(0, emulate::self().cta->fibres.size()); }
inline void __syncwarp(unsigned = ~0u) {
  emulate::warp_collective(nullptr, [](void**) {});
}
inline void __threadfence() { emulate::step(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulate::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulate::shuffle(value, (emulate::self().thread % 32) ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  unsigned lane = emulate::self().thread % 32;
  return emulate::shuffle(value, lane + delta < 32 ? lane + delta : lane);
}
template <class T>
T atomicAdd(T* at, T value) {
  emulate::step();
  T old = *at;
  *at += value;
  return old;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
