"""Schedules: how a problem is mapped to the GPU.

Of all fields split_k alone changes bits of the result: the order in which parts of k are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from .dtypes import F32
from .problem import Gemm, GroupedGemm
from .target import SM90A, Target

BLOCK_K = 128  # bytes of an SW128 row of E4M3, and elements between two promotions
# K blocks whose scales are loaded together: 32 bytes of a row-major sfa, one L2 sector.
SCALE_BLOCKS = 8
WGMMA_M = 64
SCALE_ROWS = 16  # of wgmma's columns, whose scales a thread reads together where each has one
UNROLL_K = 4  # K blocks of straight-line code; only the last promotion of each is not overlapped
EPILOGUE_COLUMNS = {False: 16, True: 8}  # of wgmma's that a warp writes at once; by swap_ab
MIN_PART_COLUMNS = 48  # a narrower wgmma reads A from shared memory too often for its work
WARPGROUP_THREADS = 128
TILE_SLOTS = 8  # tiles that a block with groups remembers: kTileSlots in groups.cuh says why
SWIZZLE_ATOM_BYTES = 1024  # 8 rows of 128 bytes: base alignment of an SW128 tile
# By number of math warpgroups: registers of a producer and of a math thread, which `setmaxnreg`
# moves from the one to the other in steps of 8; and how many of the latter NVRTC 13.0 leaves for
# accumulators without spilling.
REGISTER_SPLIT = {1: (56, 240), 2: (56, 224), 3: (56, 152)}
ACCUMULATOR_REGISTERS = {1: 192, 2: 192, 3: 100}
# At most: with 128 rows a warpgroup in a tile that touches two rows of sfb (scales to keep); and
# where D is float32 (addresses to keep), with 128 rows a warpgroup, and with two rows of sfb.
TWO_WAVES_TWO_ROWS_ACCUMULATOR_REGISTERS = 152
F32_TWO_WAVES_ACCUMULATOR_REGISTERS = 128
F32_TWO_ROWS_ACCUMULATOR_REGISTERS = 136
# With groups, 128 rows a warpgroup and two stages, whose addresses are kept.
GROUPED_TWO_STAGES_ACCUMULATOR_REGISTERS = 176
# Where every row of B has its scale, by number of math warpgroups: those of 16 columns are at hand.
SCALED_BY_ROW_ACCUMULATOR_REGISTERS = {1: 156, 2: 156, 3: 92}
# With float32 results, of one math warpgroup: a bfloat16 residual is widened beside them.
F32_SCALED_BY_ROW_ACCUMULATOR_REGISTERS = 136

Promotion = Literal["overlapped", "serial"]


@dataclass(frozen=True)
class Schedule:
    """Tile sizes and their mapping to warps, clusters and the grid.

    block_m, block_n : rows and columns of D that one thread block computes at a time
    num_stages : depth of the shared-memory pipeline, in K blocks of 128
    num_math_warpgroups : warpgroups that share the rows of the tile, 64 or 128 rows each
    cluster_m, cluster_n : thread blocks of a cluster along m (sharing B) and along n (sharing A)
    raster_group : tile rows that are walked together, so that their B tiles stay in L2
    split_k : thread blocks of a cluster that each compute a part of k of one tile; they exchange
        their sums and add them in the order of k
    promotion : "overlapped" promotes one partial accumulator while the next is computed; "serial"
        keeps one, twice as wide, and leaves it to the other math warpgroups to fill the tensor
        cores meanwhile
    swap_ab : B's rows are wgmma's M operand, in steps of 64, and A's its N operand, in steps of 8,
        so that a tile of a few rows of D wastes no work; the math warpgroups share its columns
    pingpong : the math warpgroups compute whole tiles in turns, so that the epilogue of one runs
        under the K loop of the next
    """

    block_m: int
    block_n: int
    num_stages: int
    num_math_warpgroups: int = 2
    cluster_m: int = 1
    cluster_n: int = 1
    raster_group: int = 8
    split_k: int = 1
    promotion: Promotion = "overlapped"
    swap_ab: bool = False
    pingpong: bool = False

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}x{BLOCK_K} stages={self.num_stages}"
            f" math_warpgroups={self.num_math_warpgroups} cluster={self.cluster_m}x{self.cluster_n}"
            f" raster_group={self.raster_group} split_k={self.split_k} promotion={self.promotion}"
            f" swap_ab={self.swap_ab:d} pingpong={self.pingpong:d}"
        )

    @property
    def cluster_size(self) -> int:
        """Blocks of a cluster, whether they share tiles or the k of one tile."""
        return self.cluster_m * self.cluster_n * self.split_k

    @property
    def num_turns(self) -> int:
        """Tiles that a block has at work at once, each by math warpgroups of its own."""
        return self.num_math_warpgroups if self.pingpong else 1

    @property
    def tile_warpgroups(self) -> int:
        """Math warpgroups that share a tile."""
        return self.num_math_warpgroups // self.num_turns

    @property
    def mma_tile(self) -> tuple[int, int]:
        """Rows and columns of the tile as wgmma sees it."""
        tile = (self.block_m, self.block_n)
        return tile[::-1] if self.swap_ab else tile

    @property
    def num_waves(self) -> int:
        """Slices of 64 rows of wgmma's that one math warpgroup computes, one after the other."""
        return self.mma_tile[0] // (WGMMA_M * self.tile_warpgroups)


@dataclass(frozen=True)
class SmemPlan:
    """Offsets in bytes of each buffer in dynamic shared memory.

    Pipelined buffers are arrays of stages.
    """

    a: int
    b: int
    d: int
    inbox: int
    scales: int
    groups: int
    barriers: int
    total_bytes: int


def is_scaled_by_row(problem: Gemm) -> bool:
    """Whether every row of B has scales of its own, as those of A have."""
    return problem.b_scale.rows == 1


def num_sfb_rows(problem: Gemm, block_n: int) -> int:
    """Most rows of sfb that a tile of `block_n` columns touches; all, if it has one a column."""
    rows = problem.b_scale.rows
    if is_scaled_by_row(problem):
        return block_n
    if problem.num_halves > 1:
        return problem.num_halves
    starts = range(0, min(problem.n, math.lcm(rows, block_n)), block_n)  # the pattern repeats there
    return max(
        (min(start + block_n, problem.n) - 1) // rows - start // rows + 1 for start in starts
    )


def tile_columns(problem: Gemm, schedule: Schedule) -> int:
    """Columns of D that a tile of `block_n` rows of B makes."""
    return schedule.block_n // problem.num_halves


def num_scale_stages(schedule: Schedule) -> int:
    """Depth of the scales' pipeline, in chunks of SCALE_BLOCKS: deeper where K blocks are quick."""
    return 4 if schedule.block_m <= 128 else 2


def smem_plan(problem: Gemm, schedule: Schedule) -> SmemPlan:
    """Where each buffer lies: swizzled tiles first, on 1024-byte boundaries."""
    sizes = {
        "a": schedule.num_stages * schedule.block_m * BLOCK_K * problem.a_dtype.size_bytes,
        "b": schedule.num_stages * schedule.block_n * BLOCK_K * problem.b_dtype.size_bytes,
        "d": schedule.num_turns
        * schedule.block_m
        * tile_columns(problem, schedule)
        * problem.d_dtype.size_bytes,
        "inbox": (schedule.split_k - 1) * schedule.mma_tile[0] * slice_columns(schedule) * 4,
        "scales": num_scale_stages(schedule) * _scale_stage_bytes(problem, schedule),
        "groups": group_table_bytes(problem),
        "barriers": 8 * num_barriers(schedule),
    }
    offset, offsets = 0, {}
    for name, size in sizes.items():
        alignment = 16 if name in ("scales", "groups", "barriers") else SWIZZLE_ATOM_BYTES
        offset = -(-offset // alignment) * alignment
        offsets[name] = offset
        offset += size
    return SmemPlan(**offsets, total_bytes=offset)


def group_table_bytes(problem: Gemm) -> int:
    """Of GroupTable in groups.cuh.

    16 bytes a tile; 4 each for where a group's rows begin and end, their runs, the tile rows before
    it and of all, and two counts of tiles.
    """
    if not isinstance(problem, GroupedGemm):
        return 0
    return 16 * TILE_SLOTS + 4 * (4 * problem.num_groups + 3)


def num_barriers(schedule: Schedule) -> int:
    """mbarriers of a block: full and empty for each stage of tiles and of scales; of the inbox."""
    return 2 * (schedule.num_stages + num_scale_stages(schedule)) + int(schedule.split_k > 1)


def split_blocks(problem: Gemm, schedule: Schedule) -> int:
    """K blocks of one part of k; the last part may have fewer."""
    return -(-num_k_blocks(problem) // schedule.split_k)


def num_k_blocks(problem: Gemm) -> int:
    """K blocks of the problem, the last of which may be partial."""
    return -(-problem.max_k // BLOCK_K)


def slice_columns(schedule: Schedule) -> int:
    """wgmma's columns of a tile that each block of a split cluster adds up, as far as they go."""
    unit = EPILOGUE_COLUMNS[schedule.swap_ab]
    return -(-schedule.mma_tile[1] // (unit * schedule.split_k)) * unit


def max_stages(problem: Gemm, schedule: Schedule, target: Target = SM90A) -> int:
    """The deepest pipeline that fits into shared memory with `schedule`'s tile; may be 0."""
    one = smem_plan(problem, replace(schedule, num_stages=1)).total_bytes
    stage = (schedule.block_m + schedule.block_n) * BLOCK_K + 2 * 8
    return max(1 + (target.smem_per_block_bytes - one) // stage, 0)


def _scale_stage_bytes(problem: Gemm, schedule: Schedule) -> int:
    """Scales of SCALE_BLOCKS K blocks: for each, one a row of A, then those of the rows of sfb."""
    return SCALE_BLOCKS * (schedule.block_m + num_sfb_rows(problem, schedule.block_n)) * 4


def accumulator_registers(problem: Gemm, schedule: Schedule) -> int:
    """Registers of a math thread that sums and partial accumulators may take."""
    two_waves = schedule.num_waves > 1
    by_row = is_scaled_by_row(problem)
    two_rows = not (schedule.swap_ab or by_row) and num_sfb_rows(problem, schedule.block_n) > 1
    limits = [ACCUMULATOR_REGISTERS[schedule.num_math_warpgroups]]
    if two_waves and two_rows:
        limits.append(TWO_WAVES_TWO_ROWS_ACCUMULATOR_REGISTERS)
    if problem.d_dtype == F32 and two_waves:
        limits.append(F32_TWO_WAVES_ACCUMULATOR_REGISTERS)
    if problem.d_dtype == F32 and two_rows:
        limits.append(F32_TWO_ROWS_ACCUMULATOR_REGISTERS)
    if by_row:
        limits.append(SCALED_BY_ROW_ACCUMULATOR_REGISTERS[schedule.num_math_warpgroups])
        if problem.d_dtype == F32 and schedule.num_math_warpgroups == 1:
            limits.append(F32_SCALED_BY_ROW_ACCUMULATOR_REGISTERS)
    if isinstance(problem, GroupedGemm) and two_waves and schedule.num_stages == 2:
        limits.append(GROUPED_TWO_STAGES_ACCUMULATOR_REGISTERS)
    return min(limits)


def num_parts(schedule: Schedule) -> int:
    """Partial accumulators a math warpgroup holds: one computed, with overlap one promoted."""
    return 2 if schedule.promotion == "overlapped" else 1


def part_columns(problem: Gemm, schedule: Schedule) -> int | None:
    """Columns of one wgmma chain; None if there are too few registers even for a narrow one.

    The widest equal slices of the tile, down to MIN_PART_COLUMNS, for which num_parts partial
    accumulators fit into registers beside the sums.
    """
    width = schedule.mma_tile[1]
    unit = SCALE_ROWS if is_scaled_by_row(problem) else 8
    budget = accumulator_registers(problem, schedule) - schedule.num_waves * width // 2
    for num_slices in range(1, max(width // MIN_PART_COLUMNS, 1) + 1):
        columns, rest = divmod(width, num_slices)
        needed = part_registers(problem, schedule, columns)
        if not rest and columns % unit == 0 and needed <= budget:
            return columns
    return None


def part_registers(problem: Gemm, schedule: Schedule, columns: int) -> int:
    """Registers of a math thread for parts of `columns` columns, and for their scales."""
    # Those of A, which are many if swapped; where each row of B has one, 16 columns' at a time.
    scales = columns // 4 if schedule.swap_ab and not is_scaled_by_row(problem) else 0
    return num_parts(schedule) * columns // 2 + scales


def products_ahead(problem: Gemm, schedule: Schedule) -> int:
    """Products of two scales that a math thread forms while a chain of wgmmas runs.

    One for each accumulator of the chain; as far as registers last, beside scales for the others,
    in steps of SCALE_ROWS columns. Only where every row of B has its scale.
    """
    columns = part_columns(problem, schedule) or 0
    sums = schedule.num_waves * schedule.mma_tile[1] // 2
    free = ACCUMULATOR_REGISTERS[schedule.num_math_warpgroups] - sums
    free -= part_registers(problem, schedule, columns)
    if columns // 2 <= free:
        return columns // 2
    step = SCALE_ROWS // 2
    return (free - step) // step * step
