"""Benchmarks of SwiGLU and requantization fused into the grouped GEMM of gate and up.

Beside it are the GEMM alone, with its plain BF16 result, and the unfused sequence: that GEMM, then
SwiGLU and quantization by torch, as separate kernels and as `torch.compile` fuses them (Triton).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..api import bind
from ..dtypes import E4M3
from ..errors import VerifyError, one_line
from ..expr import gate, silu, up
from ..numerics import AMAX_FLOOR, E4M3_MAX
from ..problem import D_SCALE, GroupedGemm
from ..runtime import driver
from ..schedule import Schedule
from .bench import read_measurement
from .bench_grouped import GroupedShape, deal, layout_of, make_tensors
from .select import select
from .timing import Measurement, measure_in_turns, measure_kernel_us

SWIGLU = silu(gate) * up
MAX_ERROR = 2.0**-4  # of a row's norm: E4M3 rounds to 4 bits, and two results are compared
# (groups, rows that a group is expected to have) of DeepSeek-V3's up projection.
FUSED_SHAPES = tuple(
    GroupedShape("ragged", deal(groups, rows, groups * rows, int), 4096, 7168, 0, rows)
    for groups, rows in ((8, 4096), (32, 192))
)


@dataclass(frozen=True)
class FusedRow:
    """One shape of gate and up rows, measured.

    schedules : of the plain GEMM and of the fused one
    plain, fused : the GEMM with a BF16 result; with SwiGLU and an E4M3 result with scales
    unfused : the sequences of kernels, by what runs SwiGLU and quantization
    missing : why a sequence was not measured
    """

    shape: GroupedShape
    schedules: tuple[Schedule, Schedule]
    plain: Measurement
    fused: Measurement
    unfused: Mapping[str, Measurement]
    missing: Mapping[str, str]

    @property
    def over_plain(self) -> float:
        """Time of the fused GEMM over the plain one's."""
        return self.fused.kernel_us / self.plain.kernel_us

    def ratio(self, name: str) -> float | None:
        """Time of an unfused sequence over that of the fused GEMM."""
        us = self.unfused_us(name)
        return us and us / self.fused.kernel_us

    def unfused_us(self, name: str) -> float | None:
        """Time of an unfused sequence, if it was measured."""
        return self.unfused[name].kernel_us if name in self.unfused else None

    def to_json(self) -> dict[str, Any]:
        """All fields, and figures derived of them, as JSON values."""
        ratios = {name: self.ratio(name) for name in self.unfused}
        return asdict(self) | {"derived": {"over_plain": self.over_plain, "ratios": ratios}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FusedRow:
        """The row that `to_json` wrote; KeyError or TypeError if it did not."""
        plain, fused = data["schedules"]
        return cls(
            GroupedShape.from_json(data["shape"]),
            (Schedule(**plain), Schedule(**fused)),
            read_measurement(data["plain"]),
            read_measurement(data["fused"]),
            {name: read_measurement(times) for name, times in data["unfused"].items()},
            data["missing"],
        )


def fused_problem(shape: GroupedShape) -> GroupedGemm:
    """The shape's problem with SwiGLU and an E4M3 result."""
    return replace(shape.problem, epilogue=SWIGLU, d_dtype=E4M3)


def bench_fused(shapes: Iterable[GroupedShape], device: driver.Device) -> Iterator[FusedRow]:
    """Each shape's row as it is measured, on torch's current GPU, which is `device`.

    Raises
    ------
    DeviceError : as `measure_kernel_us`
    VerifyError : the fused result is not near that of the sequence
    """
    for shape in shapes:
        problems = shape.problem, fused_problem(shape)
        plain, fused = (select(problem, shape.expected_rows, device.gpu) for problem in problems)
        yield _measure(shape, (plain, fused))


def _measure(shape: GroupedShape, schedules: tuple[Schedule, Schedule]) -> FusedRow:
    import torch

    tensors = make_tensors(shape, "cuda")
    rows, columns = shape.m, shape.n // 2
    d = torch.empty(rows, shape.n, dtype=torch.bfloat16, device="cuda")
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty(rows, columns // D_SCALE.k, device="cuda")
    operands = tensors["a"], tensors["b"], (tensors["sfa"], tensors["sfb"])
    layout = layout_of(shape, tensors["groups"])
    plain = bind(*operands, out=d, layout=layout, schedule=schedules[0])
    fused = bind(
        *operands,
        out=(quantized, scales),
        epilogue=SWIGLU,
        layout=layout,
        schedule=schedules[1],
    )
    plain()
    fused()
    _check(shape, swiglu_quantize(d), (quantized, scales))
    unfused: dict[str, Measurement] = {}
    missing: dict[str, str] = {}
    for name, activate in _activations(d, missing).items():

        def sequence(activate: Callable[[Any], Any] = activate) -> None:
            activate(plain())

        unfused[name] = measure_kernel_us(sequence)
    plain_time, fused_time = measure_in_turns([plain, fused])
    return FusedRow(shape, schedules, plain_time, fused_time, unfused, missing)


def swiglu_quantize(h: Any) -> tuple[Any, Any]:
    """silu(gate) * up of h bfloat16 [rows, gate | up], in E4M3 with a scale a 1x128 block."""
    import torch

    left, right = h.float().chunk(2, -1)
    blocks = (torch.nn.functional.silu(left) * right).unflatten(-1, (-1, D_SCALE.k))
    scale = blocks.abs().amax(-1).clamp_min(AMAX_FLOOR) / E4M3_MAX
    codes = (blocks / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scale


def _activations(h: Any, missing: dict[str, str]) -> dict[str, Callable[[Any], Any]]:
    """What runs SwiGLU and quantization of `h`, by name."""
    found: dict[str, Callable[[Any], Any]] = {"torch": swiglu_quantize}
    if importlib.util.find_spec("triton") is None:
        missing["torch.compile"] = "there is no Triton"
        return found
    compiled = _compiled()
    try:
        compiled(h)
    except Exception as error:  # Triton needs a C compiler, and more
        missing["torch.compile"] = f"{type(error).__name__}: {one_line(error)}"
    else:
        found["torch.compile"] = compiled
    return found


@functools.cache
def _compiled() -> Callable[[Any], Any]:
    import torch

    compiled: Callable[[Any], Any] = torch.compile(swiglu_quantize, dynamic=True)
    return compiled


def _check(shape: GroupedShape, expected: tuple[Any, Any], got: tuple[Any, Any]) -> None:
    """Raise VerifyError unless both say nearly the same."""
    import torch

    wide, other = (
        codes.float().unflatten(-1, (-1, D_SCALE.k)) * scale[..., None]
        for codes, scale in (expected, got)
    )
    error = torch.linalg.vector_norm(wide - other, dim=(1, 2))
    worst = float((error / torch.linalg.vector_norm(wide, dim=(1, 2)).clamp_min(1e-30)).max())
    if not worst <= MAX_ERROR:
        raise VerifyError(
            f"{shape}: the fused result differs from torch's by {worst:.3g} of a row's norm, at"
            f" most {MAX_ERROR:.3g} is rounding"
        )
