// Quantization and GEMM for one instruction-set level. setup.py compiles this file once per level; everything that
// depends on the target lives in the namespace W8A8_LEVEL, so that no level's code leaks into another.
#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "fourbits.h"
#include "quantization.h"

namespace w8a8::cpu::W8A8_LEVEL {

#define W8A8_QUOTE(x) #x
#define W8A8_STRING(x) W8A8_QUOTE(x)

// GEMM

constexpr int64_t kTokens = 128;  // tokens of a task: their sums stay in the L2 cache
// A task's inner blocks of k, and its blocks of channels. With few tokens the weights come from memory: short blocks of
// k stay in the L1 cache from the first tile to the last, and the next is prefetched meanwhile, unless a tile reads all
// of its task's channels at once. With many tokens a block of k is long, for fewer rounds of its sums, and its weights
// stay in the L2 cache; twice the channels then halve how often the activations are read.
struct Blocking {
  int64_t tokens, k;
  bool prefetch;
  int64_t blocks;
};
constexpr int64_t kWide = tile_blocks(kRows) == kBlocks ? kRows : 1;
constexpr Blocking kBlocking[] = {{kWide, 512, false, kBlocks},
                                  {32, 256, true, kBlocks},
                                  {96, 1024, true, kBlocks},
                                  {256, 4096, false, kBlocks},
                                  {INT64_MAX, 4096, false, kTaskBlocks}};
// Weights of four bits are unpacked by the tile where one tile reads them, which is then as fast as memory. For more
// tiles they are unpacked before, into the L2 cache: long blocks, and what comes next already there.
constexpr Blocking kFourBlocking[] = {kBlocking[0], {256, 4096, true, kBlocks}, {INT64_MAX, 4096, true, kTaskBlocks}};

using TileFunction = void (*)(const TileArgs&);
template <int rows, int blocks, Kind kind>
constexpr TileFunction tile() {
  if constexpr (blocks <= tile_blocks(rows)) return dot_tile<rows, blocks, kind>;
  return nullptr;
}
template <Kind kind, int... index>
constexpr std::array<TileFunction, sizeof...(index)> tiles(std::integer_sequence<int, index...>) {
  return {tile<1 + index / kBlocks, 1 + index % kBlocks, kind>()...};
}
constexpr auto kAll = std::make_integer_sequence<int, kRows * kBlocks>();
constexpr std::array kTiles = {tiles<kAny>(kAll), tiles<kNarrowGroups>(kAll), tiles<kFourBits>(kAll)};

// The next tile's rows, and the tile.
inline int64_t tile_rows(int64_t remaining, int64_t steps) {
#if W8A8_AMX
  if (remaining >= 16 && steps % kAmxSteps == 0) return remaining >= kAmxRows ? kAmxRows : 16;
#endif
  return ceil_div(remaining, ceil_div(remaining, kRows));
}
inline void run_tile(int64_t rows, int64_t blocks, Kind kind, const TileArgs& args) {
#if W8A8_AMX
  if (rows >= 16)
    return kind == kNarrowGroups ? amx_tile<true>(rows, blocks, args) : amx_tile<false>(rows, blocks, args);
#endif
  kTiles[kind][(rows - 1) * kBlocks + blocks - 1](args);
}

// Tokens [m0, m0 + rows) times channels [n0, n0 + columns); beyond the last task there are none.
struct Task {
  int64_t m0, n0, rows, columns;
  bool four;  // bits, each of the channels, or else eight
};

// What the tasks of one GEMM share.
struct Plan {
  const Gemm& g;
  int64_t depth;       // a group's share of K, padded to four
  const Dot::Code* a;  // in blocks: for every kTokens tokens, for every block of k, [tokens][block]
  Blocking blocking;
  const int32_t* start;  // [groups][M]: minus 128 * sum of a over the group, plus kMagicBits if narrow
  int64_t k() const { return g.groups * depth; }
  bool narrow() const { return depth <= kNarrow && !g.four.rows; }
  // Width of the block of k that starts at k0: as many narrow groups as fit, or a part of one group.
  int64_t block(int64_t k0) const {
    return narrow() ? std::min(blocking.k / depth * depth, k() - k0) : std::min(blocking.k, depth - k0 % depth);
  }
  int64_t columns() const { return blocking.blocks * kLanes; }
  int64_t along_m() const { return ceil_div(g.m, kTokens); }
  bool packs() const { return !g.packed && !g.four.rows; }  // each task its weights, by itself
  int64_t eight() const { return g.n - g.four.rows; }       // channels before those of four bits
  int64_t tasks() const { return along_m() * (ceil_div(eight(), columns()) + ceil_div(g.four.rows, columns())); }
  Task task(int64_t index) const {
    const int64_t m0 = index % along_m() * kTokens, strip = index / along_m(), strips = ceil_div(eight(), columns());
    const bool four = strip >= strips;
    const int64_t n0 = four ? eight() + (strip - strips) * columns() : strip * columns();
    return {m0, n0, std::min(kTokens, g.m - m0), std::min(columns(), (four ? g.n : eight()) - n0), four};
  }
  // Of a task's channels, from k0 on; the next block's are stride(task) bytes on.
  const uint8_t* weights(const Task& t, int64_t k0) const {
    return t.four ? g.four.codes + ((t.n0 - eight()) * k() + k0 * kLanes) / 2 : g.packed + t.n0 * k() + k0 * kLanes;
  }
  int64_t stride(const Task& t) const { return k() * kLanes / (t.four ? 2 : 1); }
  // The same of the steps of four bits.
  const uint8_t* steps(const Task& t, int64_t k0) const {
    return g.four.steps + (t.n0 - eight()) / kLanes * steps_stride() + k0 / g.four.width * 2 * kLanes;
  }
  int64_t steps_stride() const { return k() / g.four.width * 2 * kLanes; }
};

struct alignas(64) PackedLine { uint8_t bytes[kLine]; };

struct Workspace {
  alignas(64) int32_t sums[kTokens * kColumns];
  alignas(64) float out[kTokens * kColumns];
  std::unique_ptr<PackedLine[]> packed;
  std::unique_ptr<float[]> scales;
};

// 16 rows of b from row n as packed weights.
void pack_block(const Plan& p, int64_t n, uint8_t* to) {
  const Gemm& g = p.g;
  std::memset(to, 128, p.k() * kLanes);
  for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, g.n - n); ++lane)
    for (int64_t group = 0; group < g.groups; ++group) {
      const int8_t* from = g.b + ((n + lane) * g.groups + group) * g.width;
      uint8_t* row = to + group * p.depth * kLanes + lane * kDepth;
      for (int64_t k = 0; k < g.width; ++k) row[k / kDepth * kLine + k % kDepth] = (uint8_t)(from[k] ^ 0x80);
    }
}

void run_task(const Plan& p, const Task& task, const Task& upcoming, Workspace& w) {
  const Gemm& g = p.g;
  const int64_t m0 = task.m0, n0 = task.n0, rows = task.rows, columns = task.columns;
  const int64_t k = p.k(), blocks = ceil_div(columns, kLanes);
  if (!w.packed && (p.packs() || task.four)) {
    const int64_t steps = (p.packs() ? k : std::min(p.blocking.k, k)) / kDepth;
    w.packed.reset(new PackedLine[p.blocking.blocks * steps]);
  }
  uint8_t* const packed = w.packed ? w.packed[0].bytes : nullptr;
  for (int64_t v = 0; p.packs() && v < blocks; ++v) pack_block(p, n0 + v * kLanes, packed + v * k * kLanes);
  // Scales group by group; laid out as [G, N] they need no copy.
  const float* scales = g.b_scale + n0 * g.b_scale_n;
  int64_t scales_stride = g.b_scale_g;
  if (g.b_scale_n != 1 || columns % kLanes) {
    if (!w.scales) w.scales.reset(new float[g.groups * kColumns]());
    for (int64_t group = 0; group < g.groups; ++group)
      for (int64_t c = 0; c < columns; ++c)
        w.scales[group * kColumns + c] = scales[c * g.b_scale_n + group * g.b_scale_g];
    scales = w.scales.get();
    scales_stride = kColumns;
  }
  std::fill_n(w.out, rows * kColumns, 0.0f);
  for (int64_t k0 = 0, width; k0 < k; k0 += width) {
    width = p.block(k0);
    const int64_t group = k0 / p.depth;
    const bool begins = k0 % p.depth == 0, ends = (k0 + width) % p.depth == 0;
    const bool within = task.four && rows <= kWide, before = task.four && !within;
    for (int64_t v = 0; before && v < blocks; ++v)
      unpack_block(p.weights(task, k0) + v * p.stride(task), p.steps(task, k0) + v * p.steps_stride(), width,
                   g.four.width, packed + v * width * kLanes);
    const uint8_t* b = before ? packed : p.packs() ? packed + k0 * kLanes : p.weights(task, k0);
    TileArgs t{};
    t.b_stride = before ? width * kLanes : p.stride(task);
    if (within) t.m_and_o_stride = p.steps_stride(), t.m_and_o_width = g.four.width;
    const Kind kind = within ? kFourBits : p.narrow() ? kNarrowGroups : kAny;
    t.groups = std::max<int64_t>(width / p.depth, 1);
    t.steps = width / t.groups / kDepth;
    t.start_stride = g.m;
    t.a_scale_group = g.a_groups > 1;
    t.a_scale_row = g.a_groups;
    t.b_scale_stride = scales_stride;
    const bool last = k0 + width == k;
    const Task& following = last ? upcoming : task;
    const int64_t stride = p.stride(following);
    const uint8_t* ahead = nullptr;
    t.ahead_four = following.four;
    if (!p.packs() && p.blocking.prefetch && following.columns > 0) ahead = p.weights(following, last ? 0 : k0 + width);
    for (int64_t m = 0, count; m < rows; m += count) {
      count = tile_rows(rows - m, t.steps);
      const int64_t most = tile_blocks(count);
      t.a = p.a + m0 * k + k0 * rows + m * width;
      t.start = begins ? p.start + group * g.m + m0 + m : nullptr;
      t.a_scale = g.a_scale + (m0 + m) * g.a_groups + t.a_scale_group * group;
      for (int64_t v = 0, along; v < blocks; v += along) {
        along = std::min(most, blocks - v);
        t.b = b + v * t.b_stride;
        if (within) t.m_and_o = p.steps(task, k0) + v * t.m_and_o_stride;
        t.b_scale = scales + group * scales_stride + v * kLanes;
        t.sums = w.sums + m * kColumns + v * kLanes;
        t.out = ends ? w.out + m * kColumns + v * kLanes : nullptr;
        const int64_t done = m * blocks + v * count, from = done / rows, to = (done + count * along) / rows;
        t.ahead[0] = t.ahead[1] = nullptr;  // this tile's share
        if (ahead && from < to) t.ahead[0] = ahead + from * stride, t.ahead[1] = ahead + (to - 1) * stride;
        run_tile(count, along, kind, t);
      }
    }
  }
  with_float(g.dtype, [&](auto type) {
    using T = decltype(type);
    auto* out = static_cast<typename T::Storage*>(g.out);
    const int32_t* order = g.order ? g.order + n0 : nullptr;
    float bias[kColumns];
    for (int64_t c = 0; g.bias && c < columns; ++c) bias[c] = g.bias[order ? order[c] : n0 + c];
    for (int64_t m = 0; m < rows; ++m) {
      float* values = w.out + m * kColumns;
      for (int64_t c = 0; g.bias && c < columns; ++c) values[c] += bias[c];
      typename T::Storage made[kColumns], *row = out + (m0 + m) * g.n;
      narrow<T>(values, order ? made : row + n0, columns);
      for (int64_t c = 0; order && c < columns; ++c) row[order[c]] = made[c];
    }
  });
}

void gemm(const Gemm& given, const Parallel& parallel) {
  Gemm g = given;
  const int64_t depth = ceil_div(g.width, kDepth) * kDepth, k = g.groups * depth;
  // Kept from call to call: the first touch of new pages would take a few percent of the time of a large product.
  thread_local std::vector<Dot::Code> codes;
  thread_local std::vector<int32_t> starts;
  thread_local std::vector<float> scales;
  codes.resize(std::max<size_t>(codes.size(), g.m * k));
  starts.resize(std::max<size_t>(starts.size(), g.m * g.groups));
  Dot::Code* const a = codes.data();  // not by name: other threads have vectors of their own
  int32_t* const start = starts.data();
  float* scale = nullptr;
  int64_t grain = 65536;
  if (g.x.x) {
    scales.resize(std::max<size_t>(scales.size(), g.m * g.a_groups));
    g.a_scale = scale = scales.data();
    grain = g.x.silu_mul ? 4096 : 32768;
  }
  const Blocking* blocking = g.four.rows ? kFourBlocking : kBlocking;
  while (g.m > blocking->tokens) ++blocking;
  const Plan plan{g, depth, a, *blocking, start};
  const uint32_t base = plan.narrow() ? kMagicBits : 0;
  parallel(g.m, 1 + grain / std::max<int64_t>(k, 1), [&](int64_t begin, int64_t end) {
    Quantizer quantizer(g);
    for (int64_t m = begin; m < end; ++m) {
      const int64_t m0 = m / kTokens * kTokens, rows = std::min(kTokens, g.m - m0);
      const int8_t* token = g.x.x ? quantizer(m, scale + m * g.a_groups) : g.a + m * g.groups * g.width;
      for (int64_t group = 0; group < g.groups; ++group) {
        const int8_t* row = token + group * g.width;
        int32_t sum = 0;
        for (int64_t i = 0; i < g.width; ++i) sum += row[i];
        start[group * g.m + m] = (int32_t)(base - 128u * (uint32_t)sum);
      }
      for (int64_t k0 = 0, width; k0 < k; k0 += width) {
        width = plan.block(k0);
        Dot::Code* to = a + m0 * k + k0 * rows + (m - m0) * width;
        for (int64_t i = 0, count; i < width; i += count) {
          const int64_t group = (k0 + i) / depth, at = (k0 + i) % depth;
          const int8_t* from = token + group * g.width + at;
          count = std::min(width - i, depth - at);
          const int64_t whole = std::min(count, (g.width - at) / kDepth * kDepth);
          for (int64_t j = 0; j < whole; j += kDepth) Dot::keep(from + j, to + i + j);
          if (whole == count) continue;
          int8_t padded[kDepth] = {};
          std::memcpy(padded, from + whole, g.width - at - whole);
          Dot::keep(padded, to + i + whole);
        }
      }
    }
  });
  std::atomic<int64_t> next{0};  // taken one by one, because cores are not equally fast or free
  parallel(std::min<int64_t>(parallel.threads, plan.tasks()), 1, [&](int64_t begin, int64_t end) {
    TileConfiguration tiles;
    Workspace workspace;
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++, upcoming; task < plan.tasks(); task = upcoming) {
        upcoming = next++;
        run_task(plan, plan.task(task), plan.task(upcoming), workspace);
      }
  });
}

bool supported() {
#if W8A8_AMX
  if (!amx_permitted()) return false;
#endif
#if defined(__AVX512VNNI__)
  if (!__builtin_cpu_supports("avx512vnni")) return false;
#endif
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVXVNNI__)
  return __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

extern const Level level{W8A8_STRING(W8A8_LEVEL), supported, quantize, silu_mul_quantize, gemm};

}  // namespace w8a8::cpu::W8A8_LEVEL
