"""The rules of a schedule: what the kernels, the registers and the shared memory allow."""

from __future__ import annotations

from typing import get_args

from .errors import ScheduleError
from .problem import D_SCALE, Gemm, GroupedGemm
from .schedule import (
    SCALE_ROWS,
    WGMMA_M,
    Promotion,
    Schedule,
    is_scaled_by_row,
    max_stages,
    num_k_blocks,
    num_parts,
    num_sfb_rows,
    part_columns,
    smem_plan,
    split_blocks,
    tile_columns,
)
from .target import SM90A, Target

MAX_CLUSTER_BLOCKS = 8  # which every Hopper GPU can launch


def check_schedule(problem: Gemm, schedule: Schedule, target: Target = SM90A) -> None:
    """Raise ScheduleError, naming the rule and the remedy, unless `schedule` can run `problem`."""
    check_ranges(schedule)
    _check_rows(schedule)
    _check_turns(schedule)
    _check_clusters(schedule)
    _check_split(problem, schedule)
    _check_columns(problem, schedule)
    rows = num_sfb_rows(problem, schedule.block_n)
    if is_scaled_by_row(problem) and schedule.block_m % SCALE_ROWS:
        raise ScheduleError(
            f"block_m = {schedule.block_m} must be a multiple of {SCALE_ROWS} where every row of B"
            " has its scale"
        )
    if rows > 2 and not is_scaled_by_row(problem):
        raise ScheduleError(
            f"block_n = {schedule.block_n} touches {rows} rows of sfb in one tile, at most 2 are"
            " kept: choose 128, 160, 192 or 256"
        )
    _check_registers(problem, schedule)
    plan = smem_plan(problem, schedule)
    if plan.total_bytes > target.smem_per_block_bytes:
        raise ScheduleError(
            f"schedule needs {plan.total_bytes} B of shared memory, {target.arch} allows"
            f" {target.smem_per_block_bytes}: lower num_stages ({schedule.num_stages};"
            f" {max_stages(problem, schedule, target)} fit) or block_n ({schedule.block_n})"
        )


def check_ranges(schedule: Schedule) -> None:
    """Raise ScheduleError unless every field by itself is one that some kernel can have."""
    for name, low, high, step in (
        ("block_m", 8, 256, 8),
        ("block_n", 16, 256, 16),
        ("num_stages", 2, 32, 1),
        ("num_math_warpgroups", 1, 3, 1),
        ("cluster_m", 1, 4, 1),
        ("cluster_n", 1, 4, 1),
        ("raster_group", 1, 1024, 1),
        ("split_k", 1, MAX_CLUSTER_BLOCKS, 1),
    ):
        value = getattr(schedule, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ScheduleError(f"{name} must be an int, got {value!r}")
        if not low <= value <= high or value % step:
            raise ScheduleError(f"{name} = {value} must be in {low}..{high} in steps of {step}")
    if schedule.promotion not in get_args(Promotion):
        raise ScheduleError(
            f"promotion = {schedule.promotion!r} must be one of {get_args(Promotion)}"
        )
    for name in ("swap_ab", "pingpong"):
        if not isinstance(getattr(schedule, name), bool):
            raise ScheduleError(f"{name} must be a bool, got {getattr(schedule, name)!r}")


def _check_rows(schedule: Schedule) -> None:
    name = "block_n" if schedule.swap_ab else "block_m"
    rows = WGMMA_M * schedule.tile_warpgroups
    if schedule.mma_tile[0] % rows or schedule.num_waves not in (1, 2):
        raise ScheduleError(
            f"{name} = {schedule.mma_tile[0]} must be 64 or 128 for each of the"
            f" {schedule.tile_warpgroups} math warpgroups that share a tile"
        )


def _check_turns(schedule: Schedule) -> None:
    if schedule.pingpong and schedule.num_math_warpgroups == 1:
        raise ScheduleError("pingpong takes turns: num_math_warpgroups must be 2 or 3, not 1")
    if schedule.pingpong and schedule.split_k > 1:
        raise ScheduleError(
            f"split_k = {schedule.split_k} gives a block one tile, so there are no turns to take:"
            " pingpong must be False"
        )


def _check_registers(problem: Gemm, schedule: Schedule) -> None:
    if part_columns(problem, schedule) is None:
        name, width = ("block_m" if schedule.swap_ab else "block_n"), schedule.mma_tile[1]
        remedy = f"lower {name} ({width})"
        if schedule.num_waves > 1 and not schedule.pingpong:
            remedy += f" or raise num_math_warpgroups ({schedule.num_math_warpgroups})"
        raise ScheduleError(
            f"the sums of a {schedule.num_waves * WGMMA_M}x{width} tile a warpgroup leave no"
            f" registers for {num_parts(schedule)} partial accumulators: {remedy}"
        )


def _check_columns(problem: Gemm, schedule: Schedule) -> None:
    columns = tile_columns(problem, schedule)
    if problem.num_halves > 1 and (schedule.block_n not in (32, 64, 128, 256)):
        raise ScheduleError(
            f"block_n = {schedule.block_n} is half gate, half up, each in one row of sfb: it must"
            " be 32, 64, 128 or 256"
        )
    if problem.num_halves > 1 and schedule.split_k > 1:
        raise ScheduleError(
            f"split_k = {schedule.split_k} gives gate and up to different blocks: it must be 1"
        )
    if schedule.swap_ab and (problem.num_halves > 1 or problem.is_quantized):
        raise ScheduleError(
            "swap_ab leaves the columns of D to different threads: it must be False where gate and"
            " up meet, or where D is quantized"
        )
    if problem.is_quantized and (columns % D_SCALE.k or schedule.split_k > 1):
        raise ScheduleError(
            f"a tile of {columns} columns, split_k = {schedule.split_k}: D is quantized in blocks"
            f" of {D_SCALE.k} columns, which one tile must have all of: raise block_n"
            f" ({schedule.block_n}) to a multiple of {D_SCALE.k * problem.num_halves}, split_k = 1"
        )


def _check_split(problem: Gemm, schedule: Schedule) -> None:
    if schedule.split_k > 1 and schedule.cluster_m * schedule.cluster_n > 1:
        raise ScheduleError(
            f"split_k = {schedule.split_k} takes the whole cluster: cluster_m ="
            f" {schedule.cluster_m} and cluster_n = {schedule.cluster_n} must be 1"
        )
    if schedule.split_k > 1 and isinstance(problem, GroupedGemm):
        raise ScheduleError(
            f"split_k = {schedule.split_k} gives every tile a cluster, but the tiles of groups are"
            " counted on the device: it must be 1"
        )
    used = -(-num_k_blocks(problem) // split_blocks(problem, schedule))
    if used < schedule.split_k:
        raise ScheduleError(
            f"split_k = {schedule.split_k} leaves blocks without any of the"
            f" {num_k_blocks(problem)} K blocks: choose {used}"
        )


def _check_clusters(schedule: Schedule) -> None:
    if schedule.cluster_m * schedule.cluster_n > 4 or 3 in (schedule.cluster_m, schedule.cluster_n):
        raise ScheduleError(
            f"cluster = {schedule.cluster_m}x{schedule.cluster_n} must have 1, 2 or 4 blocks in all"
        )
    for name, rows, parts in (
        ("block_m", schedule.block_m, schedule.cluster_n),
        ("block_n", schedule.block_n, schedule.cluster_m),
    ):
        if rows % (8 * parts):
            raise ScheduleError(
                f"{name} = {rows} is loaded in {parts} parts by the cluster: it must be a multiple"
                f" of {8 * parts}"
            )
