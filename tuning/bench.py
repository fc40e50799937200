"""Benchmarks: what one call costs the GPU, beside its peers and the floor.

A time is reported only for a call whose result was compared with the interpreter's, bit for bit,
just before. Ratios of times are peer / jitgen: above 1, jitgen is faster.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..api import gemm, quantize
from ..dtypes import E4M3, F32, DType
from ..errors import DeviceError, VerifyError
from ..interpret import interpret
from ..ir import Kernel
from ..lower import lower
from ..problem import Gemm
from ..runtime import driver
from ..schedule import Schedule
from .select import select

GRID_M = (1, 16, 64, 128, 256, 512, 4096)
# (n, k) of DeepSeek-V3's linear layers.
GRID_NK = (
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)

# The floor: HBM reads and promoted FP8 wgmma, both as measured on an H100, and what a launch costs.
FLOOR_BYTES_PER_US = 3.0e6
FLOOR_FLOPS_PER_US = 1575e6
FLOOR_LAUNCH_US = 2.0

NUM_CALLS = 12
NUM_WARMUP_CALLS = 20
NUM_PROFILES = 3  # attempts: CUPTI may lose a record
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any Hopper GPU


@dataclass(frozen=True)
class Shape:
    """Extents of one GEMM: FP8 A [m, k] and B [n, k], BF16 D [m, n]."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"m{self.m}-n{self.n}-k{self.k}"

    @property
    def problem(self) -> Gemm:
        return Gemm(self.n, self.k)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def num_bytes(self) -> int:
        """Bytes of A, B, D and both scales, each once."""
        k_blocks = -(-self.k // 128)
        scales = 4 * k_blocks * (self.m + -(-self.n // 128))
        return self.m * self.k + self.n * self.k + 2 * self.m * self.n + scales

    @property
    def floor_us(self) -> float:
        """No kernel runs much faster than this on an H100."""
        memory, compute = self.num_bytes / FLOOR_BYTES_PER_US, self.flops / FLOOR_FLOPS_PER_US
        return max(memory, compute) + FLOOR_LAUNCH_US


GRID_DENSE = tuple(Shape(m, n, k) for m in GRID_M for n, k in GRID_NK)
GRID_QUICK = tuple(Shape(m, n, k) for m in (1, 128, 4096) for n, k in (GRID_NK[0], GRID_NK[-1]))


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
class Baseline:
    """Kernel times of the peers, measured once and kept in the repository."""

    deepgemm_us: float
    cublaslt_us: float


@dataclass(frozen=True)
class Row:
    """One shape, measured; `baseline` is None off the grid and on another GPU."""

    shape: Shape
    schedule: Schedule
    jitgen: Measurement
    cublaslt: Measurement
    baseline: Baseline | None

    @property
    def over_floor(self) -> float:
        return self.jitgen.kernel_us / self.shape.floor_us

    @property
    def tflops(self) -> float:
        return self.shape.flops / self.jitgen.kernel_us / 1e6

    @property
    def gb_per_s(self) -> float:
        return self.shape.num_bytes / self.jitgen.kernel_us / 1e3

    @property
    def vs_cublaslt(self) -> float:
        return self.cublaslt.kernel_us / self.jitgen.kernel_us

    @property
    def vs_deepgemm(self) -> float | None:
        return self.baseline.deepgemm_us / self.jitgen.kernel_us if self.baseline else None


# --- baselines ------------------------------------------------------------------------------------


@functools.cache
def _baseline_file() -> dict[str, Any]:
    file = resources.files("jitgen.tuning") / "baselines" / "h100_gemm_dense.json"
    data: dict[str, Any] = json.loads(file.read_text())
    return data


def baseline_meta() -> Mapping[str, Any]:
    """Where, when and how the baselines were measured; `gpu` as the driver names it."""
    meta: dict[str, Any] = _baseline_file()["meta"]
    return meta


def baseline_dense() -> Mapping[Shape, Baseline]:
    """The peers' kernel times on GRID_DENSE, on the GPU that `baseline_meta` names."""
    return {
        Shape(row["m"], row["n"], row["k"]): Baseline(row["deepgemm_us"], row["cublaslt_us"])
        for row in _baseline_file()["dense"]
    }


# --- timing ---------------------------------------------------------------------------------------


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
    import torch

    flush = _flush_buffer(torch.cuda.current_device())
    for _ in range(warmup_calls):
        flush.fill_(1)
        call()
    for _ in range(NUM_PROFILES - 1):
        with contextlib.suppress(DeviceError):
            return summarize_calls(profile_calls([call] * calls))
    return summarize_calls(profile_calls([call] * calls))


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


# --- checking -------------------------------------------------------------------------------------


def check_sample(
    kernel: Kernel,
    tensors: Mapping[str, NDArray[Any]],
    d: NDArray[Any],
    *,
    num_random: int = 2,
    seed: int = 0,
) -> None:
    """Raise VerifyError unless `d` has no NaN and the interpreter's bits in a sample of tiles.

    Parameters
    ----------
    kernel : what made d; its epilogue must be exact (`jitgen.expr.is_exact`)
    tensors : its inputs, as for `interpret`
    d : its result, from a buffer that held NaN before
    num_random : tiles beside the first and the last one
    """
    if unwritten := int(np.isnan(d).sum()):
        raise VerifyError(f"{kernel.problem}, {kernel.schedule}: {unwritten} elements of D are NaN")
    check_tiles(kernel, tensors, d, sample_tiles(kernel, d.shape[0], num_random, seed))


def sample_tiles(kernel: Kernel, m: int, num_random: int, seed: int = 0) -> list[tuple[int, int]]:
    """Origins of the first and the last tile of D [m, n], and of some others."""
    n = kernel.problem.n
    tiles = sorted(
        (row, column) for row, column in kernel.body.traversal.tiles(m, n) if row < m and column < n
    )
    chosen = random.Random(seed).sample(tiles, min(num_random, len(tiles)))
    return sorted({tiles[0], tiles[-1], *chosen})


def check_tiles(
    kernel: Kernel,
    tensors: Mapping[str, NDArray[Any]],
    d: NDArray[Any],
    tiles: Sequence[tuple[int, int]],
) -> None:
    """Raise VerifyError unless `d` has the interpreter's bits in the tiles with these origins."""
    expected = interpret(kernel, tensors, tiles=tiles)
    word = np.dtype(f"u{d.dtype.itemsize}")
    for row, column in tiles:
        traversal = kernel.body.traversal
        tile = slice(row, row + traversal.block_m), slice(column, column + traversal.block_n)
        wrong = np.argwhere(d[tile].view(word) != expected[tile].view(word))
        if len(wrong):
            i, j = row + wrong[0][0], column + wrong[0][1]
            raise VerifyError(
                f"{kernel.problem}, {kernel.schedule}: the tile at [{row}, {column}] differs from"
                f" the interpreter's in {len(wrong)} of {d[tile].size} elements; the first,"
                f" [{i}, {j}], is {d[i, j]}, must be {expected[i, j]}"
            )


# --- running --------------------------------------------------------------------------------------


def check_machine() -> driver.Device:
    """The GPU that torch uses.

    Raises
    ------
    DeviceError : torch is missing or sees no GPU, or the GPU cannot run the kernels
    """
    try:
        import torch
    except ImportError:
        raise DeviceError("a benchmark needs torch: pip install 'jitgen[bench]'") from None
    if not torch.cuda.is_available():
        raise DeviceError(
            "a benchmark needs a Hopper GPU and a torch that sees it, torch"
            f" {torch.__version__} sees none: `jitgen doctor` tells more"
        )
    found = driver.device(torch.cuda.current_device())
    driver.check_architecture(found)
    return found


def bench_gemm(shapes: Iterable[Shape], device: driver.Device) -> Iterator[Row]:
    """Each shape's row as it is measured, on torch's current GPU, which is `device`.

    Raises
    ------
    DeviceError : as `measure_kernel_us`
    VerifyError : a result is not the interpreter's; nothing is timed after that
    """
    baselines = baseline_dense() if device.name == baseline_meta()["gpu"] else {}
    for shape in shapes:
        schedule = select(shape.problem, shape.m, device.gpu)
        yield _bench_shape(shape, schedule, baselines.get(shape))


def _bench_shape(
    shape: Shape, schedule: Schedule, baseline: Baseline | None, device: str = "cuda"
) -> Row:
    import torch

    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.m, shape.k, device=device, generator=generator)
    weight = torch.randn(shape.n, shape.k, device=device, generator=generator)
    (a, sfa), (b, sfb) = quantize(x), quantize(weight, (128, 128))
    d = torch.full((shape.m, shape.n), math.nan, dtype=torch.bfloat16, device=device)

    def call() -> None:
        gemm(a, b, (sfa, sfb), out=d, schedule=schedule)

    call()
    tensors = {"a": to_numpy(a, E4M3), "b": to_numpy(b, E4M3)}
    tensors |= {"sfa": to_numpy(sfa, F32), "sfb": to_numpy(sfb, F32)}
    kernel = lower(shape.problem, schedule)
    check_sample(kernel, tensors, to_numpy(d, kernel.problem.d_dtype))
    checked = d.clone()
    jitgen = measure_kernel_us(call)
    if not torch.equal(d.view(torch.int16), checked.view(torch.int16)):
        raise VerifyError(f"{kernel.problem}, {schedule}: repeated calls give different results")
    cublaslt = measure_kernel_us(_cublaslt_call(x, weight))
    return Row(shape, schedule, jitgen, cublaslt, baseline)


def _cublaslt_call(x: Any, weight: Any) -> Callable[[], object]:
    """x @ weight^T in FP8 with one scale a tensor, to BF16."""
    import torch

    (a, scale_a), (b, scale_b) = (quantize(matrix, tuple(matrix.shape)) for matrix in (x, weight))
    scale_a, scale_b = scale_a.reshape(()), scale_b.reshape(())
    return functools.partial(
        torch._scaled_mm, a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def to_numpy(tensor: Any, dtype: DType) -> NDArray[Any]:
    """A torch tensor, copied to the host; bfloat16 and FP8 as ml_dtypes has them."""
    import torch

    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.size_bytes]
    array: NDArray[Any] = tensor.cpu().view(words).numpy().view(dtype.numpy)
    return array
