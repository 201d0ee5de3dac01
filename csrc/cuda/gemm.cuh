// The GEMM kernels by number: tile, granularity, and whether activations have a scale per group.
#pragma once

#include <type_traits>
#include <utility>

#include "gemm_mma.cuh"
#include "gemm_wgmma.cuh"

template <int TILE, int GRANULARITY, bool A_GROUPS>
struct GemmKernel {
  static constexpr int index = TILE;
  static constexpr layout::Tile tile = layout::TILES[TILE];
  static constexpr int shared_bytes = tile.shared_bytes(GRANULARITY);
  static constexpr bool exists = tile.does(GRANULARITY) && !(A_GROUPS && GRANULARITY == layout::CHANNEL);
  static constexpr auto function() {
    if constexpr (tile.wgmma()) {
      return &gemm_wgmma<TILE, GRANULARITY, A_GROUPS>;
    } else {
      return &gemm_mma<TILE, GRANULARITY, A_GROUPS>;
    }
  }
};

/// Calls visit(GemmKernel<...>()) for the kernel of these numbers; false where there is none.
template <class Visit, int... TILE>
bool with_kernel(int tile, int granularity, bool a_groups, Visit visit, std::integer_sequence<int, TILE...>) {
  bool found = false;
  auto consider = [&](auto kernel, int its_granularity, bool its_a_groups) {
    if constexpr (decltype(kernel)::exists) {
      if (granularity == its_granularity && a_groups == its_a_groups) {
        visit(kernel);
        found = true;
      }
    }
  };
  auto each = [&](auto index) {
    constexpr int I = decltype(index)::value;
    if (I != tile) return;
    consider(GemmKernel<I, layout::CHANNEL, false>(), layout::CHANNEL, false);
    consider(GemmKernel<I, layout::GROUP_128, false>(), layout::GROUP_128, false);
    consider(GemmKernel<I, layout::GROUP_128, true>(), layout::GROUP_128, true);
    consider(GemmKernel<I, layout::GROUP_ANY, false>(), layout::GROUP_ANY, false);
    consider(GemmKernel<I, layout::GROUP_ANY, true>(), layout::GROUP_ANY, true);
  };
  (each(std::integral_constant<int, TILE>()), ...);
  return found;
}

template <class Visit>
bool with_kernel(int tile, int granularity, bool a_groups, Visit visit) {
  return with_kernel(tile, granularity, a_groups, visit, std::make_integer_sequence<int, layout::TILE_COUNT>());
}
