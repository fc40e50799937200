"""Schedules as users spell them."""

from __future__ import annotations

from dataclasses import replace

from .errors import ScheduleError
from .problem import Gemm
from .schedule import Schedule, check_ranges, max_stages
from .target import Gpu

SCHEDULE_HELP = (
    'Pin the schedule: "128x128 stages=5 math_warpgroups=2 cluster=1x1 raster_group=8'
    ' split_k=1 promotion=overlapped"; all but the tile may be left out.'
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
    fields = {"block_m": extents[0], "block_n": extents[1], "num_stages": 0}
    promotion = Schedule.promotion
    names = {
        "stages": ("num_stages",),
        "math_warpgroups": ("num_math_warpgroups",),
        "cluster": ("cluster_m", "cluster_n"),
        "raster_group": ("raster_group",),
        "split_k": ("split_k",),
        "promotion": (),
    }
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            raise ScheduleError(f"schedule has {word!r}: after the tile, use {'=, '.join(names)}=")
        if name == "promotion":
            if value not in PROMOTIONS:
                raise ScheduleError(f"schedule has {word!r}: use {' or '.join(PROMOTIONS)}")
            promotion = value
        elif name == "cluster":
            fields |= zip(names[name], _extents(value), strict=True)
        elif value.isascii() and value.isdigit():
            fields[names[name][0]] = int(value)
        else:
            raise ScheduleError(f"schedule has {word!r}: {name} must be a number")
    schedule = Schedule(**fields, promotion=promotion)
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
