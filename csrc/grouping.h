// Channels that share a scale. Where the ops' schemas let `group_size` be none, it is the whole row: per-channel for
// weights, per-token for activations. Below these entries there are only numbers.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

/// Channels of a group in rows of `columns`, which it divides.
inline int64_t channels_of(std::optional<int64_t> group_size, int64_t columns) {
  const int64_t channels = group_size.value_or(columns);
  STD_TORCH_CHECK(channels > 0 && columns % channels == 0, "K = ", columns,
                  " is not a multiple of group_size = ", channels);
  return channels;
}
