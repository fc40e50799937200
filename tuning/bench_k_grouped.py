"""Benchmarks of the K-grouped GEMM: weight gradients of experts, added up in float32.

Shapes are those of DeepGEMM's own test on Hopper, and those of the experts of some models where
8 to 64 GPUs share them, each GPU with 32768 rows of experts (4096 tokens of 8 experts). Peers are
what torch has, live in the same run; most of them do less, see their methods.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import VerifyError, one_line
from ..problem import K_UNIT, GroupedGemm, of_k_groups
from ..runtime import driver
from ..schedule import Schedule
from .bench import least_us, read_measurement
from .operands_k_grouped import KGroupedOperands, deal_k
from .peers import check_result
from .select import select
from .timing import Measurement, measure_kernel_us

NUM_ROWS = 32768  # of all experts of a GPU


@dataclass(frozen=True)
class KGroupedShape:
    """D [num_groups, m, n] += A [m, ks of each group] B [n, ks of each group]^T, FP8 to float32.

    expected : k of a group that the groups' are drawn around
    """

    num_groups: int
    m: int
    n: int
    expected: int

    def __str__(self) -> str:
        return f"k_grouped g{self.num_groups}-m{self.m}-n{self.n}-k{self.expected}"

    @property
    def problem(self) -> GroupedGemm:
        return of_k_groups(self.n, self.num_groups)

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of each group."""
        return deal_k(self.num_groups, self.expected)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * sum(self.ks)

    @property
    def num_bytes(self) -> int:
        """Bytes of A, B and their scales, each once, and of D read and written."""
        k = sum(self.ks)
        of_operands = (self.m + self.n) * (k + 4 * k // K_UNIT)
        return of_operands + 2 * 4 * self.num_groups * self.m * self.n

    @property
    def floor_us(self) -> float:
        """As `least_us`."""
        return least_us(self.num_bytes, self.flops)


def _of_experts(m: int, n: int, *num_groups: int) -> tuple[KGroupedShape, ...]:
    units = ((groups, round(NUM_ROWS / groups / K_UNIT)) for groups in num_groups)
    return tuple(KGroupedShape(groups, m, n, K_UNIT * unit) for groups, unit in units)


DEEPGEMM_SHAPES = (
    KGroupedShape(4, 4096, 7168, 8192),
    KGroupedShape(4, 7168, 2048, 8192),
    KGroupedShape(8, 4096, 7168, 4096),
    KGroupedShape(8, 7168, 2048, 4096),
)
# Gate and up, then down, of DeepSeek-V3, Kimi-K2 and Qwen3-235B-A22B.
K_GROUPED_SHAPES = (
    *DEEPGEMM_SHAPES,
    *_of_experts(4096, 7168, 16, 32),
    *_of_experts(7168, 2048, 16, 32),
    *_of_experts(4096, 7168, 6, 12, 24, 48),
    *_of_experts(7168, 2048, 6, 12, 24, 48),
    *_of_experts(3072, 4096, 2, 4, 8, 16),
    *_of_experts(4096, 1536, 2, 4, 8, 16),
)


@dataclass(frozen=True)
class KGroupedRow:
    """One shape, measured.

    peers : by name, those of PEERS that could be timed
    missing : why another was not
    """

    shape: KGroupedShape
    schedule: Schedule
    jitgen: Measurement
    peers: Mapping[str, Measurement]
    missing: Mapping[str, str]

    def us(self, name: str) -> float | None:
        """Kernel time of a peer, if it was timed."""
        return self.peers[name].kernel_us if name in self.peers else None

    def ratio(self, name: str) -> float | None:
        """A peer's time / jitgen's."""
        us = self.us(name)
        return us and us / self.jitgen.kernel_us

    def to_json(self) -> dict[str, Any]:
        """All fields, and figures derived of them, as JSON values."""
        us = self.jitgen.kernel_us
        derived = {
            "floor_us": self.shape.floor_us,
            "over_floor": us / self.shape.floor_us,
            "tflops": self.shape.flops / us / 1e6,
            "ratios": {name: self.ratio(name) for name in self.peers},
        }
        return asdict(self) | {"derived": derived}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KGroupedRow:
        """The row that `to_json` wrote; KeyError or TypeError if it did not."""
        return cls(
            KGroupedShape(**data["shape"]),
            Schedule(**data["schedule"]),
            read_measurement(data["jitgen"]),
            {name: read_measurement(times) for name, times in data["peers"].items()},
            data["missing"],
        )


# --- running --------------------------------------------------------------------------------------


def bench_k_grouped(
    shapes: Iterable[KGroupedShape], device: driver.Device
) -> Iterator[KGroupedRow]:
    """Each shape's row as it is measured, on torch's current GPU, which is `device`.

    Raises
    ------
    DeviceError : as `measure_kernel_us`
    VerifyError : a result is not the interpreter's; nothing is timed after that
    """
    for shape in shapes:
        schedule = select(shape.problem, shape.m, device.gpu)
        jitgen = measure(shape, schedule)
        peers, missing = _time_peers(shape)
        yield KGroupedRow(shape, schedule, jitgen, peers, missing)


def measure(shape: KGroupedShape, schedule: Schedule, device: str = "cuda") -> Measurement:
    """Kernel time of a call whose result was checked before; random data, quantized."""
    import torch

    d = torch.empty(shape.num_groups, shape.m, shape.n, device=device)
    operands = KGroupedOperands(shape.problem, shape.m, shape.ks, d)
    operands.check(schedule)
    return measure_kernel_us(lambda: operands.run(schedule))


# --- peers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a peer multiplies: random data, of which it takes the columns of each group.

    x [m, k], weight [n, k] : bfloat16, or E4M3, which count as they are
    ends : int32 [num_groups], where each group's columns end
    """

    shape: KGroupedShape
    x: Any
    weight: Any
    ends: Any

    def groups(self) -> Iterator[tuple[Any, Any]]:
        """The columns of each group."""
        for begin, end in itertools.pairwise([0, *itertools.accumulate(self.shape.ks)]):
            yield self.x[:, begin:end], self.weight[:, begin:end]

    def empty(self, dtype: Any) -> Any:
        """A new D, of zeros."""
        import torch

        shape = self.shape.num_groups, self.shape.m, self.shape.n
        return torch.zeros(shape, dtype=dtype, device=self.x.device)


def _mm(given: Inputs) -> Callable[[], Any]:
    import torch

    d = given.empty(torch.bfloat16)

    def call() -> Any:
        for of_group, (x, weight) in zip(d, given.groups(), strict=True):
            torch.mm(x, weight.t(), out=of_group)
        return d

    return call


def _addmm(given: Inputs) -> Callable[[], Any]:
    import torch

    d = given.empty(torch.float32)

    def call() -> Any:
        for of_group, (x, weight) in zip(d, given.groups(), strict=True):
            torch.addmm(of_group, x, weight.t(), out_dtype=torch.float32, out=of_group)
        return d

    return call


def _grouped_mm(given: Inputs) -> Callable[[], Any]:
    import torch

    return lambda: torch._grouped_mm(given.x, given.weight.t(), offs=given.ends)


def _scaled_mm(given: Inputs) -> Callable[[], Any]:
    import torch

    d, one = given.empty(torch.bfloat16), torch.ones((), device=given.x.device)

    def call() -> Any:
        for of_group, (x, weight) in zip(d, given.groups(), strict=True):
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
            torch._scaled_mm(x, weight.t(), one, one, **options, out=of_group)
        return d

    return call


def _scaled_grouped_mm(given: Inputs) -> Callable[[], Any]:
    import torch

    shape, device = given.shape, given.x.device
    of_x, of_weight = (torch.ones(shape.num_groups * r, device=device) for r in (shape.m, shape.n))
    options = {"offs": given.ends, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return lambda: torch._scaled_grouped_mm(given.x, given.weight.t(), of_x, of_weight, **options)


@dataclass(frozen=True)
class KGroupedPeer:
    """An implementation to compare with.

    title : its name for people
    method : what is timed
    is_fp8 : what it multiplies; bfloat16 otherwise
    prepare : a call on these inputs, which returns D [num_groups, m, n]
    """

    title: str
    method: str
    is_fp8: bool
    prepare: Callable[[Inputs], Callable[[], Any]]


PEERS: Mapping[str, KGroupedPeer] = {
    "addmm": KGroupedPeer(
        "BF16 addmm",
        "`torch.addmm` of each group in BF16, added to float32",
        False,
        _addmm,
    ),
    "mm": KGroupedPeer(
        "BF16 mm",
        "`torch.mm` of each group in BF16, D set in BF16",
        False,
        _mm,
    ),
    "grouped_mm": KGroupedPeer(
        "BF16 grouped_mm",
        "`torch._grouped_mm` in BF16, D set in BF16",
        False,
        _grouped_mm,
    ),
    "scaled_mm": KGroupedPeer(
        "FP8 scaled_mm",
        "`torch._scaled_mm` of each group in FP8 with one scale a tensor, use_fast_accum=True, D"
        " set in BF16",
        True,
        _scaled_mm,
    ),
    "scaled_grouped_mm": KGroupedPeer(
        "FP8 scaled_grouped_mm",
        "`torch._scaled_grouped_mm` in FP8 with one scale a row of each group, use_fast_accum=True,"
        " D set in BF16",
        True,
        _scaled_grouped_mm,
    ),
}


def make_inputs(shape: KGroupedShape, device: str, *, is_fp8: bool) -> Inputs:
    """Random normal data."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    k = sum(shape.ks)
    x, weight = (
        torch.randn(rows, k, dtype=torch.bfloat16, device=device, generator=generator).to(dtype)
        for rows in (shape.m, shape.n)
    )
    ends = torch.tensor([*itertools.accumulate(shape.ks)], dtype=torch.int32, device=device)
    return Inputs(shape, x, weight, ends)


def check_peer(d: Any, given: Inputs) -> None:
    """Raise VerifyError unless the first and the last group of D are their products in float64."""
    groups = list(given.groups())
    for i in {0, len(groups) - 1}:
        x, weight = (part.double() for part in groups[i])
        check_result(d[i], x @ weight.t())


def _time_peers(shape: KGroupedShape) -> tuple[dict[str, Measurement], dict[str, str]]:
    """The peers' times by name, and by title why there is none."""
    times: dict[str, Measurement] = {}
    missing: dict[str, str] = {}
    for is_fp8 in (False, True):
        given = make_inputs(shape, "cuda", is_fp8=is_fp8)
        for name, peer in PEERS.items():
            if peer.is_fp8 != is_fp8:
                continue
            try:
                call = peer.prepare(given)
                check_peer(call(), given)
                times[name] = measure_kernel_us(call)
            except (AttributeError, RuntimeError, TypeError, ValueError, VerifyError) as error:
                missing[peer.title] = f"{one_line(error):.300}"
    return times, missing
