"""Benchmarks: what one call costs the GPU, beside its peers and the floor.

A time of jitgen is reported only for a call whose result was compared with the interpreter's, bit
for bit, just before; a peer's, as `peers.check_result` does. Ratios of times are peer / jitgen:
above 1, jitgen is faster.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..api import gemm
from ..api_quantize import quantize
from ..dtypes import E4M3, F32, DType
from ..errors import DeviceError, VerifyError, one_line
from ..interpret import interpret
from ..kernel import Kernel
from ..lower import lower
from ..problem import D_SCALE, Gemm
from ..runtime import driver
from ..schedule import Schedule
from .peers import PEERS, check_result
from .select import select
from .timing import Measurement, measure_kernel_us

DENSE_FILE = "h100_gemm_dense.json"
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


def least_us(num_bytes: int, flops: int) -> float:
    """The floor: no kernel that moves and computes so much runs much faster on an H100."""
    return max(num_bytes / FLOOR_BYTES_PER_US, flops / FLOOR_FLOPS_PER_US) + FLOOR_LAUNCH_US


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
    def flops_per_byte(self) -> float:
        return self.flops / self.num_bytes

    @property
    def floor_us(self) -> float:
        """As `least_us`."""
        return least_us(self.num_bytes, self.flops)


GRID_DENSE = tuple(Shape(m, n, k) for m in GRID_M for n, k in GRID_NK)
GRID_QUICK = tuple(Shape(m, n, k) for m in (1, 128, 4096) for n, k in (GRID_NK[0], GRID_NK[-1]))


@dataclass(frozen=True)
class Baseline:
    """Kernel times of the peers, measured once and kept in the repository."""

    deepgemm_us: float
    cublaslt_us: float


@dataclass(frozen=True)
class PeerTime:
    """A peer's measurement, in the configuration that was its fastest."""

    config: str
    measurement: Measurement


@dataclass(frozen=True)
class Row:
    """One shape, measured.

    peers : by name, those of `peers.PEERS` that could be timed
    missing : why a peer, or one of its configurations, was not timed, by its title
    baseline : None off the grid and on another GPU
    """

    shape: Shape
    schedule: Schedule
    jitgen: Measurement
    peers: Mapping[str, PeerTime]
    missing: Mapping[str, str]
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

    def us(self, name: str) -> float | None:
        """Kernel time of "jitgen", of a peer, of "deepgemm" (from the file), or of the "best" of
        DeepGEMM and cuBLASLt; None if it was not measured."""
        if name == "jitgen":
            return self.jitgen.kernel_us
        if name == "deepgemm":
            return self.baseline.deepgemm_us if self.baseline else None
        if name == "best":
            deepgemm, cublaslt = self.us("deepgemm"), self.us("cublaslt")
            return None if deepgemm is None or cublaslt is None else min(deepgemm, cublaslt)
        return self.peers[name].measurement.kernel_us if name in self.peers else None

    def ratio(self, name: str) -> float | None:
        """That time / jitgen's."""
        us = self.us(name)
        return None if us is None else us / self.jitgen.kernel_us

    def to_json(self) -> dict[str, Any]:
        """All fields, and figures derived of them, as JSON values."""
        derived = {
            "floor_us": self.shape.floor_us,
            "over_floor": self.over_floor,
            "tflops": self.tflops,
            "gb_per_s": self.gb_per_s,
            "num_kernels": self.jitgen.num_kernels,
            "ratios": {name: self.ratio(name) for name in ("deepgemm", *self.peers, "best")},
        }
        return asdict(self) | {"derived": derived}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """The row that `to_json` wrote; KeyError or TypeError if it did not."""
        peers = {
            name: PeerTime(peer["config"], read_measurement(peer["measurement"]))
            for name, peer in data["peers"].items()
        }
        return cls(
            Shape(**data["shape"]),
            Schedule(**data["schedule"]),
            read_measurement(data["jitgen"]),
            peers,
            data["missing"],
            Baseline(**data["baseline"]) if data["baseline"] else None,
        )


def read_measurement(data: Mapping[str, Any]) -> Measurement:
    """The measurement whose fields `data` holds; KeyError or TypeError if it does not."""
    return Measurement(**{**data, "kernels": tuple(data["kernels"])})


# --- baselines ------------------------------------------------------------------------------------


@functools.cache
def baseline_file(name: str) -> dict[str, Any]:
    """A file of peers' times that comes with jitgen, and is not to be changed."""
    file = resources.files("jitgen.tuning") / "baselines" / name
    data: dict[str, Any] = json.loads(file.read_text())
    return data


def baseline_meta() -> Mapping[str, Any]:
    """Where, when and how the baselines were measured; `gpu` as the driver names it."""
    meta: dict[str, Any] = baseline_file(DENSE_FILE)["meta"]
    return meta


def baseline_dense() -> Mapping[Shape, Baseline]:
    """The peers' kernel times on GRID_DENSE, on the GPU that `baseline_meta` names."""
    return {
        Shape(row["m"], row["n"], row["k"]): Baseline(row["deepgemm_us"], row["cublaslt_us"])
        for row in baseline_file(DENSE_FILE)["dense"]
    }


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
    n = kernel.problem.columns
    tiles = sorted(
        (row, column) for row, column in kernel.body.traversal.tiles(m, n) if row < m and column < n
    )
    chosen = random.Random(seed).sample(tiles, min(num_random, len(tiles)))
    return sorted({tiles[0], tiles[-1], *chosen})


def check_tiles(
    kernel: Kernel,
    tensors: Mapping[str, NDArray[Any]],
    d: NDArray[Any] | tuple[NDArray[Any], NDArray[Any]],
    tiles: Sequence[tuple[int, int]],
) -> None:
    """Raise VerifyError unless `d` has the interpreter's bits in the tiles with these origins.

    d : with its scales, if it has some
    """
    expected = interpret(kernel, tensors, tiles=tiles)
    parts = [("D", d, expected, 1)]  # the last: columns of D that make one of the part
    if isinstance(d, tuple):
        parts = [("D", d[0], expected[0], 1), ("scales of D", d[1], expected[1], D_SCALE.k)]
    traversal = kernel.body.traversal
    for (row, column), (name, got, want, width) in itertools.product(tiles, parts):
        columns = slice(column // width, (column + traversal.block_n) // width)
        tile = slice(row, row + traversal.block_m), columns
        word = np.dtype(f"u{got.dtype.itemsize}")
        wrong = np.argwhere(got[tile].view(word) != want[tile].view(word))
        if len(wrong):
            i, j = row + wrong[0][0], columns.start + wrong[0][1]
            raise VerifyError(
                f"{kernel.problem}, {kernel.schedule}: in the tile at [{row}, {column}] {name}"
                f" differs from the interpreter's in {len(wrong)} of {got[tile].size} elements; the"
                f" first, [{i}, {j}], is {got[i, j]}, must be {want[i, j]}"
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
    times, missing = _time_peers(x, weight)
    return Row(shape, schedule, jitgen, times, missing, baseline)


def _time_peers(x: Any, weight: Any) -> tuple[dict[str, PeerTime], dict[str, str]]:
    """The peers' times by name, and by title why there is none."""
    times: dict[str, PeerTime] = {}
    missing: dict[str, str] = {}
    for peer in PEERS:
        measured: dict[str, Measurement] = {}
        try:
            prepared = peer.prepare(x, weight)
        except DeviceError as error:
            missing[peer.title] = one_line(error)
            continue
        for config, call in prepared.calls.items():
            try:
                check_result(call(), prepared.reference)
                measured[config] = measure_kernel_us(call)
            except (RuntimeError, ValueError, VerifyError) as error:  # torch's are of two kinds
                missing[f"{peer.title} {config}".strip()] = f"{one_line(error):.300}"
        if measured:
            fastest = min(measured, key=lambda config: measured[config].kernel_us)
            times[peer.name] = PeerTime(fastest, measured[fastest])
    return times, missing


def to_numpy(tensor: Any, dtype: DType) -> NDArray[Any]:
    """A torch tensor, copied to the host; bfloat16 and FP8 as ml_dtypes has them."""
    import torch

    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.size_bytes]
    array: NDArray[Any] = tensor.cpu().view(words).numpy().view(dtype.numpy)
    return array
