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
# A schedule is chosen by the batch alone, and measured at these lengths; sparse decode looks at so
# many of so many tokens.
LENGTHS = (1024, 4096, 16384)
SPARSE_LENGTHS = (2048, 16384)
TOPK = 2048
# What a field of a schedule may be; the others are as `select_mla` has them.
VALUES: dict[str, tuple[Any, ...]] = {
    "tile_rows": (16, 32, 64),
    "evict_first": tuple(EVICT_FIRST_BLOCKS * tiles for tiles in range(5)),
    "score_ahead": (False, True),
    "num_stages": (2, 3, 4),
}
# How thread blocks pair: cluster, meet, prefetch. Loads ahead into L2 lost wherever blocks did not
# share keys.
PAIRINGS = ((1, 1, 0), (1, 2, 0), (2, 1, 0), (2, 1, 1))


def mla_as_tuned(problem: MlaDecode) -> MlaDecode:
    """What schedules are chosen and measured for in the problem's place: types and sinks do not
    matter, nor how many keys the last query tokens see."""
    return replace(problem, dtype=BF16, causal=not problem.sparse, sink=False)


def mla_lengths(problem: MlaDecode) -> tuple[int, ...]:
    """Tokens of a sequence, of each launch that a measurement is of."""
    return SPARSE_LENGTHS if problem.sparse else LENGTHS


def mla_name(problem: MlaDecode) -> str:
    """A name of `mla_as_tuned`: of records' files and the tuner's jobs."""
    form = "-fp8" * problem.is_fp8 + "-sparse" * problem.sparse
    dims = f"d{problem.head_dim_qk}x{problem.head_dim_v}"
    return f"h{problem.num_heads}-q{problem.num_queries}-{dims}-p{problem.page}{form}"


def mla_candidates(problem: MlaDecode, first: MlaSchedule) -> list[MlaSchedule]:
    """Legal schedules, those first that are the fewest steps away from `first`.

    Tiles of fewer rows win with few keys and lose with many, so only sparse decode, which looks at
    TOPK, has others than `first`.
    """
    choices = VALUES if problem.sparse else VALUES | {"tile_rows": (first.tile_rows,)}
    found = []
    for (cluster, meet, prefetch), *values in itertools.product(PAIRINGS, *choices.values()):
        fields = dict(zip(choices, values, strict=True))
        found.append(replace(first, cluster=cluster, meet=meet, prefetch=prefetch, **fields))
    legal = (schedule for schedule in found if is_legal(problem, schedule))
    return sorted(legal, key=lambda schedule: num_steps(problem, schedule, first))


def num_steps(problem: MlaDecode, schedule: MlaSchedule, first: MlaSchedule) -> int:
    """How far a schedule is from `first`: one step for another pairing of blocks, one to the next
    value of a field, and one for each number of stages above its own that there is room for."""

    def distance(name: str) -> int:
        here, there = (VALUES[name].index(getattr(s, name)) for s in (schedule, first))
        return abs(here - there)

    more = [n for n in VALUES["num_stages"] if n > schedule.num_stages]
    idle = sum(is_legal(problem, replace(schedule, num_stages=n)) for n in more)
    fields = sum(distance(name) for name in VALUES if name != "num_stages")
    return (_pairing(schedule) != _pairing(first)) + fields + idle


def _pairing(schedule: MlaSchedule) -> tuple[int, int, int]:
    return schedule.cluster, schedule.meet, schedule.prefetch
