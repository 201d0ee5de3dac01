// Dynamic INT8 quantization of activations, per token or per token and group: plain, after add + RMSNorm, after
// SiLU * up.
//
// One block a row. A thread takes vectors of 8 channels (16-byte loads); a row that fits into the block's registers is
// read once, a wider one is walked in chunks and read again for each pass. Codes and scales equal those of
// ops/reference.py bit for bit: no contraction (the _rn intrinsics), IEEE division and root, sums over one fixed tree.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace quant {

constexpr int kVector = 8;

template <class T>
struct alignas(16) Vector {
  uint32_t word[kVector * sizeof(T) / 4];
};

// Numbers as stored.
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

__device__ __forceinline__ void unpack(const Vector<float>& v, float (&x)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = __uint_as_float(v.word[j]);
}
__device__ __forceinline__ void unpack(const Vector<Bf16>& v, float (&x)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = __uint_as_float(j % 2 ? v.word[j / 2] & 0xffff0000u : v.word[j / 2] << 16);
}
__device__ __forceinline__ void unpack(const Vector<Fp16>& v, float (&x)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = ptx::unpack_fp16(v.word[j / 2] >> (j % 2 * 16));
}

__device__ __forceinline__ void pack(const float (&x)[kVector], Vector<float>& v) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) v.word[j] = __float_as_uint(x[j]);
}
__device__ __forceinline__ void pack(const float (&x)[kVector], Vector<Bf16>& v) {
#pragma unroll
  for (int j = 0; j < kVector / 2; ++j) v.word[j] = ptx::pack_bf16(x[2 * j], x[2 * j + 1]);
}
__device__ __forceinline__ void pack(const float (&x)[kVector], Vector<Fp16>& v) {
#pragma unroll
  for (int j = 0; j < kVector / 2; ++j) v.word[j] = ptx::pack_fp16(x[2 * j], x[2 * j + 1]);
}

template <class T>
__device__ __forceinline__ Vector<T> load(const T* base, int64_t vector) {
  return reinterpret_cast<const Vector<T>*>(base)[vector];
}

// 1 / x, correctly rounded for 1 <= x < 2^126 by one Newton step, as nvcc's own division does it; 0 above.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(r, __fmaf_rn(-x, r, 1.0f), r);
#else
  return x < 0x1p126f ? 1.0f / x : 0.0f;
#endif
}

// x / (1 + exp(-x)) by the steps that reference.silu explains.
__device__ __forceinline__ float silu(float x) {
  constexpr float kRounder = 12582912.0f, kLog2e = 1.44269502162933349609375f;
  constexpr float kLn2High = 0.693147182464599609375f, kLn2Low = -1.9046542121259336e-09f;
  const float low = fminf(x, 87.0f);
  const float shifted = __fmaf_rn(low, -kLog2e, kRounder);
  const float n = __fsub_rn(shifted, kRounder);
  const float r = __fmaf_rn(n, -kLn2Low, __fmaf_rn(n, -kLn2High, -low));
  float power = 0.0013814539415761828f;
  power = __fmaf_rn(power, r, 0.00836874544620514f);
  power = __fmaf_rn(power, r, 0.04166838899254799f);
  power = __fmaf_rn(power, r, 0.1666652113199234f);
  power = __fmaf_rn(power, r, 0.4999999403953552f);
  power = __fmaf_rn(power, r, 1.0f);
  power = __fmaf_rn(power, r, 1.0f);
  const float scaled = __uint_as_float(__float_as_uint(power) + (__float_as_uint(shifted) << 23));
  const float exponential = x < -87.0f ? 0x1p127f : scaled;  // its reciprocal is taken as 0
  return __fmul_rn(x, reciprocal(__fadd_rn(1.0f, exponential)));
}

// What is quantized. `fetch` only loads, so that the loads of many vectors are under way together; `make` computes.
template <class T>
struct Plain {
  using Number = T;
  using Raw = Vector<T>;
  static constexpr bool kNorm = false;
  const T* x;
  __device__ __forceinline__ Raw fetch(int64_t row, int vectors, int v) const { return load(x, row * vectors + v); }
  __device__ __forceinline__ Vector<T> make(const Raw& raw, float) const { return raw; }
};

template <class T>
struct Pair {
  Vector<T> left, right;
};

template <class T>
struct SiluMul {
  using Number = T;
  using Raw = Pair<T>;
  static constexpr bool kNorm = false;
  const T* x;
  __device__ __forceinline__ Raw fetch(int64_t row, int vectors, int v) const {
    return {load(x, 2 * row * vectors + v), load(x, (2 * row + 1) * vectors + v)};
  }
  __device__ __forceinline__ Vector<T> make(const Raw& raw, float) const {
    float gate[kVector], up[kVector];
    Vector<T> value;
    unpack(raw.left, gate);
#pragma unroll
    for (int j = 0; j < kVector; ++j) gate[j] = silu(gate[j]);
    pack(gate, value);  // rounds, as the unfused operation does
    unpack(value, gate);
    unpack(raw.right, up);
#pragma unroll
    for (int j = 0; j < kVector; ++j) gate[j] = __fmul_rn(gate[j], up[j]);
    pack(gate, value);
    return value;
  }
};

// What is normed is `sum` of `fetch_terms`; once the norm is known, `make` computes the result from that and the gain.
template <class T>
struct RmsNorm {
  using Number = T;
  using Raw = Pair<T>;
  static constexpr bool kNorm = true;
  const T* x;
  T* residual;  // or null
  const T* gain;
  float epsilon;
  __device__ __forceinline__ Raw fetch_terms(int64_t row, int vectors, int v) const {
    return {load(x, row * vectors + v), residual ? load(residual, row * vectors + v) : Vector<T>{}};
  }
  __device__ __forceinline__ Vector<T> sum(const Raw& raw) const {
    if (!residual) return raw.left;
    float a[kVector], b[kVector];
    Vector<T> value;
    unpack(raw.left, a);
    unpack(raw.right, b);
#pragma unroll
    for (int j = 0; j < kVector; ++j) a[j] = __fadd_rn(a[j], b[j]);
    pack(a, value);
    return value;
  }
  __device__ __forceinline__ Raw fetch(int64_t row, int vectors, int v) const {
    return {load(residual ? residual : x, row * vectors + v), load(gain, v)};
  }
  __device__ __forceinline__ Vector<T> make(const Raw& raw, float inverse_rms) const {
    float z[kVector], w[kVector];
    Vector<T> value;
    unpack(raw.left, z);
    unpack(raw.right, w);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[j] = __fmul_rn(__fmul_rn(z[j], inverse_rms), w[j]);
    pack(z, value);
    return value;
  }
};

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The largest magnitude as bits, which are ordered like the numbers, with NaN above infinity.
template <class T>
__device__ __forceinline__ uint32_t amax_bits(const Vector<T>& value) {
  float x[kVector];
  unpack(value, x);
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) largest = larger(largest, __float_as_uint(x[j]) & 0x7fffffffu);
  return largest;
}

__device__ __forceinline__ uint32_t max_over(uint32_t x, int lanes) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    if (step < lanes) x = larger(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// The reference's tree: neighbours first. Addition commutes, so every lane gets the same bits.
__device__ __forceinline__ float tree_sum(float x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = __fadd_rn(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const Vector<T>& value) {
  float x[kVector];
  unpack(value, x);
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = __fmul_rn(x[j], x[j]);
  return __fadd_rn(__fadd_rn(__fadd_rn(x[0], x[1]), __fadd_rn(x[2], x[3])),
                   __fadd_rn(__fadd_rn(x[4], x[5]), __fadd_rn(x[6], x[7])));
}

__device__ __forceinline__ float inverse_scale(uint32_t amax) {
  const float inverse = __fdiv_rn(127.0f, __uint_as_float(amax));
  return inverse < INFINITY ? inverse : 0.0f;  // 0 also for NaN
}

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | d << 24;
}

template <class T>
__device__ __forceinline__ uint64_t codes_of(const Vector<T>& value, float inverse) {
  float x[kVector];
  unpack(value, x);
  uint32_t word[2];
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = __fadd_rn(__fmul_rn(x[j], inverse), 12582912.0f);  // code in the low byte
#pragma unroll
  for (int h = 0; h < 2; ++h)
    word[h] = low_bytes(__float_as_uint(x[4 * h]), __float_as_uint(x[4 * h + 1]), __float_as_uint(x[4 * h + 2]),
                        __float_as_uint(x[4 * h + 3]));
  return word[0] | static_cast<uint64_t>(word[1]) << 32;
}

// How a row's vectors form groups, and how the lanes of a warp share them; the same for every block size.
struct Groups {
  int vectors;  // of a row
  int width;    // vectors of a group
  int count;    // groups of a row
  int lanes;    // neighbours in a warp that are of one group: 1 << shift
  int shift = 0;
  bool token, inside_warp;  // one group a row; a group is `lanes` vectors
  int parts;                // of a group, `lanes` vectors each
  uint32_t inverse;         // 2^32 / parts, rounded up: exact quotients of numbers below 2^16
  Groups(int channels, int group) : vectors(channels / kVector), width(group / kVector), count(vectors / width) {
    token = count == 1;
    while (shift < 5 && (token || width % (2 << shift) == 0)) ++shift;
    lanes = 1 << shift;
    inside_warp = !token && width == lanes;
    parts = width >> shift;
    inverse = parts > 1 ? static_cast<uint32_t>(((1ull << 32) + parts - 1) / parts) : 0;
  }
  // Shared words: sums of squares of 32 vectors each, then the largest magnitudes of warps or of `lanes` vectors.
  __host__ __device__ int squares() const { return (vectors + 31) / 32; }
  int shared_bytes(bool norm) const {
    return 4 * ((norm ? squares() : 0) + (token ? 32 : inside_warp ? 0 : vectors >> shift));
  }
};

// Threads of a block: few enough that each has registers for ITEMS = 4 vectors, or pairs of them, on their way.
template <class Source>
constexpr int kMaxThreads = Source::kNorm || sizeof(typename Source::Number) == 4 ? 512
                            : sizeof(typename Source::Raw) > 16                   ? 896
                                                                                  : 1024;

template <class Source, int ITEMS>
__global__ void __launch_bounds__(kMaxThreads<Source>, 1)
    quantize(const Source source, const Groups groups, int8_t* codes, float* scales) {
  using T = typename Source::Number;
  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32;
  const int vectors = groups.vectors, chunk = threads * ITEMS;
  uint32_t* const squares = reinterpret_cast<uint32_t*>(ptx::shared_memory());
  uint32_t* const largest = squares + (Source::kNorm ? groups.squares() : 0);

  // Threads past the row's end load its last vector, hold zeros and write nothing.
  const auto at = [&](int first, int i) { return first + i * threads + thread; };
  const auto inside = [&](int v) { return v < vectors ? v : vectors - 1; };
  Vector<T> value[ITEMS];
  int held = -1;  // first vector of the chunk in `value`
  const auto walk = [&](auto fetch, auto make, auto visit) {
    for (int first = 0; first < vectors; first += chunk) {
      if (first != held) {
        typename Source::Raw raw[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) raw[i] = fetch(inside(at(first, i)));
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) value[i] = at(first, i) < vectors ? make(raw[i]) : Vector<T>{};
        held = first;
      }
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) visit(at(first, i), value[i]);
    }
  };

  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();

  float inverse_rms = 0;
  if constexpr (Source::kNorm) {
    Vector<T> gain[ITEMS];  // of the first chunk; on its way while the squares are summed
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) gain[i] = load(source.gain, inside(at(0, i)));
    walk([&](int v) { return source.fetch_terms(row, vectors, v); },
         [&](const typename Source::Raw& raw) { return source.sum(raw); },
         [&](int v, const Vector<T>& z) {
           const float squared = tree_sum(sum_of_squares(z));
           if (v >= vectors) return;
           if (source.residual) reinterpret_cast<Vector<T>*>(source.residual)[row * vectors + v] = z;
           if (lane == 0) squares[v / 32] = __float_as_uint(squared);
         });
    __syncthreads();
    const int count = groups.squares();  // at most 1024: lane l adds up those from 32 l on
    float sum = 0;
    for (int l = 0; 32 * l < count; ++l) {
      const int i = 32 * l + lane;
      const float part = tree_sum(i < count ? __uint_as_float(squares[i]) : 0.0f);
      if (lane == l) sum = part;
    }
    const float mean = __fdiv_rn(tree_sum(sum), static_cast<float>(vectors * kVector));
    inverse_rms = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, source.epsilon)));
    if (vectors > chunk) {
      held = -1;
    } else {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) value[i] = source.make({value[i], gain[i]}, inverse_rms);
    }
  }

  const auto fetch = [&](int v) { return source.fetch(row, vectors, v); };
  const auto make = [&](const typename Source::Raw& raw) { return source.make(raw, inverse_rms); };
  uint32_t token_amax = 0;
  if (!groups.inside_warp) {
    walk(fetch, make, [&](int v, const Vector<T>& x) {
      const uint32_t amax = amax_bits(x);
      if (groups.token) {
        token_amax = larger(token_amax, amax);
      } else {
        const uint32_t part = max_over(amax, groups.lanes);
        if ((lane & (groups.lanes - 1)) == 0 && v < vectors) largest[v >> groups.shift] = part;
      }
    });
    if (groups.token) {
      token_amax = max_over(token_amax, 32);
      if (lane == 0) largest[thread / 32] = token_amax;
    }
    __syncthreads();
    if (groups.token) {
      token_amax = max_over(lane < threads / 32 ? largest[lane] : 0, 32);
      if (thread == 0) scales[row] = __fdiv_rn(__uint_as_float(token_amax), 127.0f);
    }
  }

  const float token_inverse = inverse_scale(token_amax);
  walk(fetch, make, [&](int v, const Vector<T>& x) {
    float inverse = token_inverse;
    if (!groups.token) {
      const uint32_t part = v >> groups.shift;
      const int g = groups.inside_warp ? part : static_cast<uint64_t>(part) * groups.inverse >> 32;
      uint32_t amax = 0;
      if (groups.inside_warp) {
        amax = max_over(amax_bits(x), groups.lanes);
      } else if (v < vectors) {
        for (int p = g * groups.parts; p < (g + 1) * groups.parts; ++p) amax = larger(amax, largest[p]);
      }
      inverse = inverse_scale(amax);
      if (v < vectors && v == g * groups.width)
        scales[row * groups.count + g] = __fdiv_rn(__uint_as_float(amax), 127.0f);
    }
    if (v < vectors) reinterpret_cast<uint64_t*>(codes)[row * vectors + v] = codes_of(x, inverse);
  });
}

// The shape of a launch. With few rows latency counts, so each thread takes one vector if a block can hold the row;
// with many it takes four, which are under way together and share the reductions.
struct Plan {
  int items, threads;
  Plan(int64_t rows, int vectors, int max_threads) {
    const auto warps = [](int n) { return (n + 31) / 32 * 32; };
    items = vectors <= 256 || (rows <= 256 && vectors <= max_threads) ? 1 : 4;
    threads = warps((vectors + items - 1) / items);
    if (threads > max_threads) threads = max_threads;
  }
};

}  // namespace quant
