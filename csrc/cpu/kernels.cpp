// Quantization and GEMM for one instruction-set level. setup.py compiles this file once per level; everything that
// depends on the target lives in the namespace W8A8_LEVEL, so that no level's code leaks into another.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "tile.h"

namespace w8a8::cpu::W8A8_LEVEL {

#define W8A8_QUOTE(x) #x
#define W8A8_STRING(x) W8A8_QUOTE(x)

// Floats

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

struct Fp32 {
  using Storage = uint32_t;
  static constexpr uint32_t magnitude = 0x7fffffff;
  static float widen(Storage bits) { return as_float(bits); }
  static Storage narrow(float f) { return as_bits(f); }
};
struct Bf16 {
  using Storage = uint16_t;
  static constexpr uint16_t magnitude = 0x7fff;
  static float widen(Storage bits) { return as_float((uint32_t)bits << 16); }
  // Not VCVTNEPS2BF16, which flushes denormals.
  static Storage narrow(float f) {
    uint32_t bits = as_bits(f);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return f != f ? 0x7fc0 : rounded;
  }
};
struct Fp16 {
  using Storage = uint16_t;
  static constexpr uint16_t magnitude = 0x7fff;
  // Without branches, so that loops become vectors.
  static float widen(Storage bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    // The exponent's bias differs by 112; the product also normalizes denormals.
    const uint32_t finite = as_bits(as_float(rest << 13) * 0x1p112f);
    return as_float(sign | finite | (rest >= 0x7c00 ? 0x7f800000 : 0));
  }
  static Storage narrow(float f) {
    const uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    const uint32_t normal = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
    const uint32_t denormal = as_bits(as_float(rest) + 0.5f) - 0x3f000000;  // rounded to its last place, 2^-24
    const uint32_t special = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    return sign | (rest >= 0x477ff000 ? special : rest < 0x38800000 ? denormal : normal);
  }
};

template <class T>
void widen(const typename T::Storage* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T::widen(from[i]);
}
template <class T>
void narrow(const float* from, typename T::Storage* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T::narrow(from[i]);
}
#if defined(__F16C__)  // which compilers do not find by themselves
template <>
inline void widen<Fp16>(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; ++i) to[i] = Fp16::widen(from[i]);
}
template <>
inline void narrow<Fp16>(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) to[i] = Fp16::narrow(from[i]);
}
#endif

// Calls f with the type of a Float.
template <class F>
void with_float(Float dtype, const F& f) {
  switch (dtype) {
    case Float::fp32: return f(Fp32{});
    case Float::bf16: return f(Bf16{});
    case Float::fp16: return f(Fp16{});
  }
}

// Quantization

template <class T>
void quantize_row(const typename T::Storage* x, int64_t width, int8_t* codes, float* scale) {
  // The largest magnitude as bits: infinity's are above every number's, and those of NaN above infinity's.
  typename T::Storage top = 0;
  for (int64_t i = 0; i < width; ++i) top = std::max<typename T::Storage>(top, x[i] & T::magnitude);
  const float amax = T::widen(top), ratio = 127.0f / amax;
  const float inverse = ratio <= 3.4028235e38f ? ratio : 0.0f;  // 0 if that is infinite or NaN
  *scale = amax / 127.0f;
  // Adding kMagic rounds half to even and leaves the integer in the low bits. (-ffp-contract=off: the contract rounds
  // the product first.)
  for (int64_t i = 0; i < width; ++i) codes[i] = (int8_t)as_bits(T::widen(x[i]) * inverse + kMagic);
}

void quantize(const Quantize& q, const Parallel& parallel) {
  with_float(q.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* x = static_cast<const typename T::Storage*>(q.x);
    parallel(q.rows, 1 + 32768 / std::max<int64_t>(q.width, 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        quantize_row<T>(x + r * q.width, q.width, q.codes + r * q.width, q.scale + r);
    });
  });
}

// x / (1 + exp(-x)) by the steps that reference.silu explains.
inline float silu(float x) {
  const float low = 87.0f < x ? 87.0f : x;
  const float shifted = std::fma(low, -1.44269502162933349609375f, kMagic), n = shifted - kMagic;
  const float r = std::fma(n, 1.9046542121259336e-09f, std::fma(n, -0.693147182464599609375f, -low));
  float power = std::fma(0.0013814539415761828f, r, 0.00836874544620514f);
  power = std::fma(power, r, 0.04166838899254799f);
  power = std::fma(power, r, 0.1666652113199234f);
  power = std::fma(power, r, 0.4999999403953552f);
  power = std::fma(std::fma(power, r, 1.0f), r, 1.0f);
  const float exponential = as_float(as_bits(power) + (as_bits(shifted) << 23));
  return x * (1.0f / (1.0f + (x < -87.0f ? INFINITY : exponential)));
}

constexpr int64_t kChunk = 256;  // channels that stay in the L1 cache as floats

// silu(gate) * up of one token.
template <class T>
void silu_mul(const typename T::Storage* gate, int64_t channels, typename T::Storage* row) {
  const auto* up = gate + channels;
  for (int64_t i = 0; i < channels; i += kChunk) {
    const int64_t count = std::min(kChunk, channels - i);
    float left[kChunk], right[kChunk];
    widen<T>(gate + i, left, count), widen<T>(up + i, right, count);
    for (int64_t j = 0; j < count; ++j) left[j] = silu(left[j]);
    narrow<T>(left, row + i, count), widen<T>(row + i, left, count);
    for (int64_t j = 0; j < count; ++j) left[j] *= right[j];
    narrow<T>(left, row + i, count);
  }
}

void silu_mul_quantize(const SiluMul& q, const Parallel& parallel) {
  with_float(q.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* x = static_cast<const typename T::Storage*>(q.x);
    parallel(q.tokens, 1 + 4096 / std::max<int64_t>(q.channels, 1), [&](int64_t begin, int64_t end) {
      std::vector<typename T::Storage> row(q.channels);
      for (int64_t t = begin; t < end; ++t) {
        silu_mul<T>(x + t * 2 * q.channels, q.channels, row.data());
        for (int64_t i = 0; i < q.channels; i += q.width) {
          const int64_t at = t * q.channels + i;
          quantize_row<T>(row.data() + i, q.width, q.codes + at, q.scale + at / q.width);
        }
      }
    });
  });
}

// What quantizes tokens for a product, one after the other, on one thread.
struct Quantizer {
  const Unquantized& x;
  int64_t channels, width;  // of a token, and what shares a scale
  std::vector<int8_t> codes;
  std::unique_ptr<uint8_t[]> activated;

  Quantizer(const Gemm& g) : x(g.x), channels(g.groups * g.width), width(channels / g.a_groups) {
    if (x.x) codes.resize(channels);
    if (x.x && x.silu_mul) activated.reset(new uint8_t[channels * sizeof(float)]);
  }
  const int8_t* operator()(int64_t token, float* scale) {
    with_float(x.dtype, [&](auto type) {
      using T = decltype(type);
      using Storage = typename T::Storage;
      const auto* row = static_cast<const Storage*>(x.x) + token * channels * (1 + x.silu_mul);
      if (x.silu_mul) {
        auto* made = reinterpret_cast<Storage*>(activated.get());
        silu_mul<T>(row, channels, made), row = made;
      }
      for (int64_t i = 0; i < channels; i += width) quantize_row<T>(row + i, width, codes.data() + i, scale++);
    });
    return codes.data();
  }
};

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

using TileFunction = void (*)(const TileArgs&);
template <int rows, int blocks, bool narrow>
constexpr TileFunction tile() {
  if constexpr (blocks <= tile_blocks(rows)) return dot_tile<rows, blocks, narrow>;
  return nullptr;
}
template <bool narrow, int... index>
constexpr std::array<TileFunction, sizeof...(index)> tiles(std::integer_sequence<int, index...>) {
  return {tile<1 + index / kBlocks, 1 + index % kBlocks, narrow>()...};
}
constexpr auto kAll = std::make_integer_sequence<int, kRows * kBlocks>();
constexpr std::array kTiles = {tiles<false>(kAll), tiles<true>(kAll)};

// The next tile's rows, and the tile.
inline int64_t tile_rows(int64_t remaining, int64_t steps) {
#if W8A8_AMX
  if (remaining >= 16 && steps % kAmxSteps == 0) return remaining >= kAmxRows ? kAmxRows : 16;
#endif
  return ceil_div(remaining, ceil_div(remaining, kRows));
}
inline void run_tile(int64_t rows, int64_t blocks, bool narrow, const TileArgs& args) {
#if W8A8_AMX
  if (rows >= 16) return narrow ? amx_tile<true>(rows, blocks, args) : amx_tile<false>(rows, blocks, args);
#endif
  kTiles[narrow][(rows - 1) * kBlocks + blocks - 1](args);
}

// What the tasks of one GEMM share.
struct Plan {
  const Gemm& g;
  int64_t depth;       // a group's share of K, padded to four
  const Dot::Code* a;  // in blocks: for every kTokens tokens, for every block of k, [tokens][block]
  Blocking blocking;
  const int32_t* start;  // [groups][M]: minus 128 * sum of a over the group, plus kMagicBits if narrow
  int64_t k() const { return g.groups * depth; }
  bool narrow() const { return depth <= kNarrow; }
  // Width of the block of k that starts at k0: as many narrow groups as fit, or a part of one group.
  int64_t block(int64_t k0) const {
    return narrow() ? std::min(blocking.k / depth * depth, k() - k0) : std::min(blocking.k, depth - k0 % depth);
  }
  int64_t columns() const { return blocking.blocks * kLanes; }
  int64_t along_m() const { return ceil_div(g.m, kTokens); }
  int64_t tasks() const { return along_m() * ceil_div(g.n, columns()); }
  int64_t m0(int64_t task) const { return task % along_m() * kTokens; }
  int64_t n0(int64_t task) const { return task / along_m() * columns(); }
};

struct Workspace {
  alignas(64) int32_t sums[kTokens * kColumns];
  alignas(64) float out[kTokens * kColumns];
  std::unique_ptr<uint8_t[]> packed;
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

// Tokens [m0, m0 + kTokens) times channels [n0, n0 + p.columns()).
void run_task(const Plan& p, int64_t task, int64_t upcoming, Workspace& w) {
  const Gemm& g = p.g;
  const int64_t m0 = p.m0(task), n0 = p.n0(task), k = p.k(), stride = k * kLanes;
  const int64_t rows = std::min(kTokens, g.m - m0), columns = std::min(p.columns(), g.n - n0);
  const int64_t blocks = ceil_div(columns, kLanes);
  const uint8_t* b = g.packed + n0 * k;
  if (!g.packed) {
    if (!w.packed) w.packed.reset(new uint8_t[p.blocking.blocks * stride]);
    for (int64_t v = 0; v < blocks; ++v) pack_block(p, n0 + v * kLanes, w.packed.get() + v * stride);
    b = w.packed.get();
  }
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
    TileArgs t{};
    t.b_stride = stride;
    t.groups = std::max<int64_t>(width / p.depth, 1);
    t.steps = width / t.groups / kDepth;
    t.start_stride = g.m;
    t.a_scale_group = g.a_groups > 1;
    t.a_scale_row = g.a_groups;
    t.b_scale_stride = scales_stride;
    const uint8_t* ahead = b + (k0 + width) * kLanes;
    if (k0 + width == k) ahead = upcoming < p.tasks() ? g.packed + p.n0(upcoming) * k : nullptr;
    if (!g.packed || !p.blocking.prefetch) ahead = nullptr;
    for (int64_t m = 0, count; m < rows; m += count) {
      count = tile_rows(rows - m, t.steps);
      const int64_t most = tile_blocks(count);
      t.a = p.a + m0 * k + k0 * rows + m * width;
      t.start = begins ? p.start + group * g.m + m0 + m : nullptr;
      t.a_scale = g.a_scale + (m0 + m) * g.a_groups + t.a_scale_group * group;
      for (int64_t v = 0, along; v < blocks; v += along) {
        along = std::min(most, blocks - v);
        t.b = b + k0 * kLanes + v * stride;
        t.b_scale = scales + group * scales_stride + v * kLanes;
        t.sums = w.sums + m * kColumns + v * kLanes;
        t.out = ends ? w.out + m * kColumns + v * kLanes : nullptr;
        const int64_t done = m * blocks + v * count, from = done / rows, to = (done + count * along) / rows;
        t.ahead[0] = t.ahead[1] = nullptr;  // this tile's share
        if (ahead && from < to) t.ahead[0] = ahead + from * stride, t.ahead[1] = ahead + (to - 1) * stride;
        run_tile(count, along, p.narrow(), t);
      }
    }
  }
  with_float(g.dtype, [&](auto type) {
    using T = decltype(type);
    auto* out = static_cast<typename T::Storage*>(g.out);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t c = 0; c < columns; ++c) {
        float value = w.out[m * kColumns + c];
        if (g.bias) value += g.bias[n0 + c];
        out[(m0 + m) * g.n + n0 + c] = T::narrow(value);
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
  if (!g.a) {
    scales.resize(std::max<size_t>(scales.size(), g.m * g.a_groups));
    g.a_scale = scale = scales.data();
    grain = g.x.silu_mul ? 4096 : 32768;
  }
  const Blocking* blocking = kBlocking;
  while (g.m > blocking->tokens) ++blocking;
  const Plan plan{g, depth, a, *blocking, start};
  const uint32_t base = plan.narrow() ? kMagicBits : 0;
  parallel(g.m, 1 + grain / std::max<int64_t>(k, 1), [&](int64_t begin, int64_t end) {
    Quantizer quantizer(g);
    for (int64_t m = begin; m < end; ++m) {
      const int64_t m0 = m / kTokens * kTokens, rows = std::min(kTokens, g.m - m0);
      const int8_t* token = g.a ? g.a + m * g.groups * g.width : quantizer(m, scale + m * g.a_groups);
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
        run_task(plan, task, upcoming, workspace);
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
