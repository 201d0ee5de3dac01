// What both GEMM kernels share: their arguments, the sum of split tiles, and the way from sums to outputs.
#pragma once

#include "layout.h"
#include "ptx.h"

enum class Float : int { fp32, bf16, fp16 };

/// 1.5 * 2^23: its bits and a number of at most 22 bits are, read as a float, the sum of both.
constexpr int MAGIC_BITS = 0x4B400000;
constexpr float MAGIC = 12582912.f;

/// d[m, n] = cast(sum_g(a_scale[m, g] * b_scale[n, g] * (a b^T)[m, n, g]) + bias[n]); a int8 [m, k], b int8 [n, k].
struct Gemm {
  const int8_t *a, *b;
  int m, n, k;
  int groups, group_steps;  // groups in k; steps of 32 columns in a group
  const float *a_scale, *b_scale;
  int64_t a_scale_row, a_scale_group, b_scale_row, b_scale_group;  // strides
  const void* bias;                                                // [n] or null
  Float bias_type, d_type;
  void* d;
  int* partials;       // of split tiles: [team][part][thread's sums]; per group: [tile][group][token][weight]
  unsigned* tickets;   // of split tiles: parts of a team that are done; zero before and after
  bool early_weights;  // b and b_scale may be loaded before the previous kernel ends
  layout::Schedule schedule;
};

__device__ __forceinline__ float load_bias(const Gemm& gemm, int n) {
  if (!gemm.bias) return 0.f;
  if (gemm.bias_type == Float::fp32) return static_cast<const float*>(gemm.bias)[n];
  uint16_t bits = static_cast<const uint16_t*>(gemm.bias)[n];
  return gemm.bias_type == Float::bf16 ? ptx::unpack_bf16(bits) : ptx::unpack_fp16(bits);
}

/// Scales of a weight row and a token in the epilogue: 1 where the main loop has applied them.
template <bool GROUPS>
__device__ __forceinline__ float epilogue_b_scale(const Gemm& gemm, int n) {
  return GROUPS || n >= gemm.n ? 1.f : gemm.b_scale[n * gemm.b_scale_row];
}
template <bool A_GROUPS>
__device__ __forceinline__ float epilogue_a_scale(const Gemm& gemm, int m) {
  return A_GROUPS || m >= gemm.m ? 1.f : gemm.a_scale[m * gemm.a_scale_row];
}

/// The reference's roundings: ((sum * a_scale) * b_scale) + bias, none contracted. x * 1 and x + 0 change nothing.
__device__ __forceinline__ float finish(float sum, float a_scale, float b_scale, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(sum, a_scale), b_scale), bias);
}

__device__ __forceinline__ uint32_t pack(Float type, float low, float high) {
  return type == Float::bf16 ? ptx::pack_bf16(low, high) : ptx::pack_fp16(low, high);
}

__device__ __forceinline__ void store(const Gemm& gemm, int m, int n, float value) {
  int64_t at = int64_t(m) * gemm.n + n;
  if (gemm.d_type == Float::fp32) {
    static_cast<float*>(gemm.d)[at] = value;
  } else {
    static_cast<uint16_t*>(gemm.d)[at] = uint16_t(pack(gemm.d_type, value, 0.f));
  }
}

/// Whether this part of a split tile is the last of them to come here; what the others have written is then visible.
/// `flag` is a word of shared memory, `sync` a barrier of the part's threads.
template <class Sync>
__device__ __forceinline__ bool comes_last(const Gemm& gemm, int team, int thread, unsigned* flag, Sync sync) {
  sync();
  if (thread == 0) {
    __threadfence();  // one thread's is enough: between barriers it orders the writes and reads of all
    *flag = atomicAdd(gemm.tickets + team, 1u);
    __threadfence();
  }
  sync();
  if (*flag + 1 != unsigned(gemm.schedule.split)) return false;
  if (thread == 0) gemm.tickets[team] = 0;  // for the next launch
  return true;
}

/// Adds up the parts of a split tile, which `threads` threads of each part hold in the same order. Returns true in the
/// part that comes last, with the total in `sums`.
template <int COUNT, class Sync>
__device__ __forceinline__ bool sum_parts(const Gemm& gemm, int (&sums)[COUNT], int team, int part, int thread,
                                          int threads, unsigned* flag, Sync sync) {
  static_assert(COUNT % 4 == 0, "partial sums move as int4");
  int split = gemm.schedule.split;
  auto slot = [&](int of, int i) {
    return reinterpret_cast<int4*>(gemm.partials) + (int64_t(team * split + of) * (COUNT / 4) + i) * threads + thread;
  };
#pragma unroll
  for (int i = 0; i < COUNT / 4; ++i) {
    *slot(part, i) = int4{sums[i * 4], sums[i * 4 + 1], sums[i * 4 + 2], sums[i * 4 + 3]};
  }
  if (!comes_last(gemm, team, thread, flag, sync)) return false;
  for (int of = 0; of < split; ++of) {
    if (of == part) continue;
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
      int4 other = __ldcg(slot(of, i));
      sums[i * 4] += other.x;
      sums[i * 4 + 1] += other.y;
      sums[i * 4 + 2] += other.z;
      sums[i * 4 + 3] += other.w;
    }
  }
  return true;
}

/// Where the parts of a split tile leave the sums of a group, for a token and a weight row of the tile.
template <int TOKENS, int WEIGHTS>
__device__ __forceinline__ int* group_sum(const Gemm& gemm, int tile, int group, int token, int row) {
  return gemm.partials + ((int64_t(tile) * gemm.groups + group) * TOKENS + token) * WEIGHTS + row;
}

/// Outputs of a tile whose parts have left the sums of all groups, of weight rows [first, first + ROWS): groups are
/// scaled and added in ascending order, as a tile in one part does it, so that splitting changes no bit.
template <int TOKENS, int WEIGHTS, int ROWS, bool A_GROUPS>
__device__ __forceinline__ void add_groups(const Gemm& gemm, int tile, int first, int m0, int n0, int thread,
                                           int threads) {
  constexpr int AT_ONCE = 16;
  const int tokens = layout::least(TOKENS, gemm.m - m0);
  for (int i = thread; i < tokens * ROWS; i += threads) {
    const int token = i / ROWS, row = first + i % ROWS, m = m0 + token, n = n0 + row;
    if (n >= gemm.n) continue;
    const int* from = group_sum<TOKENS, WEIGHTS>(gemm, tile, 0, token, row);
    const float* a_scale = gemm.a_scale + m * gemm.a_scale_row;
    const float* b_scale = gemm.b_scale + n * gemm.b_scale_row;
    float sum = 0.f;
    for (int group = 0; group < gemm.groups; group += AT_ONCE) {
      int value[AT_ONCE];
      float scale[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int at = layout::least(group + j, gemm.groups - 1);
        value[j] = __ldcg(from + int64_t(at) * TOKENS * WEIGHTS);
        scale[j] = b_scale[at * gemm.b_scale_group];
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (group + j >= gemm.groups) break;
        float scaled = __int_as_float(MAGIC_BITS + value[j]) - MAGIC;  // 128 products: exact, and fast on sm_80
        if constexpr (A_GROUPS) scaled = __fmul_rn(scaled, a_scale[(group + j) * gemm.a_scale_group]);
        sum = __fmaf_rn(scaled, scale[j], sum);
      }
    }
    store(gemm, m, n, finish(sum, epilogue_a_scale<A_GROUPS>(gemm, m), 1.f, load_bias(gemm, n)));
  }
}

/// Copies ROWS staged rows of COLUMNS 16-bit outputs to d at token m, weight row n, 16 bytes at a time.
template <int THREADS, int ROWS, int COLUMNS>
__device__ __forceinline__ void store_rows(const Gemm& gemm, const uint16_t* staged, int pitch, int m, int n,
                                           int thread) {
  constexpr int CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0);
  const int first = thread / CHUNKS, column = thread % CHUNKS * 8, rows_left = gemm.m - m - first;
  if (n + column >= gemm.n) return;
  uint16_t* const to = static_cast<uint16_t*>(gemm.d) + int64_t(m + first) * gemm.n + n + column;
  const uint16_t* const from = staged + first * pitch + column;
#pragma unroll
  for (int next = 0; next < ROWS; next += STEP) {
    if (next < rows_left) {
      *reinterpret_cast<uint4*>(to + int64_t(next) * gemm.n) = *reinterpret_cast<const uint4*>(from + next * pitch);
    }
  }
}
