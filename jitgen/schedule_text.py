"""Schedules as users spell them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .errors import ScheduleError
from .problem import Gemm
from .schedule import Schedule, max_stages
from .schedule_rules import check_ranges
from .target import Gpu

SCHEDULE_HELP = (
    'Pin the schedule: "128x128 stages=5 math_warpgroups=2 cluster=1x1 raster_group=8'
    ' split_k=1 promotion=overlapped swap_ab=0 pingpong=0"; all but the tile may be left out.'
)


def schedule_for(problem: Gemm, m: int, gpu: Gpu, text: str | None = None) -> Schedule:
    """The schedule that `text` spells or, without one, that a call with `m` rows on `gpu` takes.

    Raises
    ------
    ScheduleError : as `parse_schedule`
    """
    from .tuning.select import select

    if text is not None:
        return parse_schedule(text, problem)
    return select(problem, m, gpu)


def parse_schedule(text: str, problem: Gemm) -> Schedule:
    """The schedule that `text` spells as `str(schedule)` does; without `stages`, the most that fit.

    Raises
    ------
    ScheduleError : a word of `text` is not understood
    """
    from .tuning.space import MAX_STAGES, PROMOTIONS

    tile, *words = text.split() or [""]
    extents = _extents(tile.removesuffix("x128") if tile.count("x") == 2 else tile)
    fields: dict[str, Any] = {"block_m": extents[0], "block_n": extents[1], "num_stages": 0}
    names = {
        "stages": ("num_stages",),
        "math_warpgroups": ("num_math_warpgroups",),
        "cluster": ("cluster_m", "cluster_n"),
        "raster_group": ("raster_group",),
        "split_k": ("split_k",),
        "promotion": ("promotion",),
        "swap_ab": ("swap_ab",),
        "pingpong": ("pingpong",),
    }
    words_of = {"promotion": PROMOTIONS, "swap_ab": ("0", "1"), "pingpong": ("0", "1")}
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            raise ScheduleError(f"schedule has {word!r}: after the tile, use {'=, '.join(names)}=")
        if name in words_of:
            if value not in words_of[name]:
                raise ScheduleError(f"schedule has {word!r}: use {' or '.join(words_of[name])}")
            fields[name] = value if name == "promotion" else value == "1"
        elif name == "cluster":
            fields |= zip(names[name], _extents(value), strict=True)
        elif value.isascii() and value.isdigit():
            fields[names[name][0]] = int(value)
        else:
            raise ScheduleError(f"schedule has {word!r}: {name} must be a number")
    schedule = Schedule(**fields)
    if "stages" in text:
        return schedule
    check_ranges(replace(schedule, num_stages=2))
    return replace(schedule, num_stages=max(2, min(max_stages(problem, schedule), MAX_STAGES)))


def _extents(text: str) -> tuple[int, int]:
    """The two numbers of "128x64"."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(part.isascii() and part.isdigit() for part in numbers):
        raise ScheduleError(f"schedule has {text!r} where two numbers are due, such as 128x64")
    return int(numbers[0]), int(numbers[1])
