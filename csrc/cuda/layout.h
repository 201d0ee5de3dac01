// Which tile, and which part of it, a CTA computes: plain integer functions for the host and the device.
//
// Everything is seen with the operands swapped: weight rows (N) are the rows of the MMA, tokens (M) its columns.
#pragma once

#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#define LAYOUT_FUNCTION __host__ __device__ constexpr
#else
#define LAYOUT_FUNCTION constexpr
#endif

namespace layout {

constexpr int BLOCK = 128;  // bytes of k in a block: a 128-byte swizzle row, and a group of the fast path

LAYOUT_FUNCTION int ceil_div(int a, int b) { return (a + b - 1) / b; }
LAYOUT_FUNCTION int least(int a, int b) { return a < b ? a : b; }

/// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows with the 128-byte swizzle.
LAYOUT_FUNCTION int swizzled(int row, int chunk) { return row * BLOCK + ((chunk ^ (row & 7)) << 4); }

/// Shared memory that a CTA can have on an architecture, in bytes.
LAYOUT_FUNCTION int shared_limit(int architecture) {
  return architecture == 86 || architecture == 89 || architecture >= 120 ? 101376 : 232448;
}

/// Work of one CTA (or cluster): a tile, and the k-blocks [begin, end) of it.
struct Unit {
  int token_tile, weight_tile, begin, end;
  int split_tile, part;  // which split tile this is a part of, and which part; -1, 0 for a whole tile
};

/// All units of a product. The first `whole` tiles have one unit each, which covers all of k; every later tile is split
/// along k into `split` units, so that the last wave fills the chip. int32 partial sums make the split exact.
struct Schedule {
  int token_tiles, weight_tiles, blocks, whole, split;

  LAYOUT_FUNCTION int tiles() const { return token_tiles * weight_tiles; }
  LAYOUT_FUNCTION int split_tiles() const { return tiles() - whole; }
  LAYOUT_FUNCTION int units() const { return whole + split_tiles() * split; }

  LAYOUT_FUNCTION Unit unit(int index) const {
    bool entire = index < whole;
    int late = index - whole;
    int tile = entire ? index : whole + late / split;
    int part = entire ? 0 : late % split;
    int parts = entire ? 1 : split;
    // Bands of 8 token tiles, through which all weight tiles pass: CTAs that run together share both operands in L2.
    int band = tile / (8 * weight_tiles), within = tile - band * 8 * weight_tiles;
    int height = least(8, token_tiles - band * 8);
    return {
        band * 8 + within % height, within / height,
        blocks * part / parts,      blocks * (part + 1) / parts,
        entire ? -1 : tile - whole, part,
    };
  }
};

/// What kernels are specialised for.
enum Granularity {
  CHANNEL,    // one scale a weight row
  GROUP_128,  // one scale a weight row and 128 columns
  GROUP_ANY,  // groups of any multiple of 32 columns
};
constexpr int GRANULARITIES = 3;
LAYOUT_FUNCTION Granularity granularity_of(int64_t k, int64_t channels) {
  return channels == k ? CHANNEL : channels == 128 ? GROUP_128 : GROUP_ANY;
}

/// A tile shape that kernels are built for.
struct Tile {
  int warpgroups;                 // that multiply, with Hopper's warpgroup MMA; 0: mma.sync
  int tokens, weights;            // of one CTA
  int warp_tokens, warp_weights;  // mma.sync: of one warp; wgmma: weights of one warpgroup
  int warps_k;                    // mma.sync: warps that share the tile and divide k
  int stages;                     // mma.sync: of the pipeline; wgmma takes as many as fit
  int cluster;                    // CTAs with neighbouring weight tiles, which share the activations' loads
  unsigned granularities;         // bits, by Granularity

  LAYOUT_FUNCTION bool does(int granularity) const { return granularities >> granularity & 1; }
  LAYOUT_FUNCTION bool wgmma() const { return warpgroups > 0; }
  // wgmma: warpgroups that share a tile. If there are more, each has a tile of its own, and they multiply by turns:
  // while one does, the other stores its outputs ("ping-pong").
  LAYOUT_FUNCTION int team() const { return wgmma() ? weights / warp_weights : 1; }
  LAYOUT_FUNCTION bool turns() const { return warpgroups > team(); }
  LAYOUT_FUNCTION int threads() const {
    return wgmma() ? (warpgroups + 1) * 128 : tokens / warp_tokens * (weights / warp_weights) * warps_k * 32;
  }
  // Whether it can be split along k. Per group, parts exchange the sums of every group, too much but for few tokens;
  // where warpgroups take turns, registers do not suffice.
  LAYOUT_FUNCTION bool splits(int granularity) const {
    return does(granularity) && !turns() && (granularity == CHANNEL || (granularity == GROUP_128 && tokens <= 32));
  }
  // int32 that parts exchange, of one tile in so many parts.
  LAYOUT_FUNCTION int64_t exchanged(int granularity, int split, int groups) const {
    return int64_t(tokens) * weights * (granularity == CHANNEL ? split : groups);
  }
  LAYOUT_FUNCTION int block() const { return BLOCK * warps_k; }

  // Shared memory of an mma.sync tile: stages, then their scales, then the exchange between warps that divide k.
  LAYOUT_FUNCTION int stage_bytes() const { return (tokens + weights) * block(); }
  LAYOUT_FUNCTION int scales(int granularity) const { return granularity == GROUP_128 ? tokens + weights : 0; }
  LAYOUT_FUNCTION int exchange_bytes() const { return warps_k > 1 ? warps_k * tokens * (weights + 4) * 4 : 0; }

  // Shared memory of a wgmma tile: stages, their scales, output staging and token scales of the warpgroups, barriers.
  LAYOUT_FUNCTION int staging_tokens() const { return least(tokens, 64); }
  LAYOUT_FUNCTION int staging_bytes() const { return warpgroups * (staging_tokens() * (64 + 8) * 2 + tokens * 4 + 16); }
  LAYOUT_FUNCTION int wgmma_stages(int granularity) const {
    int stage = stage_bytes() + scales(granularity) * 4 + 16;
    return least(12, (shared_limit(90) - staging_bytes()) / stage);
  }

  /// Columns of k in all of its stages.
  LAYOUT_FUNCTION int ring(int granularity) const { return block() * (wgmma() ? wgmma_stages(granularity) : stages); }

  LAYOUT_FUNCTION int shared_bytes(int granularity) const {
    if (wgmma()) {
      int stage = stage_bytes() + scales(granularity) * 4 + 16;
      return wgmma_stages(granularity) * stage + staging_bytes();
    }
    int pipeline = stages * (stage_bytes() + scales(granularity) * warps_k * 4) + exchange_bytes();
    int output = tokens * (weights + 8) * 2;
    return pipeline > output ? pipeline : output;
  }
};

constexpr unsigned C = 1u << CHANNEL, G = 1u << GROUP_128, ANY = 1u << GROUP_ANY;
constexpr Tile TILES[] = {
    // warpgroups, tokens, weights, of a warp(group): tokens, weights, k, stages, cluster
    {2, 16, 128, 0, 64, 1, 0, 1, C | G},       {2, 32, 128, 0, 64, 1, 0, 1, C | G},
    {2, 64, 128, 0, 64, 1, 0, 1, C | G},       {2, 128, 128, 0, 64, 1, 0, 1, C | G},
    {2, 192, 128, 0, 64, 1, 0, 2, C | G},      {2, 128, 256, 0, 128, 1, 0, 2, C | G},
    {2, 256, 128, 0, 64, 1, 0, 2, C},  // per group: too many registers
    {0, 16, 32, 16, 32, 4, 3, 1, C | G},       {0, 32, 32, 32, 32, 4, 3, 1, G},
    {0, 32, 64, 32, 16, 1, 4, 1, C | G | ANY}, {0, 64, 64, 32, 32, 1, 4, 1, C | G},
    {0, 64, 128, 32, 32, 1, 4, 1, C | G},      {0, 128, 128, 32, 64, 1, 3, 1, C | G | ANY},
    {0, 256, 128, 64, 64, 1, 3, 1, C},         {1, 16, 64, 0, 64, 1, 0, 1, C | G},
    {1, 32, 64, 0, 64, 1, 0, 1, C | G},        {1, 64, 64, 0, 64, 1, 0, 1, C | G},
    {2, 128, 128, 0, 128, 1, 0, 2, C},  // by turns; per group, warpgroups of a team do not wait for each other either
    {2, 192, 128, 0, 128, 1, 0, 2, C},
};
constexpr int TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]);

/// What a multiprocessor of an architecture does in a clock. Peaks of int8 are those of NVIDIA's whitepapers (A100: 624
/// TOPS of 108 multiprocessors at 1.41 GHz, GA102, AD102 and GB202: 284, 733 and 838 of 82, 142 and 170), of which
/// mma.sync attains about three quarters on A100 and the larger chips after it. L2: 32 bytes reproduce the published
/// 68 % of peak of 128 x 128 tiles on H100; Ampere's and Ada's smaller chips measure about half (5 TB/s of AD102).
struct Rates {
  int capability;  // from this one on
  int macs;        // int8, by mma.sync
  int level2;      // bytes from L2
  int shared;      // bytes of shared memory, of all of its CTAs
  int threads;     // of all of its CTAs
};
constexpr Rates RATES[] = {
    {80, 1536, 32, 167936, 2048}, {86, 1024, 16, 102400, 1536},  {89, 1024, 16, 102400, 1536},
    {90, 1536, 32, 233472, 2048}, {100, 1536, 32, 233472, 2048}, {120, 1024, 16, 102400, 1536},
};
inline Rates rates(int capability) {
  Rates found = RATES[0];
  for (const Rates& row : RATES) {
    if (row.capability <= capability) found = row;
  }
  return found;
}

/// What the choice depends on: the product and the device.
struct Problem { int m, n, k, granularity; };
struct Device {
  int capability;                         // 80, 86, 89, 90, ...; as far as the kernels' code uses it
  int sms;                                // multiprocessors
  int shared_bytes;                       // of a CTA, opted in, and at most what the kernels' code is compiled for
  int memory_bytes = 0;                   // of memory a clock, for the whole device; 0 if it does not say
  unsigned left_out[GRANULARITIES] = {};  // bits of TILES that must not be chosen
  bool splits = true;                     // whether tiles may be divided along k
  int pairs = sms / 2;                    // clusters of two CTAs that run at once
};
/// Bytes of memory a clock from the device's attributes, in kHz and bits: nine tenths of two transfers a memory clock.
inline int memory_bytes(int clock, int memory_clock, int bus) {
  return clock > 0 ? int(0.9 * 2 * memory_clock * (bus / 8.0) / clock) : 0;
}
/// A device as kernels see it whose code was compiled for the architecture `code`: older code has no wgmma, and code
/// for less shared memory lacks tiles.
LAYOUT_FUNCTION Device device(int capability, int code, int sms, int shared_bytes, int memory_bytes = 0) {
  return {capability < 90 ? capability : least(capability, code), sms, least(shared_bytes, shared_limit(code)),
          memory_bytes};
}

struct Choice {
  int tile = -1;  // in TILES; -1: none fits
  int whole = 0, split = 1;
  double clocks = 0;  // predicted
};

LAYOUT_FUNCTION Schedule schedule(const Problem& p, const Tile& tile, int whole, int split) {
  Schedule s{ceil_div(p.m, tile.tokens), ceil_div(p.n, tile.weights * tile.cluster), ceil_div(p.k, tile.block()), whole,
             split};
  return s;
}

/// CTAs of a tile that one multiprocessor holds. Registers of mma.sync kernels are about these, see the build's log.
inline int resident(const Tile& tile, int granularity, int capability) {
  if (tile.wgmma()) return 1;
  Rates sm = rates(capability);
  int sums = tile.warp_tokens * tile.warp_weights / 32 * (granularity == CHANNEL ? 1 : 2);
  int registers = least(256, (sums + 90 + 7) / 8 * 8);
  int most = least(sm.shared / (tile.shared_bytes(granularity) + 1024), sm.threads / tile.threads());
  most = least(most, 65536 / (tile.threads() * registers));
  return most < 1 ? 1 : most;
}

/// Instructions of a warp in one turn of the loop over k of an mma.sync tile, from the machine code for 8.0.
inline double instructions(const Tile& tile, int granularity) {
  int rows = tile.warp_weights / 16, columns = tile.warp_tokens / 8;
  double copies = double(tile.tokens + tile.weights) * 8 * tile.warps_k / tile.threads();
  double promote = granularity == CHANNEL ? 0 : 3.5 * rows * columns * 4 + 25;
  return 4 * (rows * columns + rows + columns / 2) + 5 * copies + 45 + promote;
}

/// Clocks that one multiprocessor needs for 128 columns of k of a tile, of which it holds so many at once: its busiest
/// resource. A model, not a measurement.
inline double block_clocks(const Tile& tile, int m, int granularity, int capability, int held) {
  Rates sm = rates(capability);
  double area = double(tile.tokens) * tile.weights;
  double multiply = area * BLOCK / (tile.wgmma() ? 4096 : sm.macs);
  double fill = tile.tokens + tile.weights;  // 128 bytes a clock into shared memory, and out of it:
  double read = tile.wgmma() ? tile.weights / 64 * (64.0 + tile.tokens)
                             : area / (tile.warp_tokens * tile.warp_weights) * (tile.warp_tokens + tile.warp_weights);
  double level2 = double(BLOCK) / sm.level2 * (tile.weights + double(least(tile.tokens, m)) / tile.cluster);
  double promote = granularity == CHANNEL ? 0 : granularity == GROUP_128 ? area / 64 + area / 128 : area / 12;
  double issue = 0;
  if (!tile.wgmma()) {  // four schedulers; a warp alone on one issues every other clock
    double warps = tile.threads() / 128.0, both = warps * held < 2 ? warps * held / 2 : 1;
    issue = instructions(tile, granularity) * warps / both / tile.warps_k;
  }
  double busiest = multiply;
  for (double each : {fill + read, level2, promote, issue}) busiest = each > busiest ? each : busiest;
  return busiest + 0.15 * promote;
}

/// Clocks between the last product of a tile and its last output. Where a multiprocessor holds another CTA, that
/// multiplies meanwhile; of wgmma nothing does: instructions of the epilogue (six a thread and output) and 32 bytes a
/// clock to L2.
inline double store_clocks(const Tile& tile) {
  return 1000 + double(tile.tokens) * tile.weights / (tile.wgmma() ? 9 : 32);
}

/// Clocks until the part of a split tile that comes last has added up all parts, of m tokens.
inline double join_clocks(const Tile& tile, int m, int granularity, int split, int groups) {
  if (granularity == CHANNEL) return 1500 + split * double(tile.tokens) * tile.weights * 4 / 32;
  double outputs = double(least(tile.tokens, m)) * tile.weights;  // 16 groups at once, by each thread
  double turns = ceil_div(groups, 16) * ceil_div(int(outputs), tile.threads());
  return 1500 + turns * 400 + outputs * groups * 4 / 32;
}

LAYOUT_FUNCTION bool fits(const Tile& tile, int granularity, const Device& device) {
  return tile.does(granularity) && (!tile.wgmma() || device.capability == 90) &&
         (tile.cluster == 1 || device.pairs > 0) && tile.shared_bytes(granularity) <= device.shared_bytes;
}

/// The tile and split with the lowest predicted time.
inline Choice choose(const Problem& p, const Device& device) {
  Choice best;
  for (int index = 0; index < TILE_COUNT; ++index) {
    const Tile& tile = TILES[index];
    if (!fits(tile, p.granularity, device) || device.left_out[p.granularity] >> index & 1) continue;
    Schedule plain = schedule(p, tile, 0, 1);
    int tiles = plain.tiles(), sms = tile.cluster > 1 ? device.pairs : device.sms;
    int held = least(resident(tile, p.granularity, device.capability), ceil_div(tiles, sms)), slots = sms * held;
    double block = block_clocks(tile, p.m, p.granularity, device.capability, held) * tile.warps_k;
    double overhead = store_clocks(tile), loop = held * plain.blocks * block;
    double wave = tile.turns() && (loop + overhead) / 2 > loop ? (loop + overhead) / 2 : loop;
    if (!tile.turns()) wave += overhead;
    double bytes = double(p.n) * p.k + double(p.m) * p.k + 2.0 * p.m * p.n;
    double memory = bytes / (device.memory_bytes > 0 ? device.memory_bytes : 20.0 * device.sms);
    int full = tiles / slots, rest = tiles % slots;
    for (int split = 1; split <= 16; ++split) {
      if (split > 1 && (!device.splits || !tile.splits(p.granularity))) break;
      if (split > 1 && (rest * split > slots || split * 2 > plain.blocks)) break;
      double clocks = full * wave;
      if (rest) clocks += ceil_div(rest * split, sms) * ceil_div(plain.blocks, split) * block + overhead;
      if (!rest && tile.turns()) clocks += overhead;  // of the last wave
      if (split > 1) clocks += join_clocks(tile, p.m, p.granularity, split, p.k / BLOCK);
      double loads = memory + overhead;  // what overlaps does not hide each other wholly
      clocks = clocks < loads ? loads + 0.1 * clocks : clocks + 0.1 * loads;
      if (device.capability == 90 && !tile.wgmma()) clocks *= 1.03;  // where both seem alike, what TMA feeds
      if (best.tile < 0 || clocks < best.clocks) best = {index, split > 1 ? full * slots : tiles, split, clocks};
    }
  }
  return best;
}

}  // namespace layout
