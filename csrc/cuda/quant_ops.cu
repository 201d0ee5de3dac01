// The quantization ops on CUDA: checks, outputs, launches. Schemas and semantics: vllm_w8a8_bismooth/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "device.h"
#include "grouping.h"
#include "quant.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Quantized = std::tuple<Tensor, Tensor>;

// Contiguous and aligned for 16-byte loads, by a copy where it must be.
Tensor loadable(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 ? torch::stable::clone(x) : x;
}

template <class Source, int ITEMS>
void launch(const Source& source, const quant::Groups& groups, int threads, const Tensor& x, Quantized& out) {
  cudaLaunchAttribute overlap{};  // may start before the kernel ahead of it has ended: it waits for it itself
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const auto kernel = &quant::quantize<Source, ITEMS>;
  const int device = x.get_device_index();
  STD_TORCH_CHECK(device >= 0 && device < MAX_DEVICES, "no CUDA device ", device);
  static std::atomic<int> architecture[MAX_DEVICES];  // of the kernel's code: before 9.0, it does not wait
  if (!architecture[device].load()) architecture[device].store(compiled_for(reinterpret_cast<const void*>(kernel)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(x.size(0)));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = groups.shared_bytes(Source::kNorm);
  config.stream = current_stream(device);
  config.attrs = &overlap;
  config.numAttrs = architecture[device].load() >= 90 && !one_after_another[device].load();
  auto* codes = static_cast<int8_t*>(std::get<0>(out).mutable_data_ptr());
  auto* scales = static_cast<float*>(std::get<1>(out).mutable_data_ptr());
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, source, groups, codes, scales);
  STD_TORCH_CHECK(status == cudaSuccess, "quantization kernel: ", cudaGetErrorString(status));
}

// `source_of` makes the source for x's number type from a value of that type.
template <class SourceOf>
Quantized quantize(const Tensor& x, int64_t channels, std::optional<int64_t> given_size, SourceOf source_of) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have two dimensions");
  const int64_t group_size = channels_of(given_size, channels);
  STD_TORCH_CHECK(group_size % quant::kVector == 0 && channels < 1 << 18, "on CUDA, group_size (here ", group_size,
                  ") must be a multiple of 8, and K (here ", channels, ") at most 262136");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Quantized out{torch::stable::new_empty(x, {x.size(0), channels}, ScalarType::Char),
                torch::stable::new_empty(x, {x.size(0), channels / group_size}, ScalarType::Float)};
  if (x.size(0) == 0) return out;
  const quant::Groups groups(static_cast<int>(channels), static_cast<int>(group_size));
  const auto run = [&](auto number) {
    const auto source = source_of(number);
    using Source = std::decay_t<decltype(source)>;
    STD_TORCH_CHECK(groups.shared_bytes(Source::kNorm) <= 48 << 10, "groups of ", group_size, " in ", channels,
                    " channels need more shared memory than there is");
    const quant::Plan plan(x.size(0), groups.vectors, quant::kMaxThreads<Source>);
    plan.items == 1 ? launch<Source, 1>(source, groups, plan.threads, x, out)
                    : launch<Source, 4>(source, groups, plan.threads, x, out);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: run(float{}); break;
    case ScalarType::BFloat16: run(quant::Bf16{}); break;
    case ScalarType::Half: run(quant::Fp16{}); break;
    default: STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
  return out;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

Quantized quantize_activations(const Tensor& x, std::optional<int64_t> group_size) {
  const Tensor from = loadable(x);
  return quantize(from, from.size(1), group_size,
                  [&](auto number) { return quant::Plain<decltype(number)>{data<decltype(number)>(from)}; });
}

Quantized silu_mul_quantize(const Tensor& x, std::optional<int64_t> group_size) {
  const Tensor from = loadable(x);
  STD_TORCH_CHECK(from.size(1) % 2 == 0, "x must be [M, 2 K]");
  return quantize(from, from.size(1) / 2, group_size,
                  [&](auto number) { return quant::SiluMul<decltype(number)>{data<decltype(number)>(from)}; });
}

Quantized rms_norm_quantize(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, double epsilon,
                            std::optional<int64_t> group_size) {
  const int32_t device = x.get_device_index();
  STD_TORCH_CHECK(weight.get_device_index() == device && (!residual || residual->get_device_index() == device),
                  "x, residual and weight must be on one device");
  const Tensor from = loadable(x), gain = loadable(weight);
  STD_TORCH_CHECK(gain.scalar_type() == from.scalar_type() && gain.numel() == from.size(1),
                  "weight must be [K] in x's dtype");
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == from.scalar_type() && residual->numel() == from.numel() &&
                        residual->is_contiguous() && reinterpret_cast<uintptr_t>(residual->data_ptr()) % 16 == 0,
                    "residual must be [M, K] in x's dtype, contiguous and aligned to 16 bytes");
  }
  return quantize(from, from.size(1), group_size, [&](auto number) {
    using T = decltype(number);
    T* sum = residual ? static_cast<T*>(residual->mutable_data_ptr()) : nullptr;
    return quant::RmsNorm<T>{data<T>(from), sum, data<T>(gain), static_cast<float>(epsilon)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(w8a8_bismooth, CUDA, m) {
  m.impl("quantize_activations", TORCH_BOX(&quantize_activations));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
}
