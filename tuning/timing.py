"""Kernel times: what one call costs the GPU, with a cold L2."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DeviceError

NUM_CALLS = 12
NUM_WARMUP_CALLS = 20
NUM_PROFILES = 3  # attempts: CUPTI may lose a record
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any Hopper GPU
WARMUP_MS, REPEAT_MS = 25.0, 100.0  # of calls between events: those of triton.testing.do_bench
HOST_CLOCKS = 500_000  # of the GPU, in which a busy host has enqueued a call too
CALLS_AHEAD = 30  # that are enqueued before the first of them runs


@dataclass(frozen=True)
class Measurement:
    """Device time of one call, over `num_calls` calls, and the kernels that it launches."""

    kernel_us: float
    std_us: float
    min_us: float
    max_us: float
    num_calls: int
    kernels: tuple[str, ...]

    @property
    def num_kernels(self) -> int:
        return len(self.kernels)


@dataclass(frozen=True)
class DeviceEvent:
    """One kernel, copy or fill that ran on the GPU."""

    name: str
    start_us: float
    duration_us: float


def measure_kernel_us(
    call: Callable[[], object],
    *,
    calls: int = NUM_CALLS,
    warmup_calls: int = NUM_WARMUP_CALLS,
) -> Measurement:
    """The device time of what one `call()` launches on torch's current stream, with a cold L2.

    Parameters
    ----------
    call : launches the same work every time; it need not wait for it
    calls : how many are timed; a published time takes at least 12
    warmup_calls : how many go before, while kernels are compiled and clocks rise

    Raises
    ------
    DeviceError : the calls did not all launch the same kernels, or records of them were lost
    """
    (measurement,) = measure_in_turns([call], calls=calls, warmup_calls=warmup_calls)
    return measurement


def measure_in_turns(
    variants: Sequence[Callable[[], object]],
    *,
    calls: int = NUM_CALLS,
    warmup_calls: int = NUM_WARMUP_CALLS,
) -> list[Measurement]:
    """As `measure_kernel_us` of each of `variants`, which take turns: `calls` and `warmup_calls`
    each."""
    import torch

    flush = _flush_buffer(torch.cuda.current_device())
    for call in [*variants] * warmup_calls:
        flush.fill_(1)
        call()

    return [summarize_calls(runs) for runs in profile_in_turns(variants, calls)]


def profile_in_turns(
    variants: Sequence[Callable[[], object]], calls: int, *, skipped: int = 0
) -> list[list[list[DeviceEvent]]]:
    """What ran for each of `variants` in its `calls` calls, without the first `skipped`; they take
    turns, each with a cold L2.

    Raises
    ------
    DeviceError : records were lost, or the calls of one ran other kernels, several times
    """

    def attempt() -> list[list[list[DeviceEvent]]]:
        runs = profile_calls([*variants] * calls)
        of_each = [runs[i :: len(variants)][skipped:] for i in range(len(variants))]
        for same in of_each:
            summarize_calls(same)  # which sees that they ran the same kernels
        return of_each

    for _ in range(NUM_PROFILES - 1):
        with contextlib.suppress(DeviceError):
            return attempt()
    return attempt()


def measure_event_us(call: Callable[[], object]) -> float:
    """The median of the times between two CUDA events around a `call()`, with a cold L2.

    What `triton.testing.do_bench` measures: more than the kernels' own time by a launch, of as many
    calls as REPEAT_MS have room for. How many matters where power limits clocks. The GPU waits
    before the first of them until some are enqueued, or a busy host's pauses would count.
    """
    import torch

    flush = _flush_buffer(torch.cuda.current_device())

    def enqueue(calls: int) -> list[list[Any]]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda._sleep(min(calls, CALLS_AHEAD) * HOST_CLOCKS)
        for begin, end in events:
            flush.fill_(1)
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return events

    enqueue(3)
    few = enqueue(5)
    period_ms = few[0][0].elapsed_time(few[-1][0]) / (len(few) - 1)
    enqueue(math.ceil(WARMUP_MS / period_ms))
    events = enqueue(math.ceil(REPEAT_MS / period_ms))
    return float(statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in events))


def profile_calls(calls: Sequence[Callable[[], object]]) -> list[list[DeviceEvent]]:
    """What ran on the GPU for each of `calls`, one after the other, each with a cold L2.

    Raises
    ------
    DeviceError : records were lost; another attempt may succeed
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    flush = _flush_buffer(torch.cuda.current_device())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls:
            flush.fill_(1)
            call()
        torch.cuda.synchronize()
    return split_calls(_device_events(profiler.events()), len(calls))


@functools.cache
def _flush_buffer(ordinal: int) -> Any:
    import torch

    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=f"cuda:{ordinal}")


def _device_events(events: Iterable[Any]) -> list[DeviceEvent]:
    """The work that ran on the GPU, of all events that a torch profiler recorded."""
    from torch.autograd import DeviceType

    return [
        DeviceEvent(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def split_calls(events: Sequence[DeviceEvent], num_calls: int) -> list[list[DeviceEvent]]:
    """What each call ran, without the flush before it. The first event is a flush, and so is every
    event of the same name.

    Raises
    ------
    DeviceError : there is not one flush a call, or a call ran nothing
    """
    calls: list[list[DeviceEvent]] = []
    ordered = sorted(events, key=lambda event: event.start_us)
    for event in ordered:
        if event.name == ordered[0].name:
            calls.append([])
        else:
            calls[-1].append(event)
    if len(calls) != num_calls:
        raise DeviceError(
            f"the profile of {num_calls} calls holds {len(calls)} L2 flushes: records are missing,"
            " or the call launches the same kernel as the flush"
        )
    if not all(calls):
        raise DeviceError(f"the profile of {num_calls} calls holds none of the kernels of one")
    return calls


def summarize_calls(calls: Sequence[Sequence[DeviceEvent]]) -> Measurement:
    """The measurement that calls of equal work make.

    Raises
    ------
    DeviceError : they did not all run the same kernels
    """
    runs = {tuple(event.name for event in call) for call in calls}
    if len(runs) != 1:
        raise DeviceError(
            f"{len(calls)} calls must run the same kernels, got"
            f" {' or '.join(str(list(run)) for run in sorted(runs))}"
        )
    times = [sum(event.duration_us for event in call) for call in calls]
    return Measurement(
        kernel_us=statistics.fmean(times),
        std_us=statistics.pstdev(times),
        min_us=min(times),
        max_us=max(times),
        num_calls=len(times),
        kernels=tuple(event.name for event in calls[0]),
    )
