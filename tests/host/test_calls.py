"""Calls on torch tensors, launched on a GPU that the interpreter plays: results, caches, bind."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import jitgen
from jitgen import Schedule, acc, calls, control, matrix, scalar, vector
from jitgen.errors import DeviceError, JitgenError, ProblemError, ScheduleError
from jitgen.runtime.launch import MAX_IDLE_LAUNCHES

from . import fake_gpu
from .fake_gpu import FakeGpu, Result

torch = pytest.importorskip("torch")

M, N, K = 7, 72, 144
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = torch.float8_e4m3fn
OPERAND = acc * scalar("alpha") + vector("bias") + matrix("residual")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu.install(monkeypatch)


def aligned(array: NDArray[Any]) -> Any:
    """The array as a torch tensor in memory that torch allocated."""
    words = array.view({1: np.uint8, 2: np.int16, 4: np.int32}[array.itemsize])
    dtype = {FP8: FLOAT8, BFLOAT: torch.bfloat16}.get(array.dtype, torch.float32)
    return torch.from_numpy(words.copy()).clone().view(dtype)


def make(rng: np.random.Generator, m: int = M, n: int = N, k: int = K) -> dict[str, Any]:
    """Tensors of a GEMM by name, with operands of OPERAND, and `out`."""
    blocks = -(-k // 128)
    arrays = {
        "a": rng.standard_normal((m, k)).astype(FP8),
        "b": rng.standard_normal((n, k)).astype(FP8),
        "sfa": rng.uniform(0.5, 2, (m, blocks)).astype(np.float32),
        "sfb": rng.uniform(0.5, 2, (-(-n // 128), blocks)).astype(np.float32),
        "alpha": rng.standard_normal(1).astype(np.float32),
        "bias": rng.standard_normal(n).astype(BFLOAT),
        "residual": rng.standard_normal((m, n)).astype(BFLOAT),
        "out": np.full((m, n), np.nan, BFLOAT),
    }
    return {name: aligned(array) for name, array in arrays.items()}


def call(t: dict[str, Any], *names: str, function: Any = jitgen.gemm, **options: Any) -> Any:
    """gemm of the tensors; `names` of "operands" and "out" are what it gets beside a, b, scales."""
    if "operands" in names:
        options["epilogue"] = OPERAND.bind(**{n: t[n] for n in ("alpha", "bias", "residual")})
    if "out" in names:
        options["out"] = t["out"]
    return function(t["a"], t["b"], (t["sfa"], t["sfb"]), **options)


def numpy(tensor: Any) -> NDArray[Any]:
    tensor = tensor.contiguous()
    if tensor.dtype == FLOAT8:
        return tensor.view(torch.uint8).numpy().view(FP8)
    return tensor.view(torch.int16).numpy().view(BFLOAT) if tensor.itemsize == 2 else tensor.numpy()


def expected(t: dict[str, Any], *names: str, **options: Any) -> NDArray[Any]:
    """What the same call gives on NumPy arrays."""
    arrays = {name: numpy(tensor) for name, tensor in t.items() if name != "out"}
    return call(arrays, *(name for name in names if name != "out"), **options)


def bits(array: Any) -> NDArray[Any]:
    array = array if isinstance(array, np.ndarray) else numpy(array)
    return array.view(f"u{array.itemsize}")


# --- gemm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("out",), ("operands",), ("operands", "out")], ids=str)
def test_gemm_launches_what_the_interpreter_computes(
    rng: np.random.Generator, gpu: FakeGpu, names: tuple[str, ...]
) -> None:
    t = make(rng)
    for _ in range(2):
        d = call(t, *names)
        assert (d is t["out"]) == ("out" in names)
        assert (d.dtype, tuple(d.shape)) == (torch.bfloat16, (M, N))
        np.testing.assert_array_equal(bits(d), bits(expected(t, *names)))
    first, second = gpu.launches
    assert (first.stream, first.smem_bytes) == (7, first.kernel.smem.total_bytes)
    assert (first.grid, first.num_threads) == (second.grid, first.kernel.num_threads)
    assert gpu.driver.num_encoded == 3 * len(
        {launch.tensors["d"].ctypes.data for launch in gpu.launches}
    )


def test_gemm_without_out_gives_new_memory_every_time(
    rng: np.random.Generator, gpu: FakeGpu
) -> None:
    t = make(rng)
    results = [call(t) for _ in range(3 * MAX_IDLE_LAUNCHES)]
    assert len({d.data_ptr() for d in results}) == len(results)
    want = bits(expected(t))
    assert all(np.array_equal(bits(d), want) for d in results)


@pytest.mark.parametrize("moved", ["a", "b", "sfa", "sfb", "alpha", "bias", "residual", "out"])
def test_gemm_finds_a_tensor_that_moved(rng: np.random.Generator, gpu: FakeGpu, moved: str) -> None:
    """As often as to have launches rewritten, and back again."""
    first = make(rng)
    variants = [first | {moved: make(rng)[moved]} for _ in range(MAX_IDLE_LAUNCHES + 2)]
    for t in (*variants, *variants, first):
        t["out"].fill_(torch.nan)
        d = call(t, "operands", "out")
        assert d.data_ptr() == t["out"].data_ptr()
        np.testing.assert_array_equal(bits(d), bits(expected(t, "operands")))
    assert len(calls._calls) == 1
    assert gpu.driver.num_encoded == 3 * MAX_IDLE_LAUNCHES
    is_mapped = moved in ("a", "b", "out")
    assert (gpu.driver.num_replaced > 0) == is_mapped


def test_gemm_at_known_addresses_writes_no_argument(rng: np.random.Generator, gpu: FakeGpu) -> None:
    variants = [make(rng) for _ in range(MAX_IDLE_LAUNCHES)]
    for t in variants:
        call(t, "out")
    gpu.driver.num_encoded = 0
    for t in variants * 3:
        call(t, "out")
    assert (gpu.driver.num_encoded, gpu.driver.num_replaced) == (0, 0)


def test_gemm_keeps_no_tensor_alive(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng)
    call(t, "operands", "out")
    dead = [weakref.ref(tensor) for tensor in t.values()]
    t.clear()
    gc.collect()
    assert not any(ref() for ref in dead)


def padded(tensor: Any, columns: int) -> Any:
    wide = tensor.new_empty((tensor.shape[0], columns))
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def test_gemm_tells_signatures_apart(rng: np.random.Generator, gpu: FakeGpu) -> None:
    """Everything that a kernel, its arguments or a check depend on; each comes twice."""
    t = make(rng)
    other = make(rng)
    wide_a, wide_b = (padded(t[name].view(torch.uint8), K + 16).view(FLOAT8) for name in "ab")
    variants: list[tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = [
        (t, (), {}),
        (t, ("out",), {}),
        (t, ("operands",), {}),
        (t, ("operands", "out"), {}),
        (t, (), {"out_dtype": "float32"}),
        (t, (), {"schedule": Schedule(64, 48, 3, 1)}),
        (t, (), {"epilogue": acc + 0.0}),
        (t, (), {"epilogue": acc + -0.0}),
        (t | {"a": wide_a}, (), {}),
        (t | {"b": wide_b}, (), {}),
        (t | {"sfa": padded(t["sfa"], 3)}, (), {}),
        (t | {"sfa": t["sfa"].t().contiguous().t()}, (), {}),
        (t | {"residual": padded(t["residual"], N + 2)}, ("operands",), {}),
        (t | {"out": padded(t["out"], N + 8)}, ("out",), {}),
        (t | {"out": t["out"].float()}, ("out",), {}),
        (t | {name: t[name][:3] for name in ("a", "sfa")}, (), {}),
        (t | {name: other[name][:3] for name in ("a", "sfa")}, (), {"out_dtype": "float32"}),
    ]
    for tensors, names, options in variants * 2:
        d = call(tensors, *names, **options)
        np_options = options | ({"out_dtype": str(d.dtype).removeprefix("torch.")})
        np.testing.assert_array_equal(bits(d), bits(expected(tensors, *names, **np_options)))
    assert len(calls._calls) == len(variants)


def test_gemm_tells_operands_apart_by_name(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng)
    x, y = (make(rng)["bias"] for _ in range(2))
    expr = acc * vector("x") + vector("y")
    for _ in range(2):
        one = call(t, out_dtype="float32", epilogue=expr.bind(x=x, y=y))
        other = call(t, out_dtype="float32", epilogue=expr.bind(y=x, x=y))
        plain = call(t, out_dtype="float32")
        assert torch.equal(one, plain * x.float() + y.float())
        assert torch.equal(other, plain * y.float() + x.float())


def test_gemm_takes_epilogues_of_zeros_of_both_signs(
    rng: np.random.Generator, gpu: FakeGpu
) -> None:
    t = make(rng)
    positive, negative = (call(t, epilogue=zero) for zero in (0.0, -0.0))
    assert not torch.signbit(positive).any()
    assert torch.signbit(negative).all()


def test_gemm_takes_contiguous_rows_whatever_their_stride(
    rng: np.random.Generator, gpu: FakeGpu
) -> None:
    """The stride of a dimension of one element means nothing."""
    t = make(rng, m=1)
    want = bits(expected(t, "operands"))
    for stride in (1, 3, 2**33):
        one = {
            name: torch.as_strided(t[name], t[name].shape, (stride, 1))
            for name in ("a", "sfa", "residual")
        }
        calls._calls.clear()
        np.testing.assert_array_equal(bits(call(t | one, "operands")), want)


@pytest.mark.parametrize("names", [(), ("out",)], ids=str)
def test_gemm_of_no_rows_launches_nothing(
    rng: np.random.Generator, gpu: FakeGpu, names: tuple[str, ...]
) -> None:
    t = make(rng, m=0)
    for _ in range(2):
        assert tuple(call(t, *names).shape) == (0, N)
    assert gpu.launches == []


def test_gemm_runs_on_the_current_stream(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng)
    for gpu.stream in (0, 9, 2**47):
        call(t, "out")
    assert [launch.stream for launch in gpu.launches] == [0, 9, 2**47]


def test_gemm_makes_the_device_of_its_tensors_current(
    rng: np.random.Generator, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    @contextlib.contextmanager
    def device(index: int | None) -> Iterator[None]:
        entered.append(index)
        gpu.stream = 11
        yield
        gpu.stream = 7

    monkeypatch.setattr(torch.cuda, "device", device)
    t = make(rng)
    bound = call(t, "out", function=jitgen.bind)
    call(t, "out")
    assert entered == []
    gpu.current_device = 1
    call(t, "out")
    bound()
    assert entered == [None, None]  # the index of a CPU tensor, which plays CUDA's
    assert [launch.stream for launch in gpu.launches] == [7, 11, 11]


# --- rejections on a warm path --------------------------------------------------------------------


def shifted(tensor: Any, num_bytes: int) -> Any:
    """The same tensor, `num_bytes` beyond a multiple of 16 bytes."""
    memory = torch.empty(tensor.nbytes + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + num_bytes
    moved = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize(
    ("name", "num_bytes", "error"),
    [
        ("a", 8, r"^a is.*starts at an address that is not a multiple of 16 B"),
        ("a", 1, r"^a is.*starts at an address that is not a multiple of 16 B"),
        ("b", 4, r"^b is.*starts at an address that is not a multiple of 16 B"),
        ("out", 8, r"^d is.*starts at an address that is not a multiple of 16 B"),
        ("bias", 2, r"^bias is.*starts at an address that is not a multiple of two elements"),
        ("residual", 2, r"^residual is.*starts at an address that is not a multiple of two"),
        ("sfa", 4, None),
        ("sfb", 12, None),
        ("alpha", 4, None),
        ("bias", 4, None),
        ("residual", 8, None),
    ],
)
def test_gemm_checks_addresses_that_are_new(
    rng: np.random.Generator, gpu: FakeGpu, name: str, num_bytes: int, error: str | None
) -> None:
    t = make(rng)
    call(t, "operands", "out")
    moved = t | {name: shifted(t[name], num_bytes)}
    for _ in range(2):
        if error:
            with pytest.raises(ProblemError, match=error):
                call(moved, "operands", "out")
        else:
            d = call(moved, "operands", "out")
            np.testing.assert_array_equal(bits(d), bits(expected(t, "operands")))
    assert len(gpu.launches) == (1 if error else 3)


def column_major(tensor: Any) -> Any:
    words = tensor.view({1: torch.uint8, 2: torch.int16}[tensor.itemsize])
    return words.t().contiguous().t().view(tensor.dtype)


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a list": (lambda t: t | {"a": [1.0]}, "a is a list"),
    "b none": (lambda t: t | {"b": None}, "b is a NoneType"),
    "sfa number": (lambda t: t | {"sfa": 1.0}, "sfa is a float"),
    "sfb numpy": (lambda t: t | {"sfb": t["sfb"].numpy()}, "sfb is a ndarray"),
    "bias numpy": (lambda t: t | {"bias": t["alpha"].numpy()}, "bias is a ndarray"),
    "out numpy": (lambda t: t | {"out": numpy(t["out"])}, "d is a ndarray"),
    "out list": (lambda t: t | {"out": []}, "d is a list"),
    "a dtype": (lambda t: t | {"a": t["a"].view(torch.uint8)}, r"a has dtype uint8"),
    "a transposed": (lambda t: t | {"a": t["a"].t()}, r"agree in k"),
    "a column-major": (lambda t: t | {"a": column_major(t["a"])}, "^a is.*row-major"),
    "b column-major": (lambda t: t | {"b": column_major(t["b"])}, "^b is.*row-major"),
    "sfb strided": (lambda t: t | {"sfb": t["sfb"].repeat(1, 2)[:, ::2]}, "^sfb is.*contiguous"),
    "bias strided": (lambda t: t | {"bias": t["bias"].repeat(2)[::2]}, "^bias is.*stride must"),
    "out column-major": (lambda t: t | {"out": column_major(t["out"])}, "^d is.*row-major"),
    "sfa rows": (lambda t: t | {"sfa": t["sfa"][1:]}, r"^sfa is.*\[6, 2\]"),
    "sfb bf16": (lambda t: t | {"sfb": t["sfb"].bfloat16()}, "^sfb is bfloat16"),
    "bias dtype": (lambda t: t | {"bias": t["bias"].float()}, "^bias is float32"),
    "out shape": (lambda t: t | {"out": t["out"][:-1]}, r"^d is.*\[6, 72\]"),
    "out float16": (lambda t: t | {"out": t["out"].half()}, "float16"),
}


@pytest.mark.parametrize(("change", "error"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("function", [jitgen.gemm, jitgen.bind], ids=["gemm", "bind"])
def test_warm_call_rejects(
    rng: np.random.Generator, gpu: FakeGpu, function: Any, change: Any, error: str
) -> None:
    t = make(rng)
    call(t, "operands", "out")
    for _ in range(2):
        with pytest.raises(ProblemError, match=error):
            call(change(t), "operands", "out", function=function)
    assert len(gpu.launches) == 1


def test_warm_call_rejects_metadata_that_changed_in_place(
    rng: np.random.Generator, gpu: FakeGpu
) -> None:
    t = make(rng)
    call(t, "out")
    t["b"].t_()
    with pytest.raises(ProblemError, match="agree in k"):
        call(t, "out")


def test_warm_call_rejects_scales_in_one_tensor(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng, m=1, n=8, k=16)
    call(t)
    both = torch.stack([t["sfa"], t["sfb"]])
    with pytest.raises(ProblemError, match=r"scales must be the pair"):
        jitgen.gemm(t["a"], t["b"], both)


@pytest.mark.parametrize("out_dtype", ["float16", [1], {}, 3], ids=str)
def test_warm_call_rejects_out_dtype(
    rng: np.random.Generator, gpu: FakeGpu, out_dtype: Any
) -> None:
    t = make(rng)
    call(t)
    for _ in range(2):
        with pytest.raises(ProblemError, match=r"bfloat16.*float32"):
            call(t, out_dtype=out_dtype)


def test_warm_call_rejects_schedules(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng)
    call(t, schedule=Schedule(64, 48, 3, 1))
    with pytest.raises(ScheduleError, match="block_m = 100"):
        call(t, schedule=Schedule(100, 48, 3, 1))
    with pytest.raises(JitgenError, match=r"schedule.*tuple"):
        call(t, schedule=(64, 48, 3, 1))  # type: ignore[arg-type]


def test_operand_named_like_a_tensor_is_rejected_on_torch(
    rng: np.random.Generator, gpu: FakeGpu
) -> None:
    t = make(rng)
    with pytest.raises(ProblemError, match=r"operand.*\bd\b"):
        call(t, epilogue=(acc + matrix("d")).bind(d=t["residual"]))


# --- launches that fail ---------------------------------------------------------------------------


def test_launch_makes_the_context_current_in_a_new_thread(
    rng: np.random.Generator, gpu: FakeGpu
) -> None:
    t = make(rng)
    gpu.driver.refusals = [Result.CUDA_ERROR_INVALID_CONTEXT]
    call(t, "out")
    assert gpu.driver.current == ["context of device None"]
    np.testing.assert_array_equal(bits(t["out"]), bits(expected(t)))


@pytest.mark.parametrize("num_before", [0, 1, MAX_IDLE_LAUNCHES + 1])
def test_launch_of_new_addresses_makes_the_context_current_in_a_new_thread(
    rng: np.random.Generator, gpu: FakeGpu, num_before: int
) -> None:
    earlier = [make(rng) for _ in range(num_before)]  # kept, or their memory would be used again
    for t in earlier:
        call(t, "out")
    t = make(rng)
    gpu.driver.context = 0
    call(t, "out")
    assert gpu.driver.context == 1
    np.testing.assert_array_equal(bits(t["out"]), bits(expected(t)))


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(
    "status", [Result.CUDA_ERROR_INVALID_VALUE, None], ids=["value", "context"]
)
def test_launch_that_the_driver_refuses_is_an_error_and_leaves_no_trace(
    rng: np.random.Generator,
    gpu: FakeGpu,
    status: Result | None,
    pdl: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "pdl_enabled", pdl)
    t = make(rng)
    bound = call(t, "out", function=jitgen.bind)
    for run in (lambda: call(t, "out"), bound):
        gpu.driver.refusals = [status] if status else [Result.CUDA_ERROR_INVALID_CONTEXT] * 2
        with pytest.raises(DeviceError, match="cannot be launched: CUDA_ERROR_INVALID"):
            run()
        t["out"].fill_(torch.nan)
        run()
        np.testing.assert_array_equal(bits(t["out"]), bits(expected(t)))


def test_pdl_is_as_configured_at_each_launch(
    rng: np.random.Generator, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "pdl_enabled", False)
    t = make(rng)
    bound = call(t, "out", function=jitgen.bind)
    dependent = []
    for pdl in (False, True, False):
        jitgen.configure(pdl=pdl)
        for run in (lambda: call(t, "out"), bound):
            t["out"].fill_(torch.nan)
            run()
            np.testing.assert_array_equal(bits(t["out"]), bits(expected(t)))
        dependent.append(gpu.driver.num_dependent)
    assert dependent == [0, 2, 2]
    assert [launched.stream for launched in gpu.launches] == [gpu.stream] * 6
    assert len({(each.grid, each.num_threads, each.smem_bytes) for each in gpu.launches}) == 1


def test_num_sms_bounds_the_grid_of_calls_from_then_on(
    rng: np.random.Generator, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "num_sms_limit", 0)
    t = make(rng)
    grids = []
    for limit in (0, 2, 132, 0):
        jitgen.configure(num_sms=limit)
        t["out"].fill_(torch.nan)
        call(t, "out")
        np.testing.assert_array_equal(bits(t["out"]), bits(expected(t)))
        grids.append((gpu.launches[-1].grid, gpu.launches[-1].kernel.schedule.split_k))
    assert grids[0] == grids[2] == grids[3]
    assert grids[0][0] > 2 >= grids[1][0]
    assert grids[1][1] == 1
    with pytest.raises(JitgenError, match="num_sms is -1, must be a count of SMs, or 0"):
        jitgen.configure(num_sms=-1)


# --- caches ---------------------------------------------------------------------------------------


def test_calls_forget_the_oldest_signature(
    rng: np.random.Generator, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MAX_CALLS", 2)
    t = make(rng)
    for m in (1, 2, 3, 1):
        part = t | {name: t[name][:m] for name in ("a", "sfa")}
        np.testing.assert_array_equal(bits(call(part)), bits(expected(part)))
        assert len(calls._calls) <= 2


def test_launch_in_use_is_not_moved(rng: np.random.Generator, gpu: FakeGpu) -> None:
    """What other threads do while the driver reads the arguments."""
    kept = [make(rng) for _ in range(MAX_IDLE_LAUNCHES)]
    others = [make(rng) for _ in range(2 * MAX_IDLE_LAUNCHES)]

    def call_others() -> None:
        gpu.driver.on_launch = lambda: None
        for t in (*others, kept[0], *others):
            call(t, "out")

    for t in kept:
        call(t, "out")
    gpu.driver.on_launch = call_others
    call(kept[0], "out")
    for t in (*kept, *others):
        np.testing.assert_array_equal(bits(t["out"]), bits(expected(t)))


def test_calls_are_safe_in_threads(rng: np.random.Generator, gpu: FakeGpu) -> None:
    """More threads than launches are kept, all with the same signatures, each with its tensors."""
    num_threads, num_calls = 2 * MAX_IDLE_LAUNCHES, 12
    gpu.driver.on_launch = lambda: time.sleep(random.random() * 1e-3)
    work = [[make(rng, n=16, k=16) for _ in range(3)] for _ in range(num_threads)]
    shared = call(work[0][0], "out", function=jitgen.bind)
    errors: list[BaseException] = []
    start = threading.Barrier(num_threads, timeout=60)

    def run(mine: list[dict[str, Any]]) -> None:
        try:
            start.wait()
            for i in range(num_calls):
                t = mine[i % len(mine)]
                rows = M if i % 2 else M - 1
                t = t | {name: t[name][:rows] for name in ("a", "sfa", "out")}
                d = call(t, *(("out",) if i % 3 else ()))
                np.testing.assert_array_equal(bits(d), bits(expected(t)))
                shared()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(mine,)) for mine in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(gpu.launches) == 2 * num_threads * num_calls


# --- bind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("out",), ("operands", "out")], ids=str)
def test_bind_runs_on_what_the_tensors_hold(
    rng: np.random.Generator, gpu: FakeGpu, names: tuple[str, ...]
) -> None:
    t = make(rng)
    bound = call(t, *names, function=jitgen.bind)
    assert gpu.launches == []
    for gpu.stream in (7, 8):
        assert bound() is t["out"]
        np.testing.assert_array_equal(bits(t["out"]), bits(expected(t, *names)))
        for name, new in make(rng).items():
            t[name].copy_(new)
    assert [launch.stream for launch in gpu.launches] == [7, 8]


def test_bind_is_not_moved_by_other_calls(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng)
    bound = call(t, "out", function=jitgen.bind)
    others = [make(rng) for _ in range(2 * MAX_IDLE_LAUNCHES)]
    bounds = [call(other, "out", function=jitgen.bind) for other in others]
    for other in others:
        call(other, "out")
    gpu.driver.num_encoded = gpu.driver.num_replaced = 0
    for run, tensors in zip((bound, *bounds), (t, *others), strict=True):
        tensors["out"].fill_(torch.nan)
        run()
        np.testing.assert_array_equal(bits(tensors["out"]), bits(expected(tensors)))
    assert (gpu.driver.num_encoded, gpu.driver.num_replaced) == (0, 0)


def test_bind_keeps_its_tensors_alive(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng)
    want = bits(expected(t, "operands"))
    bound = call(t, "operands", "out", function=jitgen.bind)
    alive = [weakref.ref(tensor) for tensor in t.values()]
    t.clear()
    gc.collect()
    assert all(ref() is not None for ref in alive)
    np.testing.assert_array_equal(bits(bound()), want)
    del bound
    gc.collect()
    assert not any(ref() for ref in alive)


def test_bind_of_no_rows_launches_nothing(rng: np.random.Generator, gpu: FakeGpu) -> None:
    t = make(rng, m=0)
    assert call(t, "out", function=jitgen.bind)() is t["out"]
    assert gpu.launches == []


def test_bind_pins_a_schedule(rng: np.random.Generator, gpu: FakeGpu) -> None:
    schedule = Schedule(64, 48, 3, 1)
    call(make(rng), "out", function=jitgen.bind, schedule=schedule)()
    assert gpu.launches[0].kernel.schedule == schedule


def test_bind_on_numpy_interprets_every_time(rng: np.random.Generator) -> None:
    t = {name: numpy(tensor) for name, tensor in make(rng).items()}
    bound = call(t, "operands", "out", function=jitgen.bind)
    for _ in range(2):
        assert np.isnan(t["out"].astype(np.float32)).all()
        assert bound() is t["out"]
        np.testing.assert_array_equal(bits(t["out"]), bits(call(t, "operands")))
        t["a"][...] = make(rng)["a"].view(torch.uint8).numpy().view(FP8)
        t["out"][...] = np.nan


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_bind_rejects_at_once(rng: np.random.Generator, gpu: FakeGpu, library: str) -> None:
    t = make(rng)
    if library == "numpy":
        t = {name: numpy(tensor) for name, tensor in t.items()}
    scales = t["sfa"], t["sfb"]
    with pytest.raises(ProblemError, match=r"^out is None"):
        jitgen.bind(t["a"], t["b"], scales, out=None)
    with pytest.raises(ProblemError, match=r"^d is.*\[6, 72\]"):
        jitgen.bind(t["a"], t["b"], scales, out=t["out"][1:])
    with pytest.raises(ProblemError, match=r"scales must be the pair"):
        jitgen.bind(t["a"], t["b"], t["sfa"], out=t["out"])
    with pytest.raises(ProblemError, match=r"needs operands \[bias\]"):
        jitgen.bind(t["a"], t["b"], scales, out=t["out"], epilogue=acc + vector("bias"))
    with pytest.raises(ScheduleError, match="block_m = 100"):
        jitgen.bind(t["a"], t["b"], scales, out=t["out"], schedule=Schedule(100, 64, 4, 1))
    assert gpu.launches == []


def test_bind_rejects_torch_cpu_tensors(rng: np.random.Generator) -> None:
    with pytest.raises(DeviceError, match=r"a is on cpu.*\.cuda\(\)"):
        call(make(rng), "out", function=jitgen.bind)
