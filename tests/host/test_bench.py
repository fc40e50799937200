"""Benchmarks without a GPU: arithmetic, baselines, profiler events, checks, reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jitgen import api
from jitgen.dtypes import E4M3
from jitgen.errors import DeviceError, VerifyError
from jitgen.interpret import interpret
from jitgen.lower import lower
from jitgen.runtime.driver import Device
from jitgen.schedule import Schedule
from jitgen.tuning import bench, report
from jitgen.tuning.bench import (
    GRID_DENSE,
    Baseline,
    DeviceEvent,
    Measurement,
    Row,
    Shape,
)
from jitgen.tuning.report import Meta, Result

SCHEDULE = Schedule(64, 64, 4, num_math_warpgroups=1)
SMALL = Shape(70, 136, 256)
H100 = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)

# BASELINES.md: by m, the geometric mean of DeepGEMM / floor and of the best peer / floor.
PEERS_OVER_FLOOR = {
    1: (1.69, 1.54),
    16: (1.60, 1.52),
    64: (1.50, 1.47),
    128: (1.49, 1.45),
    256: (1.55, 1.44),
    512: (1.54, 1.35),
    4096: (1.25, 1.13),
    None: (1.51, 1.41),
}


def measured(kernel_us: float, kernels: tuple[str, ...] = ("gemm",)) -> Measurement:
    return Measurement(kernel_us, 0.1, kernel_us - 0.2, kernel_us + 0.2, 12, kernels)


def row(shape: Shape, us: float, cublaslt_us: float, baseline: Baseline | None) -> Row:
    return Row(shape, SCHEDULE, measured(us), measured(cublaslt_us), baseline)


# --- shapes and arithmetic ------------------------------------------------------------------------


def test_grid_dense_is_the_grid_of_the_baselines() -> None:
    assert len(GRID_DENSE) == 49
    assert set(bench.baseline_dense()) == set(GRID_DENSE)
    assert set(bench.GRID_QUICK) < set(GRID_DENSE)


def test_floor_of_a_small_m_is_that_of_its_bytes() -> None:
    shape = Shape(1, 2112, 7168)
    weights, scales = 2112 * 7168, 4 * 56 * (1 + 17)
    assert shape.num_bytes == weights + 7168 + 2 * 2112 + scales
    assert shape.floor_us == pytest.approx(shape.num_bytes / 3.0e6 + 2)


def test_floor_of_a_large_m_is_that_of_its_flops() -> None:
    shape = Shape(4096, 7168, 16384)
    assert shape.flops == 2 * 4096 * 7168 * 16384
    assert shape.floor_us == pytest.approx(shape.flops / 1575e6 + 2)


@pytest.mark.parametrize("m", PEERS_OVER_FLOOR)
def test_baselines_over_floor_are_the_published_figures(m: int | None) -> None:
    dense = {s: b for s, b in bench.baseline_dense().items() if m in (None, s.m)}
    deepgemm = report.geomean(peer.deepgemm_us / s.floor_us for s, peer in dense.items())
    best = report.geomean(
        min(peer.deepgemm_us, peer.cublaslt_us) / s.floor_us for s, peer in dense.items()
    )
    # Two decimals each; at m = 1 the best peer is 1.5346, which the table rounds up twice.
    assert (deepgemm, best) == pytest.approx(PEERS_OVER_FLOOR[m], abs=0.0055)


def test_baseline_meta_names_gpu_source_and_method() -> None:
    meta = bench.baseline_meta()
    assert meta["gpu"] == H100.name
    assert {"source", "method", "driver", "measured", "peers"} <= set(meta)


def test_geomean_is_the_root_of_the_product() -> None:
    assert report.geomean([1, 8]) == pytest.approx(8**0.5)


def test_row_derives_its_figures() -> None:
    shape = Shape(4096, 7168, 2048)
    one = row(shape, 100.0, 80.0, Baseline(150.0, 90.0))
    assert one.tflops == pytest.approx(shape.flops / 100e-6 / 1e12)
    assert one.gb_per_s == pytest.approx(shape.num_bytes / 100e-6 / 1e9)
    assert one.over_floor == pytest.approx(100 / shape.floor_us)
    assert (one.vs_cublaslt, one.vs_deepgemm) == (0.8, 1.5)


# --- profiler events ------------------------------------------------------------------------------

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
    measurement = bench.summarize_calls(bench.split_calls(events, 4))
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
    assert len(bench.split_calls(events, 3)) == 3
    with pytest.raises(DeviceError, match=message):
        bench.summarize_calls(bench.split_calls(break_events(events), 3))


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
    assert bench._device_events(events) == [DeviceEvent("gemm", 5.0, 2.5)]


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
        monkeypatch.setattr(bench, "_flush_buffer", lambda ordinal: flush)

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
    measurement = bench.measure_kernel_us(lambda: gpu.log.append("gemm"), calls=12)
    assert (measurement.kernel_us, measurement.num_calls) == (7.0, 12)
    assert gpu.lost == []


def test_measure_kernel_us_rejects_profiles_that_stay_incomplete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, lost=[1] * bench.NUM_PROFILES)
    with pytest.raises(DeviceError, match=r"none of the kernels of one|records are missing"):
        bench.measure_kernel_us(lambda: gpu.log.append("gemm"))
    assert gpu.lost == []


# --- checks ---------------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def computed(rng: np.random.Generator) -> tuple[Any, Arrays, np.ndarray[Any, Any]]:
    """A kernel, its inputs and its right result."""
    x = rng.standard_normal((SMALL.m, SMALL.k), dtype=np.float32)
    weight = rng.standard_normal((SMALL.n, SMALL.k), dtype=np.float32)
    (a, sfa), (b, sfb) = api.quantize(x), api.quantize(weight, (128, 128))
    kernel = lower(SMALL.problem, SCHEDULE)
    tensors = {"a": a, "b": b, "sfa": sfa, "sfb": sfb}
    return kernel, tensors, interpret(kernel, tensors)


def test_check_sample_accepts_the_interpreters_bits(computed: Any) -> None:
    bench.check_sample(*computed)


@pytest.mark.parametrize("at", [(0, 0), (69, 135)], ids=["first tile", "last tile"])
def test_check_sample_rejects_one_wrong_bit(computed: Any, at: tuple[int, int]) -> None:
    kernel, tensors, d = computed
    d.view(np.uint16)[at] ^= 1
    with pytest.raises(VerifyError, match="in 1 of") as caught:
        bench.check_sample(kernel, tensors, d, num_random=0)
    assert str(kernel.problem) in str(caught.value)
    assert f"[{at[0]}, {at[1]}]" in str(caught.value)


def test_check_sample_rejects_unwritten_elements(computed: Any) -> None:
    kernel, tensors, d = computed
    d[30, 70] = np.nan  # in a tile that is not sampled
    with pytest.raises(VerifyError, match="1 elements of D are NaN"):
        bench.check_sample(kernel, tensors, d, num_random=0)


# --- running, with the GPU's part played on the CPU -----------------------------------------------


@dataclass
class Played:
    """What was timed, in order; `spoil` may alter the result of the n-th call of gemm."""

    timed: list[str] = field(default_factory=list)
    num_calls: int = 0
    spoil: Callable[[Any, int], None] = lambda d, n: None


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Lets `bench_gemm` run on CPU tensors."""
    torch = pytest.importorskip("torch")
    played = Played()

    def gemm(a: Any, b: Any, scales: Any, *, out: Any, schedule: Schedule) -> None:
        numpy_a, numpy_b = (bench.to_numpy(tensor, E4M3) for tensor in (a, b))
        sfa, sfb = (tensor.numpy() for tensor in scales)
        d = api.gemm(numpy_a, numpy_b, (sfa, sfb), schedule=schedule)
        out.view(torch.int16).copy_(torch.from_numpy(d.view(np.int16)))
        played.num_calls += 1
        played.spoil(out, played.num_calls)

    def measure(call: Callable[[], Any]) -> Measurement:
        result = call()
        played.timed.append("jitgen" if result is None else "cublaslt")
        if result is not None:
            assert result.shape == (SMALL.m, SMALL.n)
            assert result.dtype == torch.bfloat16
        return measured(10.0 if result is None else 8.0)

    real = bench._bench_shape
    monkeypatch.setattr(bench, "gemm", gemm)
    monkeypatch.setattr(bench, "measure_kernel_us", measure)
    monkeypatch.setattr(bench, "_bench_shape", lambda s, c, b: real(s, c, b, "cpu"))
    return played


def test_bench_gemm_times_a_checked_call_and_its_peer(played: Played) -> None:
    (one,) = bench.bench_gemm([SMALL], H100)
    assert played.timed == ["jitgen", "cublaslt"]
    assert (one.shape, one.baseline, one.vs_cublaslt) == (SMALL, None, 0.8)


def test_bench_gemm_times_no_wrong_result(played: Played) -> None:
    played.spoil = lambda d, n: d[0, 0].add_(1)
    with pytest.raises(VerifyError, match="differs from the interpreter's"):
        list(bench.bench_gemm([SMALL], H100))
    assert played.timed == []


def test_bench_gemm_rejects_results_that_change(played: Played) -> None:
    played.spoil = lambda d, n: d[0, 0].add_(n - 1)
    with pytest.raises(VerifyError, match="repeated calls give different results"):
        list(bench.bench_gemm([SMALL], H100))


@pytest.mark.parametrize(
    ("gpu", "has_baseline"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", False)]
)
def test_bench_gemm_shows_baselines_of_the_same_gpu_only(
    monkeypatch: pytest.MonkeyPatch, gpu: str, has_baseline: bool
) -> None:
    monkeypatch.setattr(
        bench, "_bench_shape", lambda shape, schedule, baseline: row(shape, 9, 9, baseline)
    )
    rows = list(bench.bench_gemm(GRID_DENSE[:2], replace(H100, name=gpu)))
    assert [one.baseline is not None for one in rows] == [has_baseline] * 2


def test_check_machine_rejects_torch_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="needs a Hopper GPU"):
        bench.check_machine()


def test_check_machine_rejects_missing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError, match=r"pip install 'jitgen\[bench\]'"):
        bench.check_machine()


# --- reports --------------------------------------------------------------------------------------

META = Meta(H100.name, "580.1", "13.0.88", "2.11", "0.1.0", "2026-11-22", "Method.", "jitgen bench")
WIN, LOSS = GRID_DENSE[0], GRID_DENSE[-1]


@pytest.fixture
def result() -> Result:
    """One shape that beats both peers and one that loses to both."""
    rows = (
        row(WIN, 10.0, 20.0, Baseline(40.0, 20.0)),
        row(LOSS, 100.0, 90.0, Baseline(81.0, 45.0)),
    )
    return Result(META, rows)


def test_summarize_gives_each_m_and_all(result: Result) -> None:
    first, second, total = report.summarize(result.rows)
    assert [first.label, second.label, total.label] == ["1", "4096", "all"]
    assert (first.vs_deepgemm, first.vs_cublaslt, first.num_losses) == (4, 2, 0)
    assert (second.num_losses, total.num_losses, total.num_shapes) == (1, 1, 2)
    assert total.vs_deepgemm == pytest.approx((4 * 0.81) ** 0.5)
    assert total.live_over_baseline == pytest.approx(2**0.5)


def test_summarize_compares_with_no_partial_baseline(result: Result) -> None:
    rows = (*result.rows, row(SMALL, 5.0, 6.0, None))
    total = report.summarize(rows)[-1]
    assert (total.vs_deepgemm, total.num_losses, total.live_over_baseline) == (None, None, None)
    assert total.vs_cublaslt == pytest.approx((2 * 0.9 * 1.2) ** (1 / 3))
    assert report.summarize([]) == []


def test_render_markdown_shows_losses_in_bold(result: Result) -> None:
    lines = report.render_markdown(result).splitlines()
    won = next(line for line in lines if line.startswith("| 2112 | 7168 |"))
    lost = next(line for line in lines if line.startswith("| 7168 | 2048 |"))
    assert "**" not in won
    assert "| 10.00 | 1.0% | 20.00 | 40.00 | 4.00 |" in won
    assert "| 100.00 | 0.1% | **90.00** | **81.00** | **0.81** |" in lost
    total = next(line for line in lines if line.startswith("| all | 2 |"))
    assert total.split(" | ")[2:5] == ["1.80", "**1**", "1.34"]


def test_render_markdown_says_where_and_how(result: Result) -> None:
    text = report.render_markdown(result)
    for part in (*vars(META).values(), "## M = 1", "## M = 4096", "DeepGEMM 2.6.1", "launches: 1."):
        assert part in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(report.COLUMNS) - 1, len(report.SUMMARY_COLUMNS)}  # M is in the headings
    assert {line.count("|") - 1 for line in tables} == widths


def test_result_to_json_holds_all_figures(result: Result) -> None:
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["meta"] == vars(META)
    one = data["rows"][1]
    assert one["shape"] == {"m": 4096, "n": 7168, "k": 2048}
    assert one["schedule"]["num_stages"] == SCHEDULE.num_stages
    assert (one["jitgen"]["kernel_us"], one["jitgen"]["num_kernels"]) == (100.0, 1)
    assert one["jitgen"]["kernels"] == ["gemm"]
    assert one["vs_deepgemm"] == pytest.approx(0.81)
    assert one["floor_us"] == pytest.approx(LOSS.floor_us)
