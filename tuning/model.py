"""The cost model: a kernel's time from its schedule, so that one is chosen without measuring.

The constants were fitted, by random search, to the 1260 timings that `jitgen tune --grid dense`
took on one H100 SXM (700 W; CUPTI, L2 flushed before each call; 2026-11-22): 30 schedules for each
of the seven N, K of DeepSeek-V3's linear layers at M = 16..4096. Of those, the schedule that the
model picks is 3.1% slower than the fastest (geometric mean), 13% at worst; on an N, K held out of
the fitting 3.7%, 19% at worst.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence

from ..groups import typical_rows
from ..problem import MAX_EXTENT, Gemm, is_k_grouped, without_epilogue
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
SMEM_CLOCKS_PER_ROW = 0.696  # a row of 128 bytes read by wgmma or written by TMA
EPILOGUE_CLOCKS_PER_ELEMENT = 0.023
LOAD_BYTES_PER_CLOCK = 88.8  # of one SM from L2
SPLIT_CLOCKS = 2805.0  # a split cluster's start, for it has one tile only, and end
TYPICAL_K = 4096  # of a group of k_grouped, whose k is known on the device only
EXCHANGE_BYTES_PER_CLOCK = 7.85  # of sums between the blocks of a split cluster, for each

# Two steps an octave from the least row tile on; below it, extents that a schedule may exploit.
M_BUCKETS = (16, 32, *sorted(base << i for i in range(11) for base in (64, 96))[:-1])


def predict_us(problem: Gemm, schedule: Schedule, m: int, num_sms: int = SM90A.num_sms) -> float:
    """Predicted kernel time in microseconds."""
    return _predict_us(problem, schedule, m, num_sms, block_clocks(problem, schedule))


def _predict_us(problem: Gemm, s: Schedule, m: int, num_sms: int, clocks_per_block: float) -> float:
    """`predict_us`, with the part that is the same for every m."""
    tiles = Traversal(s.block_m, s.block_n, s.cluster_m, s.cluster_n, s.raster_group)
    # Of groups as large as each other.
    groups, of_group = typical_rows(problem, m)
    rows, columns = tiles.grid(of_group, problem.n)
    rows *= groups
    clusters = max_clusters(s.cluster_size, num_sms)
    rounds = -(-rows * columns // clusters) if clusters else math.inf
    load_clocks = (min(m, s.block_m) + s.block_n) * BLOCK_K / LOAD_BYTES_PER_CLOCK
    k = TYPICAL_K if is_k_grouped(problem) else problem.k
    num_blocks = k // BLOCK_K if is_k_grouped(problem) else split_blocks(problem, s)
    k_loop = num_blocks * _soft_max(clocks_per_block, load_clocks)
    stored = s.mma_tile[0] * slice_columns(s)
    end = stored * EPILOGUE_CLOCKS_PER_ELEMENT
    if s.split_k > 1:
        sent = (s.split_k - 1) * stored * min(m / s.block_m, 1.0) * 4
        end += SPLIT_CLOCKS + sent / EXCHANGE_BYTES_PER_CLOCK
    # Tiles in turns overlap; the end of the last one does not.
    tile = max(k_loop + TURN_CLOCKS, (k_loop + end) / 2) if s.pingpong else k_loop + end
    compute_us = (rounds * tile + (end if s.pingpong else 0.0)) / CLOCKS_PER_US
    bytes_moved = (m + groups * problem.n) * k + m * problem.n * problem.d_dtype.size_bytes
    if is_k_grouped(problem):  # A is of each group too, and D is read and written
        bytes_moved = groups * ((m + problem.n) * k + 2 * m * problem.n * 4)
    return FIXED_US + _soft_max(compute_us, bytes_moved / HBM_BYTES_PER_US)


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
    elif s.swap_ab:
        extra += SWAPPED_COLUMN_CLOCKS * s.num_waves * columns
    else:
        extra += SFB_ROW_CLOCKS * (num_sfb_rows(problem, s.block_n) - 1)
    extra += CLUSTER_CLOCKS if s.cluster_m * s.cluster_n > 1 else 0.0
    return _soft_max(compute, SMEM_CLOCKS_PER_ROW * smem_rows) + extra


def choose(problem: Gemm, m: int, num_sms: int = SM90A.num_sms, target: Target = SM90A) -> Schedule:
    """The schedule with the least predicted time for `m` rows; one for all m of a bucket."""
    return _choose(without_epilogue(problem), m_bucket(m), num_sms, target)


def rank(problem: Gemm, m: int, num_sms: int = SM90A.num_sms) -> dict[Schedule, float]:
    """Every candidate with its predicted microseconds, the fastest first."""
    found = {s: _predict_us(problem, s, m, num_sms, c) for s, c in _candidates(problem)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def choose_for_all(problem: Gemm, num_sms: int = SM90A.num_sms) -> Schedule:
    """One schedule for every m: it loses least to the choice of each bucket, in geometric mean."""
    return _choose_for_all(without_epilogue(problem), num_sms)


def m_bucket(m: int) -> int:
    """The extent that a schedule is chosen for: the least of M_BUCKETS at or above m, or the last.

    So every problem has a finite number of kernels, whatever m comes.
    """
    return M_BUCKETS[min(bisect.bisect_left(M_BUCKETS, m), len(M_BUCKETS) - 1)]


def m_buckets(extents: Sequence[int]) -> list[int]:
    """Every bucket that a value of `extents`, in ascending order, falls into."""
    edges = (*M_BUCKETS[:-1], MAX_EXTENT)
    ends = [bisect.bisect_right(extents, edge) for edge in edges]
    starts = (0, *ends[:-1])
    return [
        bucket for bucket, start, end in zip(M_BUCKETS, starts, ends, strict=True) if end > start
    ]


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
