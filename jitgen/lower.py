"""Lowering: Problem and Schedule to the tile program that is interpreted, rendered and verified."""

from __future__ import annotations

import math

from .dtypes import F32
from .expr import Operand, acc, operands
from .ir import (
    Buffer,
    Dim,
    Evaluate,
    ForK,
    ForTiles,
    Kernel,
    Load,
    Mma,
    Promote,
    Reduce,
    Stmt,
    Store,
    Tensor,
    Traversal,
    Window,
    Zero,
)
from .problem import Gemm, check_problem
from .schedule import (
    BLOCK_K,
    SCALE_BLOCKS,
    WGMMA_M,
    Schedule,
    check_schedule,
    num_sfb_rows,
    slice_columns,
    smem_plan,
    split_blocks,
)
from .target import SM90A, Target


def lower(problem: Gemm, schedule: Schedule, target: Target = SM90A) -> Kernel:
    """The tile program of `problem` under `schedule`.

    Raises
    ------
    ProblemError, ScheduleError : a rule of check_problem or check_schedule is broken
    """
    check_problem(problem)
    check_schedule(problem, schedule, target)
    m, n, k = Dim("m", None), Dim("n", problem.n), Dim("k", problem.k)
    a = Tensor("a", problem.a_dtype, (m, k))
    b = Tensor("b", problem.b_dtype, (n, k))
    sfa = Tensor(
        "sfa", F32, (Dim("m", None, problem.a_scale.rows), Dim("k", problem.k, problem.a_scale.k))
    )
    sfb = Tensor(
        "sfb",
        F32,
        (Dim("n", problem.n, problem.b_scale.rows), Dim("k", problem.k, problem.b_scale.k)),
    )
    d = Tensor("d", problem.d_dtype, (m, n))
    extra = tuple(
        _operand_tensor(operand, {"m": m, "n": n}) for operand in operands(problem.epilogue)
    )
    return Kernel(
        name=kernel_name(problem, schedule),
        family="gemm",
        problem=problem,
        schedule=schedule,
        target=target,
        tensors=(a, b, sfa, sfb, d, *extra),
        smem=smem_plan(problem, schedule),
        body=_gemm_body(problem, schedule, (a, b, sfa, sfb, d), extra),
    )


def kernel_name(problem: Gemm, schedule: Schedule) -> str:
    """The kernel's `extern "C"` name: stable, and telling in a profiler."""
    s = schedule
    name = (
        f"gemm_{problem.a_dtype}_{problem.d_dtype}_n{problem.n}_k{problem.k}"
        f"_{s.block_m}x{s.block_n}x{BLOCK_K}_s{s.num_stages}_w{s.num_math_warpgroups}"
        f"_c{s.cluster_m}x{s.cluster_n}_g{s.raster_group}_k{s.split_k}_{s.promotion}"
        f"{'_swap' * s.swap_ab}{'_pingpong' * s.pingpong}"
    )
    return name if problem.epilogue == acc else f"{name}_epilogue"


def store_box(schedule: Schedule, element_bytes: int) -> tuple[int, int]:
    """Rows and columns of a TMA store: of one warpgroup's rows, or of one block's with swap_ab.

    Its columns are the widest swizzle span that divides what a block of a split cluster stores.
    """
    unit = math.gcd(schedule.mma_tile[1], slice_columns(schedule))
    rows, columns = schedule.block_m // schedule.tile_warpgroups, unit
    if schedule.swap_ab:
        rows, columns = unit, WGMMA_M
    span = next(span for span in (128, 64, 32) if columns * element_bytes % span == 0)
    return rows, span // element_bytes


def _operand_tensor(operand: Operand, dims: dict[str, Dim]) -> Tensor:
    return Tensor(operand.name, operand.dtype, tuple(dims[axis] for axis in operand.axes))


def _gemm_body(
    problem: Gemm, schedule: Schedule, tensors: tuple[Tensor, ...], extra: tuple[Tensor, ...]
) -> ForTiles:
    d = tensors[-1]
    rows, columns = schedule.block_m, schedule.block_n
    box = store_box(schedule, problem.d_dtype.size_bytes)
    span = box[1] * problem.d_dtype.size_bytes
    smem_d = Buffer("smem_d", d.dtype, (rows, columns), "smem", swizzle_bytes=span)
    sums = Buffer("acc", F32, (rows, columns), "registers")
    k_loop = _k_loop(problem, schedule, tensors, sums)
    if schedule.split_k > 1:
        part_sums = sums
        sums = Buffer("total", F32, (rows, columns), "registers")
        inbox_shape = (schedule.split_k - 1, schedule.mma_tile[0], slice_columns(schedule))
        inbox = Buffer("smem_inbox", F32, inbox_shape, "smem")
        part_k = split_blocks(problem, schedule) * BLOCK_K
        k_loop = (
            ForK(
                problem.k,
                part_k,
                (*k_loop, Reduce(sums, part_sums, inbox)),
                num_blocks=schedule.split_k,
            ),
        )
    return ForTiles(
        Traversal(rows, columns, schedule.cluster_m, schedule.cluster_n, schedule.raster_group),
        (
            *k_loop,
            Evaluate(smem_d, sums, problem.epilogue, extra),
            Store(d, smem_d, (Window("m", rows), Window("n", columns)), box),
        ),
        schedule.num_turns,
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
    over_m, over_n, over_k = Window("m", rows), Window("n", columns), Window("k", BLOCK_K)
    scale_m = Window("m", rows, problem.a_scale.rows)
    scale_n = Window("n", columns, problem.b_scale.rows)
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
        split_blocks(problem, schedule) * BLOCK_K if schedule.split_k > 1 else problem.k,
        scale_k.size,
        (
            Load(smem_sfa, sfa, (scale_m, scale_k), "registers", any_strides=True),
            Load(smem_sfb, sfb, (scale_n, scale_k), "registers"),
            block_loop,
        ),
    )
    return Zero(sums), chunk_loop
