// The CPU implementations of the w8a8_bismooth ops, registered on torch's stable ABI. Their shapes and numerics are
// defined in vllm_w8a8_bismooth/ops/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

// What weights, scales and bias say of the product of m tokens with a_groups scales each, checked. What it had to copy
// takes the place of b and bias, which are to live as long as the result is used.
Gemm product(int64_t m, int64_t k, int64_t a_groups, Tensor& b, const Tensor& b_scale, std::optional<Tensor>& bias) {
  const int64_t n = b_scale.size(0), groups = b_scale.size(1);
  STD_TORCH_CHECK(groups > 0 && k % groups == 0 && (a_groups == 1 || a_groups == groups), "scaled_mm: a [", m, ", ", k,
                  "], a_scale [", m, ", ", a_groups, "], b_scale [", n, ", ", groups,
                  "]: expected [M, K], [M, 1] or [M, G], [N, G] with K a multiple of G");
  STD_TORCH_CHECK(k < 1 << 17, "scaled_mm: K = ", k, " is not below 131072, where int32 sums may overflow");
  STD_TORCH_CHECK(b_scale.scalar_type() == ScalarType::Float, "scaled_mm: the scales must be fp32");
  const bool packed = b.dim() == 4;
  const int64_t steps = groups * ceil_div(k / groups, kDepth);
  if (packed) {
    STD_TORCH_CHECK(b.scalar_type() == ScalarType::Byte && b.is_contiguous() && b.size(0) == ceil_div(n, kLanes) &&
                        b.size(1) == steps && b.size(2) == kLanes && b.size(3) == kDepth,
                    "scaled_mm: b is not what pack_weight makes of an [N, K] weight with these scales");
  } else {
    STD_TORCH_CHECK(b.scalar_type() == ScalarType::Char && b.dim() == 2 && b.size(0) == n && b.size(1) == k,
                    "scaled_mm: b must be int8 [N, K], or packed");
  }
  b = dense(b);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "scaled_mm: bias must be [N]");
    if (bias->scalar_type() != ScalarType::Float) bias = torch::stable::to(*bias, ScalarType::Float);
    bias = dense(*bias);
  }
  Gemm gemm{};
  gemm.m = m, gemm.n = n, gemm.groups = groups, gemm.width = k / groups, gemm.a_groups = a_groups;
  if (packed)
    gemm.packed = (const uint8_t*)b.const_data_ptr();
  else
    gemm.b = (const int8_t*)b.const_data_ptr();
  gemm.b_scale = (const float*)b_scale.const_data_ptr();
  gemm.b_scale_n = b_scale.stride(0), gemm.b_scale_g = b_scale.stride(1);
  gemm.bias = bias ? (const float*)bias->const_data_ptr() : nullptr;
  return gemm;
}

Tensor run(Gemm& gemm, const Tensor& like, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, {gemm.m, gemm.n}, dtype);
  gemm.out = out.mutable_data_ptr(), gemm.dtype = float_of(dtype);
  active->gemm(gemm, torch_threads());
  return out;
}

// constant_b is about work that is still under way on a device; on a CPU there is none.
Tensor scaled_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, std::optional<Tensor> bias,
                 bool /* constant_b */) {
  STD_TORCH_CHECK(a.dim() == 2 && a_scale.dim() == 2 && b_scale.dim() == 2, "scaled_mm: a and the scales must be 2-D");
  STD_TORCH_CHECK(a_scale.size(0) == a.size(0), "scaled_mm: a_scale has ", a_scale.size(0), " rows, a ", a.size(0));
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Char && a_scale.scalar_type() == ScalarType::Float,
                  "scaled_mm: a must be int8 and the scales fp32");
  Gemm gemm = product(a.size(0), a.size(1), a_scale.size(1), b, b_scale, bias);
  a = dense(a), a_scale = dense(a_scale);
  gemm.a = (const int8_t*)a.const_data_ptr(), gemm.a_scale = (const float*)a_scale.const_data_ptr();
  return run(gemm, a, out_dtype);
}

Tensor linear(Tensor x, Tensor b, Tensor b_scale, std::optional<int64_t> group_size, std::optional<Tensor> bias,
              bool silu_mul) {
  STD_TORCH_CHECK(x.dim() == 2 && b_scale.dim() == 2 && x.size(1) % (1 + silu_mul) == 0,
                  "linear: x must be [M, K], or [M, 2 K] with silu_mul, and b_scale [N, G]");
  const int64_t k = x.size(1) / (1 + silu_mul);
  Gemm gemm = product(x.size(0), k, k / channels_of(group_size, k), b, b_scale, bias);
  x = dense(x);
  gemm.x = {x.const_data_ptr(), float_of(x.scalar_type()), silu_mul};
  return run(gemm, x, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(w8a8_bismooth, m) { m.def("_cpu_level(str name) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(w8a8_bismooth, CompositeExplicitAutograd, m) { m.impl("_cpu_level", TORCH_BOX(&level)); }
STABLE_TORCH_LIBRARY_IMPL(w8a8_bismooth, CPU, m) {
  m.impl("quantize_activations", TORCH_BOX(&quantize_activations));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  m.impl("scaled_mm", TORCH_BOX(&scaled_mm));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace w8a8::cpu
