// The few hardware operations that the kernels use, one function each. On the device: atoms of CUTLASS/CuTe where they
// fit and inline assembly elsewhere (CUTLASS's barrier atoms carry no "memory" clobber, so the compiler may move plain
// shared-memory accesses across them). A host compiler gets their emulation from tests/csrc instead, so that the same
// kernel sources run in tests on a CPU; nvcc needs nothing from there.
#pragma once

#ifndef __CUDACC__
#include "emulate/ptx.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/reg_reconfig.h>
#include <utility>

namespace ptx {

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// mbarriers

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

/// Makes initialised mbarriers visible to the cluster and to the copy engine; a barrier of the threads must follow.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

/// Arrives at the mbarrier of a CTA of the cluster. The arrival follows only reads, so it does without
/// .release.cluster, which costs a fence of the whole GPU.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* bar, unsigned rank) {
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}

/// Arrives and expects `bytes` of asynchronous copies in this phase.
__device__ __forceinline__ void mbarrier_expect(uint64_t* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

/// Waits until the phase of the given parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, unsigned parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void named_barrier(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Clusters

__device__ __forceinline__ unsigned cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Tensor memory accelerator

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Copies the box at (row, column) of a matrix of bytes; what lies outside the matrix becomes zero.
__device__ __forceinline__ void tma_load(const TensorMap* map, void* to, uint64_t* bar, int column, int row,
                                         uint64_t hint) {
  cute::SM90_TMA_LOAD_2D::copy(map, bar, hint, to, column, row);
}

/// The same into every CTA of the cluster that `mask` names, at the same place and with the same mbarrier there.
__device__ __forceinline__ void tma_multicast(const TensorMap* map, void* to, uint64_t* bar, int column, int row,
                                              uint64_t hint, unsigned mask) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(map, bar, static_cast<uint16_t>(mask), hint, to, column, row);
}

// cp.async

/// Copies BYTES (4 or 16) to shared memory, of which only the first `valid` are read and the rest is zero.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* to, const void* from, unsigned valid = BYTES) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                 "r"(valid)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// Arrives at an mbarrier, which counts this arrival, when the thread's copies so far have landed.
__device__ __forceinline__ void cp_async_arrive(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// Matrix fragments

/// Four 8x16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Stores four 8x8 matrices of 16-bit values transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_transposed(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

/// d[16, 8] = a[16, 32] b[8, 32]^T + c in int8 and int32, by one warp.
__device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  uint32_t out[4];
  cute::SM80_16x8x32_S32S8S8S32_TN::fma(out[0], out[1], out[2], out[3], a[0], a[1], a[2], a[3], b0, b1, uint32_t(c[0]),
                                        uint32_t(c[1]), uint32_t(c[2]), uint32_t(c[3]));
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = int(out[i]);
}

// Warpgroup MMA

template <int N>
struct WgmmaAtom;
template <>
struct WgmmaAtom<16> : cute::SM90::GMMA::MMA_64x16x32_S32S8S8_SS_TN {};
template <>
struct WgmmaAtom<32> : cute::SM90::GMMA::MMA_64x32x32_S32S8S8_SS_TN {};
template <>
struct WgmmaAtom<64> : cute::SM90::GMMA::MMA_64x64x32_S32S8S8_SS_TN {};
template <>
struct WgmmaAtom<128> : cute::SM90::GMMA::MMA_64x128x32_S32S8S8_SS_TN {};
template <>
struct WgmmaAtom<192> : cute::SM90::GMMA::MMA_64x192x32_S32S8S8_SS_TN {};
template <>
struct WgmmaAtom<256> : cute::SM90::GMMA::MMA_64x256x32_S32S8S8_SS_TN {};

template <int SIZE, size_t... I>
__device__ __forceinline__ void wgmma_expanded(int (&d)[SIZE], uint64_t a, uint64_t b, bool accumulate,
                                               std::index_sequence<I...>) {
  WgmmaAtom<SIZE * 2>::fma(a, b, reinterpret_cast<uint32_t&>(d[I])...,
                           accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

/// d[64, N] (+)= a[64, 32] b[N, 32]^T from shared memory, by one warpgroup, asynchronously; d has N / 2 registers.
template <int SIZE>
__device__ __forceinline__ void wgmma(int (&d)[SIZE], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_expanded(d, a, b, accumulate, std::make_index_sequence<SIZE>());
}
// The compiler does not know that wgmma writes its registers late, so uses of them must not move across these.
template <int ROWS, int SIZE>
__device__ __forceinline__ void pin(int (&d)[ROWS][SIZE]) {
#pragma unroll
  for (int i = 0; i < ROWS * SIZE; ++i) asm volatile("" : "+r"(d[i / SIZE][i % SIZE])::"memory");
}

template <int ROWS, int SIZE>
__device__ __forceinline__ void wgmma_fence(int (&d)[ROWS][SIZE]) {
  pin(d);
  cute::warpgroup_arrive();
}
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }

/// Waits until at most PENDING groups are in flight. d may be read after a wait for all of them.
template <int PENDING, int ROWS, int SIZE>
__device__ __forceinline__ void wgmma_wait(int (&d)[ROWS][SIZE]) {
  cute::warpgroup_wait<PENDING>();
  pin(d);
}

// Registers and programmatic dependent launch

template <int COUNT>
__device__ __forceinline__ void registers_grow() {
  cutlass::arch::warpgroup_reg_alloc<COUNT>();
}
template <int COUNT>
__device__ __forceinline__ void registers_shrink() {
  cutlass::arch::warpgroup_reg_dealloc<COUNT>();
}

/// Waits until the kernels before this one have ended and what they wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// threadIdx.x, read here: what follows from it is computed again, and takes no registers before.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16-bit floats

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float unpack_fp16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace ptx
#endif

namespace ptx {

__device__ __forceinline__ float unpack_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

/// Descriptor of a K-major int8 operand in shared memory: rows of 128 bytes, 128-byte swizzle, 8 rows to 1024 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile) {
  return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

// Hints to L2: what to drop first, and what last.
constexpr uint64_t EVICT_NORMAL = 0x1000000000000000;
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;
constexpr uint64_t EVICT_LAST = 0x14F0000000000000;

}  // namespace ptx
