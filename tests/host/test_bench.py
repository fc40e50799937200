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
from jitgen.errors import DeviceError, ProblemError, VerifyError
from jitgen.interpret import interpret
from jitgen.lower import lower
from jitgen.runtime.driver import Device
from jitgen.schedule import Schedule
from jitgen.tuning import bench, peers, plot, report, timing
from jitgen.tuning.bench import GRID_DENSE, Baseline, PeerTime, Row, Shape
from jitgen.tuning.report import Meta, Result
from jitgen.tuning.timing import DeviceEvent, Measurement

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
    """A row without CUTLASS, which takes half as long again with blockwise scales."""
    times = {
        "cublaslt": PeerTime("", measured(cublaslt_us)),
        "cublaslt_blockwise": PeerTime("", measured(1.5 * cublaslt_us)),
    }
    return Row(shape, SCHEDULE, measured(us), times, {"CUTLASS": "no nvcc"}, baseline)


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
    names = ("jitgen", "deepgemm", "cublaslt", "cublaslt_blockwise", "cutlass", "best")
    assert [one.us(name) for name in names] == [100, 150, 80, 120, None, 80]
    assert [one.ratio(name) for name in names] == [1, 1.5, 0.8, 1.2, None, 0.8]
    assert replace(one, baseline=None).us("best") is None
    assert replace(one, peers={}).us("best") is None


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
        (lambda events: events[1:], "holds 3 L2 flushes|must run the same"),
        (lambda events: events[:2] + events[3:], "holds 2 L2 flushes"),
        (lambda events: events[:-1], "must run the same kernels"),
        (lambda events: events[::2], "at least one each"),
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
        timing.split_calls(break_events(events), 3)


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
    with pytest.raises(DeviceError, match=r"must run the same kernels|records are missing"):
        timing.measure_kernel_us(lambda: gpu.log.append("gemm"))
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
    """Lets `bench_gemm` run on CPU tensors, beside one peer with configurations of 8 and 7 us."""
    torch = pytest.importorskip("torch")
    played = Played()

    def gemm(a: Any, b: Any, scales: Any, *, out: Any, schedule: Schedule) -> None:
        numpy_a, numpy_b = (bench._to_numpy(tensor, E4M3) for tensor in (a, b))
        sfa, sfb = (tensor.numpy() for tensor in scales)
        d = api.gemm(numpy_a, numpy_b, (sfa, sfb), schedule=schedule)
        out.view(torch.int16).copy_(torch.from_numpy(d.view(np.int16)))
        played.num_calls += 1
        played.spoil(out, played.num_calls)

    def prepare(x: Any, weight: Any) -> peers.Prepared:
        product = x.double() @ weight.double().t()
        d = product.bfloat16()
        return peers.Prepared({"slow": lambda: d[:], "fast": lambda: d}, product)

    def measure(call: Callable[[], Any]) -> Measurement:
        result = call()
        kind = "jitgen" if result is None else "slow" if result._is_view() else "fast"
        played.timed.append(kind)
        return measured({"jitgen": 10.0, "slow": 8.0, "fast": 7.0}[kind])

    real = bench._bench_shape
    monkeypatch.setattr(bench, "gemm", gemm)
    monkeypatch.setattr(bench, "PEERS", (peers.Peer("cublaslt", "cuBLASLt", "", prepare),))
    monkeypatch.setattr(bench, "measure_kernel_us", measure)
    monkeypatch.setattr(bench, "_bench_shape", lambda s, c, b: real(s, c, b, "cpu"))
    return played


def test_bench_gemm_times_a_checked_call_and_the_fastest_of_its_peer(played: Played) -> None:
    (one,) = bench.bench_gemm([SMALL], H100)
    assert played.timed == ["jitgen", "slow", "fast"]
    assert (one.shape, one.baseline, one.missing) == (SMALL, None, {})
    assert one.peers == {"cublaslt": PeerTime("fast", measured(7.0))}


def test_bench_gemm_times_no_wrong_result(played: Played) -> None:
    played.spoil = lambda d, n: d[0, 0].add_(1)
    with pytest.raises(VerifyError, match="differs from the interpreter's"):
        list(bench.bench_gemm([SMALL], H100))
    assert played.timed == []


def test_bench_gemm_rejects_results_that_change(played: Played) -> None:
    played.spoil = lambda d, n: d[0, 0].add_(n - 1)
    with pytest.raises(VerifyError, match="repeated calls give different results"):
        list(bench.bench_gemm([SMALL], H100))


def fails(error: Exception) -> Any:
    def call() -> None:
        raise error

    return call


def test_bench_gemm_goes_on_without_a_peer_and_says_why(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    reference = torch.ones(SMALL.m, SMALL.n, dtype=torch.float64)
    calls = {
        "wrong": lambda: 2 * reference,
        "refused": fails(RuntimeError("CUDA error:\n  not supported")),
        "mistaken": fails(ValueError("scale_a must have shape")),
    }
    monkeypatch.setattr(
        bench,
        "PEERS",
        (
            peers.Peer("one", "One", "", lambda x, weight: peers.Prepared(calls, reference)),
            peers.Peer("two", "Two", "", lambda x, weight: fails(DeviceError("no nvcc"))()),
        ),
    )
    (one,) = bench.bench_gemm([SMALL], H100)
    assert played.timed == ["jitgen"]
    assert one.peers == {}
    assert list(one.missing) == ["One wrong", "One refused", "One mistaken", "Two"]
    assert one.missing["One wrong"].startswith("70 of 70 rows are wrong")
    assert one.missing["One refused"] == "CUDA error: not supported"
    assert one.missing["Two"] == "no nvcc"


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

META = Meta(
    gpu=H100.name,
    driver="580.1",
    nvrtc="13.0.88",
    torch="2.11",
    cutlass="4.2.0 (nvcc 13.0.88)",
    jitgen="0.1.0",
    date="2026-11-22",
    method="Method.",
    peers={"cuBLASLt": "per tensor."},
    command="jitgen bench",
)
WIN, LOSS = GRID_DENSE[0], GRID_DENSE[-1]


@pytest.fixture
def result() -> Result:
    """One shape that beats the peers and one that loses to two."""
    rows = (
        row(WIN, 10.0, 20.0, Baseline(40.0, 20.0)),
        row(LOSS, 100.0, 90.0, Baseline(81.0, 45.0)),
    )
    return Result(META, rows)


def test_summarize_gives_each_m_and_all(result: Result) -> None:
    first, second, total = report.summarize(result.rows)
    assert [first.label, second.label, total.label] == ["1", "4096", "all"]
    ratios = {"deepgemm": 4, "cublaslt": 2, "cublaslt_blockwise": 3, "cutlass": None, "best": 2}
    assert first.ratios == pytest.approx(ratios)
    assert set(first.num_losses.values()) == {0, None}
    assert list(second.num_losses.values()) == [1, 1, 0, None, 1]
    assert (total.num_losses["best"], total.num_shapes) == (1, 2)
    assert total.ratios["best"] == pytest.approx((2 * 0.81) ** 0.5)
    assert total.live_over_baseline == pytest.approx(2**0.5)
    assert first.over_floor["jitgen"] == pytest.approx(10 / WIN.floor_us)
    assert first.over_floor["cublaslt_blockwise"] == pytest.approx(30 / WIN.floor_us)
    assert first.over_floor["cutlass"] is None


def test_summarize_compares_with_no_partial_baseline(result: Result) -> None:
    rows = (*result.rows, row(SMALL, 5.0, 6.0, None))
    total = report.summarize(rows)[-1]
    for name in ("deepgemm", "best"):
        figures = total.ratios[name], total.num_losses[name], total.over_floor[name]
        assert figures == (None, None, None)
    assert total.live_over_baseline is None
    assert total.ratios["cublaslt"] == pytest.approx((2 * 0.9 * 1.2) ** (1 / 3))
    assert report.summarize([]) == []


def table(text: str, title: str) -> list[dict[str, str]]:
    """The rows of the Markdown table below a heading, by column."""
    lines = text.split(f"\n## {title}\n\n")[1].split("\n\n")[0].splitlines()
    columns, _, *rows = (line.strip("| ").split(" | ") for line in lines)
    return [dict(zip(columns, cells, strict=True)) for cells in rows]


def test_render_markdown_shows_losses_in_bold(result: Result) -> None:
    text = report.render_markdown(result)
    (won,), (lost,) = table(text, "M = 1"), table(text, "M = 4096")
    assert not any("**" in cell for cell in won.values())
    assert (won["jitgen us"], won["spread"], won["DeepGEMM us"]) == ("10.00", "1.0%", "40.00")
    assert (won["CUTLASS us"], won["best peer / jitgen"]) == ("-", "2.00")
    assert (lost["DeepGEMM us"], lost["cuBLASLt us"]) == ("**81.00**", "**90.00**")
    assert (lost["cuBLASLt blockwise us"], lost["best peer / jitgen"]) == ("135.00", "**0.81**")
    total = table(text, "Geometric means")[-1]
    assert (total["best peer / jitgen"], total["slower than best peer"]) == ("1.27", "**1**")
    assert (total["cuBLASLt / jitgen"], total["cuBLASLt live / file"]) == ("1.34", "1.41")
    floors = table(text, "Time over floor, geometric means")
    assert [cells["M"] for cells in floors] == ["1", "4096", "all"]
    assert floors[1]["DeepGEMM"].startswith("**")
    assert floors[0]["CUTLASS"] == "-"


def test_render_markdown_says_where_and_how(result: Result) -> None:
    text = report.render_markdown(result)
    for part in (*vars(META).values(), "## M = 1", "## M = 4096", "DeepGEMM 2.6.1", "launches: 1."):
        assert part is META.peers or part in text
    assert "- cuBLASLt, live in the same run: per tensor.\n" in text
    assert "Not measured:\n\n- CUTLASS, every shape: no nvcc\n" in text
    configs = table(text, "Schedules")
    assert [cells["jitgen"] for cells in configs] == [str(SCHEDULE)] * 2
    assert "![" not in text
    assert "(plot.svg)" in report.render_markdown(result, plot="plot.svg")


def test_render_markdown_names_the_shapes_that_a_peer_lacks(result: Result) -> None:
    rows = (result.rows[0], replace(result.rows[1], missing={}))
    text = report.render_markdown(replace(result, rows=rows))
    assert f"- CUTLASS, {WIN}: no nvcc\n" in text


def test_result_json_holds_all_figures_and_reads_back(result: Result) -> None:
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["meta"] == vars(META)
    one = data["rows"][1]
    assert one["shape"] == {"m": 4096, "n": 7168, "k": 2048}
    assert one["schedule"]["num_stages"] == SCHEDULE.num_stages
    assert (one["jitgen"]["kernel_us"], one["jitgen"]["kernels"]) == (100.0, ["gemm"])
    assert one["peers"]["cublaslt"]["measurement"]["kernel_us"] == 90.0
    derived = one["derived"]
    assert derived["ratios"]["deepgemm"] == pytest.approx(0.81)
    assert (derived["num_kernels"], derived["floor_us"]) == (1, pytest.approx(LOSS.floor_us))
    assert Result.from_json(data) == result


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data.pop("rows"), "KeyError 'rows'"),
        (lambda data: data["meta"].pop("date"), "TypeError .*date"),
        (lambda data: data["rows"][0].pop("peers"), "KeyError 'peers'"),
        (lambda data: data["rows"][0]["schedule"].update(block_q=1), "TypeError .*block_q"),
    ],
    ids=["rows", "meta", "peers", "schedule"],
)
def test_result_rejects_json_of_another_version(
    result: Result, spoil: Callable[[Any], object], message: str
) -> None:
    data = json.loads(json.dumps(result.to_json()))
    spoil(data)
    with pytest.raises(ProblemError, match=message):
        Result.from_json(data)


def test_collect_meta_keeps_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(report, "_driver_release", lambda: "580.1")
    monkeypatch.setattr(report, "describe", lambda: "4.2.0 (nvcc 13.0.88)")
    arguments = ["bench", "gemm", "--json", "/tmp/out/a b.json", "--markdown=/work/docs/p.md"]
    meta = report.collect_meta(H100, version="0.1.0", arguments=arguments)
    assert meta.command == "jitgen bench gemm --json 'a b.json' --markdown=p.md"
    assert list(meta.peers) == ["cuBLASLt", "cuBLASLt blockwise", "CUTLASS"]


# --- the plot -------------------------------------------------------------------------------------


def test_plot_has_a_style_for_everything_compared() -> None:
    assert set(plot.STYLES) | {"best"} == {"jitgen", *report.TITLES}


def test_series_are_geometric_means_by_m_without_missing_peers(result: Result) -> None:
    rows = (*result.rows, row(SMALL, 5.0, 6.0, None))
    extents, lines = plot.series(rows)
    assert extents == ["1", "70", "4096"]
    assert list(lines) == ["jitgen", "deepgemm", "cublaslt", "cublaslt_blockwise"]
    assert lines["deepgemm"] == [
        pytest.approx(40 / WIN.floor_us),
        None,
        pytest.approx(81 / LOSS.floor_us),
    ]


def test_render_svg_draws_each_series_and_is_reproducible(result: Result) -> None:
    pytest.importorskip("matplotlib")
    svg = plot.render_svg(result.rows)
    assert svg is not None
    assert svg == plot.render_svg(result.rows)
    assert "DeepGEMM" in svg
    assert "CUTLASS" not in svg


def test_render_svg_without_matplotlib_is_none(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.render_svg(result.rows) is None
