// INT8 quantization and GEMM on x86 CPUs: what the instruction-set levels have in common. Knows nothing of torch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace w8a8::cpu {

enum class Float { fp32, bf16, fp16 };

// Calls body(begin, end) over [0, count) on several threads; the binding passes torch's own thread pool.
struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, const void* context);
  void (*run)(int64_t count, int64_t grain, Body body, const void* context);
  int threads;

  template <class F>
  void operator()(int64_t count, int64_t grain, const F& f) const {
    run(count, grain, [](int64_t begin, int64_t end, const void* c) { (*static_cast<const F*>(c))(begin, end); }, &f);
  }
};

// Weights are packed for dot products of four bytes: [N / 16][K / 4][16][4], each byte offset by 128 so that it is
// unsigned, which is what VPDPBUSD and its relatives want of one operand. N is padded to 16 and each group's share of K
// to 4, with the byte 128 (zero).
constexpr int kLanes = 16, kDepth = 4, kLine = kLanes * kDepth;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Quantize {
  const void* x;  // [rows, width], contiguous: a row is one token, or one group of a token
  Float dtype;
  int64_t rows, width;
  int8_t* codes;  // [rows, width]
  float* scale;   // [rows]
};

struct SiluMul {
  const void* x;  // [tokens, 2 * channels], contiguous: gate, then up
  Float dtype;
  int64_t tokens, channels, width;  // width divides channels: what shares a scale
  int8_t* codes;                    // [tokens, channels]
  float* scale;                     // [tokens, channels / width]
};

// Activations that a product quantizes itself.
struct Unquantized {
  const void* x;  // [M, K], or with silu_mul [M, 2 * K], gate, then up; contiguous
  Float dtype;
  bool silu_mul;
};

// Rows of four bits, the last `rows` of a weight's N: a code is q * m + o, with an m and an o for every `width` of k.
// The rows before them are whole blocks. Codes beyond [-127, 127] make wrong sums, and nothing worse.
struct FourBits {
  const uint8_t* codes;  // [rows / 16][K / 8][16][4]: q of two steps of four k, the first in the lower halves
  const uint8_t* steps;  // [rows / 16][K / width][2][16]: m, and o + 128
  int64_t rows, width;   // 32, 64 or 128, which divides K
};

struct Gemm {
  int64_t m, n, groups, width;  // K = groups * width
  const int8_t* a;              // [M, K]; where there is an `x`, that makes them, and a_scale
  const uint8_t* packed;        // packed weights, or null
  const int8_t* b;              // [N, K], read where there are neither `packed` nor `four`
  FourBits four;                // besides `packed`, in a weight of one group
  const float* a_scale;         // [M, a_groups]
  int64_t a_groups;             // 1 or groups
  const float* b_scale;         // [N, G] with these strides
  int64_t b_scale_n, b_scale_g;
  const float* bias;     // [N] or null
  const int32_t* order;  // [N]: the columns of bias and out that the weight's rows make; null: theirs
  void* out;             // [M, N]
  Float dtype;
  Unquantized x;
};

// One instruction-set level: the same source, kernels.cpp, compiled with that level's flags.
struct Level {
  const char* name;
  bool (*supported)();
  void (*quantize)(const Quantize&, const Parallel&);
  void (*silu_mul_quantize)(const SiluMul&, const Parallel&);
  void (*gemm)(const Gemm&, const Parallel&);
};

}  // namespace w8a8::cpu
