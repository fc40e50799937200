"""Kernel times without a GPU: which events of a profile belong to which call."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jitgen.errors import DeviceError
from jitgen.tuning import timing
from jitgen.tuning.timing import DeviceEvent

FLUSH = "void vectorized_elementwise_kernel<4, FillFunctor<unsigned char>>"


def profiled(calls: list[list[tuple[str, float]]]) -> list[DeviceEvent]:
    """The events of calls, each a flush and then (name, duration) one after the other."""
    events, now = [], 1000.0
    for call in calls:
        for name, duration in [(FLUSH, 90.0), *call]:
            events.append(DeviceEvent(name, now, duration))
            now += duration + 1
    return events


def test_split_calls_sums_all_kernels_of_a_call_without_the_flush() -> None:
    calls = [[("splitk", 10.0 + i), ("Memset (Device)", 1.0), ("reduce", 2.0)] for i in range(4)]
    events = profiled(calls)[::-1]  # in any order
    measurement = timing.summarize_calls(timing.split_calls(events, 4))
    assert measurement.kernels == ("splitk", "Memset (Device)", "reduce")
    assert measurement.num_kernels == 3
    assert measurement.kernel_us == pytest.approx(14.5)
    assert (measurement.min_us, measurement.max_us, measurement.num_calls) == (13.0, 16.0, 4)
    assert measurement.std_us == pytest.approx(1.25**0.5)


@pytest.mark.parametrize(
    ("break_events", "message"),
    [
        (lambda events: [], "holds 0 L2 flushes"),
        (lambda events: events[1:], "holds 3 L2 flushes|none of the kernels of one"),
        (lambda events: events[:2] + events[3:], "holds 2 L2 flushes"),
        (lambda events: events[:-1], "none of the kernels of one"),
        (lambda events: events[::2], "none of the kernels of one"),
        (lambda events: [*events, DeviceEvent("more", 9e9, 1.0)], "must run the same kernels"),
        (lambda events: [*events, DeviceEvent(FLUSH, 9e9, 1.0)], "holds 4 L2 flushes"),
    ],
    ids=["none", "first flush", "a flush", "a kernel", "no kernels", "one more", "call flushes"],
)
def test_split_calls_rejects_incomplete_profile(
    break_events: Callable[[list[DeviceEvent]], list[DeviceEvent]], message: str
) -> None:
    events = profiled([[("gemm", 10.0)]] * 3)
    assert len(timing.split_calls(events, 3)) == 3
    with pytest.raises(DeviceError, match=message):
        timing.summarize_calls(timing.split_calls(break_events(events), 3))


def test_device_events_are_the_work_of_the_gpu() -> None:
    kinds = pytest.importorskip("torch.autograd").DeviceType
    interval = SimpleNamespace(start=5.0, elapsed_us=lambda: 2.5)
    events = [
        SimpleNamespace(name="cuLaunchKernel", time_range=interval, device_type=kinds.CPU),
        SimpleNamespace(name="gemm", time_range=interval, device_type=kinds.CUDA),
        SimpleNamespace(
            name="ProfilerStep#1",
            time_range=interval,
            device_type=kinds.CUDA,
            is_user_annotation=True,
        ),
    ]
    assert timing._device_events(events) == [DeviceEvent("gemm", 5.0, 2.5)]


class FakeGpu:
    """Stands in for torch's GPU: records what is launched, and profiles lose what `lost` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost: list[int]) -> None:
        torch = pytest.importorskip("torch")
        self.log: list[str] = []
        self.lost = lost
        self.kind = torch.autograd.DeviceType.CUDA
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.profiler, "profile", lambda activities: self)
        flush = SimpleNamespace(fill_=lambda value: self.log.append(FLUSH))
        monkeypatch.setattr(timing, "_flush_buffer", lambda ordinal: flush)

    def __enter__(self) -> FakeGpu:
        self.log.clear()
        return self

    def __exit__(self, *_: object) -> None:
        del self.log[: self.lost.pop(0)]

    def events(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=name,
                device_type=self.kind,
                time_range=SimpleNamespace(start=float(i), elapsed_us=lambda: 7.0),
            )
            for i, name in enumerate(self.log)
        ]


def test_measure_kernel_us_profiles_again_if_records_were_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, lost=[1, 0])
    measurement = timing.measure_kernel_us(lambda: gpu.log.append("gemm"), calls=12)
    assert (measurement.kernel_us, measurement.num_calls) == (7.0, 12)
    assert gpu.lost == []


def test_measure_kernel_us_rejects_profiles_that_stay_incomplete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, lost=[1] * timing.NUM_PROFILES)
    with pytest.raises(DeviceError, match=r"none of the kernels of one|records are missing"):
        timing.measure_kernel_us(lambda: gpu.log.append("gemm"))
    assert gpu.lost == []
