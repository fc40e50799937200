"""The search space: every schedule worth trying for a problem."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields, replace

from ..errors import ScheduleError
from ..problem import Gemm
from ..schedule import Promotion, Schedule, check_schedule, max_stages
from ..target import SM90A, Target

# (block_m, math warpgroups): 64 or 128 rows a warpgroup.
ROW_TILES = ((64, 1), (128, 1), (128, 2), (192, 3), (256, 2))
COLUMN_TILES = tuple(range(16, 257, 16))
# (cluster_m, cluster_n, split_k)
CLUSTERS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), *((1, 1, split_k) for split_k in range(2, 9)))
PROMOTIONS: tuple[Promotion, ...] = ("overlapped", "serial")
# Fields of a schedule that never change a bit of the result.
NEUTRAL_FIELDS = {
    *("block_m", "block_n", "num_stages", "num_math_warpgroups", "cluster_m", "cluster_n"),
    *("raster_group", "promotion"),
}
MAX_STAGES = 12  # beyond that, more bytes in flight no longer help


def candidates(problem: Gemm, target: Target = SM90A) -> Iterator[Schedule]:
    """Legal schedules of `problem`, each with the deepest pipeline that fits."""
    for rows, columns, cluster, promotion in itertools.product(
        ROW_TILES, COLUMN_TILES, CLUSTERS, PROMOTIONS
    ):
        too_wide = 2 * max(problem.n, 16)
        if rows[1] == 3:  # wider ones spill with some epilogues
            too_wide = min(too_wide, 129)
        if columns >= too_wide:
            continue
        cluster_m, cluster_n, split_k = cluster
        schedule = Schedule(
            *(rows[0], columns, 2, rows[1]),
            cluster_m=cluster_m,
            cluster_n=cluster_n,
            split_k=split_k,
            promotion=promotion,
        )
        stages = min(max_stages(problem, schedule, target), MAX_STAGES)
        schedule = replace(schedule, num_stages=stages)
        if is_legal(problem, schedule, target):
            yield schedule


def is_legal(problem: Gemm, schedule: Schedule, target: Target = SM90A) -> bool:
    """Whether check_schedule accepts the schedule."""
    try:
        check_schedule(problem, schedule, target)
    except ScheduleError:
        return False
    return True


def numerics_class(schedule: Schedule) -> tuple[object, ...]:
    """Schedules of one class give the same bits; those of two classes may add up k differently."""
    names = (field.name for field in fields(schedule) if field.name not in NEUTRAL_FIELDS)
    return tuple(getattr(schedule, name) for name in names)
