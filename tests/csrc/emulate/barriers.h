// Shared memory, barriers in it, clusters, and the registers that warpgroups hand to each other.
#pragma once

#include <cstdint>

#include "machine.h"

namespace ptx {

inline uint8_t* shared_memory() { return emulate::self().cta->shared; }
inline uint32_t shared_address(const void* p) {
  auto& cta = *emulate::self().cta;
  auto offset = static_cast<const uint8_t*>(p) - cta.shared;
  if (offset < 0 || size_t(offset) >= cta.shared_bytes) emulate::fail("an address outside shared memory");
  return uint32_t(offset);
}

inline void mbarrier_init(uint64_t* bar, unsigned count) {
  int n = int(count);
  emulate::self().cta->mbarriers[shared_address(bar)] = {n, n, 0, 0};
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(uint64_t* bar) {
  emulate::step();
  auto& cta = *emulate::self().cta;
  emulate::mbarrier(cta, shared_address(bar)).pending -= 1;
  emulate::settle(cta, shared_address(bar));
}
inline void mbarrier_arrive_remote(uint64_t* bar, unsigned rank) {
  emulate::step();
  auto& cta = *emulate::self().cta->cluster->ctas[rank];
  if (!cta.running) emulate::fail("an arrival at a CTA that has ended");
  emulate::mbarrier(cta, shared_address(bar)).pending -= 1;
  emulate::settle(cta, shared_address(bar));
}
inline void mbarrier_expect(uint64_t* bar, unsigned bytes) {
  emulate::step();
  auto& cta = *emulate::self().cta;
  auto& state = emulate::mbarrier(cta, shared_address(bar));
  state.bytes += int(bytes);
  state.pending -= 1;
  emulate::settle(cta, shared_address(bar));
}
inline void mbarrier_wait(uint64_t* bar, unsigned parity) {
  emulate::step();
  auto& state = emulate::mbarrier(*emulate::self().cta, shared_address(bar));
  while (state.phase == int(parity)) emulate::park(&state);
}

inline void named_barrier(unsigned id, unsigned threads) { emulate::barrier(id, threads); }
inline unsigned cluster_rank() { return emulate::self().cta->rank; }
inline void cluster_sync() {
  emulate::step();
  auto& cluster = *emulate::self().cta->cluster;
  unsigned size = unsigned(cluster.ctas.size() * emulate::self().cta->fibres.size());
  if (!emulate::last_to_meet(cluster.sync, size)) return;
  for (auto& cta : cluster.ctas) emulate::unpark(*cta, 0, unsigned(cta->fibres.size()), &cluster.sync);
}

// Registers: a CTA has those of its launch and no others, so growth waits for what other threads give back.
inline int registers_at_launch() { return int(65536 / emulate::self().cta->fibres.size() / 8 * 8); }
template <int COUNT>
void registers_grow() {
  emulate::step();
  auto& free = emulate::self().cta->free_registers;
  while (free < COUNT - registers_at_launch()) emulate::park(&free);
  free -= COUNT - registers_at_launch();
}
template <int COUNT>
void registers_shrink() {
  emulate::step();
  auto& cta = *emulate::self().cta;
  cta.free_registers += registers_at_launch() - COUNT;
  emulate::unpark(cta, 0, unsigned(cta.fibres.size()), &cta.free_registers);
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
inline int thread_again() { return threadIdx.x; }

}  // namespace ptx
