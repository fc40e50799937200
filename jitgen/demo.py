"""The demo: a real sentence-embedding model in FP32 and in FP8, side by side.

Both runs share the NumPy encoder of `jitgen.minilm`; only `linear` differs. In FP8 every linear
layer is one `jitgen.gemm` with its bias, and the GELU that follows it, fused: on the interpreter,
or on a Hopper GPU where torch finds one.
"""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import jitgen

from .build import prebuild
from .expr import Bound
from .minilm import Array, Dense, Model, encode, linear_fp32, load_model
from .problem import Gemm
from .runtime import driver
from .target import H100, SM90A, Gpu
from .tuning.select import select

MIN_COSINE = 0.99

SENTENCES = (
    "The ferry to the island leaves every morning at half past seven.",
    "Each day a boat departs for the island at 7:30 a.m.",
    "Knead the dough for ten minutes, then let it rise until it has doubled.",
    "Work the bread dough by hand and leave it to prove until twice its size.",
    "The central bank raised interest rates by a quarter of a percentage point.",
    "Borrowing became dearer after policymakers lifted the key rate by 25 basis points.",
    "Her knee still hurts when she climbs stairs, six weeks after the operation.",
    "Six weeks after surgery, the patient reports knee pain on the stairs.",
    "The goalkeeper saved two penalties and the home side won the cup.",
    "Two spot kicks were stopped by the keeper, and the hosts lifted the trophy.",
    "A kernel that waits for memory gains nothing from a faster multiplier.",
    "Speeding up arithmetic does not help code that is limited by memory bandwidth.",
    "Water the tomatoes at the root, never on the leaves, or they will rot.",
    "Wet foliage makes tomato plants go bad, so pour the water on the soil.",
    "The judge dismissed the case because the key witness could not be found.",
    "With the main witness missing, the court threw the charges out.",
)


class Backend(Protocol):
    """Where `jitgen.gemm` runs: how arrays get there and back."""

    name: str
    gpu: Gpu

    def upload(self, array: npt.NDArray[Any]) -> Any: ...

    def download(self, tensor: Any) -> Array: ...

    def synchronize(self) -> None: ...


class InterpreterBackend:
    """NumPy arrays stay as they are: `jitgen.gemm` interprets."""

    name = "NumPy interpreter (no Hopper GPU with torch here)"
    gpu = H100

    def upload(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array

    def download(self, tensor: Array) -> Array:
        return tensor

    def synchronize(self) -> None:
        pass


class TorchCudaBackend:
    """CUDA tensors of torch: `jitgen.gemm` launches."""

    def __init__(self) -> None:
        import torch

        self.name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        self.gpu = driver.device(torch.cuda.current_device()).gpu

    def upload(self, array: npt.NDArray[Any]) -> Any:
        import torch

        if array.dtype.kind == "f":
            return torch.from_numpy(array).cuda()
        raw = torch.from_numpy(array.view(np.uint8))  # E4M3, which torch takes from NumPy as bytes
        return raw.cuda().view(getattr(torch, array.dtype.name))

    def download(self, tensor: Any) -> Array:
        array: Array = tensor.cpu().numpy()
        return array

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()


def choose_backend() -> Backend:
    """The GPU if torch sees one that jitgen compiles for, otherwise the interpreter."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if (
            torch.cuda.is_available()
            and torch.cuda.get_device_capability() == SM90A.compute_capability
        ):
            return TorchCudaBackend()
    return InterpreterBackend()


@dataclass(frozen=True, eq=False)
class _Fp8Weight:
    """A weight quantized in 128x128 blocks, and the layer's epilogue, on the backend."""

    q: Any
    scale: Any
    epilogue: Bound


class LinearFp8:
    """`linear` in FP8 on a backend; weights are quantized once, activations at every call."""

    def __init__(self, model: Model, backend: Backend) -> None:
        self._backend = backend
        self._weights = {
            dense: self._quantize_weight(dense)
            for layer in model.layers
            for dense in layer.dense_layers
        }
        self.gemm_seconds = 0.0

    def _quantize_weight(self, dense: Dense) -> _Fp8Weight:
        q, scale = jitgen.quantize(dense.weight, block=(128, 128))
        upload = self._backend.upload
        bound = dense.epilogue.bind(bias=upload(dense.bias))
        return _Fp8Weight(upload(q), upload(scale), bound)

    def __call__(self, x: Array, dense: Dense) -> Array:
        weight = self._weights[dense]
        q, scale = map(self._backend.upload, jitgen.quantize(x, block=(1, 128)))
        self._backend.synchronize()
        start = time.perf_counter()
        scales = (scale, weight.scale)
        y = jitgen.gemm(q, weight.q, scales, out_dtype="float32", epilogue=weight.epilogue)
        self._backend.synchronize()
        self.gemm_seconds += time.perf_counter() - start
        return self._backend.download(y)


@dataclass(frozen=True)
class CompileReport:
    """How many of the demo's kernels were compiled now or in the store already, and the time."""

    num_compiled: int
    num_cached: int
    seconds: float


def _compile_kernels(calls: Sequence[tuple[Gemm, int]], gpu: Gpu) -> CompileReport:
    """Compile what the (problem, m) of `calls` launch on `gpu`, which need not be there."""
    started = time.perf_counter()
    built = prebuild([(problem, select(problem, m, gpu)) for problem, m in calls])
    num_compiled = sum(kernel.compiled for kernel in built)
    return CompileReport(num_compiled, len(built) - num_compiled, time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Embeddings [sentences, hidden] of both runs, and what the FP8 run took."""

    fp32: Array
    fp8: Array
    calls: tuple[tuple[Gemm, int], ...]
    compiled: CompileReport
    gemm_seconds: float

    @property
    def cosines(self) -> Array:
        """Similarity of each sentence's FP8 embedding to its FP32 one."""
        cosines: Array = (self.fp32 * self.fp8).sum(axis=1)
        return cosines

    @property
    def num_tokens(self) -> int:
        return self.calls[0][1]


def nearest_other(embeddings: Array) -> npt.NDArray[np.intp]:
    """For each embedding the index of the other one that is most similar to it."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    nearest: npt.NDArray[np.intp] = similarity.argmax(axis=1)
    return nearest


def run_demo(console: Console, sentences: Sequence[str] = SENTENCES) -> DemoResult:
    """Embed `sentences` in FP32 and in FP8, and print how they compare and what the FP8 run took.

    Raises
    ------
    JitgenError : the model is not installed, or a kernel cannot be compiled, stored or run
    """
    model = load_model()
    backend = choose_backend()
    console.print("[bold]all-MiniLM-L6-v2: FP8 with jitgen against FP32 with NumPy[/]")
    console.print(f"machine  {platform.platform()}, Python {platform.python_version()}")
    console.print(f"backend  {backend.name}\n", highlight=False)

    calls: list[tuple[Gemm, int]] = []

    def recorded_fp32(x: Array, dense: Dense) -> Array:
        calls.append((dense.problem, len(x)))
        return linear_fp32(x, dense)

    with console.status("FP32 reference"):
        fp32 = encode(model, sentences, recorded_fp32)
    with console.status("compiling the kernels"):
        compiled = _compile_kernels(calls, backend.gpu)
    with console.status(f"FP8 on {backend.name}"):
        linear_fp8 = LinearFp8(model, backend)
        fp8 = encode(model, sentences, linear_fp8)
    result = DemoResult(fp32, fp8, tuple(calls), compiled, linear_fp8.gemm_seconds)
    _print_result(console, sentences, result)
    return result


def _print_result(console: Console, sentences: Sequence[str], result: DemoResult) -> None:
    table = Table()
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("sentence")
    table.add_column("cosine\nFP8, FP32", justify="right", no_wrap=True)
    table.add_column("nearest\nin FP8", justify="right", no_wrap=True)
    table.add_column("nearest\nin FP32", justify="right", no_wrap=True)
    nearest_fp32 = nearest_other(result.fp32)
    rows = zip(sentences, result.cosines, nearest_other(result.fp8), nearest_fp32, strict=True)
    for i, (sentence, cosine, fp8, fp32) in enumerate(rows):
        agreement = "same" if fp8 == fp32 else f"[yellow]#{fp32 + 1}[/]"
        similarity = float(result.fp8[i] @ result.fp8[fp8])
        colour = "green" if cosine >= MIN_COSINE else "red"
        table.add_row(
            str(i + 1),
            sentence,
            f"[{colour}]{cosine:.5f}[/]",
            f"#{fp8 + 1} ({similarity:.2f})",
            agreement,
        )
    console.print(table)
    compiled = result.compiled
    console.print(
        f"min cosine {result.cosines.min():.5f}, {result.num_tokens} tokens\n"
        f"{compiled.num_compiled} kernels compiled, {compiled.num_cached} already there,"
        f" {compiled.seconds:.2f} s\n"
        f"{len(result.calls)} GEMM calls, {result.gemm_seconds:.3f} s in GEMMs"
    )


def main() -> int:
    """Run the demo; 1 if an FP8 embedding is too far from its FP32 one."""
    console = Console()
    lowest = float(run_demo(console).cosines.min())
    if lowest < MIN_COSINE:
        console.print(f"[red]error:[/] cosine {lowest:.5f} is below {MIN_COSINE}")
        return 1
    return 0
