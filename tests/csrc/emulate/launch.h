// The scheduler: starts the CTAs of a grid, decides which thread runs next, and when an asynchronous copy lands.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <utility>

#include "machine.h"

namespace emulate {

inline void entry() {
  machine.kernel();
  Fibre& me = self();
  me.done = true;
  if (!me.copy_groups.empty() || !me.copies.empty()) fail("a thread left with cp.async in flight");
  if (!me.accumulators.empty()) fail("a thread left with wgmma in flight");
  _longjmp(machine.scheduler, 1);
}

inline void land(size_t which) {
  Landing landing = std::move(machine.landings[which]);
  machine.landings[which] = std::move(machine.landings.back());
  machine.landings.pop_back();
  for (auto& copy : landing.copies) copy();
  Mbarrier& bar = mbarrier(*landing.cta, landing.barrier);
  landing.bytes ? bar.bytes -= landing.bytes : bar.pending -= 1;
  settle(*landing.cta, landing.barrier);
}

inline void start(dim3 index, unsigned cluster_size, unsigned threads, size_t shared_bytes) {
  auto cluster = std::make_unique<Cluster>();
  for (unsigned rank = 0; rank < cluster_size; ++rank) {
    auto cta = std::make_unique<Cta>();
    cta->index = {index.x + rank, index.y, index.z};
    cta->rank = rank;
    cta->running = threads;
    cta->cluster = cluster.get();
    cta->shared_bytes = shared_bytes;
    cta->shared = static_cast<uint8_t*>(aligned_alloc(1024, (shared_bytes + 2047) / 1024 * 1024));
    memset(cta->shared, 0x5a, shared_bytes);
    auto& spare = machine.spare_stacks[threads];
    if (spare.empty()) {
      void* fresh = mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (fresh == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a CTA");
      spare.push_back(static_cast<uint8_t*>(fresh));
    }
    cta->stacks = spare.back();
    spare.pop_back();
    cta->fibres.resize(threads);
    cta->warps.resize((threads + WARP - 1) / WARP);
    for (unsigned t = 0; t < threads; ++t) {
      cta->fibres[t].thread = t;
      cta->fibres[t].cta = cta.get();
      cta->warps[t / WARP].ready |= 1u << t % WARP;
    }
    for (auto& warp : cta->warps) warp.priority = machine.random();
    cluster->ctas.push_back(std::move(cta));
  }
  machine.resident.push_back(std::move(cluster));
}

inline void drop(Cta& cta) {
  free(cta.shared);
  machine.spare_stacks[unsigned(cta.fibres.size())].push_back(cta.stacks);
}

// The next fibre to run: of the ready warp with the highest priority; null where none is ready.
inline Fibre* pick() {
  Cta* best_cta = nullptr;
  unsigned best = 0;
  for (auto& cluster : machine.resident) {
    for (auto& cta : cluster->ctas) {
      for (unsigned w = 0; w < cta->warps.size(); ++w) {
        if (!cta->warps[w].ready) continue;
        if (best_cta && cta->warps[w].priority <= best_cta->warps[best].priority) continue;
        best_cta = cta.get(), best = w;
      }
    }
  }
  if (!best_cta) return nullptr;
  Warp& warp = best_cta->warps[best];
  unsigned lane = __builtin_ctz(warp.ready);
  if (machine.chaos) {
    unsigned turn = machine.random() % WARP;
    uint32_t rotated = turn ? warp.ready >> turn | warp.ready << (WARP - turn) : warp.ready;
    lane = (__builtin_ctz(rotated) + turn) % WARP;
  }
  warp.ready &= ~(1u << lane);
  return &best_cta->fibres[best * WARP + lane];
}

inline void resume(Fibre& fibre) {
  machine.current = &fibre;
  threadIdx.x = fibre.thread;
  threadIdx.y = threadIdx.z = 0;
  blockIdx = fibre.cta->index;
  if (fibre.started) _longjmp(fibre.at, 1);
  fibre.started = true;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.cta->stacks + fibre.thread * STACK;
  fibre.context.uc_stack.ss_size = STACK;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, entry, 0);
  setcontext(&fibre.context);
}

inline void schedule() {
  if (_setjmp(machine.scheduler) == 2) return;
  while (machine.error.empty()) {
    if (machine.current && machine.current->done) {
      machine.current->done = false;
      machine.current->cta->running -= 1;
    }
    machine.current = nullptr;
    if (machine.chaos && !machine.landings.empty() && machine.random.one_in(32)) {
      land(machine.random() % machine.landings.size());
    }
    if (Fibre* next = pick()) resume(*next);
    if (machine.landings.empty()) return;
    land(machine.chaos ? machine.random() % machine.landings.size() : 0);
  }
}

inline bool finished(Cluster& cluster) {
  for (auto& cta : cluster.ctas) {
    if (cta->running) return false;
  }
  return true;
}

/// Run `kernel` (a closure over its arguments) on a grid of CTAs of `threads` threads, `cluster` CTAs to a cluster.
/// seed 0 runs the threads in order; any other seed shuffles them. Throws std::runtime_error on deadlock or misuse.
inline void launch(dim3 grid, unsigned threads, size_t shared_bytes, uint64_t seed, std::function<void()> kernel,
                   unsigned cluster = 1) {
  machine.kernel = std::move(kernel);
  machine.chaos = seed != 0;
  machine.random.state = seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d;
  machine.error.clear();
  machine.current = nullptr;
  for (int i = 0; i < 8; ++i) machine.random();
  blockDim = {threads};
  gridDim = grid;
  if (grid.x % cluster) throw std::runtime_error("the grid is not a multiple of the cluster");
  uint64_t total = uint64_t(grid.x) * grid.y * grid.z, next = 0;
  unsigned window = machine.chaos ? 1 + machine.random() % 3 : 1;
  while (next < total || !machine.resident.empty()) {
    while (next < total && machine.resident.size() < window) {
      dim3 index{unsigned(next % grid.x), unsigned(next / grid.x % grid.y), unsigned(next / grid.x / grid.y)};
      start(index, cluster, threads, shared_bytes);
      next += cluster;
    }
    schedule();
    bool progress = false;
    for (size_t i = 0; i < machine.resident.size();) {
      if (machine.error.empty() && !finished(*machine.resident[i])) {
        ++i;
        continue;
      }
      for (auto& landing : machine.landings) {
        bool stray = landing.cta->cluster == machine.resident[i].get();
        if (stray) machine.error = "a copy was in flight when its CTA ended";
      }
      for (auto& cta : machine.resident[i]->ctas) drop(*cta);
      machine.resident.erase(machine.resident.begin() + i);
      progress = true;
    }
    if (!progress) machine.error = "deadlock";
    if (!machine.error.empty()) {
      for (auto& each : machine.resident) {
        for (auto& cta : each->ctas) drop(*cta);
      }
      machine.resident.clear();
      machine.landings.clear();
      throw std::runtime_error(machine.error);
    }
  }
}

}  // namespace emulate
