"""What is tuned of MLA decode: its schedules, and the batches that they are chosen for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from ..dtypes import BF16
from ..problem_mla import MlaDecode
from ..schedule_mla import EVICT_FIRST_BLOCKS, MlaSchedule
from .space import is_legal

# Sequences of a call: a schedule is for all batches down to the next lower of these. Lengths are
# known on the device only.
BATCHES = tuple(1 << i for i in range(9))
# What a field of a schedule may be; the others are as `select_mla` has them.
VALUES: dict[str, tuple[Any, ...]] = {
    "tile_rows": (16, 32, 64),
    "cluster": (1, 2),
    "meet": (1, 2),
    "num_stages": (2, 3, 4),
    "prefetch": (0, 1),
    "evict_first": tuple(EVICT_FIRST_BLOCKS * tiles for tiles in range(5)),
    "score_ahead": (False, True),
}


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
    """Legal schedules, those first that differ from `first` in the fewest fields."""
    found = [
        replace(first, **dict(zip(VALUES, values, strict=True)))
        for values in itertools.product(*VALUES.values())
    ]
    legal = (schedule for schedule in found if is_legal(problem, schedule))
    return sorted(
        legal, key=lambda s: sum(getattr(s, name) != getattr(first, name) for name in VALUES)
    )
