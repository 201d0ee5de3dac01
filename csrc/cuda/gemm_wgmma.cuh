// INT8 GEMM for Hopper: TMA, mbarriers and wgmma, persistent and warp-specialised. Weights are the MMA's rows, tokens
// its columns, so that decode and prefill share one body.
//
// Warpgroups that multiply have each its own 64 weight rows (or two slabs of 64) of a tile, and share nothing but the
// stages: one promotes while the other multiplies. One may have its tile to itself: alone in its CTA, or with another
// that has the next tile, and then they multiply by turns and one stores while the other multiplies. In the last
// warpgroup, one thread loads tiles with TMA and, per group, one warp gathers scales. CTAs of a cluster have
// neighbouring weight tiles and each loads its part of the activations for all of them.
#pragma once

#include "epilogue.cuh"

template <int TILE, int GRANULARITY, bool A_GROUPS>
__global__ void __launch_bounds__(layout::TILES[TILE].threads(), 1)
    gemm_wgmma(const __grid_constant__ Gemm gemm, const __grid_constant__ ptx::TensorMap a_map,
               const __grid_constant__ ptx::TensorMap b_map) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace layout;
  constexpr Tile tile = TILES[TILE];
  constexpr int TOKENS = tile.tokens, WEIGHTS = tile.weights, CLUSTER = tile.cluster;
  constexpr int WARPGROUPS = tile.warpgroups, TEAM = tile.team(), SLABS = tile.warp_weights / 64;
  constexpr int STAGES = tile.wgmma_stages(GRANULARITY), SCALES = tile.scales(GRANULARITY);
  constexpr int COLUMNS = TOKENS / 2;  // registers of a slab
  constexpr int STAGED = tile.staging_tokens(), PITCH = 64 + 8;
  constexpr bool GROUPS = GRANULARITY != CHANNEL, SPLITS = tile.splits(GRANULARITY);
  constexpr bool TURNS = tile.turns();
  static_assert(!TURNS || (TEAM == 1 && WARPGROUPS == 2 && !GROUPS));
  // Registers of a thread at launch (65536 / 384, in eights), and what three warpgroups make of them; two have enough.
  // If they asked for more than the launch had, they would wait for ever.
  constexpr int LAUNCHED = 168, MULTIPLYING = 232, LOADING = 40;
  static_assert(2 * MULTIPLYING + LOADING <= 3 * LAUNCHED, "more registers than the CTA has");

  uint8_t* const memory = ptx::shared_memory();
  float* const scales = reinterpret_cast<float*>(memory + STAGES * tile.stage_bytes());  // [stage][weights, tokens]
  uint16_t* const staging = reinterpret_cast<uint16_t*>(scales + STAGES * SCALES);       // [warpgroup][token][weight]
  float* const token_scales = reinterpret_cast<float*>(staging + WARPGROUPS * STAGED * PITCH);  // [warpgroup][token]
  uint64_t* const full = reinterpret_cast<uint64_t*>(token_scales + WARPGROUPS * TOKENS);  // [stage]: loads have landed
  uint64_t* const empty = full + STAGES;                                                   // [stage]: all have read it
  uint64_t* const turn = empty + STAGES;                                   // [warpgroup]: the other has multiplied
  unsigned* const flags = reinterpret_cast<unsigned*>(turn + WARPGROUPS);  // [warpgroup]

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warpgroup = warp / 4;
  auto rank = [] { return CLUSTER > 1 ? int(ptx::cluster_rank()) : 0; };  // read anew each time, to save registers
  auto weights_at = [&](int stage) { return memory + stage * tile.stage_bytes(); };
  auto tokens_at = [&](int stage) { return weights_at(stage) + WEIGHTS * BLOCK; };
  auto first_weight = [&](const Unit& unit) { return (unit.weight_tile * CLUSTER + rank()) * WEIGHTS; };

  if (thread == 0) {
    for (int s = 0; s < STAGES; ++s) {
      ptx::mbarrier_init(full + s, GROUPS ? 1 + 32 : 1);  // the loading thread and the lanes that gather scales
      ptx::mbarrier_init(empty + s, CLUSTER * TEAM * 4);  // every warp of the cluster that multiplies it
    }
    for (int w = 0; TURNS && w < WARPGROUPS; ++w) ptx::mbarrier_init(turn + w, 4);
    ptx::mbarrier_fence_init();
  }
  if constexpr (CLUSTER > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (warpgroup == WARPGROUPS) {
    if constexpr (WARPGROUPS == 2) ptx::registers_shrink<LOADING>();
    if (warp == WARPGROUPS * 4 && lane == 0) {
      ptx::prefetch_tensor_map(&a_map);
      ptx::prefetch_tensor_map(&b_map);
      // To L2: in decode no one else reads these weights, and every CTA reads the activations.
      const bool decode = gemm.schedule.token_tiles == 1;
      const uint64_t weights_hint = decode ? ptx::EVICT_FIRST : ptx::EVICT_NORMAL;
      const uint64_t tokens_hint = decode ? ptx::EVICT_LAST : ptx::EVICT_NORMAL;
      auto load_weights = [&](int stage, int block, int n0) {
        ptx::mbarrier_expect(full + stage, tile.stage_bytes());
        ptx::tma_load(&b_map, weights_at(stage), full + stage, block * BLOCK, n0, weights_hint);
      };
      // Weights that the kernel before this one does not write: their first loads need not wait for it.
      int early = 0;
      if (gemm.early_weights) {
        Unit unit = gemm.schedule.unit(blockIdx.x / CLUSTER);
        for (; early < least(STAGES, unit.end - unit.begin); ++early) {
          load_weights(early, unit.begin + early, first_weight(unit));
        }
      }
      ptx::wait_for_previous_kernel();
      unsigned count = 0;
      for (int u = blockIdx.x / CLUSTER; u < gemm.schedule.units(); u += gridDim.x / CLUSTER) {
        Unit unit = gemm.schedule.unit(u);
        for (int block = unit.begin; block < unit.end; ++block, ++count) {
          int stage = count % STAGES;
          ptx::mbarrier_wait(empty + stage, count / STAGES % 2 ^ 1);
          if (int(count) >= early) load_weights(stage, block, first_weight(unit));
          int m0 = unit.token_tile * TOKENS;
          if constexpr (CLUSTER == 1) {
            ptx::tma_load(&a_map, tokens_at(stage), full + stage, block * BLOCK, m0, tokens_hint);
          } else {
            int skip = rank() * (TOKENS / CLUSTER);
            ptx::tma_multicast(&a_map, tokens_at(stage) + skip * BLOCK, full + stage, block * BLOCK, m0 + skip,
                               tokens_hint, (1 << CLUSTER) - 1);
          }
        }
      }
      ptx::let_next_kernel_start();
    }
    if (GROUPS && warp == WARPGROUPS * 4 + 1) {
      ptx::wait_for_previous_kernel();
      unsigned count = 0;
      for (int u = blockIdx.x / CLUSTER; u < gemm.schedule.units(); u += gridDim.x / CLUSTER) {
        Unit unit = gemm.schedule.unit(u);
        for (int block = unit.begin; block < unit.end; ++block, ++count) {
          int stage = count % STAGES;
          float* to = scales + stage * SCALES;
          ptx::mbarrier_wait(empty + stage, count / STAGES % 2 ^ 1);
#pragma unroll 1
          for (int i = lane; i < WEIGHTS; i += 32) {
            int n = least(first_weight(unit) + i, gemm.n - 1);
            ptx::cp_async<4>(to + i, gemm.b_scale + n * gemm.b_scale_row + block * gemm.b_scale_group);
          }
#pragma unroll 1
          for (int i = lane; A_GROUPS && i < TOKENS; i += 32) {
            int m = least(unit.token_tile * TOKENS + i, gemm.m - 1);
            ptx::cp_async<4>(to + WEIGHTS + i, gemm.a_scale + m * gemm.a_scale_row + block * gemm.a_scale_group);
          }
          ptx::cp_async_arrive(full + stage);
        }
      }
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    }
  } else {
    if constexpr (WARPGROUPS == 2) ptx::registers_grow<MULTIPLYING>();
    ptx::wait_for_previous_kernel();
    const int in_group = thread % 128, first_slab = TEAM == 1 ? 0 : warpgroup * SLABS;  // of the tile
    const int row = warp % 4 * 16 + lane / 4;                                           // and row + 8, of every slab
    uint16_t* const staged = staging + warpgroup * STAGED * PITCH;
    float* const a_scales = token_scales + warpgroup * TOKENS;
    auto sync = [&] { ptx::named_barrier(1 + warpgroup, 128); };
    auto release = [&](int stage) {
      __syncwarp();
      const unsigned to = threadIdx.x % 32;  // read anew, to save registers
      if constexpr (CLUSTER == 1) {
        if (to == 0) ptx::mbarrier_arrive(empty + stage);
      } else {
        if (to < CLUSTER) ptx::mbarrier_arrive_remote(empty + stage, to);
      }
    };
    auto tile_of = [&](const Unit& unit) { return unit.split_tile * CLUSTER + rank(); };  // of those that are split
    auto multiply = [&](int (&to)[COLUMNS], int stage, int slab, bool accumulate) {
      uint64_t a = ptx::wgmma_descriptor(weights_at(stage) + (first_slab + slab) * 64 * BLOCK);
      uint64_t b = ptx::wgmma_descriptor(tokens_at(stage));
#pragma unroll
      for (int step = 0; step < 4; ++step) ptx::wgmma(to, a + step * 2, b + step * 2, accumulate || step > 0);
    };

    unsigned count = 0;
    int tiles = -1;  // of this CTA, before this one
    for (int u = blockIdx.x / CLUSTER; u < gemm.schedule.units(); u += gridDim.x / CLUSTER) {
      const Unit unit = gemm.schedule.unit(u);
      tiles += 1;
      if (TURNS && tiles % 2 != warpgroup) {
        count += unit.end - unit.begin;
        continue;
      }
      const int m0 = unit.token_tile * TOKENS, n0 = first_weight(unit) + first_slab * 64;
      for (int i = in_group; i < TOKENS; i += 128) a_scales[i] = epilogue_a_scale<A_GROUPS>(gemm, m0 + i);
      float b_scale[SLABS][2], bias[SLABS][2];
      auto load_rows = [&] {
#pragma unroll
        for (int i = 0; i < SLABS * 2; ++i) {
          int n = n0 + i / 2 * 64 + row + i % 2 * 8;
          b_scale[i / 2][i % 2] = epilogue_b_scale<GROUPS>(gemm, n);
          bias[i / 2][i % 2] = n < gemm.n ? load_bias(gemm, n) : 0.f;
        }
      };
      constexpr bool EARLY = !GROUPS && SLABS * COLUMNS <= 128;  // where registers allow it
      if (EARLY) load_rows();

      int sums[GROUPS ? 1 : SLABS][COLUMNS] = {};  // of all k so far; per group: of this group
      float scaled[SLABS][COLUMNS] = {};           // per group: of all groups so far
      if (TURNS && tiles > 0) ptx::mbarrier_wait(turn + warpgroup, (tiles - 1) / 2 % 2);
      for (int block = unit.begin; block < unit.end; ++block, ++count) {
        const int stage = count % STAGES;
        ptx::mbarrier_wait(full + stage, count / STAGES % 2);
        if constexpr (!GROUPS) {
          ptx::wgmma_fence(sums);
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab) multiply(sums[slab], stage, slab, block > unit.begin);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>(sums);  // the block before this one is done
          if (block > unit.begin) release((count - 1) % STAGES);
        } else {
          const float* at = scales + stage * SCALES;
#pragma unroll
          for (int slab = 0; slab < SLABS; ++slab) {
            ptx::wgmma_fence(sums);
            multiply(sums[0], stage, slab, false);
            ptx::wgmma_commit();
            const float* own = at + (first_slab + slab) * 64 + row;
            float group_scale[2] = {own[0], own[8]};
            ptx::wgmma_wait<0>(sums);
            if (!A_GROUPS && slab == SLABS - 1) release(stage);
            if (GROUPS && SPLITS && unit.split_tile >= 0) {  // one of several parts leaves the sums to the last
#pragma unroll
              for (int i = 0; i < COLUMNS; ++i) {
                int token = i / 4 * 8 + lane % 4 * 2 + i % 2, weight = first_slab * 64 + row + i / 2 % 2 * 8;
                if (m0 + token >= gemm.m) continue;
                *group_sum<TOKENS, WEIGHTS>(gemm, tile_of(unit), block, token, weight) = sums[0][i];
              }
              continue;
            }
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
              float value = __int2float_rn(sums[0][i]);
              if constexpr (A_GROUPS) value = __fmul_rn(value, at[WEIGHTS + i / 4 * 8 + lane % 4 * 2 + i % 2]);
              scaled[slab][i] = __fmaf_rn(value, group_scale[i / 2 % 2], scaled[slab][i]);
            }
          }
          if (A_GROUPS) release(stage);
        }
      }
      if (GROUPS && SPLITS && unit.split_tile >= 0) {
        const int own = tile_of(unit);
        if (comes_last(gemm, own * TEAM + first_slab / SLABS, in_group, flags + warpgroup, sync)) {
          add_groups<TOKENS, WEIGHTS, SLABS * 64, A_GROUPS>(gemm, own, first_slab * 64, m0, n0 - first_slab * 64,
                                                            in_group, 128);
        }
        continue;
      }
      if constexpr (!GROUPS) {
        if constexpr (TURNS) {  // what it has begun to multiply is not waited for
          __syncwarp();
          if (lane == 0) ptx::mbarrier_arrive(turn + (warpgroup ^ 1));
        }
        ptx::wgmma_wait<0>(sums);
        release((count - 1) % STAGES);
        if (SPLITS && unit.split_tile >= 0) {
          int team = tile_of(unit) * TEAM + first_slab / SLABS;
          int (&flat)[SLABS * COLUMNS] = reinterpret_cast<int (&)[SLABS * COLUMNS]>(sums);
          if (!sum_parts(gemm, flat, team, unit.part, in_group, 128, flags + warpgroup, sync)) continue;
        }
      }

      if (!EARLY) load_rows();
      sync();  // a_scales are there
#pragma unroll
      for (int slab = 0; slab < SLABS; ++slab) {
#pragma unroll
        for (int first = 0; first < TOKENS; first += STAGED) {
          auto value = [&](int i) {  // register i of this part: token i / 4 * 8 + ..., row + i / 2 % 2 * 8
            int at = first / 2 + i, half = i / 2 % 2, token = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
            float sum = GROUPS ? scaled[slab][at] : __int2float_rn(sums[GROUPS ? 0 : slab][at]);
            return finish(sum, a_scales[token], b_scale[slab][half], bias[slab][half]);
          };
          if (gemm.d_type == Float::fp32) {
#pragma unroll
            for (int i = 0; i < STAGED / 2; ++i) {
              int m = m0 + first + i / 4 * 8 + lane % 4 * 2 + i % 2, n = n0 + slab * 64 + row + i / 2 % 2 * 8;
              float result = value(i);
              if (m < gemm.m && n < gemm.n) static_cast<float*>(gemm.d)[int64_t(m) * gemm.n + n] = result;
            }
            continue;
          }
#pragma unroll
          for (int i = 0; i < STAGED / 2; i += 8) {  // 16 tokens x 16 weights of a warp
            uint32_t packed[4];
#pragma unroll
            for (int p = 0; p < 4; ++p) packed[p] = pack(gemm.d_type, value(i + p * 2), value(i + p * 2 + 1));
            int token = i * 2 + lane / 16 * 8 + lane % 8, weight = warp % 4 * 16 + lane / 8 % 2 * 8;
            ptx::stmatrix_transposed(staged + token * PITCH + weight, packed[0], packed[1], packed[2], packed[3]);
          }
          sync();
          store_rows<128, STAGED, 64>(gemm, staged, PITCH, m0 + first, n0 + slab * 64, in_group);
          sync();  // before the staging is filled again
        }
      }
      if (gemm.d_type == Float::fp32) sync();  // before a_scales are written again
    }
  }
  if constexpr (CLUSTER > 1) {
    __syncwarp();
    ptx::cluster_sync();  // a CTA must not end while another one of its cluster copies into it or arrives there
  }
#else
  __trap();  // built for another architecture than sm_90a
#endif
}
