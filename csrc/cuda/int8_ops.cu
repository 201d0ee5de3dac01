// scaled_mm on CUDA: checks, choice of the kernel, tensor maps, workspaces, launch. Schema: vllm_w8a8_bismooth/ops.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "gemm.cuh"
#include "grouping.h"
#include "tickets.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define CHECK_CUDA(call)                                                            \
  do {                                                                              \
    cudaError_t status = (call);                                                    \
    STD_TORCH_CHECK(status == cudaSuccess, #call ": ", cudaGetErrorString(status)); \
  } while (0)

// What device_restrict forbids.
std::atomic<unsigned> left_out[MAX_DEVICES][layout::GRANULARITIES];
std::atomic<bool> never_split[MAX_DEVICES];

// Clusters of two CTAs that the current device runs at once, of the tiles that have them: each fills a multiprocessor.
int pairs_at_once(int sms) {
  using Kernel = GemmKernel<4, layout::CHANNEL, false>;
  static_assert(Kernel::tile.cluster == 2);
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(sms / 2 * 2);
  config.blockDim = dim3(Kernel::tile.threads());
  config.dynamicSmemBytes = Kernel::shared_bytes;
  config.attrs = &size;
  config.numAttrs = 1;
  int pairs = 0;
  auto function = Kernel::function();
  if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::shared_bytes) !=
          cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&pairs, function, &config) != cudaSuccess) {
    cudaGetLastError();  // a device, or a part of one, that has no clusters does without these tiles
    return 0;
  }
  return pairs;
}

layout::Device device_properties(int index) {
  static std::atomic<bool> known[MAX_DEVICES];
  static layout::Device devices[MAX_DEVICES];
  STD_TORCH_CHECK(index >= 0 && index < MAX_DEVICES, "no CUDA device ", index);
  if (!known[index].load(std::memory_order_acquire)) {
    int major = 0, minor = 0, sms = 0, shared = 0, clock = 0, memory_clock = 0, bus = 0;
    CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    CHECK_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    CHECK_CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index));
    CHECK_CUDA(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    CHECK_CUDA(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, index));
    CHECK_CUDA(cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, index));
    CHECK_CUDA(cudaDeviceGetAttribute(&bus, cudaDevAttrGlobalMemoryBusWidth, index));
    int capability = major * 10 + minor, code = capability;
    if (capability >= 80) {  // others have no kernels
      torch::stable::accelerator::DeviceGuard guard(index);
      code = compiled_for(reinterpret_cast<const void*>(GemmKernel<0, layout::CHANNEL, false>::function()));
    }
    const int memory = layout::memory_bytes(clock, memory_clock, bus);
    layout::Device device = layout::device(capability, code, sms, shared, memory);
    if (device.capability == 90) {
      torch::stable::accelerator::DeviceGuard guard(index);
      device.pairs = pairs_at_once(sms);
    }
    devices[index] = device;  // racing threads write the same
    known[index].store(true, std::memory_order_release);
  }
  layout::Device device = devices[index];
  for (int g = 0; g < layout::GRANULARITIES; ++g) device.left_out[g] = left_out[index][g].load();
  device.splits = !never_split[index].load();
  return device;
}

__device__ unsigned split_tickets[Tickets::COUNT];

// Counters for split tiles, or null where a captured launch finds no more.
unsigned* take_tickets(int device, int teams, bool captured) {
  static Tickets tickets[MAX_DEVICES];
  STD_TORCH_CHECK(unsigned(teams) <= Tickets::MOST, "too many split tiles: ", teams);
  int64_t first = tickets[device].take(unsigned(teams), captured);
  if (first < 0) return nullptr;
  void* all = nullptr;
  CHECK_CUDA(cudaGetSymbolAddress(&all, split_tickets));
  return static_cast<unsigned*>(all) + first;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));
  return capture != cudaStreamCaptureStatusNone;
}

// Rows of k bytes in boxes of box_rows x 128 bytes, with the 128-byte swizzle; zero outside.
CUtensorMap tensor_map(const void* base, int rows, int k, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<Encode>(found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  STD_TORCH_CHECK(encode != nullptr, "the driver has no cuTensorMapEncodeTiled");
  CUtensorMap map;
  cuuint64_t sizes[] = {cuuint64_t(k), cuuint64_t(rows)}, pitch[] = {cuuint64_t(k)};
  cuuint32_t box[] = {layout::BLOCK, cuuint32_t(box_rows)}, steps[] = {1, 1};
  CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(base), sizes, pitch, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(status));
  return map;
}

// Launches one kernel.
template <class Kernel>
void launch(const Gemm& gemm, const layout::Device& device, int device_index, cudaStream_t stream) {
  constexpr layout::Tile tile = Kernel::tile;
  auto function = Kernel::function();
  int units = gemm.schedule.units();
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(tile.threads());
  config.dynamicSmemBytes = Kernel::shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (tile.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(tile.cluster), 1, 1};
  }
  static std::atomic<bool> prepared[MAX_DEVICES];
  if (!prepared[device_index].load()) {
    CHECK_CUDA(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::shared_bytes));
    prepared[device_index].store(true);
  }
  // May start before the kernel ahead of it has ended: it waits for it itself.
  if (device.capability >= 90 && !one_after_another[device_index].load()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if constexpr (tile.wgmma()) {
    const int at_once = tile.cluster > 1 ? device.pairs : device.sms;
    config.gridDim = dim3(layout::least(units, at_once) * tile.cluster);
    CUtensorMap a_map = tensor_map(gemm.a, gemm.m, gemm.k, tile.tokens / tile.cluster);
    CUtensorMap b_map = tensor_map(gemm.b, gemm.n, gemm.k, tile.weights);
    CHECK_CUDA(cudaLaunchKernelEx(&config, function, gemm, a_map, b_map));
  } else {
    config.gridDim = dim3(units);
    CHECK_CUDA(cudaLaunchKernelEx(&config, function, gemm));
  }
}

// Why there is no kernel for weights [n, k] on a compute capability (90: 9.0), or nothing.
std::string gemm_unsupported(int64_t n, int64_t k, std::optional<int64_t> group_size, int64_t capability) {
  if (capability < 80) return "compute capability " + std::to_string(capability) + " is below 80 (Ampere)";
  if (n % 16 || k % 16 || k < 16) {
    return "N = " + std::to_string(n) + " and K = " + std::to_string(k) + " must be multiples of 16";
  }
  if (k >= 1 << 17) return "K = " + std::to_string(k) + " is not below 131072, where int32 sums may overflow";
  const int64_t channels = channels_of(group_size, k);
  if (channels != k && channels % 32) return "group_size = " + std::to_string(channels) + " is not a multiple of 32";
  return "";
}

// A contiguous tensor at an address that TMA and 16-byte loads can use.
Tensor loadable(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 ? torch::stable::clone(x) : x;
}

Float float_type(ScalarType type, const char* what) {
  if (type == ScalarType::BFloat16) return Float::bf16;
  if (type == ScalarType::Half) return Float::fp16;
  STD_TORCH_CHECK(type == ScalarType::Float, what, " must be bfloat16, float16 or float32");
  return Float::fp32;
}

// The product by the tile and split given, or, if tile_index is negative, by those that layout::choose finds fastest.
Tensor multiply(const Tensor& a_any, const Tensor& b_any, const Tensor& a_scale, const Tensor& b_scale,
                ScalarType out_dtype, const std::optional<Tensor>& bias_any, bool constant_b, int64_t tile_index,
                int64_t split) {
  STD_TORCH_CHECK(a_any.dim() == 2 && b_any.dim() == 2 && a_scale.dim() == 2 && b_scale.dim() == 2,
                  "a, b, a_scale and b_scale must be matrices");
  STD_TORCH_CHECK(a_any.scalar_type() == ScalarType::Char && b_any.scalar_type() == ScalarType::Char,
                  "a and b must be int8");
  STD_TORCH_CHECK(a_scale.scalar_type() == ScalarType::Float && b_scale.scalar_type() == ScalarType::Float,
                  "scales must be float32");
  int64_t m = a_any.size(0), k = a_any.size(1), n = b_any.size(0), groups = b_scale.size(1);
  STD_TORCH_CHECK(b_any.size(1) == k && b_scale.size(0) == n && a_scale.size(0) == m && groups > 0 && k % groups == 0 &&
                      (a_scale.size(1) == 1 || a_scale.size(1) == groups),
                  "expected a [M, K], b [N, K], a_scale [M, 1] or [M, G], b_scale [N, G], G divides K; got a [", m,
                  ", ", k, "], b [", n, ", ", b_any.size(1), "], a_scale [", a_scale.size(0), ", ", a_scale.size(1),
                  "], b_scale [", b_scale.size(0), ", ", groups, "]");
  STD_TORCH_CHECK(m < 1 << 30 && n < 1 << 30, "M = ", m, " or N = ", n, " is too large");
  int device_index = a_any.get_device_index();
  STD_TORCH_CHECK(b_any.get_device_index() == device_index && a_scale.get_device_index() == device_index &&
                      b_scale.get_device_index() == device_index,
                  "a, b and their scales must be on one device");
  layout::Device device = device_properties(device_index);
  std::string problem = gemm_unsupported(n, k, k / groups, device.capability);
  STD_TORCH_CHECK(problem.empty(), problem);

  torch::stable::accelerator::DeviceGuard guard(device_index);
  Float d_type = float_type(out_dtype, "out_dtype");
  Tensor d = torch::stable::new_empty(a_any, {m, n}, out_dtype);
  if (m == 0 || n == 0) return d;
  Tensor a = loadable(a_any), b = loadable(b_any);
  std::optional<Tensor> bias;
  if (bias_any) {
    STD_TORCH_CHECK(bias_any->numel() == n && bias_any->get_device_index() == device_index,
                    "bias must be [N] and on the device of a");
    bias = torch::stable::contiguous(*bias_any);
  }

  layout::Granularity granularity = layout::granularity_of(k, k / groups);
  layout::Problem shape{int(m), int(n), int(k), granularity};
  layout::Choice choice;
  if (tile_index < 0) {
    choice = layout::choose(shape, device);
  } else {
    STD_TORCH_CHECK(tile_index < layout::TILE_COUNT && layout::fits(layout::TILES[tile_index], granularity, device) &&
                        split >= 1 && (split == 1 || layout::TILES[tile_index].splits(granularity)),
                    "tile ", tile_index, " with split ", split, " does not fit this device or granularity");
    choice.tile = int(tile_index);
    choice.split = int(split);
    choice.whole = split > 1 ? 0 : layout::schedule(shape, layout::TILES[tile_index], 0, 1).tiles();
  }
  STD_TORCH_CHECK(choice.tile >= 0, "no kernel fits this device, or none that is not left out");
  const layout::Tile& tile = layout::TILES[choice.tile];
  layout::Schedule schedule = layout::schedule(shape, tile, choice.whole, choice.split);
  STD_TORCH_CHECK(choice.split <= schedule.blocks, "tile ", choice.tile, " has fewer blocks of K than split ", split);

  Gemm gemm{};
  gemm.a = static_cast<const int8_t*>(a.const_data_ptr());
  gemm.b = static_cast<const int8_t*>(b.const_data_ptr());
  gemm.m = int(m), gemm.n = int(n), gemm.k = int(k);
  gemm.groups = int(groups), gemm.group_steps = int(k / groups / 32);
  gemm.a_scale = static_cast<const float*>(a_scale.const_data_ptr());
  gemm.b_scale = static_cast<const float*>(b_scale.const_data_ptr());
  gemm.a_scale_row = a_scale.stride(0), gemm.a_scale_group = a_scale.stride(1);
  gemm.b_scale_row = b_scale.stride(0), gemm.b_scale_group = b_scale.stride(1);
  gemm.bias = bias ? bias->const_data_ptr() : nullptr;
  gemm.bias_type = bias ? float_type(bias->scalar_type(), "bias") : Float::fp32;
  gemm.d = d.mutable_data_ptr();
  gemm.d_type = d_type;
  gemm.early_weights = constant_b && gemm.b == b_any.const_data_ptr() &&  // a copy of b is still being written
                       !one_after_another[device_index].load();
  gemm.schedule = schedule;
  cudaStream_t stream = current_stream(device_index);
  int64_t ctas = schedule.split > 1 ? int64_t(schedule.split_tiles()) * tile.cluster : 0;
  if (ctas > 0) {  // measurements capture too much for tickets of their own
    bool captured = tile_index < 0 && is_capturing(stream);
    gemm.tickets = take_tickets(device_index, int(ctas) * tile.team(), captured);
  }
  std::optional<Tensor> partials;  // from torch's allocator: right on every stream and in a captured graph
  if (gemm.tickets) {
    partials =
        torch::stable::new_empty(a, {ctas * tile.exchanged(granularity, schedule.split, int(groups))}, ScalarType::Int);
    gemm.partials = static_cast<int*>(partials->mutable_data_ptr());
  } else {  // nothing to split, or no tickets left for it: the same sums, in whole tiles
    gemm.schedule.whole = schedule.tiles(), gemm.schedule.split = 1;
  }

  bool found = with_kernel(choice.tile, granularity, a_scale.size(1) > 1,
                           [&](auto kernel) { launch<decltype(kernel)>(gemm, device, device_index, stream); });
  STD_TORCH_CHECK(found, "tile ", choice.tile, " has no kernel for this granularity");
  return d;
}

Tensor scaled_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, std::optional<Tensor> bias,
                 bool constant_b) {
  return multiply(a, b, a_scale, b_scale, out_dtype, bias, constant_b, -1, 1);
}

// The product by one kernel of layout::TILES, with every tile of the output split along k. For tests and measurements:
// graphs of it must not run beside other launches.
Tensor scaled_mm_tile(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype,
                      std::optional<Tensor> bias, int64_t tile, int64_t split, bool constant_b) {
  STD_TORCH_CHECK(tile >= 0, "no tile ", tile);
  return multiply(a, b, a_scale, b_scale, out_dtype, bias, constant_b, tile, split);
}

// What scaled_mm would run, in words.
std::string gemm_choice(int64_t m, int64_t n, int64_t k, std::optional<int64_t> group_size, int64_t device) {
  layout::Problem shape{int(m), int(n), int(k), layout::granularity_of(k, channels_of(group_size, k))};
  layout::Choice choice = layout::choose(shape, device_properties(int(device)));
  if (choice.tile < 0) return "none";
  const layout::Tile& tile = layout::TILES[choice.tile];
  return std::to_string(choice.tile) + ": " + (tile.wgmma() ? "wgmma " : "mma ") + std::to_string(tile.tokens) +
         " tokens x " + std::to_string(tile.weights) + " weights, cluster " + std::to_string(tile.cluster) +
         ", split " + std::to_string(choice.split);
}

// Why these kernels run nothing on a device, or nothing. Never throws: a driver may be too old, and the code another's.
std::string device_problem(int64_t device) {
  int count = 0, capability = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && (device < 0 || device >= count || device >= MAX_DEVICES)) {
    return "there is no CUDA device " + std::to_string(device);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, int(device));
  }
  if (status == cudaSuccess && capability < 8) return "the kernels need compute capability 8.0";
  if (status == cudaSuccess) {
    torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
    cudaFuncAttributes code{};
    status = cudaFuncGetAttributes(&code, GemmKernel<0, layout::CHANNEL, false>::function());
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // or torch would report it again
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    return "the kernels were compiled for other architectures (TORCH_CUDA_ARCH_LIST must name this device's)";
  }
  return std::string("the compiled kernels do not load: ") + cudaGetErrorString(status);
}

// The version of CUDA that the driver is made for (13000: 13.0).
int64_t driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// The kernels that fit a device, in rows of 6: tile, granularity, tokens, weights of a cluster, columns of the ring,
// whether K can be split.
std::vector<int64_t> device_tiles(int64_t index) {
  const layout::Device device = device_properties(int(index));
  std::vector<int64_t> rows;
  for (int i = 0; i < layout::TILE_COUNT; ++i) {
    const layout::Tile& tile = layout::TILES[i];
    for (int g = 0; g < layout::GRANULARITIES; ++g) {
      if (!layout::fits(tile, g, device)) continue;
      for (int each : {i, g, tile.tokens, tile.weights * tile.cluster, tile.ring(g), int(tile.splits(g))}) {
        rows.push_back(each);
      }
    }
  }
  return rows;
}

// What a device must not do from now on: choose tiles (bits of layout::TILES for each granularity), divide them along
// k, start kernels ahead of time. Graphs that are captured keep what they have.
void device_restrict(int64_t device, int64_t channel, int64_t group_128, int64_t group_any, bool splits, bool overlap) {
  STD_TORCH_CHECK(device >= 0 && device < MAX_DEVICES, "no CUDA device ", device);
  left_out[device][layout::CHANNEL].store(unsigned(channel));
  left_out[device][layout::GROUP_128].store(unsigned(group_128));
  left_out[device][layout::GROUP_ANY].store(unsigned(group_any));
  never_split[device].store(!splits);
  one_after_another[device].store(!overlap);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(w8a8_bismooth, m) {
  m.def(
      "scaled_mm_tile(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, Tensor? bias, "
      "int tile, int split, bool constant_b=False) -> Tensor");
  m.def("gemm_unsupported(int n, int k, int? group_size, int capability) -> str");
  m.def("gemm_choice(int m, int n, int k, int? group_size, int device) -> str");
  m.def("device_problem(int device) -> str");
  m.def("driver_version() -> int");
  m.def("device_tiles(int device) -> int[]");
  m.def("device_restrict(int device, int channel, int group_128, int group_any, bool splits, bool overlap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(w8a8_bismooth, CUDA, m) {
  m.impl("scaled_mm", TORCH_BOX(&scaled_mm));
  m.impl("scaled_mm_tile", TORCH_BOX(&scaled_mm_tile));
}

STABLE_TORCH_LIBRARY_IMPL(w8a8_bismooth, CompositeExplicitAutograd, m) {
  m.impl("gemm_unsupported", TORCH_BOX(&gemm_unsupported));
  m.impl("gemm_choice", TORCH_BOX(&gemm_choice));
  m.impl("device_problem", TORCH_BOX(&device_problem));
  m.impl("driver_version", TORCH_BOX(&driver_version));
  m.impl("device_tiles", TORCH_BOX(&device_tiles));
  m.impl("device_restrict", TORCH_BOX(&device_restrict));
}
