"""What is tuned of MLA decode: the tiles of sparse decode, and the batches they are chosen for.

What is best for dense decode depends on the keys that sequences may have: `select_mla` knows them,
a record of a batch does not.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from ..dtypes import BF16
from ..problem_mla import MlaDecode
from ..schedule_mla import MlaSchedule
from .space import is_legal

# Sequences of a call: a schedule is for all batches down to the next lower of these.
BATCHES = tuple(1 << i for i in range(9))
# A schedule is measured with lists of TOPK tokens of sequences of these lengths.
LENGTHS = (2048, 16384)
TOPK = 2048
# What a field of a schedule may be; the others are as `select_mla` has them.
VALUES = {"tile_rows": (16, 32, 64), "num_stages": (2, 3, 4)}


def mla_as_tuned(problem: MlaDecode) -> MlaDecode:
    """What schedules are chosen and measured for in the problem's place: types and sinks do not
    matter, nor how many keys the last query tokens see."""
    return replace(problem, dtype=BF16, causal=not problem.sparse, sink=False)


def mla_name(problem: MlaDecode) -> str:
    """A name of `mla_as_tuned`: of records' files and the tuner's jobs."""
    form = "-fp8" * problem.is_fp8 + "-sparse" * problem.sparse
    dims = f"d{problem.head_dim_qk}x{problem.head_dim_v}"
    return f"h{problem.num_heads}-q{problem.num_queries}-{dims}-p{problem.page}{form}"


def mla_candidates(problem: MlaDecode, first: MlaSchedule) -> list[MlaSchedule]:
    """Legal schedules of sparse decode, those first that are the fewest steps away from `first`."""
    found = (
        replace(first, tile_rows=rows, num_stages=stages)
        for rows, stages in itertools.product(*VALUES.values())
    )
    legal = (schedule for schedule in found if is_legal(problem, schedule))
    return sorted(legal, key=lambda schedule: num_steps(problem, schedule, first))


def num_steps(problem: MlaDecode, schedule: MlaSchedule, first: MlaSchedule) -> int:
    """How far a schedule is from `first`: one step to the next number of rows, and one for each
    number of stages above its own that there is room for."""
    rows, more = VALUES["tile_rows"], [n for n in VALUES["num_stages"] if n > schedule.num_stages]
    idle = sum(is_legal(problem, replace(schedule, num_stages=n)) for n in more)
    return abs(rows.index(schedule.tile_rows) - rows.index(first.tile_rows)) + idle
