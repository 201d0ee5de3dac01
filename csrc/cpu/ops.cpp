// The CPU implementations of the w8a8_bismooth ops, registered on torch's stable ABI. Their shapes and numerics are
// defined in vllm_w8a8_bismooth/ops/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "grouping.h"
#include "kernels.h"

namespace w8a8::cpu {

#define W8A8_DECLARE(name) \
  namespace name { extern const Level level; }
W8A8_LEVELS(W8A8_DECLARE)  // setup.py lists what it compiles for this machine's architecture, the fastest first

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define W8A8_ADDRESS(name) &name::level,
constexpr const Level* kLevels[] = {W8A8_LEVELS(W8A8_ADDRESS)};

const Level* best() {
  for (const Level* level : kLevels)
    if (level->supported()) return level;
  return nullptr;  // the last one, portable, supports every CPU
}
const Level* active = best();

// Switches to the level named, or to none for "", and returns the one in use. For tests; no kernel may run meanwhile.
std::string level(std::string name) {
  for (const Level* level : kLevels)
    if (name == level->name && level->supported()) active = level, name.clear();
  STD_TORCH_CHECK(name.empty(), "this CPU or build has no level '", name, "'");
  return active->name;
}

Parallel torch_threads() {
  return {[](int64_t count, int64_t grain, Parallel::Body body, const void* context) {
            torch::stable::parallel_for(0, count, grain, [&](int64_t b, int64_t e) { body(b, e, context); });
          },
          (int)torch::stable::get_num_threads()};
}

Float float_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Float::fp32;
    case ScalarType::BFloat16: return Float::bf16;
    case ScalarType::Half: return Float::fp16;
    default:
      STD_TORCH_CHECK(false, "w8a8_bismooth: the float dtype must be fp32, bf16 or fp16");
      __builtin_unreachable();
  }
}

// Its data where it is contiguous, else a copy's; calls through torch's dispatcher are what few tokens wait for.
Tensor dense(Tensor x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

std::tuple<Tensor, Tensor> quantize_activations(Tensor x, std::optional<int64_t> group_size) {
  STD_TORCH_CHECK(x.dim() == 2, "quantize_activations: x must be [M, K]");
  const int64_t m = x.size(0), k = x.size(1), width = channels_of(group_size, k);
  x = dense(x);
  Tensor codes = torch::stable::new_empty(x, {m, k}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, {m, k / width}, ScalarType::Float);
  active->quantize({x.const_data_ptr(), float_of(x.scalar_type()), m * (k / width), width,
                    (int8_t*)codes.mutable_data_ptr(), (float*)scale.mutable_data_ptr()},
                   torch_threads());
  return {codes, scale};
}

std::tuple<Tensor, Tensor> silu_mul_quantize(Tensor x, std::optional<int64_t> group_size) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "silu_mul_quantize: x must be [M, 2 K]");
  const int64_t m = x.size(0), k = x.size(1) / 2, width = channels_of(group_size, k);
  x = dense(x);
  Tensor codes = torch::stable::new_empty(x, {m, k}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, {m, k / width}, ScalarType::Float);
  active->silu_mul_quantize({x.const_data_ptr(), float_of(x.scalar_type()), m, k, width,
                             (int8_t*)codes.mutable_data_ptr(), (float*)scale.mutable_data_ptr()},
                            torch_threads());
  return {codes, scale};
}

// What scales and bias say of the product of m tokens with a_groups scales each, checked. What it had to copy takes the
// place of bias, which is to live as long as the result is used.
Gemm product(int64_t m, int64_t k, int64_t a_groups, const Tensor& b_scale, std::optional<Tensor>& bias) {
  const int64_t n = b_scale.size(0), groups = b_scale.size(1);
  STD_TORCH_CHECK(groups > 0 && k % groups == 0 && (a_groups == 1 || a_groups == groups), "scaled_mm: a [", m, ", ", k,
                  "], a_scale [", m, ", ", a_groups, "], b_scale [", n, ", ", groups,
                  "]: expected [M, K], [M, 1] or [M, G], [N, G] with K a multiple of G");
  STD_TORCH_CHECK(k < 1 << 17, "scaled_mm: K = ", k, " is not below 131072, where int32 sums may overflow");
  STD_TORCH_CHECK(b_scale.scalar_type() == ScalarType::Float, "scaled_mm: the scales must be fp32");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "scaled_mm: bias must be [N]");
    if (bias->scalar_type() != ScalarType::Float) bias = torch::stable::to(*bias, ScalarType::Float);
    bias = dense(*bias);
  }
  Gemm gemm{};
  gemm.m = m, gemm.n = n, gemm.groups = groups, gemm.width = k / groups, gemm.a_groups = a_groups;
  gemm.b_scale = (const float*)b_scale.const_data_ptr();
  gemm.b_scale_n = b_scale.stride(0), gemm.b_scale_g = b_scale.stride(1);
  gemm.bias = bias ? (const float*)bias->const_data_ptr() : nullptr;
  return gemm;
}

bool is(const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool same = x.scalar_type() == dtype && x.dim() == (int64_t)shape.size();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == shape.begin()[i];
  return same;
}

// Puts the weight in, checked. A copy may take the place of b, as of bias above.
void take(Gemm& gemm, Tensor& b) {
  const int64_t k = gemm.groups * gemm.width, steps = gemm.groups * ceil_div(gemm.width, kDepth);
  if (b.dim() == 4) {
    STD_TORCH_CHECK(is(b, ScalarType::Byte, {ceil_div(gemm.n, kLanes), steps, kLanes, kDepth}) && b.is_contiguous(),
                    "scaled_mm: b is not what pack_weight makes of an [N, K] weight with these scales");
    gemm.packed = (const uint8_t*)b.const_data_ptr();
  } else {
    STD_TORCH_CHECK(is(b, ScalarType::Char, {gemm.n, k}), "scaled_mm: b must be int8 [N, K], or packed");
    b = dense(b);
    gemm.b = (const int8_t*)b.const_data_ptr();
  }
}

// The same with rows of eight bits and of four. That `order` is a permutation is not checked, only that nothing is
// written elsewhere.
void take_rows(Gemm& gemm, const Tensor& eight, const Tensor& four, const Tensor& steps, const Tensor& order) {
  const int64_t n = gemm.n, k = gemm.width;
  STD_TORCH_CHECK(gemm.groups == 1 && eight.dim() == 4 && steps.dim() == 4,
                  "linear_rows: eight and steps must be 4-D, ", "and the scales [N, 1]");
  const int64_t before = std::min(eight.size(0) * kLanes, n), blocks = ceil_div(n - before, kLanes),
                groups = steps.size(1);
  STD_TORCH_CHECK(groups > 0 && (k == 32 * groups || k == 64 * groups || k == 128 * groups), "linear_rows: K = ", k,
                  " is not ", groups, " groups of 32, 64 or 128");
  STD_TORCH_CHECK(is(eight, ScalarType::Byte, {ceil_div(before, kLanes), k / kDepth, kLanes, kDepth}) &&
                      is(four, ScalarType::Byte, {blocks, k / (2 * kDepth), kLanes, kDepth}) &&
                      is(steps, ScalarType::Byte, {blocks, groups, 2, kLanes}) && is(order, ScalarType::Int, {n}) &&
                      eight.is_contiguous() && four.is_contiguous() && steps.is_contiguous() && order.is_contiguous(),
                  "linear_rows: the weight is not what pack_rows makes of an [N, K] one with these scales");
  const auto* columns = (const int32_t*)order.const_data_ptr();
  int32_t outside = 0;  // negative if a column is
  for (int64_t i = 0; i < n; ++i) outside |= columns[i] | ((int32_t)(n - 1) - columns[i]);
  STD_TORCH_CHECK(outside >= 0, "linear_rows: order has numbers outside 0 to ", n - 1);
  gemm.packed = (const uint8_t*)eight.const_data_ptr();
  gemm.four = {(const uint8_t*)four.const_data_ptr(), (const uint8_t*)steps.const_data_ptr(), n - before, k / groups};
  gemm.order = columns;
}

Tensor run(Gemm& gemm, const Tensor& like, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, {gemm.m, gemm.n}, dtype);
  gemm.out = out.mutable_data_ptr(), gemm.dtype = float_of(dtype);
  active->gemm(gemm, torch_threads());
  return out;
}

// Of codes, and of tokens to be quantized; `weigh` puts the weight in.
template <class Weigh>
Tensor multiply(Tensor a, Tensor a_scale, const Tensor& b_scale, ScalarType out_dtype, std::optional<Tensor>& bias,
                const Weigh& weigh) {
  STD_TORCH_CHECK(a.dim() == 2 && a_scale.dim() == 2 && b_scale.dim() == 2, "scaled_mm: a and the scales must be 2-D");
  STD_TORCH_CHECK(a_scale.size(0) == a.size(0), "scaled_mm: a_scale has ", a_scale.size(0), " rows, a ", a.size(0));
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Char && a_scale.scalar_type() == ScalarType::Float,
                  "scaled_mm: a must be int8 and the scales fp32");
  Gemm gemm = product(a.size(0), a.size(1), a_scale.size(1), b_scale, bias);
  weigh(gemm);
  a = dense(a), a_scale = dense(a_scale);
  gemm.a = (const int8_t*)a.const_data_ptr(), gemm.a_scale = (const float*)a_scale.const_data_ptr();
  return run(gemm, a, out_dtype);
}

template <class Weigh>
Tensor multiply(Tensor x, const Tensor& b_scale, std::optional<int64_t> group_size, std::optional<Tensor>& bias,
                bool silu_mul, const Weigh& weigh) {
  STD_TORCH_CHECK(x.dim() == 2 && b_scale.dim() == 2 && x.size(1) % (1 + silu_mul) == 0,
                  "linear: x must be [M, K], or [M, 2 K] with silu_mul, and b_scale [N, G]");
  const int64_t k = x.size(1) / (1 + silu_mul);
  Gemm gemm = product(x.size(0), k, k / channels_of(group_size, k), b_scale, bias);
  weigh(gemm);
  x = dense(x);
  gemm.x = {x.const_data_ptr(), float_of(x.scalar_type()), silu_mul};
  return run(gemm, x, x.scalar_type());
}

// constant_b is about work that is still under way on a device; on a CPU there is none.
Tensor scaled_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, std::optional<Tensor> bias,
                 bool /* constant_b */) {
  return multiply(a, a_scale, b_scale, out_dtype, bias, [&](Gemm& gemm) { take(gemm, b); });
}

Tensor linear(Tensor x, Tensor b, Tensor b_scale, std::optional<int64_t> group_size, std::optional<Tensor> bias,
              bool silu_mul) {
  return multiply(x, b_scale, group_size, bias, silu_mul, [&](Gemm& gemm) { take(gemm, b); });
}

Tensor scaled_mm_rows(Tensor a, Tensor a_scale, Tensor eight, Tensor four, Tensor steps, Tensor b_scale, Tensor order,
                      ScalarType out_dtype, std::optional<Tensor> bias) {
  return multiply(a, a_scale, b_scale, out_dtype, bias,
                  [&](Gemm& gemm) { take_rows(gemm, eight, four, steps, order); });
}

Tensor linear_rows(Tensor x, Tensor eight, Tensor four, Tensor steps, Tensor b_scale, Tensor order,
                   std::optional<Tensor> bias, bool silu_mul) {
  return multiply(x, b_scale, std::nullopt, bias, silu_mul,
                  [&](Gemm& gemm) { take_rows(gemm, eight, four, steps, order); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(w8a8_bismooth, m) { m.def("_cpu_level(str name) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(w8a8_bismooth, CompositeExplicitAutograd, m) { m.impl("_cpu_level", TORCH_BOX(&level)); }
STABLE_TORCH_LIBRARY_IMPL(w8a8_bismooth, CPU, m) {
  m.impl("quantize_activations", TORCH_BOX(&quantize_activations));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  m.impl("scaled_mm", TORCH_BOX(&scaled_mm));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("scaled_mm_rows", TORCH_BOX(&scaled_mm_rows));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
}

}  // namespace w8a8::cpu
