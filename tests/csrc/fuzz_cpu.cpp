// Compares every instruction-set level that this CPU runs with plain loops, over random shapes in exactly sized
// buffers. Built with sanitizers by tests/ops/test_cpu_kernels.py. Usage: fuzz_cpu SEED ROUNDS
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace w8a8::cpu;

#define W8A8_DECLARE(name) \
  namespace w8a8::cpu::name { extern const Level level; }
W8A8_LEVELS(W8A8_DECLARE)
#define W8A8_ADDRESS(name) &name::level,
const Level* kLevels[] = {W8A8_LEVELS(W8A8_ADDRESS)};

std::mt19937_64 rng;
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
float real(float scale) { return std::normal_distribution<float>(0, scale)(rng); }

// Every index in a thread of its own choosing, three at a time, so that work is shared out and races would show.
const Parallel three_threads{[](int64_t count, int64_t grain, Parallel::Body body, const void* context) {
                               const int64_t share = std::max<int64_t>(grain, ceil_div(count, 3));
                               std::vector<std::thread> threads;
                               for (int64_t begin = 0; begin < count; begin += share)
                                 threads.emplace_back(body, begin, std::min(count, begin + share), context);
                               for (auto& t : threads) t.join();
                             },
                             3};

void fail(const Level* level, const char* what, int64_t at, double got, double want) {
  std::printf("%s: %s at %lld: %.9g instead of %.9g\n", level->name, what, (long long)at, got, want);
  std::exit(1);
}

// The last rows of b, [N, K], in four bits, and b what they stand for.
struct FourBitRows {
  std::vector<uint8_t> codes, steps;

  FourBitRows(const FourBits& four, int64_t n, int64_t k, std::vector<int8_t>& b) {
    const int64_t rows = ceil_div(four.rows, kLanes) * kLanes, groups = k / four.width;
    codes.resize(rows * k / 2), steps.resize(rows * groups * 2);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t group = 0; group < groups; ++group) {
        const int m = pick(0, 3) ? pick(1, 16) : pick(1, 254), top = std::min(254 / m, 15);
        const int o = pick(-127, 127 - top * m);
        uint8_t* step = steps.data() + (row / kLanes * groups + group) * 2 * kLanes + row % kLanes;
        step[0] = m, step[kLanes] = o + 128;
        for (int64_t i = group * four.width; i < (group + 1) * four.width; ++i) {
          const int q = pick(0, top);
          codes[row / kLanes * kLanes * k / 2 + i / 8 * kLine + row % kLanes * kDepth + i % 4] |= q << (i & 4);
          if (row < four.rows) b[(n - four.rows + row) * k + i] = q * m + o;
        }
      }
  }
};

void fuzz_gemm(const Level* level) {
  Gemm g{};
  g.m = std::vector<int64_t>{0, 1, pick(2, 7), pick(8, 40), pick(100, 300)}[pick(0, 4)];
  g.n = std::vector<int64_t>{1, 16 * pick(1, 9), pick(2, 150)}[pick(0, 2)];
  g.groups = pick(0, 1) ? 1 : pick(2, 6);
  g.width = std::vector<int64_t>{pick(1, 40), 64 * pick(1, 4), 4 * pick(1, 200), pick(1, 1200)}[pick(0, 3)];
  if (g.groups == 1 && pick(0, 1)) g.width = 128 * pick(1, 10);
  g.a_groups = pick(0, 1) ? 1 : g.groups;
  const int64_t k = g.groups * g.width, depth = ceil_div(g.width, kDepth) * kDepth;
  const bool packed = pick(0, 1), along_n = pick(0, 1), with_bias = pick(0, 1), extreme = pick(0, 3) == 0;
  std::vector<int8_t> a(g.m * k), b(g.n * k);
  for (auto& x : a) x = extreme ? (pick(0, 1) ? -128 : 127) : pick(-128, 127);
  for (auto& x : b) x = extreme ? (pick(0, 1) ? -128 : 127) : pick(-128, 127);
  g.four.width = 32 << pick(0, 2);
  if (packed && g.groups == 1 && g.width % 128 == 0 && pick(0, 3))
    g.four.rows = g.n - std::min(kLanes * pick(0, ceil_div(g.n, kLanes)), g.n);
  const FourBitRows four(g.four, g.n, k, b);
  g.four.codes = four.codes.data(), g.four.steps = four.steps.data();
  std::vector<int32_t> order(g.n);
  for (int64_t n = 0; n < g.n; ++n) order[n] = n;
  if (g.four.rows) std::shuffle(order.begin(), order.end(), rng), g.order = order.data();
  const int64_t eight = g.n - g.four.rows;
  std::vector<uint8_t> p(packed ? ceil_div(eight, kLanes) * kLanes * g.groups * depth : 0, 128);
  for (int64_t n = 0; packed && n < eight; ++n)
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = i / g.width * depth + i % g.width;
      p[n / kLanes * kLanes * g.groups * depth + at / kDepth * kLine + n % kLanes * kDepth + at % kDepth] =
          (uint8_t)(b[n * k + i] + 128);
    }
  std::vector<float> a_scale(g.m * g.a_groups), b_scale(g.n * g.groups), bias(g.n), out(g.m * g.n, NAN);
  for (auto& x : a_scale) x = std::fabs(real(1));
  for (auto& x : b_scale) x = std::fabs(real(1));
  for (auto& x : bias) x = real(100);
  g.a = a.data(), g.a_scale = a_scale.data();
  std::vector<float> x;
  if (const int64_t sides = pick(0, 2)) {  // the product's own codes and scales, those of the other two functions
    x.resize(g.m * k * sides);
    for (auto& value : x) value = real(4);
    if (sides == 1)
      level->quantize({x.data(), Float::fp32, g.m * g.a_groups, k / g.a_groups, a.data(), a_scale.data()},
                      three_threads);
    else
      level->silu_mul_quantize({x.data(), Float::fp32, g.m, k, k / g.a_groups, a.data(), a_scale.data()},
                               three_threads);
    g.a = nullptr, g.a_scale = nullptr, g.x = {x.data(), Float::fp32, sides == 2};
  }
  g.b_scale = b_scale.data(), g.out = out.data(), g.dtype = Float::fp32;
  packed ? (void)(g.packed = p.data()) : (void)(g.b = b.data());
  g.b_scale_n = along_n ? 1 : g.groups, g.b_scale_g = along_n ? g.n : 1;
  g.bias = with_bias ? bias.data() : nullptr;
  level->gemm(g, three_threads);
  for (int64_t m = 0; m < g.m; ++m)
    for (int64_t n = 0; n < g.n; ++n) {
      float want = 0;
      for (int64_t group = 0; group < g.groups; ++group) {
        int64_t sum = 0;
        for (int64_t i = group * g.width; i < (group + 1) * g.width; ++i) sum += a[m * k + i] * b[n * k + i];
        float product = (float)sum * a_scale[m * g.a_groups + (g.a_groups > 1 ? group : 0)];
        product *= b_scale[n * g.b_scale_n + group * g.b_scale_g];
        want += product;
      }
      const int64_t at = m * g.n + order[n];
      if (with_bias) want += bias[order[n]];
      if (out[at] != want) fail(level, "gemm", at, out[at], want);
    }
}

double widen(Float dtype, uint32_t bits) {
  if (dtype == Float::fp16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    double v = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                              : std::ldexp(fraction, -24);
    return bits >> 15 ? -v : v;
  }
  if (dtype == Float::bf16) bits <<= 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void fuzz_quantize(const Level* level) {
  Quantize q{};
  q.dtype = std::vector<Float>{Float::fp32, Float::bf16, Float::fp16}[pick(0, 2)];
  q.rows = pick(0, 20), q.width = pick(1, 700);
  const int size = q.dtype == Float::fp32 ? 4 : 2;
  const bool wild = pick(0, 3) == 0;  // any bits: NaN, infinities, denormals
  std::vector<uint8_t> x(q.rows * q.width * size);
  for (int64_t i = 0; i < q.rows * q.width; ++i) {
    float value = real(std::ldexp(1.0f, pick(-14, 10)));
    uint32_t bits = rng();
    if (!wild) {
      std::memcpy(&bits, &value, 4);
      if (q.dtype == Float::bf16) bits >>= 16;
      if (q.dtype == Float::fp16) bits = (bits >> 16 & 0x8000) | (bits >> 13 & 0x3fff);
    }
    std::memcpy(x.data() + i * size, &bits, size);
  }
  std::vector<int8_t> codes(q.rows * q.width);
  std::vector<float> scale(q.rows);
  q.x = x.data(), q.codes = codes.data(), q.scale = scale.data();
  level->quantize(q, three_threads);
  for (int64_t r = 0; r < q.rows; ++r) {
    std::vector<float> row(q.width);
    float amax = 0;
    for (int64_t i = 0; i < q.width; ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, x.data() + (r * q.width + i) * size, size);
      row[i] = (float)widen(q.dtype, bits);
      amax = std::isnan(amax) || std::isnan(row[i]) ? NAN : std::max(amax, std::fabs(row[i]));
    }
    const float want = amax / 127.0f;
    if (scale[r] != want && !(std::isnan(want) && std::isnan(scale[r]))) fail(level, "scale", r, scale[r], want);
    if (!std::isfinite(amax)) continue;  // codes unspecified
    const float inverse = std::isfinite(127.0f / amax) ? 127.0f / amax : 0.0f;
    for (int64_t i = 0; i < q.width; ++i) {
      const float product = row[i] * inverse;
      if (codes[r * q.width + i] != std::nearbyint(product))
        fail(level, "code", r * q.width + i, codes[r * q.width + i], std::nearbyint(product));
    }
  }
}

// Within the rounding of the quantization, of silu and of the product; the bits are compared in Python.
void fuzz_silu_mul(const Level* level) {
  SiluMul q{};
  const int64_t groups = pick(1, 3);
  q.dtype = pick(0, 1) ? Float::fp32 : Float::bf16;
  q.tokens = pick(0, 20), q.width = pick(1, 300), q.channels = groups * q.width;
  const int size = q.dtype == Float::fp32 ? 4 : 2;
  std::vector<uint8_t> x(q.tokens * 2 * q.channels * size);
  std::vector<double> y(q.tokens * q.channels);
  for (int64_t t = 0; t < q.tokens; ++t)
    for (int64_t c = 0; c < q.channels; ++c) {
      double value[2];
      for (int side : {0, 1}) {
        const float drawn = real(4);
        uint32_t bits;
        std::memcpy(&bits, &drawn, 4);
        if (q.dtype == Float::bf16) bits >>= 16;
        std::memcpy(x.data() + ((2 * t + side) * q.channels + c) * size, &bits, size);
        value[side] = widen(q.dtype, bits);
      }
      y[t * q.channels + c] = value[0] / (1 + std::exp(-value[0])) * value[1];
    }
  std::vector<int8_t> codes(q.tokens * q.channels);
  std::vector<float> scale(q.tokens * groups);
  q.x = x.data(), q.codes = codes.data(), q.scale = scale.data();
  level->silu_mul_quantize(q, three_threads);
  const double epsilon = q.dtype == Float::fp32 ? 1e-6 : 0.01;
  for (size_t i = 0; i < y.size(); ++i) {
    const double step = scale[i / q.width];
    if (!(std::fabs(codes[i] * step - y[i]) <= 0.501 * step + epsilon * std::fabs(y[i]) + 1e-12))
      fail(level, "silu", i, codes[i] * step, y[i]);
  }
}

int main(int, char** arguments) {
  rng.seed(std::atoll(arguments[1]));
  for (const Level* level : kLevels)
    if (level->supported()) {
      for (int round = std::atoi(arguments[2]); round > 0; --round)
        fuzz_gemm(level), fuzz_quantize(level), fuzz_silu_mul(level);
      std::printf("%s\n", level->name);
    }
}
