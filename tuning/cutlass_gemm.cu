// A peer of the benchmark: CUTLASS's FP8 GEMM with blockwise scales for Hopper, behind C functions.
//
//   D = (A * sfa) @ (B * sfb)^T, A e4m3 [m, k], B e4m3 [n, k], D bf16 [m, n], all row-major;
//   sfa float [k / 128][m] and sfb float [k / 128][ceil(n / 128)], as the library likes them
//
// One configuration a library, named by macros:
//   TILE_M, TILE_N     tile of what CUTLASS computes
//   CLUSTER_M          blocks of a cluster along m, which share the tile of B
//   PINGPONG           1: a tile a math warpgroup in turn; 0: both work on one tile
//   STREAM_K           1: the blocks share k too; 0: one block a tile, persistent
//   SWAPPED            1: CUTLASS computes D^T = B A^T, so that TILE_N cuts a small m

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace {

using cute::_1;
using cute::_128;
using cute::Int;
using cute::Shape;

using E4M3 = cutlass::float_e4m3_t;
using BF16 = cutlass::bfloat16_t;

constexpr bool kSwapped = SWAPPED;
constexpr int kAlignmentAB = 16;  // elements of 16 bytes, what TMA asks for
constexpr int kAlignmentD = 8;

using TileShape = Shape<Int<TILE_M>, Int<TILE_N>, _128>;
using ClusterShape = Shape<Int<CLUSTER_M>, _1, _1>;
using LayoutD =
    std::conditional_t<kSwapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;

// The left operand is A with a scale every row, or, swapped, B with a scale every 128 rows.
using Scales =
    cutlass::detail::Sm90BlockwiseScaleConfig<kSwapped ? 128 : 1, kSwapped ? 1 : 128, 128>;
using LayoutLeftScales = decltype(Scales::deduce_layoutSFA());
using LayoutRightScales = decltype(Scales::deduce_layoutSFB());

using MainloopSchedule =
    std::conditional_t<PINGPONG, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8Blockwise,
                       cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8Blockwise>;
using EpilogueSchedule = std::conditional_t<PINGPONG, cutlass::epilogue::TmaWarpSpecialized,
                                            cutlass::epilogue::TmaWarpSpecializedCooperative>;
using TileScheduler = std::conditional_t<STREAM_K, cutlass::gemm::StreamKScheduler,
                                         cutlass::gemm::PersistentScheduler>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutD, kAlignmentD, BF16,
    LayoutD, kAlignmentD, EpilogueSchedule>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, E4M3,
    cute::tuple<cutlass::layout::RowMajor, LayoutLeftScales>, kAlignmentAB, E4M3,
    cute::tuple<cutlass::layout::ColumnMajor, LayoutRightScales>, kAlignmentAB, float, TileShape,
    ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    MainloopSchedule>::CollectiveOp;

// A struct of its own gives the kernel a name that a profile can show.
struct CutlassGemm
    : cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                           TileScheduler> {};
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<CutlassGemm>;

struct Operands {
  void const* a;
  void const* b;
  float const* sfa;
  float const* sfb;
  void* d;
};

cutlass::KernelHardwareInfo hardware() {
  int device = 0;
  cudaGetDevice(&device);
  return {device, cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device)};
}

Gemm::Arguments make_arguments(Operands const& operands, int m, int n, int k) {
  bool const swapped = kSwapped;
  int const rows = swapped ? n : m;
  int const columns = swapped ? m : n;
  auto const extents = cute::make_shape(rows, columns, k, 1);
  auto const row_stride = cute::make_stride(int64_t{k}, _1{}, int64_t{0});

  Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {rows, columns, k, 1};
  auto& mainloop = arguments.mainloop;
  mainloop.ptr_A = static_cast<E4M3 const*>(swapped ? operands.b : operands.a);
  mainloop.dA = row_stride;
  mainloop.ptr_B = static_cast<E4M3 const*>(swapped ? operands.a : operands.b);
  mainloop.dB = row_stride;
  mainloop.ptr_SFA = swapped ? operands.sfb : operands.sfa;
  mainloop.layout_SFA = Scales::tile_atom_to_shape_SFA(extents);
  mainloop.ptr_SFB = swapped ? operands.sfa : operands.sfb;
  mainloop.layout_SFB = Scales::tile_atom_to_shape_SFB(extents);
  auto& epilogue = arguments.epilogue;
  epilogue.thread.alpha = 1.0f;
  epilogue.thread.beta = 0.0f;
  epilogue.ptr_D = static_cast<BF16*>(operands.d);
  cute::get<kSwapped ? 1 : 0>(epilogue.dD) = n;
  arguments.hw_info = hardware();
  return arguments;
}

}  // namespace

extern "C" {

// Bytes that cutlass_gemm needs at `workspace`, on the current device.
size_t cutlass_workspace_bytes(int m, int n, int k) {
  return Gemm::get_workspace_size(make_arguments({}, m, n, k));
}

// Launches D = (A * sfa) @ (B * sfb)^T on `stream`; 0, or a status for cutlass_status_name.
int cutlass_gemm(void const* a, void const* b, float const* sfa, float const* sfb, void* d, int m,
                 int n, int k, void* workspace, cudaStream_t stream) {
  Gemm::Arguments const arguments = make_arguments({a, b, sfa, sfb, d}, m, n, k);
  cutlass::Status status = Gemm::can_implement(arguments);
  if (status == cutlass::Status::kSuccess) {
    status = Gemm{}.run(arguments, workspace, stream);
  }
  return static_cast<int>(status);
}

char const* cutlass_status_name(int status) {
  return cutlassGetStatusString(static_cast<cutlass::Status>(status));
}

}  // extern "C"
