"""The search space: every schedule worth trying for a problem."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields, replace

from ..errors import ScheduleError
from ..problem import Gemm, GroupedGemm
from ..problem_mla import MlaDecode
from ..schedule import Promotion, Schedule, max_stages
from ..schedule_mla import MlaSchedule, check_mla_schedule
from ..schedule_rules import check_schedule
from ..target import SM90A, Target

# (rows of wgmma's, math warpgroups): 64 or 128 rows a warpgroup.
ROW_TILES = ((64, 1), (128, 1), (128, 2), (192, 3), (256, 2))
PINGPONG_ROW_TILES = ((64, 2), (128, 2))
COLUMN_TILES = tuple(range(16, 257, 16))
SWAPPED_COLUMN_TILES = (8, 16, 32, 48, 64, 96, 128)
# (cluster_m, cluster_n, split_k)
CLUSTERS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), *((1, 1, split_k) for split_k in range(2, 9)))
PROMOTIONS: tuple[Promotion, ...] = ("overlapped", "serial")
# (swap_ab, pingpong)
VARIANTS = ((False, False), (False, True), (True, False), (True, True))
# Fields of a schedule that never change a bit of the result.
NEUTRAL_FIELDS = {
    *("block_m", "block_n", "num_stages", "num_math_warpgroups", "cluster_m", "cluster_n"),
    *("raster_group", "promotion", "swap_ab", "pingpong"),
}
MAX_STAGES = 12  # beyond that, more bytes in flight no longer help


def candidates(problem: Gemm, target: Target = SM90A) -> Iterator[Schedule]:
    """Legal schedules of `problem`, each with the deepest pipeline that fits."""
    for tile, cluster in itertools.product(_tiles(problem), CLUSTERS):
        cluster_m, cluster_n, split_k = cluster
        schedule = replace(tile, cluster_m=cluster_m, cluster_n=cluster_n, split_k=split_k)
        stages = min(max_stages(problem, schedule, target), MAX_STAGES)
        schedule = replace(schedule, num_stages=stages)
        if is_legal(problem, schedule, target):
            yield schedule


def _tiles(problem: Gemm) -> Iterator[Schedule]:
    """Tiles and how math warpgroups share them."""
    for swap_ab, pingpong in VARIANTS:
        for rows, columns, promotion in itertools.product(
            PINGPONG_ROW_TILES if pingpong else ROW_TILES,
            SWAPPED_COLUMN_TILES if swap_ab else COLUMN_TILES,
            # Where promotion is a small part or no other warpgroup computes, it is overlapped.
            PROMOTIONS[:1] if swap_ab or pingpong else PROMOTIONS,
        ):
            block_m, block_n = (columns, rows[0]) if swap_ab else (rows[0], columns)
            # Of three warpgroups wider ones spill with some epilogues; of B's rows, with groups,
            # they were slower than two at every shape, by 3 to 19%.
            is_poor = columns > 128 or (swap_ab and isinstance(problem, GroupedGemm))
            if block_n >= 2 * max(problem.n, 16) or (rows[1] == 3 and is_poor):
                continue
            yield Schedule(
                *(block_m, block_n, 2, rows[1]),
                promotion=promotion,
                swap_ab=swap_ab,
                pingpong=pingpong,
            )


def is_legal(
    problem: Gemm | MlaDecode, schedule: Schedule | MlaSchedule, target: Target = SM90A
) -> bool:
    """Whether the schedule is of the problem's family, and can run it."""
    try:
        if isinstance(problem, MlaDecode) and isinstance(schedule, MlaSchedule):
            check_mla_schedule(problem, schedule, target)
        elif isinstance(problem, Gemm) and isinstance(schedule, Schedule):
            check_schedule(problem, schedule, target)
        else:
            return False
    except ScheduleError:
        return False
    return True


def numerics_class(schedule: Schedule) -> tuple[object, ...]:
    """Schedules of one class give the same bits; those of two classes may add up k differently."""
    names = (field.name for field in fields(schedule) if field.name not in NEUTRAL_FIELDS)
    return tuple(getattr(schedule, name) for name in names)
