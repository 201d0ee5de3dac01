// Host stand-in for the CUDA execution model: g++ compiles the kernels unchanged and runs them, one fibre per thread.
//
// It is adversarial rather than fast. A seed decides which warp runs next and when it is preempted; asynchronous copies
// poison their destination when issued and land at a random later time (cp.async: only at its wait); wgmma reads its
// operands either when issued or when waited for, and its registers hold garbage in between; shared memory starts as
// garbage. A missing or early barrier therefore gives wrong numbers, or a deadlock, which is reported as an exception.
//
// Not modelled: encodings of instructions, memory proxies and their fences, alignment faults, register limits, speed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
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

struct Mbarrier {
  int count = 0, pending = 0, bytes = 0, phase = 0;
};

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

inline void entry() {
  machine.kernel();
  Fibre& me = self();
  me.done = true;
  if (!me.copy_groups.empty() || !me.copies.empty()) fail("a thread left with cp.async in flight");
  if (!me.accumulators.empty()) fail("a thread left with wgmma in flight");
  _longjmp(machine.scheduler, 1);
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

// Values that a correct kernel never reads.
inline void poison(void* at, size_t bytes) { memset(at, 0x5a, bytes); }

template <class T>
T* from_lane(void** brought, unsigned lane) {
  return static_cast<T*>(brought[lane]);
}

template <class T>
T shuffle(T value, unsigned source) {
  struct Mine {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  warp_collective(&mine, [](void** all) {
    for (unsigned lane = 0; lane < std::min<size_t>(WARP, self().cta->fibres.size()); ++lane) {
      Mine* at = from_lane<Mine>(all, lane);
      at->result = from_lane<Mine>(all, at->source % WARP)->value;
    }
  });
  return mine.result;
}

}  // namespace emulate

inline void __syncthreads() { emulate::barrier(0, emulate::self().cta->fibres.size()); }
inline void __syncwarp(unsigned = ~0u) {
  emulate::warp_collective(nullptr, [](void**) {});
}
inline void __threadfence() { emulate::step(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulate::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulate::shuffle(value, (emulate::self().thread % 32) ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  unsigned lane = emulate::self().thread % 32;
  return emulate::shuffle(value, lane + delta < 32 ? lane + delta : lane);
}
template <class T>
T atomicAdd(T* at, T value) {
  emulate::step();
  T old = *at;
  *at += value;
  return old;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(int(bits)); }
inline unsigned __float_as_uint(float value) { return unsigned(__float_as_int(value)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __int2float_rn(int value) { return float(value); }
inline int __float2int_rn(float value) {  // saturating, ties to even, NaN to 0
  if (value != value) return 0;
  if (value >= 2147483648.f) return INT_MAX;
  if (value <= -2147483648.f) return INT_MIN;
  return int(nearbyintf(value));
}

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace ptx {

struct TensorMap {  // a matrix of bytes: boxes of `box_rows` x 128 bytes with the 128-byte swizzle
  const uint8_t* base;
  uint64_t rows, columns, pitch;
  unsigned box_rows;
};

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

inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  struct Mine {
    const uint8_t* row;
    uint32_t* r;
  } mine{static_cast<const uint8_t*>(row), r};
  shared_address(row);
  emulate::warp_collective(&mine, [](void** all) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        const uint8_t* from = emulate::from_lane<Mine>(all, i * 8 + lane / 4)->row + lane % 4 * 4;
        memcpy(&emulate::from_lane<Mine>(all, lane)->r[i], from, 4);
      }
    }
  });
}
// Four 8x8 matrices of 16-bit values, transposed on the way: lane l holds (row l/4, columns 2(l%4), +1) of each.
inline void stmatrix_transposed(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  struct Mine {
    uint8_t* row;
    uint32_t r[4];
  } mine{static_cast<uint8_t*>(row), {r0, r1, r2, r3}};
  shared_address(row);
  emulate::warp_collective(&mine, [](void** all) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        for (unsigned half = 0; half < 2; ++half) {
          uint16_t value = uint16_t(emulate::from_lane<Mine>(all, lane)->r[i] >> 16 * half);
          memcpy(emulate::from_lane<Mine>(all, i * 8 + lane % 4 * 2 + half)->row + lane / 4 * 2, &value, 2);
        }
      }
    }
  });
}

inline void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  struct Mine {
    int d[4];
    uint32_t a[4], b[2];
  } mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulate::warp_collective(&mine, [](void** all) {
    int8_t a[16][32], b[8][32];
    for (unsigned lane = 0; lane < 32; ++lane) {
      Mine* from = emulate::from_lane<Mine>(all, lane);
      for (unsigned i = 0; i < 4; ++i) memcpy(&a[lane / 4 + i % 2 * 8][lane % 4 * 4 + i / 2 * 16], &from->a[i], 4);
      for (unsigned i = 0; i < 2; ++i) memcpy(&b[lane / 4][lane % 4 * 4 + i * 16], &from->b[i], 4);
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        int sum = 0;
        for (unsigned k = 0; k < 32; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[lane % 4 * 2 + i % 2][k];
        emulate::from_lane<Mine>(all, lane)->d[i] += sum;
      }
    }
  });
  for (unsigned i = 0; i < 4; ++i) d[i] = mine.d[i];
}

// wgmma: a thread computes its own part of the tile, so its warpgroup need not meet.
inline void wgmma_compute(emulate::Accumulator& sum) {
  const emulate::Wgmma op = sum.pending.front();
  sum.pending.erase(sum.pending.begin());
  const auto& me = emulate::self();
  auto row = [&me](uint64_t descriptor, unsigned r, int8_t* to) {  // 32 bytes of a row, K-major, 128-byte swizzle
    if (descriptor >> 62 != 1) emulate::fail("a wgmma descriptor without the 128-byte swizzle");
    uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    uint32_t at = (uint32_t(descriptor & 0x3fff) << 4) + r / 8 * stride + r % 8 * 128;
    for (unsigned half = 0; half < 2; ++half) {
      uint32_t plain = at + half * 16, swizzled = plain ^ (plain >> 7 & 7) << 4;
      if (swizzled + 16 > me.cta->shared_bytes) emulate::fail("a wgmma operand outside shared memory");
      memcpy(to + half * 16, me.cta->shared + swizzled, 16);
    }
  };
  unsigned lane = me.thread % 32, first = me.thread / 32 % 4 * 16 + lane / 4;
  int8_t a[2][32], b[32];
  row(op.a, first, a[0]);
  row(op.a, first + 8, a[1]);
  for (int j = 0; j < sum.size / 4; ++j) {
    for (int pair = 0; pair < 2; ++pair) {
      row(op.b, j * 8 + lane % 4 * 2 + pair, b);
      for (int half = 0; half < 2; ++half) {
        int dot = 0;
        for (int k = 0; k < 32; ++k) dot += a[half][k] * b[k];
        int& to = sum.value[j * 4 + half * 2 + pair];
        to = op.accumulate ? to + dot : dot;
      }
    }
  }
}

template <int SIZE>
void wgmma(int (&d)[SIZE], uint64_t a, uint64_t b, bool accumulate) {
  emulate::step();
  auto& me = emulate::self();
  emulate::Accumulator* sum = nullptr;
  for (auto& each : me.accumulators) {
    if (each.registers == d) sum = &each;
  }
  if (!sum) {
    me.accumulators.push_back({d, SIZE, std::vector<int>(d, d + SIZE), {}, 0});
    sum = &me.accumulators.back();
    emulate::poison(d, sizeof(d));
  }
  sum->pending.push_back({a, b, accumulate, me.wgmma_group});
  sum->last_group = me.wgmma_group;
  if (emulate::machine.chaos && emulate::machine.random.one_in(2)) {  // it may run at once, or as late as at the wait
    while (!sum->pending.empty()) wgmma_compute(*sum);
  }
}
template <int ROWS, int SIZE>
void wgmma_fence(int (&)[ROWS][SIZE]) {
  emulate::step();
}
inline void wgmma_commit() { emulate::self().wgmma_group += 1; }
template <int PENDING, int ROWS, int SIZE>
void wgmma_wait(int (&)[ROWS][SIZE]) {
  emulate::step();
  auto& me = emulate::self();
  for (auto& sum : me.accumulators) {
    while (!sum.pending.empty() && sum.pending.front().group + PENDING < me.wgmma_group) wgmma_compute(sum);
    if (sum.last_group + PENDING < me.wgmma_group) memcpy(sum.registers, sum.value.data(), sum.size * sizeof(int));
  }
  auto done = [&me](const emulate::Accumulator& sum) { return sum.last_group + PENDING < me.wgmma_group; };
  me.accumulators.erase(std::remove_if(me.accumulators.begin(), me.accumulators.end(), done), me.accumulators.end());
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

inline uint32_t pack_bf16(float low, float high) {
  auto round = [](float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
inline uint32_t pack_fp16(float low, float high) {
  auto round = [](float x) -> uint32_t {
    uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
    float size = fabsf(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;
    if (size < 6.103515625e-05f) return sign | uint32_t(nearbyintf(size * 16777216.f));  // subnormal
    uint32_t bits = __float_as_uint(size) - (112u << 23);
    return sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13);
  };
  return round(low) | round(high) << 16;
}
inline float unpack_fp16(uint16_t bits) {
  float size = (bits & 0x7c00) == 0x7c00 ? __uint_as_float(0x7f800000u | (bits & 0x3ffu) << 13)
                                         : __uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f;
  return bits & 0x8000 ? -size : size;
}

}  // namespace ptx
