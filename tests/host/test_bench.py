"""Benchmarks without a GPU: arithmetic, baselines, profiler events, checks, reports."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from jitgen import api, quantize
from jitgen.dtypes import E4M3
from jitgen.errors import DeviceError, VerifyError
from jitgen.interpret import interpret
from jitgen.lower import lower
from jitgen.runtime.driver import Device
from jitgen.schedule import Schedule
from jitgen.tuning import bench, peers, report
from jitgen.tuning.bench import GRID_DENSE, Baseline, PeerTime, Row, Shape
from jitgen.tuning.timing import Measurement

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


def test_row_derives_its_figures() -> None:
    shape = Shape(4096, 7168, 2048)
    peers = {name: PeerTime("", measured(us)) for name, us in (("cublaslt", 80), ("cutlass", 120))}
    one = Row(shape, SCHEDULE, measured(100.0), peers, {}, Baseline(150.0, 90.0))
    assert one.tflops == pytest.approx(shape.flops / 100e-6 / 1e12)
    assert one.gb_per_s == pytest.approx(shape.num_bytes / 100e-6 / 1e9)
    assert one.over_floor == pytest.approx(100 / shape.floor_us)
    names = ("jitgen", "deepgemm", "cublaslt", "cublaslt_blockwise", "cutlass", "best")
    assert [one.us(name) for name in names] == [100, 150, 80, None, 120, 80]
    assert [one.ratio(name) for name in names] == [1, 1.5, 0.8, None, 1.2, 0.8]
    assert replace(one, baseline=None).us("best") is None
    assert replace(one, peers={}).us("best") is None


# --- checks ---------------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def computed(rng: np.random.Generator) -> tuple[Any, Arrays, np.ndarray[Any, Any]]:
    """A kernel, its inputs and its right result."""
    x = rng.standard_normal((SMALL.m, SMALL.k), dtype=np.float32)
    weight = rng.standard_normal((SMALL.n, SMALL.k), dtype=np.float32)
    (a, sfa), (b, sfb) = quantize(x), quantize(weight, (128, 128))
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
        numpy_a, numpy_b = (bench.to_numpy(tensor, E4M3) for tensor in (a, b))
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
        bench,
        "_bench_shape",
        lambda shape, schedule, baseline: Row(shape, schedule, measured(9), {}, {}, baseline),
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
