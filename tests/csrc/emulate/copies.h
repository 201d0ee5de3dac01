// Asynchronous copies to shared memory: tensor maps and cp.async.
#pragma once

#include <cstdint>
#include <utility>

#include "barriers.h"
#include "machine.h"

namespace ptx {

struct TensorMap {  // a matrix of bytes: boxes of `box_rows` x 128 bytes with the 128-byte swizzle
  const uint8_t* base;
  uint64_t rows, columns, pitch;
  unsigned box_rows;
};

inline void prefetch_tensor_map(const TensorMap*) {}
inline void tma_load_into(emulate::Cta& cta, const TensorMap& map, uint32_t to, uint32_t bar, int column, int row) {
  static const uint8_t zeros[16] = {};
  emulate::Landing landing{{}, &cta, bar, map.box_rows * 128};
  if (!cta.running) emulate::fail("a copy into a CTA that has ended");
  if (to % 1024) emulate::fail("a swizzled box that is not aligned to 1024 bytes");
  if (to + map.box_rows * 128 > cta.shared_bytes) emulate::fail("a box outside shared memory");
  landing.copies.reserve(map.box_rows * 8);
  for (unsigned r = 0; r < map.box_rows; ++r) {
    for (unsigned chunk = 0; chunk < 8; ++chunk) {
      uint64_t y = uint64_t(row) + r, x = uint64_t(column) + chunk * 16;
      bool inside = row >= 0 && column >= 0 && y < map.rows && x < map.columns;
      const uint8_t* from = inside ? map.base + y * map.pitch + x : zeros;
      landing.copies.push_back({cta.shared + to + r * 128 + (chunk ^ r % 8) * 16, from, 16, 16});
    }
  }
  emulate::poison(cta.shared + to, map.box_rows * 128);
  emulate::machine.landings.push_back(std::move(landing));
}
inline void tma_load(const TensorMap* map, void* to, uint64_t* bar, int column, int row, uint64_t) {
  emulate::step();
  tma_load_into(*emulate::self().cta, *map, shared_address(to), shared_address(bar), column, row);
}
inline void tma_multicast(const TensorMap* map, void* to, uint64_t* bar, int column, int row, uint64_t, unsigned mask) {
  emulate::step();
  for (auto& cta : emulate::self().cta->cluster->ctas) {
    if (mask >> cta->rank & 1) tma_load_into(*cta, *map, shared_address(to), shared_address(bar), column, row);
  }
}

template <int BYTES>
void cp_async(void* to, const void* from, unsigned valid = BYTES) {
  if (shared_address(to) % BYTES || (valid && uintptr_t(from) % BYTES)) emulate::fail("a misaligned cp.async");
  emulate::poison(to, BYTES);
  emulate::self().copies.push_back({static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), BYTES, valid});
}
inline void cp_async_commit() {
  emulate::step();
  emulate::self().copy_groups.push_back(std::move(emulate::self().copies));
  emulate::self().copies.clear();
}
template <int PENDING>
void cp_async_wait() {
  emulate::step();
  auto& groups = emulate::self().copy_groups;
  while (groups.size() > PENDING) {
    for (auto& copy : groups.front()) copy();
    groups.pop_front();
  }
}
inline void cp_async_arrive(uint64_t* bar) {  // when this thread's copies so far have landed
  emulate::step();
  auto& me = emulate::self();
  emulate::machine.landings.push_back({std::move(me.copies), me.cta, shared_address(bar), 0});
  me.copies.clear();
}

}  // namespace ptx
