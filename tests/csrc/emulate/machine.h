// The emulated machine: its threads (one fibre each), warps, CTAs and clusters, and what one of them may wait for.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 96 * 1024;  // of a fibre

struct Random {  // xorshift
  uint64_t state = 1;
  uint32_t operator()() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return uint32_t(state >> 32);
  }
  bool one_in(uint32_t n) { return (*this)() % n == 0; }
};

struct Rendezvous {  // a meeting of a fixed number of threads
  unsigned arrived = 0;
  void* brought[WARP];
};

struct Mbarrier { int count = 0, pending = 0, bytes = 0, phase = 0; };

struct Copy {  // of one asynchronous copy, to be done later
  uint8_t* to;
  const uint8_t* from;
  unsigned bytes, valid;
  void operator()() const {
    memcpy(to, from, valid);
    memset(to + valid, 0, bytes - valid);
  }
};

struct Wgmma {
  uint64_t a, b;
  bool accumulate;
  unsigned group;  // number of the commit group it belongs to
};

struct Accumulator {  // registers owned by wgmma operations in flight
  int* registers;
  int size;
  std::vector<int> value;
  std::vector<Wgmma> pending;
  unsigned last_group;
};

struct Cta;

struct Warp {
  uint32_t ready = 0, priority = 0;
  Rendezvous collective;
};

struct Fibre {
  jmp_buf at;
  ucontext_t context;
  bool started = false, done = false;
  unsigned thread = 0;
  Cta* cta = nullptr;
  const void* waits_for = nullptr;
  std::vector<Copy> copies;                   // cp.async, not yet committed
  std::deque<std::vector<Copy>> copy_groups;  // committed
  std::vector<Accumulator> accumulators;
  unsigned wgmma_group = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  Rendezvous sync;
};

struct Cta {
  dim3 index;
  unsigned rank = 0, running = 0;
  int free_registers = 0;  // beyond those that its threads have
  Cluster* cluster = nullptr;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  uint8_t* stacks = nullptr;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Rendezvous barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;
};

struct Landing {  // an asynchronous copy through an mbarrier
  std::vector<Copy> copies;
  Cta* cta;
  uint32_t barrier;
  unsigned bytes;  // 0: an arrival instead
};

struct Machine {
  Random random;
  bool chaos = false;
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<Landing> landings;
  std::map<unsigned, std::vector<uint8_t*>> spare_stacks;  // by the number of threads
  Fibre* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> kernel;
  std::string error;
};
inline Machine machine;

inline Fibre& self() { return *machine.current; }
inline Warp& own_warp() { return self().cta->warps[self().thread / WARP]; }

[[noreturn]] inline void fail(const std::string& what) {
  machine.error = what;
  _longjmp(machine.scheduler, 2);
}

inline void leave() {  // to the scheduler, until it resumes this fibre
  Fibre* me = machine.current;
  if (_setjmp(me->at) == 0) _longjmp(machine.scheduler, 1);
}

// Every emulated operation begins here: a chance for another warp to run, or for the order of warps to change.
inline void step() {
  if (!machine.chaos) return;
  uint32_t dice = machine.random();
  if (dice % 64 == 0) own_warp().priority = machine.random();
  if (dice % 16 < 2) {
    own_warp().ready |= 1u << self().thread % WARP;
    leave();
  }
}

inline void park(const void* key) {
  self().waits_for = key;
  leave();
}

inline void unpark(Cta& cta, unsigned begin, unsigned end, const void* key) {
  for (unsigned t = begin; t < end; ++t) {
    if (cta.fibres[t].waits_for != key) continue;
    cta.fibres[t].waits_for = nullptr;
    cta.warps[t / WARP].ready |= 1u << t % WARP;
  }
}

// True for the last thread to come; the others sleep until it unparks them.
inline bool last_to_meet(Rendezvous& place, unsigned size) {
  if (++place.arrived == size) {
    place.arrived = 0;
    return true;
  }
  park(&place);
  return false;
}

// Runs `action` once for the whole warp, on the pointers that its lanes brought.
template <class Action>
void warp_collective(void* mine, Action action) {
  step();
  Fibre& me = self();
  unsigned size = unsigned(std::min<size_t>(WARP, me.cta->fibres.size())), lane = me.thread % WARP;
  Rendezvous& place = own_warp().collective;
  place.brought[lane] = mine;
  if (!last_to_meet(place, size)) return;
  action(place.brought);
  unpark(*me.cta, me.thread - lane, me.thread - lane + size, &place);
}

inline void barrier(unsigned id, unsigned threads) {
  step();
  Cta& cta = *self().cta;
  if (last_to_meet(cta.barriers[id], threads)) unpark(cta, 0, unsigned(cta.fibres.size()), &cta.barriers[id]);
}

inline void settle(Cta& cta, uint32_t at) {
  Mbarrier& bar = cta.mbarriers.at(at);
  if (bar.pending < 0) fail("more arrivals than an mbarrier counts");
  if (bar.pending || bar.bytes) return;
  bar.pending = bar.count;
  bar.phase ^= 1;
  unpark(cta, 0, cta.fibres.size(), &bar);
}

inline Mbarrier& mbarrier(Cta& cta, uint32_t at) {
  auto found = cta.mbarriers.find(at);
  if (found == cta.mbarriers.end()) fail("an mbarrier was used before its initialisation");
  return found->second;
}

// Values that a correct kernel never reads.
inline void poison(void* at, size_t bytes) { memset(at, 0x5a, bytes); }

template <class T>
T* from_lane(void** brought, unsigned lane) {
  return static_cast<T*>(brought[lane]);
}

}  // namespace emulate
