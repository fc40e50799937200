"""Arrays of other libraries: JAX's on the interpreter, and a CuPy-like library's on a fake GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import jitgen
from jitgen import acc, dlpack, vector
from jitgen.errors import DeviceError, ProblemError

from . import fake_gpu
from .conftest import SameBits
from .fake_gpu import FakeGpu

M, N, K = 7, 72, 144
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT = np.dtype(ml_dtypes.bfloat16)
EPILOGUE = acc + vector("bias", "float32")


def make(rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    return {
        "a": rng.standard_normal((M, K)).astype(FP8),
        "b": rng.standard_normal((N, K)).astype(FP8),
        "sfa": rng.uniform(0.5, 2, (M, 2)).astype(np.float32),
        "sfb": rng.uniform(0.5, 2, (1, 2)).astype(np.float32),
        "bias": rng.standard_normal(N).astype(np.float32),
    }


def call(t: dict[str, Any], function: Any = jitgen.gemm, **options: Any) -> Any:
    epilogue = EPILOGUE.bind(bias=t["bias"])
    return function(t["a"], t["b"], (t["sfa"], t["sfb"]), epilogue=epilogue, **options)


# --- JAX, on the interpreter ----------------------------------------------------------------------


@pytest.fixture
def jnp(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return pytest.importorskip("jax.numpy")


@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_gemm_of_jax_arrays_gives_numpys_bits(
    rng: np.random.Generator, same_bits: SameBits, jnp: Any, out_dtype: str | None
) -> None:
    t = make(rng)
    d = call({name: jnp.asarray(array) for name, array in t.items()}, out_dtype=out_dtype)
    assert isinstance(d, jnp.ndarray)
    same_bits(np.asarray(d), call(t, out_dtype=out_dtype))


def test_gemm_takes_the_codes_of_float8(
    rng: np.random.Generator, same_bits: SameBits, jnp: Any
) -> None:
    t = make(rng)
    codes = {name: jnp.asarray(t[name].view(np.uint8)) for name in ("a", "b")}
    d = call({name: jnp.asarray(array) for name, array in t.items()} | codes)
    same_bits(np.asarray(d), call(t))


def test_fp8_output_of_jax_arrays_is_a_pair(
    rng: np.random.Generator, same_bits: SameBits, jnp: Any
) -> None:
    t = make(rng) | {
        "b": rng.standard_normal((128, K)).astype(FP8),
        "bias": rng.standard_normal(128).astype(np.float32),
    }
    got = call({name: jnp.asarray(array) for name, array in t.items()}, out_dtype="float8_e4m3fn")
    for array, reference in zip(got, call(t, out_dtype="float8_e4m3fn"), strict=True):
        assert isinstance(array, jnp.ndarray)
        same_bits(np.asarray(array), reference)


@pytest.mark.parametrize(
    "layout",
    [
        lambda make: jitgen.Ragged(make([0, 3, M])),
        lambda make: jitgen.Contiguous(make([0, 0, 0, 1, 1, 1, 1])),
        lambda make: jitgen.Contiguous(group_ends=make([3, M]), alignment=1),
    ],
    ids=["ragged", "group_of_row", "group_ends"],
)
def test_grouped_gemm_of_jax_arrays_gives_numpys_bits(
    rng: np.random.Generator, same_bits: SameBits, jnp: Any, layout: Any
) -> None:
    t = make(rng)
    b, sfb = np.stack([t["b"]] * 2), np.stack([t["sfb"], 2 * t["sfb"]])
    arrays = (t["a"], b, (t["sfa"], sfb))
    int32 = np.int32
    want = jitgen.grouped_gemm(*arrays, layout=layout(lambda x: np.array(x, int32)))
    got = jitgen.grouped_gemm(
        *(jnp.asarray(t["a"]), jnp.asarray(b), (jnp.asarray(t["sfa"]), jnp.asarray(sfb))),
        layout=layout(lambda x: jnp.array(x, int32)),
        debug=True,
    )
    assert isinstance(got, jnp.ndarray)
    same_bits(np.asarray(got), want)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT], ids=str)
def test_quantize_of_jax_arrays_gives_numpys_bits(
    rng: np.random.Generator, same_bits: SameBits, jnp: Any, dtype: np.dtype[Any]
) -> None:
    x = rng.standard_normal((M, K)).astype(dtype)
    got, want = jitgen.quantize(jnp.asarray(x), (128, 128)), jitgen.quantize(x, (128, 128))
    for array, reference in zip(got, want, strict=True):
        assert isinstance(array, jnp.ndarray)
        same_bits(np.asarray(array), reference)


def test_jax_arrays_are_not_written(rng: np.random.Generator, jnp: Any) -> None:
    t = {name: jnp.asarray(array) for name, array in make(rng).items()}
    out = jnp.zeros((M, N), "float32")
    for function in (jitgen.gemm, jitgen.bind):
        with pytest.raises(ProblemError, match=r"d is a .*cannot be written: take what `gemm`"):
            call(t, function, out=out)
    assert not out.any()


def test_jax_tracers_are_refused_by_name(jnp: Any) -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(ProblemError, match=r"x is a .*Tracer that cannot be read by DLPack"):
        jax.jit(jitgen.quantize)(jnp.ones((4, 128)))


def test_gemm_keeps_the_rules_for_jax_arrays(rng: np.random.Generator, jnp: Any) -> None:
    t = {name: jnp.asarray(array) for name, array in make(rng).items()}
    with pytest.raises(ProblemError, match=r"sfa is float32\[7, 1\].*makes float32\[7, 2\]"):
        call(t | {"sfa": t["sfa"][:, :1]})
    with pytest.raises(ProblemError, match=r"bias is a ndarray, a is a .*of one library only"):
        call(t | {"bias": np.asarray(t["bias"])})
    with pytest.raises(ProblemError, match=r"b is a .*arrays of one other library"):
        call(make(rng) | {"b": t["b"]})


# --- a library like CuPy, on the fake GPU ---------------------------------------------------------

torch = pytest.importorskip("torch")


class Duck:
    """An array of a library on a GPU, which torch's CPU memory plays."""

    device = (dlpack.CUDA, 0)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        if self.tensor.itemsize == 1 and self.tensor.dtype != torch.uint8:
            raise BufferError("no float8")
        LOG.append(f"lent to stream {stream}")
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class NamedDuck(Duck):
    """One that names its library."""

    def __array_namespace__(self) -> Any:
        return sys.modules[Duck.__module__.partition(".")[0]]


LOG: list[str] = []


@pytest.fixture(params=[Duck, NamedDuck])
def duck(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Duck]:
    """Its arrays; their library has neither float8 nor, as CuPy of old, bfloat16."""
    library = ModuleType("ducks")

    def from_dlpack(tensor: Any) -> Duck:
        if tensor.dtype in (torch.float8_e4m3fn, torch.bfloat16):
            raise NotImplementedError(f"no {tensor.dtype} here")
        LOG.append(f"took {tensor.numel()}")
        return request.param(torch.from_dlpack(tensor))  # type: ignore[no-any-return]

    library.from_dlpack = from_dlpack  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ducks", library)
    monkeypatch.setattr(Duck, "__module__", "ducks.core")
    monkeypatch.setattr(NamedDuck, "__module__", "elsewhere")
    return request.param  # type: ignore[no-any-return]


class Event:
    """A CUDA event that has come to pass if the test says so."""

    passed = False

    def record(self, stream: object) -> None:
        self.stream = stream

    def query(self) -> bool:
        return Event.passed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    current = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "passed", False)
    dlpack._in_flight.clear()
    LOG.clear()
    return fake_gpu.install(monkeypatch)


def to_ducks(t: dict[str, NDArray[Any]], duck: type[Duck]) -> dict[str, Any]:
    """The arrays as the library's, FP8 as its codes."""
    return {
        name: duck(torch.from_numpy((x.view(np.uint8) if x.itemsize == 1 else x).copy()).clone())
        for name, x in t.items()
    }


def test_gemm_on_the_gpu_shares_memory_and_orders_streams(
    rng: np.random.Generator, same_bits: SameBits, gpu: FakeGpu, duck: type[Duck]
) -> None:
    t = make(rng)
    ducks = to_ducks(t, duck)
    d = call(ducks, out_dtype="float32")
    assert type(d) is duck
    same_bits(d.tensor.numpy(), call(t, out_dtype="float32"))
    (launched,) = gpu.launches
    for name, array in launched.tensors.items():
        owner = d if name == "d" else ducks[name]
        assert array.ctypes.data == owner.tensor.data_ptr(), name
    lent = [entry for entry in LOG if entry.startswith("lent")]
    assert lent == ["lent to stream 7"] * 5
    assert LOG[-1] == f"took {M * N}"


def test_gemm_on_the_gpu_writes_out_and_tells_the_library(
    rng: np.random.Generator, same_bits: SameBits, gpu: FakeGpu, duck: type[Duck]
) -> None:
    t = make(rng)
    out = duck(torch.full((M, N), torch.nan))
    assert call(to_ducks(t, duck), out=out) is out
    same_bits(out.tensor.numpy(), call(t, out_dtype="float32"))
    assert LOG[-1] == f"took {M * N}"


def test_bind_on_the_gpu_takes_its_place_on_the_librarys_stream(
    rng: np.random.Generator, same_bits: SameBits, gpu: FakeGpu, duck: type[Duck]
) -> None:
    t, more = make(rng), make(rng)
    ducks = to_ducks(t, duck)
    out = duck(torch.full((M, N), torch.nan))
    run = call(ducks, jitgen.bind, out=out)
    for arrays in (t, more):
        for name, array in to_ducks(arrays, duck).items():
            ducks[name].tensor.copy_(array.tensor)
        LOG.clear()
        gpu.driver.on_launch = lambda: LOG.append("launched")
        assert run() is out
        assert ["lent to stream 7", "launched", f"took {M * N}"] == LOG
        same_bits(out.tensor.numpy(), call(arrays, out_dtype="float32"))


def test_quantize_on_the_gpu_gives_codes_where_there_is_no_float8(
    rng: np.random.Generator, same_bits: SameBits, gpu: FakeGpu, duck: type[Duck]
) -> None:
    x = rng.standard_normal((M, K)).astype(np.float32)
    codes, scale = jitgen.quantize(duck(torch.from_numpy(x)))
    want = jitgen.quantize(x)
    assert (type(codes), type(scale)) == (duck, duck)
    same_bits(codes.tensor.numpy(), want[0].view(np.uint8))
    same_bits(scale.tensor.numpy(), want[1])


def test_operands_live_until_the_kernel_is_done(
    rng: np.random.Generator, gpu: FakeGpu, duck: type[Duck], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = to_ducks(make(rng), duck)
    for count in (1, 2):
        call(t, out_dtype="float32")
        assert len(dlpack._in_flight) == count
        event, tensors = dlpack._in_flight[-1]
        assert event.stream.cuda_stream == 7
        kept = {tensor.data_ptr() for tensor in tensors}
        assert kept == {array.tensor.data_ptr() for array in t.values()}
    monkeypatch.setattr(Event, "passed", True)
    call(t, out_dtype="float32")
    assert len(dlpack._in_flight) == 1
    gpu.is_capturing = True  # no event may be asked then
    call(t, out_dtype="float32")
    assert len(dlpack._in_flight) == 1


def test_gemm_rejects_a_dtype_that_the_library_lacks_before_it_runs(
    rng: np.random.Generator, gpu: FakeGpu, duck: type[Duck]
) -> None:
    with pytest.raises(ProblemError, match=r"ducks takes no bfloat16: .*another out_dtype"):
        call(to_ducks(make(rng), duck))
    assert gpu.launches == []


def test_gemm_rejects_what_cannot_be_read(
    rng: np.random.Generator, gpu: FakeGpu, duck: type[Duck], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = to_ducks(make(rng), duck)
    float8 = duck(t["a"].tensor.view(torch.float8_e4m3fn))
    with pytest.raises(ProblemError, match=r"a is a .*no float8\. .*codes as uint8"):
        call(t | {"a": float8})
    with pytest.raises(ProblemError, match=r"sfb is a list, a is a .*of one library only"):
        call(t | {"sfb": [1.0]})
    monkeypatch.setattr(Duck, "device", (10, 0))
    with pytest.raises(DeviceError, match=r"on the CPU or a CUDA device, not on 10 of DLPack"):
        call(t)
    monkeypatch.setattr(Duck, "device", (dlpack.CUDA, 0))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError, match=r"need torch: pip install 'jitgen\[torch\]'"):
        jitgen.quantize(t["sfa"])


def test_torch_tensors_never_reach_the_conversion(
    rng: np.random.Generator, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(array: object) -> bool:
        raise AssertionError("asked about a tensor")

    t = {name: array.tensor for name, array in to_ducks(make(rng), Duck).items()}
    t |= {name: t[name].view(torch.float8_e4m3fn) for name in ("a", "b")}
    monkeypatch.setattr("jitgen.api.is_foreign", refuse)
    assert call(t).dtype == torch.bfloat16
    assert len(gpu.launches) == 1
