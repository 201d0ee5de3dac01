// The GEMM kernels under emulation, and the tile chooser, behind a C interface for the Python tests.
#include "gemm.cuh"
#include "tickets.h"

#ifdef MUTANTS  // the sources are patched to misbehave in the way of this number
extern "C" void set_mutant(int number) { mutant = number; }
#endif

#ifndef ONLY_TILES  // bits: fewer kernels compile faster
#define ONLY_TILES ~0u
#endif

struct Arguments {
  int32_t tile, a_groups, m, n, k, groups, grid, whole, split;
  int32_t bias_type, d_type;
  int64_t a_scale_row, a_scale_group, b_scale_row, b_scale_group;
  const int8_t *a, *b;
  const float *a_scale, *b_scale;
  const void* bias;
  void* d;
  uint64_t seed;
};

static const char* run(const Arguments& x) {
  static std::string error;
  const layout::Tile& tile = layout::TILES[x.tile];
  layout::Granularity granularity = layout::granularity_of(x.k, x.k / x.groups);
  auto schedule = layout::schedule({x.m, x.n, x.k, granularity}, tile, x.whole, x.split);
  int ctas = schedule.split_tiles() * tile.cluster, teams = ctas * tile.team();
  std::vector<int> partials(ctas * tile.exchanged(granularity, x.split, x.groups), 0x5a5a5a5a);
  std::vector<unsigned> tickets(teams, 0);
  Gemm gemm{};
  gemm.a = x.a, gemm.b = x.b, gemm.m = x.m, gemm.n = x.n, gemm.k = x.k;
  gemm.groups = x.groups, gemm.group_steps = x.k / x.groups / 32;
  gemm.a_scale = x.a_scale, gemm.a_scale_row = x.a_scale_row, gemm.a_scale_group = x.a_scale_group;
  gemm.b_scale = x.b_scale, gemm.b_scale_row = x.b_scale_row, gemm.b_scale_group = x.b_scale_group;
  gemm.bias = x.bias, gemm.bias_type = Float(x.bias_type), gemm.d = x.d, gemm.d_type = Float(x.d_type);
  gemm.partials = partials.data(), gemm.tickets = tickets.data();
  gemm.early_weights = x.seed % 2 == 1, gemm.schedule = schedule;
  ptx::TensorMap a_map{reinterpret_cast<const uint8_t*>(x.a), uint64_t(x.m), uint64_t(x.k), uint64_t(x.k),
                       unsigned(tile.tokens / tile.cluster)};
  ptx::TensorMap b_map{reinterpret_cast<const uint8_t*>(x.b), uint64_t(x.n), uint64_t(x.k), uint64_t(x.k),
                       unsigned(tile.weights)};
  error.clear();
  try {
    bool found = with_kernel(x.tile, granularity, x.a_groups, [&](auto kernel) {
      using Kernel = decltype(kernel);
      if constexpr (ONLY_TILES >> Kernel::index & 1) {
        unsigned units = unsigned(schedule.units()) * tile.cluster;
        unsigned grid = x.grid ? unsigned(layout::least(x.grid * tile.cluster, int(units))) : units;
        if constexpr (Kernel::tile.wgmma()) {
          emulate::launch(
              {grid}, tile.threads(), Kernel::shared_bytes, x.seed, [&] { Kernel::function()(gemm, a_map, b_map); },
              tile.cluster);
        } else {
          emulate::launch({units}, tile.threads(), Kernel::shared_bytes, x.seed, [&] { Kernel::function()(gemm); });
        }
      }
    });
    if (!found) error = "no such kernel";
  } catch (const std::exception& e) {
    error = e.what();
  }
  for (unsigned ticket : tickets) {
    if (ticket && error.empty()) error = "a ticket was left behind";
  }
  return error.c_str();
}

extern "C" const char* run_gemm(const Arguments* arguments) { return run(*arguments); }

extern "C" int tile_count() { return layout::TILE_COUNT; }

/// The whole table: wgmma, tokens, weights, cluster, granularities, block, threads; then by granularity shared bytes,
/// columns of the ring, and whether it can be split.
extern "C" void tile_at(int index, int* out) {
  const layout::Tile& tile = layout::TILES[index];
  const int values[] = {tile.wgmma(), tile.tokens,   tile.weights, tile.cluster, int(tile.granularities),
                        tile.block(), tile.threads()};
  for (int value : values) *out++ = value;
  for (int g = 0; g < layout::GRANULARITIES; ++g) {
    out[g] = tile.shared_bytes(g), out[3 + g] = tile.ring(g), out[6 + g] = tile.splits(g);
  }
}

/// `left_out` holds the bits of tiles that are not to be chosen.
extern "C" double choose(int m, int n, int k, int granularity, int capability, int sms, int shared, int memory,
                         unsigned left_out, int splits, int* out) {
  layout::Device device{capability, sms, shared, memory};
  device.left_out[granularity] = left_out, device.splits = splits;
  layout::Choice choice = layout::choose({m, n, k, granularity}, device);
  out[0] = choice.tile, out[1] = choice.whole, out[2] = choice.split;
  return choice.clocks;
}

/// capability, multiprocessors and shared bytes of a device that runs code for the architecture `code`.
extern "C" void device(int capability, int code, int sms, int shared, int* out) {
  layout::Device device = layout::device(capability, code, sms, shared);
  out[0] = device.capability, out[1] = device.sms, out[2] = device.shared_bytes;
}

/// Tickets of a launch, from counters of their own for each `device`: the first place, or negative.
extern "C" int64_t take_tickets(int device, unsigned count, bool captured) {
  static Tickets tickets[4];
  return tickets[device].take(count, captured);
}

/// All units of a schedule as rows of 6; returns their number.
extern "C" int units(int m, int n, int k, int tile, int whole, int split, int* out) {
  auto schedule = layout::schedule({m, n, k, 0}, layout::TILES[tile], whole, split);
  for (int i = 0; out && i < schedule.units(); ++i) {
    layout::Unit unit = schedule.unit(i);
    int values[] = {unit.token_tile, unit.weight_tile, unit.begin, unit.end, unit.split_tile, unit.part};
    for (int j = 0; j < 6; ++j) out[i * 6 + j] = values[j];
  }
  return schedule.units();
}

/// Conversions of the host emulation between float32 and 16-bit floats (1: bf16, 2: fp16).
extern "C" void round_floats(const float* x, uint16_t* out, int count, int type) {
  for (int i = 0; i < count; ++i) out[i] = uint16_t(pack(Float(type), x[i], 0.f));
}
extern "C" void widen_halves(const uint16_t* x, float* out, int count, int type) {
  for (int i = 0; i < count; ++i) out[i] = Float(type) == Float::bf16 ? ptx::unpack_bf16(x[i]) : ptx::unpack_fp16(x[i]);
}
