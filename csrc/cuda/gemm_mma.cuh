// INT8 GEMM with mma.sync for sm_80 and up. Weights are the MMA's rows, tokens its columns.
//
// 16-byte cp.async copies fill a ring of stages with the 128-byte swizzle, ldmatrix reads fragments. The int32 partial
// of a group of 128 starts at the bits of 1.5 * 2^23: read as a float it is 12582912 + partial, exact because
// |partial| <= 2^21, so that no integer conversion is needed (slow on sm_80). With warps_k > 1, for few tokens,
// warps share one tile and divide k: more loads in flight, while groups are still added in ascending order.
#pragma once

#include <type_traits>

#include "epilogue.cuh"

/// float(value), correctly rounded for every int32, without a conversion instruction.
__device__ __forceinline__ float to_float(int value) {
  float high = __int_as_float(MAGIC_BITS + (value >> 16)) - MAGIC;
  float low = __int_as_float(0x4B000000 | (value & 0xffff)) - 8388608.f;
  return __fmaf_rn(high, 65536.f, low);
}

template <int TILE, int GRANULARITY, bool A_GROUPS>
__global__ void __launch_bounds__(layout::TILES[TILE].threads(), 1) gemm_mma(const __grid_constant__ Gemm gemm) {
  using namespace layout;
  constexpr Tile tile = TILES[TILE];
#ifdef __CUDA_ARCH__
  if constexpr (tile.shared_bytes(GRANULARITY) > shared_limit(__CUDA_ARCH__ / 10)) return;  // never chosen here
#endif
  constexpr int TOKENS = tile.tokens, WEIGHTS = tile.weights, STAGES = tile.stages, WARPS_K = tile.warps_k;
  constexpr int ROWS = tile.warp_weights / 16, COLUMNS = tile.warp_tokens / 8;  // MMAs of a warp
  constexpr int THREADS = tile.threads(), SCALES = tile.scales(GRANULARITY);
  constexpr bool GROUPS = GRANULARITY != CHANNEL, STAGED_SCALES = GRANULARITY == GROUP_128;
  constexpr bool EXCHANGE = WARPS_K > 1, SPLITS_GROUPS = GROUPS && tile.splits(GRANULARITY);
  constexpr int OWNED = TOKENS * WEIGHTS / THREADS;  // sums of a thread when warps divide k
  constexpr int PITCH = WEIGHTS + 4;                 // of the exchange: no bank conflicts

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_k = warp % WARPS_K;
  const int warp_row = warp / WARPS_K % (WEIGHTS / tile.warp_weights) * tile.warp_weights;
  const int warp_token = warp / WARPS_K / (WEIGHTS / tile.warp_weights) * tile.warp_tokens;
  const Unit unit = gemm.schedule.unit(blockIdx.x);
  const int n0 = unit.weight_tile * WEIGHTS, m0 = unit.token_tile * TOKENS;

  uint8_t* const memory = ptx::shared_memory();
  float* const scales = reinterpret_cast<float*>(memory + STAGES * tile.stage_bytes());  // [stage][k][weights, tokens]
  int* const exchange = reinterpret_cast<int*>(scales + STAGES * WARPS_K * SCALES);      // [k][token][weight]
  auto weights_at = [&](int block) { return memory + block % STAGES * tile.stage_bytes(); };
  auto tokens_at = [&](int block) { return weights_at(block) + WEIGHTS * tile.block(); };
  auto scales_at = [&](int block, int k) { return scales + (block % STAGES * WARPS_K + k) * SCALES; };

  // One operand of a block: WARPS_K tiles of ROWS rows of 128 bytes. A thread copies the same chunk, and the same place
  // of the swizzle, of every STEPth row, so that all that changes from copy to copy is constant.
  auto load = [&](auto rows, uint8_t* to, const int8_t* from, int first, int limit, int block) {
    constexpr int OF_TILE = decltype(rows)::value, STEP = THREADS / 8;
    static_assert(OF_TILE % STEP == 0 && STEP % 8 == 0);
    const int row = thread / 8, chunk = thread % 8, rows_left = limit - first - row;
    const int k = block * WARPS_K * BLOCK + chunk * 16, k_left = gemm.k - k;
    const int8_t* source = from + int64_t(first + row) * gemm.k + k;
    uint8_t* const target = to + swizzled(row, chunk);
#pragma unroll
    for (int next = 0; next < OF_TILE; next += STEP, source += int64_t(STEP) * gemm.k) {
#pragma unroll
      for (int slice = 0; slice < WARPS_K; ++slice) {
        bool inside = next < rows_left && slice * BLOCK < k_left;
        ptx::cp_async<16>(target + (slice * OF_TILE + next) * BLOCK, inside ? source + slice * BLOCK : from,
                          inside ? 16 : 0);
      }
    }
  };
  // Scales of one operand's rows, for every group of a block.
  auto load_scales = [&](auto rows, int offset, const float* from, int64_t by_row, int64_t by_group, int first,
                         int limit, int block) {
    constexpr int OF_TILE = decltype(rows)::value;
#pragma unroll
    for (int base = 0; base < OF_TILE * WARPS_K; base += THREADS) {
      const int i = base + thread, row = i % OF_TILE, slice = i / OF_TILE, group = block * WARPS_K + slice;
      if (OF_TILE * WARPS_K % THREADS != 0 && i >= OF_TILE * WARPS_K) break;
      bool inside = first + row < limit && group < gemm.groups;
      const float* source = inside ? from + (first + row) * by_row + group * by_group : from;
      ptx::cp_async<4>(scales_at(block, slice) + offset + row, source, inside ? 4 : 0);
    }
  };
  using WeightRows = std::integral_constant<int, WEIGHTS>;
  using TokenRows = std::integral_constant<int, TOKENS>;
  auto load_weights = [&](int block) {
    if (block >= unit.end) return;
    load(WeightRows{}, weights_at(block), gemm.b, n0, gemm.n, block);
    if constexpr (STAGED_SCALES) {
      load_scales(WeightRows{}, 0, gemm.b_scale, gemm.b_scale_row, gemm.b_scale_group, n0, gemm.n, block);
    }
  };
  auto load_tokens = [&](int block) {
    if (block >= unit.end) return;
    load(TokenRows{}, tokens_at(block), gemm.a, m0, gemm.m, block);
    if constexpr (STAGED_SCALES && A_GROUPS) {
      load_scales(TokenRows{}, WEIGHTS, gemm.a_scale, gemm.a_scale_row, gemm.a_scale_group, m0, gemm.m, block);
    }
  };

  // Weights that the kernel before this one does not write: their first loads need not wait for it.
  if (!gemm.early_weights) ptx::wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load_weights(unit.begin + s);
  if (gemm.early_weights) ptx::wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    load_tokens(unit.begin + s);
    ptx::cp_async_commit();
  }

  int partial[ROWS][COLUMNS][4] = {};
  float sum[ROWS][COLUMNS][4] = {};
  float owned[OWNED] = {};
  int magic[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
  int group = 0, steps_left = gemm.group_steps;  // GROUP_ANY

  // Adds the scaled partials of a group to this warp's sums.
  auto promote = [&](auto as_float, auto a_scale_of, auto b_scale_of) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const int token = warp_token + j * 8 + lane % 4 * 2;
      float a_scale[2] = {a_scale_of(token), a_scale_of(token + 1)};
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float value = as_float(partial[i][j][e]);
          if constexpr (A_GROUPS) value = __fmul_rn(value, a_scale[e % 2]);
          float& to = sum[i][j][e];
          to = __fmaf_rn(value, b_scale_of(i, e / 2), to);
        }
      }
    }
  };

  for (int block = unit.begin; block < unit.end; ++block) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the block has landed for all, and all have left the stage that is filled next
    load_weights(block + STAGES - 1);
    load_tokens(block + STAGES - 1);
    ptx::cp_async_commit();

    const uint8_t* weights = weights_at(block) + warp_k * WEIGHTS * BLOCK;
    const uint8_t* tokens = tokens_at(block) + warp_k * TOKENS * BLOCK;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[ROWS][4], b[COLUMNS / 2][4];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        ptx::ldmatrix(a[i], weights + swizzled(warp_row + i * 16 + lane % 16, step * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < COLUMNS / 2; ++j) {
        ptx::ldmatrix(b[j], tokens + swizzled(warp_token + j * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          bool restart = GRANULARITY == GROUP_128 && step == 0;
          ptx::mma(partial[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], restart ? magic : partial[i][j]);
        }
      }
      if constexpr (GRANULARITY == GROUP_ANY) {
        if (--steps_left == 0 && group < gemm.groups) {
          auto a_scale = [&](int token) {
            int m = least(m0 + token, gemm.m - 1);
            return A_GROUPS ? gemm.a_scale[m * gemm.a_scale_row + group * gemm.a_scale_group] : 1.f;
          };
          float b_scale[ROWS][2];
#pragma unroll
          for (int i = 0; i < ROWS * 2; ++i) {
            int n = least(n0 + warp_row + i / 2 * 16 + i % 2 * 8 + lane / 4, gemm.n - 1);
            b_scale[i / 2][i % 2] = gemm.b_scale[n * gemm.b_scale_row + group * gemm.b_scale_group];
          }
          promote(to_float, a_scale, [&](int i, int half) { return b_scale[i][half]; });
#pragma unroll
          for (int i = 0; i < ROWS * COLUMNS * 4; ++i) partial[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0;
          group += 1;
          steps_left = gemm.group_steps;
        }
      }
    }

    if (SPLITS_GROUPS && !EXCHANGE && unit.split_tile >= 0) {  // one of several parts leaves the sums to the last
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS * 4; ++i) {
        int row = warp_row + i / 4 / COLUMNS * 16 + i % 4 / 2 * 8 + lane / 4;
        int token = warp_token + i / 4 % COLUMNS * 8 + lane % 4 * 2 + i % 2;
        if (m0 + token >= gemm.m) continue;
        *group_sum<TOKENS, WEIGHTS>(gemm, unit.split_tile, block, token, row) =
            partial[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] - MAGIC_BITS;
      }
    } else if constexpr (STAGED_SCALES && !EXCHANGE) {
      const float* at = scales_at(block, 0);
      float b_scale[ROWS][2];
#pragma unroll
      for (int i = 0; i < ROWS * 2; ++i) b_scale[i / 2][i % 2] = at[warp_row + i / 2 * 16 + i % 2 * 8 + lane / 4];
      promote([](int bits) { return __int_as_float(bits) - MAGIC; },
              [&](int token) { return A_GROUPS ? at[WEIGHTS + token] : 1.f; },
              [&](int i, int half) { return b_scale[i][half]; });
    }
    if constexpr (STAGED_SCALES && EXCHANGE) {
      // Every warp has another group: a thread adds up all of them, in ascending order, for the outputs that it owns.
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS * 4; ++i) {
        int row = i / 4 / COLUMNS * 16 + i % 4 / 2 * 8 + lane / 4, token = i / 4 % COLUMNS * 8 + lane % 4 * 2 + i % 2;
        exchange[(warp_k * TOKENS + token) * PITCH + row] = partial[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4];
      }
      __syncthreads();  // the loop's own barrier protects the exchange from the next block

      if (SPLITS_GROUPS && unit.split_tile >= 0) {  // one of several parts leaves the sums to the last
        const int tokens_left = least(TOKENS, gemm.m - m0);
#pragma unroll 1
        for (int i = thread; i < WARPS_K * WEIGHTS * tokens_left; i += THREADS) {
          const int row = i % WEIGHTS, k = i / WEIGHTS % WARPS_K, token = i / (WEIGHTS * WARPS_K);
          if (block * WARPS_K + k >= gemm.groups) continue;
          *group_sum<TOKENS, WEIGHTS>(gemm, unit.split_tile, block * WARPS_K + k, token, row) =
              exchange[(k * TOKENS + token) * PITCH + row] - MAGIC_BITS;
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < OWNED; ++i) {
        int row = (i * THREADS + thread) % WEIGHTS, token = (i * THREADS + thread) / WEIGHTS;
#pragma unroll
        for (int k = 0; k < WARPS_K; ++k) {
          float value = __int_as_float(exchange[(k * TOKENS + token) * PITCH + row]) - MAGIC;
          if constexpr (A_GROUPS) value = __fmul_rn(value, scales_at(block, k)[WEIGHTS + token]);
          owned[i] = __fmaf_rn(value, scales_at(block, k)[row], owned[i]);
        }
      }
    }
  }
  ptx::let_next_kernel_start();
  ptx::cp_async_wait<0>();
  __syncthreads();  // shared memory is free from here on
  unsigned* flag = reinterpret_cast<unsigned*>(memory);
  auto sync = [] { __syncthreads(); };

  if (SPLITS_GROUPS && unit.split_tile >= 0) {
    if (comes_last(gemm, unit.split_tile, thread, flag, sync)) {
      add_groups<TOKENS, WEIGHTS, WEIGHTS, A_GROUPS>(gemm, unit.split_tile, 0, m0, n0, thread, THREADS);
    }
    return;
  }
  if constexpr (EXCHANGE) {  // outputs are owned by threads: weight rows to neighbouring threads
    if constexpr (!GROUPS) {
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS * 4; ++i) {
        int row = i / 4 / COLUMNS * 16 + i % 4 / 2 * 8 + lane / 4, token = i / 4 % COLUMNS * 8 + lane % 4 * 2 + i % 2;
        exchange[(warp_k * TOKENS + token) * PITCH + row] = partial[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4];
      }
      __syncthreads();
      int total[OWNED] = {};
#pragma unroll
      for (int i = 0; i < OWNED * WARPS_K; ++i) {
        int at = i / WARPS_K * THREADS + thread;
        total[i / WARPS_K] += exchange[(i % WARPS_K * TOKENS + at / WEIGHTS) * PITCH + at % WEIGHTS];
      }
      if (unit.split_tile >= 0 && !sum_parts(gemm, total, unit.split_tile, unit.part, thread, THREADS, flag, sync)) {
        return;
      }
#pragma unroll
      for (int i = 0; i < OWNED; ++i) owned[i] = __int2float_rn(total[i]);
    }
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
      int n = n0 + (i * THREADS + thread) % WEIGHTS, m = m0 + (i * THREADS + thread) / WEIGHTS;
      if (n >= gemm.n || m >= gemm.m) continue;
      float a_scale = epilogue_a_scale<A_GROUPS>(gemm, m), b_scale = epilogue_b_scale<GROUPS>(gemm, n);
      float value = finish(owned[i], a_scale, b_scale, load_bias(gemm, n));
      store(gemm, m, n, value);
    }
  } else {
    if constexpr (!GROUPS) {
      int (&flat)[ROWS * COLUMNS * 4] = reinterpret_cast<int (&)[ROWS * COLUMNS * 4]>(partial);
      if (unit.split_tile >= 0) {
        if (!sum_parts(gemm, flat, unit.split_tile, unit.part, thread, THREADS, flag, sync)) return;
        sync();  // the flag lies where outputs are staged
      }
    }
    uint16_t* staged = reinterpret_cast<uint16_t*>(memory);
    const int thread = ptx::thread_again(), lane = thread % 32;
    const int warp_row = thread / 32 / WARPS_K % (WEIGHTS / tile.warp_weights) * tile.warp_weights;
    const int warp_token = thread / 32 / WARPS_K / (WEIGHTS / tile.warp_weights) * tile.warp_tokens;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = warp_row + i * 16 + half * 8 + lane / 4, n = n0 + row;
        float b_scale = epilogue_b_scale<GROUPS>(gemm, n), bias = n < gemm.n ? load_bias(gemm, n) : 0.f;
#pragma unroll
        for (int j = 0; j < COLUMNS * 2; ++j) {
          int token = warp_token + j / 2 * 8 + lane % 4 * 2 + j % 2, m = m0 + token, e = half * 2 + j % 2;
          float value = GROUPS ? sum[i][j / 2][e] : __int2float_rn(partial[i][j / 2][e]);
          value = finish(value, epilogue_a_scale<A_GROUPS>(gemm, m), b_scale, bias);
          if (gemm.d_type != Float::fp32) {
            staged[token * (WEIGHTS + 8) + row] = uint16_t(pack(gemm.d_type, value, 0.f));
          } else if (m < gemm.m && n < gemm.n) {
            static_cast<float*>(gemm.d)[int64_t(m) * gemm.n + n] = value;
          }
        }
      }
    }
    if (gemm.d_type == Float::fp32) return;
    __syncthreads();
    store_rows<THREADS, TOKENS, WEIGHTS>(gemm, staged, WEIGHTS + 8, m0, n0, thread);
  }
}
