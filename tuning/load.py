"""Load times: what a compiled kernel costs a process that needs it for the first time.

Every round opens the store anew, as another process would: entries come from disk, all of them
hashed. The process itself is warm: NVRTC and the driver are loaded, and the GPU has a context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..build import key_of
from ..errors import StoreError
from ..lower import AnyKernel, AnyProblem, AnySchedule, lower_any
from ..runtime.entry import Entry
from ..runtime.store import KernelStore

if TYPE_CHECKING:
    from rich.console import Console

LOAD = "store hit to function handle"
FIND = "problem to store hit"
MISS = "problem to a miss, as with jit=forbid"

# What they may take, in milliseconds; the load on an H100.
BARS_MS = {LOAD: 3.0, MISS: 1.0}


@dataclass(frozen=True)
class LoadTime:
    """Times of one step, over all kernels and rounds, in milliseconds."""

    name: str
    median_ms: float
    p90_ms: float
    max_ms: float
    count: int


def measure_loads(
    kernels: Sequence[tuple[AnyProblem, AnySchedule]],
    open_store: Callable[[], KernelStore],
    load: Callable[[Entry, AnyKernel], object],
    *,
    num_rounds: int,
) -> tuple[LoadTime, ...]:
    """The times of LOAD, FIND and MISS.

    Parameters
    ----------
    kernels : compiled into the store before, see `jitgen.build.prebuild`
    open_store : opens that store, with nothing in memory
    load : makes the function handle on the GPU

    Raises
    ------
    StoreError : a kernel is not in the store
    """
    times: dict[str, list[float]] = {LOAD: [], FIND: [], MISS: []}
    for round_ in range(num_rounds + 1):
        store = open_store()
        for problem, schedule in kernels:
            started = time.perf_counter()
            kernel = lower_any(problem, schedule)
            key = key_of(kernel)
            keyed = time.perf_counter()
            entry = store.get(key)
            found = time.perf_counter()
            if entry is None:
                raise StoreError(f"kernel {kernel.name} is not in the store: prebuild it first")
            load(entry, kernel)
            loaded = time.perf_counter()
            asked = time.perf_counter()
            absent = replace(key_of(lower_any(problem, schedule)), arch="none")  # which nobody has
            found_absent = store.get(absent)
            missed = time.perf_counter()
            if round_ and found_absent is None:  # the first round warms up
                times[LOAD].append(loaded - keyed)
                times[FIND].append(found - started)
                times[MISS].append(missed - asked)
    return tuple(_summarize(name, seconds) for name, seconds in times.items())


def _summarize(name: str, seconds: list[float]) -> LoadTime:
    ordered = [1e3 * each for each in sorted(seconds)]
    return LoadTime(
        name,
        median_ms=statistics.median(ordered),
        p90_ms=ordered[round(0.9 * (len(ordered) - 1))],
        max_ms=ordered[-1],
        count=len(ordered),
    )


def print_load_times(console: Console, times: Sequence[LoadTime]) -> None:
    """Print a line a step; a median over its bar in red with a star."""
    from rich.table import Table

    table = Table()
    table.add_column("step")
    for column in ("median ms", "p90 ms", "max ms", "bar ms"):
        table.add_column(column, justify="right")
    for line in times:
        bar, median = BARS_MS.get(line.name), f"{line.median_ms:.3f}"
        table.add_row(
            line.name,
            f"[red]{median}*[/]" if bar is not None and line.median_ms > bar else median,
            f"{line.p90_ms:.3f}",
            f"{line.max_ms:.3f}",
            "" if bar is None else f"{bar:g}",
        )
    console.print(table)
    console.print(f"{times[0].count} loads", highlight=False)
