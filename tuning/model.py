"""The cost model: a kernel's time from its schedule, so that one is chosen without measuring.

The constants were fitted, by random search, to the 1260 timings that `jitgen tune --grid dense`
took on one H100 SXM (700 W; CUPTI, L2 flushed before each call; 2026-11-22): 30 schedules for each
of the seven N, K of DeepSeek-V3's linear layers at M = 16..4096. Of those, the schedule that the
model picks is 3.1% slower than the fastest (geometric mean), 13% at worst; on an N, K held out of
the fitting 3.7%, 19% at worst.

What grouped GEMMs add was fitted to 664 timings of 40 shapes (2026-11-22): 1 to 64 groups of 8 to
8192 rows. There the pick is 1.5% slower than the fastest of some ten to twenty, 9% at worst. Of 822
timings of 65 shapes with the kernels that followed it is 1.0% slower, 11% at worst.

What scales of every row of B add was fitted to 96 timings of four shapes of k_grouped (2026-11-22).
There the pick is the fastest, and predicted times are within 2.8% (standard deviation).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence

from ..groups import planned_rows, spread_rows
from ..problem import MAX_EXTENT, Gemm, GroupedGemm, adds_to_d, as_tuned, is_k_grouped
from ..problem_mla import MlaDecode
from ..schedule import (
    BLOCK_K,
    WGMMA_M,
    Schedule,
    is_scaled_by_row,
    num_sfb_rows,
    part_columns,
    slice_columns,
    split_blocks,
)
from ..target import SM90A, Target
from ..traversal import Traversal
from .space import candidates
from .space_mla import BATCHES

GPC_SMS = 16  # 33 clusters of 4 or 18 of 6 blocks did not fit into the 132 SMs of an H100
CLOCKS_PER_US = 1416.0
FIXED_US = 3.02  # launch, first loads from HBM, last stores
HBM_BYTES_PER_US = 2.37e6
# Clocks that a K block takes beside its arithmetic: always, in a cluster, for a second row of sfb,
# for the scales of one of wgmma's columns if A and B are swapped, and where promotion waits for
# wgmma and no other math warpgroup fills the tensor cores meanwhile.
BLOCK_CLOCKS = 3.7
SWAPPED_COLUMN_CLOCKS = 1.43
TURN_CLOCKS = 94.0  # from the K loop of one math warpgroup to that of the next
CLUSTER_CLOCKS = 77.4
SFB_ROW_CLOCKS = 73.1
SERIAL_CLOCKS_ALONE = 74.5
# Where every row of B has its scale, math warpgroups drift apart while they promote, and a stage
# waits for the last: clocks for each that ENOUGH_STAGES has more.
ENOUGH_STAGES, SHALLOW_STAGE_CLOCKS = 4, 65.0
SMEM_CLOCKS_PER_ROW = 0.696  # a row of 128 bytes read by wgmma or written by TMA
EPILOGUE_CLOCKS_PER_ELEMENT = 0.023
LOAD_BYTES_PER_CLOCK = 88.8  # of one SM from L2
SPLIT_CLOCKS = 2805.0  # a split cluster's start, for it has one tile only, and end
TYPICAL_K = 4096  # of a group of k_grouped, whose k is known on the device only
EXCHANGE_BYTES_PER_CLOCK = 7.85  # of sums between the blocks of a split cluster, for each
# Of grouped GEMMs: the groups are found first, and each tile's. A round of tiles that is not full
# costs a part of one that is, for tiles of a round differ, and less where memory bounds. A math
# warpgroup without rows leaves the tensor cores to others. What is read after FIRST_BYTES need not
# wait for L2 to write back; of tiles of many rows of B, it is read a little slower.
GROUPED_FIXED_US = 4.37
GROUPED_TILE_CLOCKS = 583.0
ROUNDING_SHARE = 0.166
MEMORY_ROUNDING_SHARE = 0.082
MEMORY_ROW_SHARE = 0.00011
SKIPPED_SHARE = 0.416
FIRST_BYTES = 45e6
LATER_HBM_BYTES_PER_US = 2.92e6
TWO_WAVES_SHARE = 0.04  # more clocks with 128 rows of groups a math warpgroup

# Two steps an octave from the least row tile on; below it, extents that a schedule may exploit.
M_BUCKETS = (16, 32, *sorted(base << i for i in range(11) for base in (64, 96))[:-1])
# Of k_grouped m is a weight's extent, one a layer: every row tile of wgmma's is a bucket.
K_GROUPED_BUCKETS = tuple(range(WGMMA_M, M_BUCKETS[-1] + 1, WGMMA_M))


def predict_us(problem: Gemm, schedule: Schedule, m: int, num_sms: int = SM90A.num_sms) -> float:
    """Predicted kernel time in microseconds."""
    return _predict_us(problem, schedule, m, num_sms, block_clocks(problem, schedule))


def _predict_us(problem: Gemm, s: Schedule, m: int, num_sms: int, clocks_per_block: float) -> float:
    """`predict_us`, with the part that is the same for every m."""
    if isinstance(problem, GroupedGemm) and not is_k_grouped(problem):
        return _predict_grouped_us(problem, s, m, num_sms, clocks_per_block)
    matrices = problem.num_groups if isinstance(problem, GroupedGemm) else 1  # of D
    rows, columns = _traversal(s).grid(m, problem.n)
    clusters = max_clusters(s.cluster_size, num_sms)
    rounds = -(-matrices * rows * columns // clusters) if clusters else math.inf
    stored = s.mma_tile[0] * slice_columns(s)
    end = stored * EPILOGUE_CLOCKS_PER_ELEMENT
    if s.split_k > 1:
        sent = (s.split_k - 1) * stored * min(m / s.block_m, 1.0) * 4
        end += SPLIT_CLOCKS + sent / EXCHANGE_BYTES_PER_CLOCK
    compute_us = _compute_us(problem, s, min(m, s.block_m), clocks_per_block, end, rounds)
    d_bytes = m * problem.n * problem.d_dtype.size_bytes
    bytes_moved = (m + problem.n) * problem.k + d_bytes
    if is_k_grouped(problem):  # what D is added to is read too
        bytes_moved = matrices * ((m + problem.n) * TYPICAL_K + (1 + adds_to_d(problem)) * d_bytes)
    return FIXED_US + _soft_max(compute_us, bytes_moved / HBM_BYTES_PER_US)


def _predict_grouped_us(
    problem: GroupedGemm, s: Schedule, m: int, num_sms: int, clocks_per_block: float
) -> float:
    """`_predict_us` for groups whose rows are `spread_rows`."""
    groups, height = problem.num_groups, s.block_m * s.cluster_m
    rows = max(_tile_rows(groups, m, height), 1)
    clusters = max_clusters(s.cluster_size, num_sms)
    if not clusters:
        return math.inf
    rounds = rows * _traversal(s).grid(m, problem.n)[1] / clusters
    uneven = math.ceil(rounds) - rounds  # of the last round: what has no tile
    part = s.block_m if s.swap_ab else s.block_m // s.tile_warpgroups
    idle = 1 - _tile_rows(groups, m, part) * part / (rows * height)
    end = s.mma_tile[0] * slice_columns(s) * EPILOGUE_CLOCKS_PER_ELEMENT + GROUPED_TILE_CLOCKS
    clocks = clocks_per_block * (1 - SKIPPED_SHARE * idle)
    clocks *= 1 + TWO_WAVES_SHARE * (s.num_waves - 1)
    rounded = rounds + ROUNDING_SHARE * uneven
    compute_us = _compute_us(problem, s, s.block_m, clocks, end, rounded)
    read = (m + min(groups, m) * problem.n) * problem.k
    bytes_moved = read + m * problem.columns * problem.d_dtype.size_bytes
    first = min(bytes_moved, FIRST_BYTES)
    memory_us = first / HBM_BYTES_PER_US + (bytes_moved - first) / LATER_HBM_BYTES_PER_US
    memory_us *= 1 + MEMORY_ROUNDING_SHARE * uneven / rounds + MEMORY_ROW_SHARE * s.block_n
    return GROUPED_FIXED_US + _soft_max(compute_us, memory_us)


def _compute_us(
    problem: Gemm,
    s: Schedule,
    loaded_rows: int,
    clocks_per_block: float,
    end_clocks: float,
    rounds: float,
) -> float:
    """What `rounds` tiles take a block, one after the other."""
    load_clocks = (loaded_rows + s.block_n) * BLOCK_K / LOAD_BYTES_PER_CLOCK
    num_blocks = TYPICAL_K // BLOCK_K if is_k_grouped(problem) else split_blocks(problem, s)
    k_loop = num_blocks * _soft_max(clocks_per_block, load_clocks)
    if not s.pingpong:
        return rounds * (k_loop + end_clocks) / CLOCKS_PER_US
    # Tiles in turns overlap; the end of the last one does not.
    tile = max(k_loop + TURN_CLOCKS, (k_loop + end_clocks) / 2)
    return (rounds * tile + end_clocks) / CLOCKS_PER_US


def _traversal(s: Schedule) -> Traversal:
    return Traversal(s.block_m, s.block_n, s.cluster_m, s.cluster_n, s.raster_group)


@functools.lru_cache(maxsize=4096)
def _tile_rows(num_groups: int, m: int, height: int) -> int:
    """Tile rows of `height` rows that the groups make."""
    return sum(-(-rows // height) for rows in spread_rows(num_groups, m))


def max_clusters(size: int, num_sms: int) -> int:
    """Clusters of `size` blocks, each with an SM of its own, that run at once.

    SMs come in pairs, and those in GPCs of at least GPC_SMS; a cluster lies in one GPC.
    """
    if size <= 2:
        return num_sms // size
    num_gpcs = max(num_sms // GPC_SMS, 1)
    return num_gpcs * (min(GPC_SMS, num_sms) // size)


def block_clocks(problem: Gemm, schedule: Schedule) -> float:
    """Predicted clocks that a thread block spends on one K block of its tile."""
    s = schedule
    rows, columns = s.mma_tile
    waves = rows // WGMMA_M
    slices = columns // (part_columns(problem, s) or columns)
    tensor = waves * columns * 2.0  # 64 x 1 x 128 multiply-adds at 4096 a clock
    promote = waves / s.tile_warpgroups * columns / 2 * (1 + is_scaled_by_row(problem))
    if s.promotion == "overlapped" or s.num_math_warpgroups > 1:
        compute = max(tensor, promote)
    else:
        compute = tensor + promote + SERIAL_CLOCKS_ALONE
    smem_rows = waves * (slices * WGMMA_M + columns) + rows + columns
    extra = BLOCK_CLOCKS
    if is_scaled_by_row(problem):
        smem_rows += waves * columns // 8  # 16 bytes for 16 columns, read by each of 4 warps
        extra += SHALLOW_STAGE_CLOCKS * max(ENOUGH_STAGES - s.num_stages, 0)
    elif s.swap_ab:
        extra += SWAPPED_COLUMN_CLOCKS * s.num_waves * columns
    else:
        extra += SFB_ROW_CLOCKS * (num_sfb_rows(problem, s.block_n) - 1)
    extra += CLUSTER_CLOCKS if s.cluster_m * s.cluster_n > 1 else 0.0
    return _soft_max(compute, SMEM_CLOCKS_PER_ROW * smem_rows) + extra


def choose(problem: Gemm, m: int, num_sms: int = SM90A.num_sms, target: Target = SM90A) -> Schedule:
    """The schedule with the least predicted time for `m` rows; one for all m of a bucket."""
    return _choose(as_tuned(problem), m_bucket(m, problem), num_sms, target)


def rank(problem: Gemm, m: int, num_sms: int = SM90A.num_sms) -> dict[Schedule, float]:
    """Every candidate with its predicted microseconds, the fastest first."""
    found = {s: _predict_us(problem, s, m, num_sms, c) for s, c in _candidates(problem)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def choose_for_all(problem: Gemm, num_sms: int = SM90A.num_sms) -> Schedule:
    """One schedule for every m: it loses least to the choice of each bucket, in geometric mean."""
    return _choose_for_all(as_tuned(problem), num_sms)


def m_bucket(m: int, problem: Gemm | MlaDecode | None = None) -> int:
    """The extent that a schedule is chosen for: the least of M_BUCKETS at or above m, or the last.

    So every problem has a finite number of kernels, whatever m comes. Of groups, whose rows in all
    vary around what is expected, it is the nearest (by ratio). Of k_grouped, whose m is fixed and
    whose k varies, it is one of K_GROUPED_BUCKETS, whatever k is. Of MLA decode m counts sequences,
    and it is one of BATCHES.
    """
    buckets, ends = _buckets(problem)
    return buckets[bisect.bisect_left(ends[:-1], m)]


def m_buckets(extents: Sequence[int], problem: Gemm | MlaDecode | None = None) -> list[int]:
    """Every bucket that a value of `extents`, in ascending order, falls into.

    problem : whose `planned_rows` the values are of
    """
    rows = functools.partial(planned_rows, problem) if isinstance(problem, Gemm) else None
    buckets, bucket_ends = _buckets(problem)
    ends = [bisect.bisect_right(extents, end, key=rows) for end in bucket_ends]
    starts = (0, *ends[:-1])
    return [bucket for bucket, start, end in zip(buckets, starts, ends, strict=True) if end > start]


@functools.cache
def _nearest_ends() -> tuple[int, ...]:
    means = (math.isqrt(a * b) for a, b in itertools.pairwise(M_BUCKETS))
    return *means, MAX_EXTENT


def _buckets(problem: Gemm | MlaDecode | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The buckets of a problem, and the largest m of each."""
    buckets = M_BUCKETS
    if isinstance(problem, MlaDecode):
        buckets = BATCHES
    elif isinstance(problem, GroupedGemm):
        if not is_k_grouped(problem):
            return M_BUCKETS, _nearest_ends()
        buckets = K_GROUPED_BUCKETS
    return buckets, (*buckets[:-1], MAX_EXTENT)


def _soft_max(a: float, b: float) -> float:
    """Slightly above the larger of two times that mostly overlap."""
    return float((a**4 + b**4) ** 0.25)


@functools.lru_cache(maxsize=256)
def _candidates(problem: Gemm, target: Target = SM90A) -> tuple[tuple[Schedule, float], ...]:
    """All candidates, which every bucket chooses from, with their block_clocks."""
    return tuple((s, block_clocks(problem, s)) for s in candidates(problem, target))


@functools.lru_cache(maxsize=4096)
def _choose(problem: Gemm, m: int, num_sms: int, target: Target) -> Schedule:
    def predicted(candidate: tuple[Schedule, float]) -> float:
        return _predict_us(problem, candidate[0], m, num_sms, candidate[1])

    return min(_candidates(problem, target), key=predicted)[0]


@functools.lru_cache(maxsize=4096)
def _choose_for_all(problem: Gemm, num_sms: int) -> Schedule:
    def total(candidate: tuple[Schedule, float]) -> float:
        s, clocks = candidate
        return sum(math.log(_predict_us(problem, s, m, num_sms, clocks)) for m in M_BUCKETS)

    return min(_candidates(problem), key=total)[0]
