// Baseline: D[M,N] = bf16(a_scale[m] * (b_scale[n] * (A B^T)[m,n])) in int8 by CUTLASS's collective builder, sm_90a.
// Compiled once for each tile of benchmarks/cutlass_baseline.py, which names what the macros hold.
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using Tile = Shape<Int<TILE_M>, Int<TILE_N>, Int<TILE_K>>;
using Cluster = Shape<Int<CLUSTER_M>, Int<CLUSTER_N>, _1>;
using Out = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;

template <class To>
using Multiply = fusion::Sm90Compute<cutlass::multiplies, To, float, cutlass::FloatRoundStyle::round_to_nearest>;
using PerToken = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, _0>>;
using PerChannel = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>>;
using ByChannel = fusion::Sm90EVT<Multiply<float>, PerChannel, fusion::Sm90AccFetch>;
using Scaled = fusion::Sm90EVT<Multiply<Out>, PerToken, ByChannel>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    int32_t, float, void, RowMajor, 8, Out, RowMajor, 8, cutlass::epilogue::EPILOGUE_SCHEDULE, Scaled>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, 16, int8_t, cutlass::layout::ColumnMajor, 16,
    int32_t, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::MAINLOOP_SCHEDULE>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                    cutlass::gemm::PersistentScheduler>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

}  // namespace

// Returns 0, or CUTLASS's status. Needs no workspace.
extern "C" int int8_gemm(const int8_t* a, const int8_t* b, const float* a_scale, const float* b_scale, Out* d, int m,
                         int n, int k, int sms, cudaStream_t stream) {
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                     {m, n, k, 1},
                                     {a, cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1}), b,
                                      cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1})},
                                     {{{a_scale}, {{b_scale}, {}, {}}, {}},
                                      nullptr,
                                      {},
                                      d,
                                      cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1})}};
  arguments.hw_info.sm_count = sms;
  if (Gemm::get_workspace_size(arguments)) return -1;
  Gemm gemm;
  if (auto status = gemm.can_implement(arguments); status != cutlass::Status::kSuccess) return int(status);
  if (auto status = gemm.initialize(arguments, nullptr); status != cutlass::Status::kSuccess) return int(status);
  return int(gemm.run(stream));
}
