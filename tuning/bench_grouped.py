"""Benchmarks of the grouped GEMM: DeepGEMM's contiguous and masked shapes, and ragged rows.

As in `bench`, a time is reported only for a call whose result was compared with the interpreter's.
A contiguous shape is measured twice: with the padding to 128 rows that DeepGEMM takes, and `ragged`
with the same tokens and no padding. Ratios are DeepGEMM / jitgen, for the same tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..api import bind
from ..api_quantize import quantize
from ..dtypes import E4M3, F32
from ..errors import VerifyError
from ..groups import expected_rows
from ..layouts import Contiguous, GroupLayout, Masked, Ragged
from ..lower import lower
from ..problem import GroupedGemm, Layout
from ..runtime import driver
from ..schedule import Schedule
from .bench import (
    Shape,
    baseline_file,
    baseline_meta,
    bench_gemm,
    check_tiles,
    least_us,
    read_measurement,
    to_numpy,
)
from .operands import make_weights
from .select import select
from .timing import Measurement, measure_kernel_us

GROUPED_FILE = "h100_gemm_grouped.json"
PADDING = 128  # rows of which DeepGEMM wants a multiple in every contiguous group
CONTIGUOUS: tuple[Layout, ...] = ("group_of_row", "ragged")
NUM_TILES = 3  # that are compared with the interpreter
CHECK = Schedule(64, 64, 2, 1)  # of which size they are: no schedule of groups changes a bit


@dataclass(frozen=True)
class GroupedShape:
    """Extents of a grouped GEMM: FP8 A and B [num_groups, n, k], BF16 D.

    layout : "group_of_row" is padded to PADDING rows, with -1 for the padding
    counts : rows of each group
    max_m : of each group's part of A, if masked; else 0
    expected : rows of a group that the counts were drawn around
    """

    layout: Layout
    counts: tuple[int, ...]
    n: int
    k: int
    max_m: int
    expected: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GroupedShape:
        """The shape whose fields `data` holds; KeyError or TypeError if it does not."""
        return cls(**{**data, "counts": tuple(data["counts"])})

    def __str__(self) -> str:
        return f"{self.layout} g{len(self.counts)}-m{self.expected}-n{self.n}-k{self.k}"

    @property
    def problem(self) -> GroupedGemm:
        return GroupedGemm(self.n, self.k, num_groups=len(self.counts), layout=self.layout)

    @property
    def m(self) -> int:
        """Rows of A, or of each group's part of it."""
        if self.layout == "masked":
            return self.max_m
        return sum(map(padded, self.counts)) if self.layout == "group_of_row" else self.num_rows

    @property
    def num_rows(self) -> int:
        """Rows that are computed."""
        return sum(self.counts)

    @property
    def expected_rows(self) -> int:
        """Rows that the schedule is chosen for."""
        return expected_rows(self.problem, self.m, self.expected)

    @property
    def flops(self) -> int:
        return 2 * self.num_rows * self.n * self.k

    @property
    def num_bytes(self) -> int:
        """Bytes of the groups' rows of A and D, of B where a group has rows, and of the scales."""
        k_blocks = -(-self.k // 128)
        active = sum(count > 0 for count in self.counts)
        of_b = active * (self.n * self.k + 4 * k_blocks * -(-self.n // 128))
        return of_b + self.num_rows * (self.k + 4 * k_blocks + 2 * self.n)

    @property
    def floor_us(self) -> float:
        """As `least_us`."""
        return least_us(self.num_bytes, self.flops)


@dataclass(frozen=True)
class GroupedRow:
    """One shape, measured; deepgemm_us is None on another GPU than the file's."""

    shape: GroupedShape
    schedule: Schedule
    jitgen: Measurement
    deepgemm_us: float | None

    @property
    def ratio(self) -> float | None:
        """DeepGEMM / jitgen."""
        return self.deepgemm_us and self.deepgemm_us / self.jitgen.kernel_us

    def to_json(self) -> dict[str, Any]:
        """All fields, and figures derived of them, as JSON values."""
        us = self.jitgen.kernel_us
        derived = {
            "floor_us": self.shape.floor_us,
            "over_floor": us / self.shape.floor_us,
            "tflops": self.shape.flops / us / 1e6,
            "gb_per_s": self.shape.num_bytes / us / 1e3,
            "ratio": self.ratio,
        }
        return asdict(self) | {"derived": derived}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GroupedRow:
        """The row that `to_json` wrote; KeyError or TypeError if it did not."""
        return cls(
            GroupedShape.from_json(data["shape"]),
            Schedule(**data["schedule"]),
            read_measurement(data["jitgen"]),
            data["deepgemm_us"],
        )


def padded(count: int) -> int:
    """`count` rows and the padding that DeepGEMM wants behind them."""
    return -(-count // PADDING) * PADDING


# --- baselines ------------------------------------------------------------------------------------


def grid_grouped() -> Mapping[GroupedShape, float]:
    """The shapes of the baselines with DeepGEMM's times, contiguous ones as they are and ragged."""
    grid: dict[GroupedShape, float] = {}
    for row in baseline_file(GROUPED_FILE)["contiguous"]:
        counts = deal(row["groups"], row["expected"], row["rows"], padded)
        for layout in CONTIGUOUS:
            shape = GroupedShape(layout, counts, row["n"], row["k"], 0, row["expected"])
            grid[shape] = row["deepgemm_us"]
    for row in baseline_file(GROUPED_FILE)["masked"]:
        counts = deal(row["groups"], row["expected"], row["rows"], int, row["max_m"])
        shape = GroupedShape("masked", counts, row["n"], row["k"], row["max_m"], row["expected"])
        grid[shape] = row["deepgemm_us"]
    return grid


def deal(
    num_groups: int,
    expected: int,
    total: int,
    size: Callable[[int], int],
    most: int = 2**31,
) -> tuple[int, ...]:
    """Rows of each group, around `expected`, whose sizes by `size` add up to `total`.

    Drawn as the baselines' were, uniformly from 0.7 to 1.3 of what is expected, then moved towards
    the total, one group after the other; always the same.
    """
    rng = random.Random(f"{num_groups} {expected} {total}")
    counts = [min(max(round(expected * rng.uniform(0.7, 1.3)), 1), most) for _ in range(num_groups)]
    step = -(-size(1) // 8)  # small beside what sizes differ by
    while missing := total - sum(map(size, counts)):
        i = rng.randrange(num_groups)
        counts[i] = min(max(counts[i] + (step if missing > 0 else -step), 1), most)
    return tuple(counts)


# --- running --------------------------------------------------------------------------------------


def bench_grouped(shapes: Iterable[GroupedShape], device: driver.Device) -> Iterator[GroupedRow]:
    """Each shape's row as it is measured, on torch's current GPU, which is `device`.

    Raises
    ------
    DeviceError : as `measure_kernel_us`
    VerifyError : a result is not the interpreter's; nothing is timed after that
    """
    baselines = grid_grouped() if device.name == baseline_meta()["gpu"] else {}
    for shape in shapes:
        schedule = select(shape.problem, shape.expected_rows, device.gpu)
        yield GroupedRow(shape, schedule, measure(shape, schedule), baselines.get(shape))


def live_over_baseline(device: driver.Device) -> float | None:
    """cuBLASLt's time for one dense GEMM over that in the file; None on another GPU."""
    shape = Shape(4096, 7168, 2048)
    (row,) = bench_gemm([shape], device)
    live = row.us("cublaslt")
    return live / row.baseline.cublaslt_us if row.baseline and live is not None else None


def measure(shape: GroupedShape, schedule: Schedule, device: str = "cuda") -> Measurement:
    """Kernel time of a call whose result was checked before; random data, quantized."""
    import torch

    tensors = make_tensors(shape, device)
    outer = tensors["a"].shape[:-1]
    d = torch.full((*outer, shape.n), math.nan, dtype=torch.bfloat16, device=device)
    call = bind(
        tensors["a"],
        tensors["b"],
        (tensors["sfa"], tensors["sfb"]),
        out=d,
        layout=layout_of(shape, tensors["groups"]),
        schedule=schedule,
    )
    call()
    check(shape, tensors, d)
    return measure_kernel_us(call)


def make_tensors(shape: GroupedShape, device: str) -> dict[str, Any]:
    """a, sfa, b, sfb and groups."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    groups = len(shape.counts)
    outer = (groups, shape.m) if shape.layout == "masked" else (shape.m,)
    a, sfa = quantize(torch.randn(math.prod(outer), shape.k, device=device, generator=generator))
    b, sfb = make_weights(groups, shape.n, shape.k, device)
    values = torch.tensor(_values(shape), dtype=torch.int32, device=device)
    return {
        "a": a.view(*outer, shape.k),
        "sfa": sfa.view(*outer, -1),
        "b": b,
        "sfb": sfb,
        "groups": values,
    }


def _values(shape: GroupedShape) -> Sequence[int]:
    """What the layout's tensor holds."""
    if shape.layout == "masked":
        return shape.counts
    if shape.layout == "ragged":
        return [begin for begin, _ in _begins(shape)] + [shape.num_rows]
    return [
        group if row < count else -1
        for group, count in enumerate(shape.counts)
        for row in range(padded(count))
    ]


def _begins(shape: GroupedShape) -> list[tuple[int, int]]:
    """The first row of each group in A, and its rows."""
    size = padded if shape.layout == "group_of_row" else int
    begins, begin = [], 0
    for count in shape.counts:
        begins.append((begin, count))
        begin += shape.m if shape.layout == "masked" else size(count)
    return begins


def layout_of(shape: GroupedShape, groups: Any) -> GroupLayout:
    """The layout that holds the tensor `groups`."""
    if shape.layout == "masked":
        return Masked(groups, expected_rows=shape.expected)
    return Ragged(groups) if shape.layout == "ragged" else Contiguous(group_of_row=groups)


def check(shape: GroupedShape, tensors: Mapping[str, Any], d: Any) -> None:
    """Raise VerifyError unless the groups' rows of D, and no others, are written, and some tiles of
    them are those that the interpreter computes of the group's rows alone."""
    import torch

    rows = d.view(-1, shape.n)
    written = ~torch.isnan(rows).any(1)
    expected = torch.zeros_like(written)
    for begin, count in _begins(shape):
        expected[begin : begin + count] = True
    if not torch.equal(written, expected):
        raise VerifyError(f"{shape}: other rows than those of groups are written")
    a, sfa = tensors["a"].view(-1, shape.k), tensors["sfa"].flatten(0, -2)
    kernel = lower(shape.problem.of_one_group, CHECK)
    rng = random.Random(0)
    for _ in range(NUM_TILES):
        group = rng.choice([i for i, count in enumerate(shape.counts) if count])
        begin, count = _begins(shape)[group]
        row = begin + rng.randrange(count)
        tile = slice(row, min(row + CHECK.block_m, begin + count))
        column = rng.randrange(0, shape.n, CHECK.block_n)
        host = {"a": to_numpy(a[tile], E4M3), "sfa": to_numpy(sfa[tile], F32)}
        host |= {
            "b": to_numpy(tensors["b"][group], E4M3),
            "sfb": to_numpy(tensors["sfb"][group], F32),
        }
        check_tiles(kernel, host, to_numpy(rows[tile], shape.problem.d_dtype), [(0, column)])
