"""Host-time benchmarks without a GPU: the clock, the calls that are timed, the report."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jitgen.errors import VerifyError
from jitgen.runtime.driver import Device
from jitgen.runtime.launch import MAX_IDLE_LAUNCHES
from jitgen.tuning import host
from jitgen.tuning.bench import Shape
from jitgen.tuning.host import BATCH_CALLS, HostResult, HostTime, measure_host_us

from . import fake_gpu
from .fake_gpu import FakeGpu

H100 = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
SHAPE = Shape(5, 24, 144)


# --- the clock ------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Time that passes only where a test says so."""

    now_us: float = 0.0
    queued: int = 0  # calls since the last synchronization
    most_queued: int = 0

    def call(self, takes_us: Callable[[], float]) -> Callable[[], object]:
        def call() -> None:
            self.now_us += takes_us()
            self.queued += 1
            self.most_queued = max(self.most_queued, self.queued)

        return call

    def synchronize(self) -> None:
        self.now_us += 1e4 * self.queued
        self.queued = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    timer = SimpleNamespace(perf_counter=lambda: clock.now_us * 1e-6)
    monkeypatch.setattr(host, "time", timer)
    return clock


def test_measure_host_us_counts_calls_and_no_waiting(clock: Clock) -> None:
    calls = {"fast": clock.call(lambda: 3.0), "slow": clock.call(lambda: 50.0)}
    fast, slow = measure_host_us(calls, num_calls=950, synchronize=clock.synchronize)
    assert (fast.name, fast.num_calls, slow.num_calls) == ("fast", 1000, 1000)
    assert (fast.median_us, fast.p10_us, fast.p90_us) == pytest.approx((3, 3, 3))
    assert slow.median_us == pytest.approx(50)
    assert clock.most_queued == BATCH_CALLS
    assert clock.queued == 0


def test_measure_host_us_gives_the_spread_of_batches(clock: Clock) -> None:
    counter = iter(range(10**6))
    skipped = host.NUM_WARMUP_BATCHES * BATCH_CALLS
    call = clock.call(lambda: 1.0 + (next(counter) - skipped) // BATCH_CALLS)  # 1 us, 2 us, ..
    (time,) = measure_host_us({"call": call}, num_calls=1100, synchronize=clock.synchronize)
    assert (time.median_us, time.p10_us, time.p90_us) == pytest.approx((6, 2, 10))


def test_measure_host_us_holds_one_result_at_a_time() -> None:
    class D:
        pass

    alive: weakref.WeakSet[D] = weakref.WeakSet()
    counts = set()

    def call() -> D:
        d = D()
        alive.add(d)
        counts.add(len(alive))
        return d

    measure_host_us({"call": call}, num_calls=1, synchronize=lambda: counts.add(10 + len(alive)))
    assert counts == {1, 2, 10}


# --- the calls ------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    torch = pytest.importorskip("torch")
    gpu = fake_gpu.install(monkeypatch)
    real = host._make_calls
    monkeypatch.setattr(host, "_make_calls", lambda shape, device: real(shape, "cpu"))
    monkeypatch.setattr(host, "cublaslt_call", lambda x, weight: lambda: None)
    stream = type("Stream", (), {"cuda_stream": 5})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return gpu


def bench(**options: Any) -> HostResult:
    options = {"num_calls": 1, "version": "0.1", "command": "jitgen bench host"} | options
    return host.bench_host(SHAPE, H100, **options)


def test_bench_host_times_every_way_to_call(gpu: FakeGpu) -> None:
    result = bench()
    assert [time.name for time in result.times] == [
        host.GEMM_OUT,
        host.GEMM_MOVED,
        host.GEMM,
        host.BOUND,
        host.LAUNCH,
        host.SCALED_MM,
    ]
    assert {time.name: time.bar_us for time in result.times if time.bar_us} == host.BARS_US
    assert (result.gpu, result.jitgen, result.shape) == (H100.name, "0.1", SHAPE)
    assert result.cpu
    assert {launch.stream for launch in gpu.launches} == {5, 7}  # 5: the driver call alone


def test_bench_host_moves_a_and_sfa_at_every_call(gpu: FakeGpu) -> None:
    call = host._make_calls(SHAPE, "cpu")[host.GEMM_MOVED]
    gpu.launches.clear()
    gpu.driver.num_encoded = gpu.driver.num_replaced = 0
    num_calls = 3 * MAX_IDLE_LAUNCHES
    for _ in range(num_calls):
        call()
    for name in ("a", "sfa"):
        assert len({launch.tensors[name].ctypes.data for launch in gpu.launches}) == num_calls
    # Launches are made while there are few; every other call writes the descriptor of a.
    assert gpu.driver.num_encoded % 3 == 0
    assert gpu.driver.num_encoded // 3 + gpu.driver.num_replaced == num_calls
    assert gpu.driver.num_replaced > num_calls // 2


def test_bench_host_times_no_wrong_result(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = host.bind
    monkeypatch.setattr(host, "bind", lambda *args, **options: real(*args, **options)().neg)
    with pytest.raises(VerifyError, match=r"m5-n24-k144: bind.* gives another result"):
        bench()


# --- the report -----------------------------------------------------------------------------------

TIMES = (
    HostTime(host.GEMM_OUT, 8.25, 8.0, 9.0, 1000),
    HostTime(host.GEMM, 13.5, 13.0, 14.0, 1000),
    HostTime(host.SCALED_MM, 37.0, 36.0, 38.0, 1000),
)
RESULT = HostResult(
    SHAPE, TIMES, H100.name, "Xeon", "3.12.1", "2.11", "0.1", "2026-11-22", "jitgen bench host"
)


def test_is_over_bar() -> None:
    assert [time.is_over_bar for time in TIMES] == [False, True, False]
    assert not replace(TIMES[0], median_us=10.0).is_over_bar
    assert replace(TIMES[0], median_us=10.01).is_over_bar


def test_host_result_to_json_holds_all_figures() -> None:
    data = json.loads(json.dumps(RESULT.to_json(), allow_nan=False))
    assert data["shape"] == {"m": 5, "n": 24, "k": 144}
    assert data["times"][0] == {
        "name": host.GEMM_OUT,
        "median_us": 8.25,
        "p10_us": 8.0,
        "p90_us": 9.0,
        "num_calls": 1000,
        "bar_us": 10.0,
    }
    assert data["times"][2]["bar_us"] is None
    assert (data["gpu"], data["cpu"], data["torch"]) == (H100.name, "Xeon", "2.11")


def test_print_host_result_marks_what_is_over_its_bar() -> None:
    file = io.StringIO()
    host.print_host_result(Console(file=file, width=120), RESULT)
    text = file.getvalue()
    assert "m5-n24-k144 on NVIDIA H100 80GB HBM3, Xeon, Python 3.12.1, torch 2.11" in text
    assert " 8.25 │   8.00 - 9.00 │     10 │" in text
    assert " 13.50* │ 13.00 - 14.00 │     13 │" in text
    assert "10 batches of 100 calls" in text
    assert text.count("*") == 2
