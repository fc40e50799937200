"""Lowering: Problem and Schedule to the tile program that is interpreted, rendered and verified."""

from __future__ import annotations

import math
from dataclasses import replace

from .dtypes import F32, I32
from .errors import ScheduleError
from .expr import Operand, acc, operands
from .groups import num_values
from .ir import (
    Buffer,
    Dim,
    Evaluate,
    ForK,
    ForTiles,
    Load,
    Mma,
    Promote,
    Quantize,
    Reduce,
    Stmt,
    Store,
    Tensor,
    Window,
    Zero,
)
from .ir_mla import MlaKernel
from .kernel import Kernel
from .lower_mla import lower_mla
from .merge import MergeKernel, MergeSchedule, MergeStates, lower_merge
from .problem import (
    D_SCALE,
    Gemm,
    GroupedGemm,
    adds_to_d,
    check_problem,
    is_k_grouped,
    is_masked,
)
from .problem_mla import MlaDecode
from .quantization import (
    Quantization,
    QuantizationKernel,
    QuantizationSchedule,
    lower_quantization,
)
from .schedule import (
    BLOCK_K,
    SCALE_BLOCKS,
    WGMMA_M,
    Schedule,
    is_scaled_by_row,
    num_sfb_rows,
    slice_columns,
    smem_plan,
    split_blocks,
    tile_columns,
)
from .schedule_mla import MlaSchedule
from .schedule_rules import check_schedule
from .target import SM90A, Target
from .traversal import Traversal

AnyProblem = Gemm | MlaDecode | MergeStates | Quantization
AnySchedule = Schedule | MlaSchedule | MergeSchedule | QuantizationSchedule
AnyKernel = Kernel | MlaKernel | MergeKernel | QuantizationKernel


def lower(problem: Gemm, schedule: Schedule, target: Target = SM90A) -> Kernel:
    """The tile program of `problem` under `schedule`.

    Raises
    ------
    ProblemError, ScheduleError : a rule of check_problem or check_schedule is broken
    """
    check_problem(problem)
    check_schedule(problem, schedule, target)
    tensors, groups = _tensors(problem), _groups_tensor(problem)
    extra = tuple(_operand_tensor(problem, operand) for operand in operands(problem.epilogue))
    return Kernel(
        name=kernel_name(problem, schedule),
        family="gemm",
        problem=problem,
        schedule=schedule,
        target=target,
        tensors=(*tensors, *_scales_of_d(problem), *([groups] if groups else []), *extra),
        smem=smem_plan(problem, schedule),
        body=_gemm_body(problem, schedule, tensors, extra, groups),
    )


def lower_any(problem: AnyProblem, schedule: AnySchedule) -> AnyKernel:
    """The tile program of a problem of any family, on the target that all have.

    Raises
    ------
    ProblemError, ScheduleError : as `lower`, `lower_mla`, `lower_merge` and
        `lower_quantization`
    """
    if isinstance(problem, MlaDecode) and isinstance(schedule, MlaSchedule):
        return lower_mla(problem, schedule)
    if isinstance(problem, MergeStates) and isinstance(schedule, MergeSchedule):
        return lower_merge(problem, schedule)
    if isinstance(problem, Quantization) and isinstance(schedule, QuantizationSchedule):
        return lower_quantization(problem, schedule)
    if isinstance(problem, Gemm) and isinstance(schedule, Schedule):
        return lower(problem, schedule)
    kinds = type(problem).__name__, type(schedule).__name__
    raise ScheduleError(f"a {kinds[0]} cannot run with a {kinds[1]}: it is another family's")


def kernel_name(problem: Gemm, schedule: Schedule) -> str:
    """The kernel's `extern "C"` name: stable, and telling in a profiler."""
    s = schedule
    family = "gemm"
    if isinstance(problem, GroupedGemm):
        aligned = f"_{problem.alignment}" if problem.layout == "group_ends" else ""
        family = f"grouped_gemm_{problem.layout}{aligned}_g{problem.num_groups}"
    k = f"_k{problem.k}" if problem.k else ""
    by_row = f"_{problem.b_scale}" if is_scaled_by_row(problem) else ""
    name = (
        f"{family}_{problem.a_dtype}_{problem.d_dtype}_n{problem.n}{k}{by_row}"
        f"_{s.block_m}x{s.block_n}x{BLOCK_K}_s{s.num_stages}_w{s.num_math_warpgroups}"
        f"_c{s.cluster_m}x{s.cluster_n}_g{s.raster_group}_k{s.split_k}_{s.promotion}"
        f"{'_swap' * s.swap_ab}{'_pingpong' * s.pingpong}"
    )
    name += "_ue8m0" * problem.ue8m0 + "_gated" * (problem.num_halves > 1)
    return name if problem.epilogue == acc else f"{name}_epilogue"


def store_box(schedule: Schedule, element_bytes: int, num_halves: int = 1) -> tuple[int, int]:
    """Rows and columns of a TMA store: of one warpgroup's rows, or of one block's with swap_ab.

    Its columns are the widest swizzle span that divides what a block of a split cluster stores.
    """
    unit = math.gcd(schedule.mma_tile[1] // num_halves, slice_columns(schedule))
    rows, columns = schedule.block_m // schedule.tile_warpgroups, unit
    if schedule.swap_ab:
        rows, columns = unit, WGMMA_M
    span = next(span for span in (128, 64, 32) if columns * element_bytes % span == 0)
    return rows, span // element_bytes


def _tensors(problem: Gemm) -> tuple[Tensor, ...]:
    """a, b, sfa, sfb and d."""
    m, n, k = Dim("m", None), Dim("n", problem.columns), Dim("k", problem.k or None)
    sfa = replace(m, block=problem.a_scale.rows), replace(k, block=problem.a_scale.k)
    sfb = replace(n, block=problem.b_scale.rows), replace(k, block=problem.b_scale.k)
    halves = (Dim("h", problem.num_halves),) if problem.num_halves > 1 else ()
    return (
        Tensor("a", problem.a_dtype, _of_groups(problem, (m, k))),
        Tensor("b", problem.b_dtype, _of_groups(problem, (*halves, n, k))),
        Tensor("sfa", F32, _of_groups(problem, sfa)),
        Tensor("sfb", F32, _of_groups(problem, (*halves, *sfb))),
        Tensor("d", problem.d_dtype, _of_groups(problem, (m, n))),
    )


def _scales_of_d(problem: Gemm) -> tuple[Tensor, ...]:
    """sfd, if D has scales."""
    if not problem.is_quantized:
        return ()
    dims = Dim("m", None, D_SCALE.rows), Dim("n", problem.columns, D_SCALE.k)
    return (Tensor("sfd", F32, _of_groups(problem, dims)),)


def _groups_tensor(problem: Gemm) -> Tensor | None:
    if not isinstance(problem, GroupedGemm):
        return None
    if problem.layout == "group_of_row":
        return Tensor("groups", I32, (Dim("m", None),))
    return Tensor("groups", I32, (Dim("g", num_values(problem, 0)),))


def _operand_tensor(problem: Gemm, operand: Operand) -> Tensor:
    dims: dict[str, Dim] = {"m": Dim("m", None), "n": Dim("n", problem.columns)}
    axes = tuple(dims[axis] for axis in operand.axes)
    return Tensor(operand.name, operand.dtype, _of_groups(problem, axes))


def _of_groups(problem: Gemm, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """`dims`, once for every group if the tensor does not span the rows, or k, that they share."""
    if not isinstance(problem, GroupedGemm) or not dims:
        return dims
    shared = dims[0].axis == "m" and not is_masked(problem)
    if is_k_grouped(problem):
        shared = dims[-1].axis == "k"
    return dims if shared else (Dim("g", problem.num_groups), *dims)


def _gemm_body(
    problem: Gemm,
    schedule: Schedule,
    tensors: tuple[Tensor, ...],
    extra: tuple[Tensor, ...],
    groups: Tensor | None,
) -> ForTiles:
    d = tensors[-1]
    rows, columns = schedule.block_m, tile_columns(problem, schedule)
    box = store_box(schedule, problem.d_dtype.size_bytes, problem.num_halves)
    span = box[1] * problem.d_dtype.size_bytes
    smem_d = Buffer("smem_d", d.dtype, (rows, columns), "smem", swizzle_bytes=span)
    sums = Buffer("acc", F32, (rows, schedule.block_n), "registers")
    k_loop = _k_loop(problem, schedule, tensors, sums)
    if schedule.split_k > 1:
        part_sums = sums
        sums = Buffer("total", F32, (rows, columns), "registers")
        inbox_shape = (schedule.split_k - 1, schedule.mma_tile[0], slice_columns(schedule))
        inbox = Buffer("smem_inbox", F32, inbox_shape, "smem")
        part_k = split_blocks(problem, schedule) * BLOCK_K
        k_loop = (
            ForK(
                problem.max_k,
                part_k,
                (*k_loop, Reduce(sums, part_sums, inbox)),
                num_blocks=schedule.split_k,
            ),
        )
    finish: tuple[Stmt, ...] = (Evaluate(smem_d, sums, problem.epilogue, extra),)
    for sfd in _scales_of_d(problem):
        value = Buffer("value", F32, (rows, columns), "registers")
        windows = Window("m", rows, D_SCALE.rows), Window("n", columns, D_SCALE.k)
        finish = (
            Evaluate(value, sums, problem.epilogue, extra),
            Quantize(smem_d, sfd, value, windows, problem.ue8m0),
        )
    return ForTiles(
        Traversal(rows, columns, schedule.cluster_m, schedule.cluster_n, schedule.raster_group),
        (
            *k_loop,
            *finish,
            Store(
                d,
                smem_d,
                (Window("m", rows), Window("n", columns)),
                box,
                by_row=groups is not None and not is_k_grouped(problem),
                adds=adds_to_d(problem),
            ),
        ),
        schedule.num_turns,
        groups,
    )


def _k_loop(
    problem: Gemm, schedule: Schedule, tensors: tuple[Tensor, ...], sums: Buffer
) -> tuple[Stmt, ...]:
    """sums = the product over one block's part of k."""
    a, b, sfa, sfb, _ = tensors
    rows, columns = schedule.block_m, schedule.block_n
    smem_a = Buffer("smem_a", a.dtype, (rows, BLOCK_K), "smem", pipelined=True, swizzle_bytes=128)
    smem_b = Buffer(
        "smem_b", b.dtype, (columns, BLOCK_K), "smem", pipelined=True, swizzle_bytes=128
    )
    smem_sfa = Buffer("smem_sfa", F32, (rows, SCALE_BLOCKS), "smem", pipelined=True)
    sfb_shape = (num_sfb_rows(problem, columns), SCALE_BLOCKS)
    smem_sfb = Buffer("smem_sfb", F32, sfb_shape, "smem", pipelined=True)
    part = Buffer("part", F32, (rows, columns), "registers")
    of_d = tile_columns(problem, schedule)
    over_m, over_n, over_k = Window("m", rows), Window("n", of_d), Window("k", BLOCK_K)
    scale_m = Window("m", rows, problem.a_scale.rows)
    scale_n = Window("n", of_d, problem.b_scale.rows)
    scale_k = Window("k", BLOCK_K * SCALE_BLOCKS, problem.a_scale.k)
    block_loop = ForK(
        scale_k.size,
        BLOCK_K,
        (
            Load(smem_a, a, (over_m, over_k), "tma", multicast=schedule.cluster_n),
            Load(smem_b, b, (over_n, over_k), "tma", multicast=schedule.cluster_m),
            Mma(part, smem_a, smem_b, schedule.swap_ab),
            Promote(sums, part, (smem_sfa, smem_sfb), (scale_m, scale_n)),
        ),
    )
    chunk_loop = ForK(
        split_blocks(problem, schedule) * BLOCK_K if schedule.split_k > 1 else problem.max_k,
        scale_k.size,
        (
            Load(smem_sfa, sfa, (scale_m, scale_k), "registers", any_strides=True),
            Load(
                smem_sfb,
                sfb,
                (scale_n, scale_k),
                "registers",
                any_strides=is_scaled_by_row(problem),
            ),
            block_loop,
        ),
    )
    return Zero(sums), chunk_loop
