"""Merging attention over two sets of keys: its problem, schedule, tile program and meaning.

    kernel ::= MergeKernel(problem, schedule, target, body)
    body   ::= ForRows(step, op*)
    op     ::= MergeRows(o, lse, o_a, lse_a, o_b, lse_b)

For each row, with natural logarithms, weights w = e^(lse - max) of the two results, 0 for one of
no keys (lse +inf, or -inf as other libraries have it), whose o is then not looked at:

    o = (w_a o_a + w_b o_b) / (w_a + w_b), rounded once; lse = max + log(w_a + w_b)

and o = 0, lse = +inf where both are of no keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, F16, F32, DType
from .errors import ProblemError, ScheduleError, VerifyError
from .ir import MlaTensor
from .ir_mla import MlaParameter
from .limits import require
from .target import SM90A, Target

UNIT = 8  # columns that a lane takes at a time: 16 bytes of a 16-bit o
MAX_WARPS = 16

Array = NDArray[Any]


@dataclass(frozen=True)
class MergeStates:
    """o [b, s_q, h_q, head_dim_v] of `dtype` and lse float32 [b, h_q, s_q], of two sets of keys."""

    head_dim_v: int = 512
    dtype: DType = BF16

    def __str__(self) -> str:
        return f"merge of attention {self.dtype} o[b, s_q, h_q, {self.head_dim_v}]"


@dataclass(frozen=True)
class MergeSchedule:
    """num_warps : of a thread block, each with a row of o."""

    num_warps: int = 8

    def __str__(self) -> str:
        return f"num_warps={self.num_warps}"


@dataclass(frozen=True)
class MergeRows:
    """`lanes` threads merge a row, `unit` columns each at a time."""

    tensors: tuple[MlaTensor, ...]  # o_a, lse_a, o_b, lse_b, o, lse
    lanes: int
    unit: int

    def __str__(self) -> str:
        o_a, lse_a, o_b, lse_b, o, lse = (tensor.name for tensor in self.tensors)
        return f"{o}, {lse} = merge(({o_a}, {lse_a}), ({o_b}, {lse_b}))[row]"


@dataclass(frozen=True)
class ForRows:
    """`op` for each of a block's `step` rows."""

    step: int
    op: MergeRows


@dataclass(frozen=True)
class NoSmem:
    """A kernel that uses no dynamic shared memory."""

    total_bytes: int = 0


@dataclass(frozen=True)
class MergeKernel:
    """A lowered kernel: what the interpreter runs, the template renders and the verifier checks."""

    name: str
    family: str
    problem: MergeStates
    schedule: MergeSchedule
    target: Target
    tensors: tuple[MlaTensor, ...]
    body: ForRows
    smem: NoSmem = NoSmem()

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.body.op.lanes * self.body.step

    @property
    def parameters(self) -> tuple[MlaParameter, ...]:
        """The kernel's arguments, in order."""
        pointers = []
        for tensor in self.tensors:
            const = "" if tensor.name in ("o", "lse") else "const "
            kind = "float" if tensor.dtype == F32.short else self.problem.dtype.cuda
            pointers.append(MlaParameter(tensor.name, f"{const}{kind}* {tensor.name}"))
        sizes = ("num_rows", "num_queries", "num_heads")
        return (*pointers, *(MlaParameter(name, f"u32 {name}") for name in sizes))

    def __str__(self) -> str:
        return "\n".join(
            (
                f"kernel {self.name}({', '.join(map(str, self.tensors))})",
                f"  schedule {self.schedule}",
                f"  for row of the block's {self.body.step}:",
                f"    {self.body.op}",
            )
        )


def check_merge(problem: MergeStates) -> None:
    """Raise ProblemError, naming the rule and what is legal, unless `problem` keeps all rules."""
    if problem.dtype not in (BF16, F16, F32):
        name = getattr(problem.dtype, "name", repr(problem.dtype))
        raise ProblemError(f"o has dtype {name}, must be {BF16.name}, {F16.name} or {F32.name}")
    columns = problem.head_dim_v
    if type(columns) is not int or columns <= 0 or columns % UNIT:
        raise ProblemError(f"head_dim_v = {columns!r} must be a positive multiple of {UNIT}")


def lower_merge(
    problem: MergeStates, schedule: MergeSchedule, target: Target = SM90A
) -> MergeKernel:
    """The tile program of `problem` under `schedule`.

    Raises
    ------
    ProblemError, ScheduleError : a rule is broken
    """
    check_merge(problem)
    warps = schedule.num_warps
    if type(warps) is not int or not 1 <= warps <= MAX_WARPS:
        raise ScheduleError(f"num_warps = {warps!r} must be in 1..{MAX_WARPS}")
    tensors = merge_tensors(problem)
    return MergeKernel(
        name=f"merge_states_{problem.dtype}_d{problem.head_dim_v}_w{warps}",
        family="merge_states",
        problem=problem,
        schedule=schedule,
        target=target,
        tensors=tensors,
        body=ForRows(warps, MergeRows(tensors, 32, UNIT)),
    )


def merge_tensors(problem: MergeStates) -> tuple[MlaTensor, ...]:
    """The tensors of `problem`, outputs last."""
    shape: tuple[int | str, ...] = ("b", "s_q", "h_q", problem.head_dim_v)
    return tuple(
        tensor
        for end in ("_a", "_b", "")
        for tensor in (
            MlaTensor(f"o{end}", problem.dtype.short, shape),
            MlaTensor(f"lse{end}", F32.short, ("b", "h_q", "s_q")),
        )
    )


def verify_merge(kernel: MergeKernel) -> None:
    """Raise VerifyError, naming the op and the rule, unless `kernel` is sound: every element of o
    and lse is written once, of both results."""
    try:
        check_merge(kernel.problem)
    except ProblemError as error:
        raise VerifyError(f"{kernel.name}: {error}") from error
    body, tensors = kernel.body, merge_tensors(kernel.problem)
    require(kernel.tensors == tensors, kernel.name, f"takes {kernel.tensors}, not {tensors}")
    require(body.op.tensors == tensors, body.op, "must merge the kernel's tensors")
    require(body.op.lanes == 32, body.op, "a row is a warp's, of 32 lanes")
    require(kernel.problem.head_dim_v % body.op.unit == 0, body.op, "a row must be whole units")
    require(body.step == kernel.schedule.num_warps, body.op, "a block has a row for each warp")


def interpret_merge(kernel: MergeKernel, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """(o, lse) of arrays by name: o_a, lse_a, o_b, lse_b; in float32, e^x and log to nearest."""
    lse = [np.where(np.isinf(arrays[f"lse_{i}"]), -np.inf, arrays[f"lse_{i}"]) for i in "ab"]
    top = np.maximum(*lse)
    base = np.where(top == -np.inf, 0, top)
    weights = [np.exp((x - base).astype(np.float64)).astype(np.float32) for x in lse]
    total = weights[0] + weights[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(total == 0, 0, np.float32(1) / total).astype(np.float32)
        merged = np.where(total == 0, np.inf, base + np.log(total)).astype(np.float32)
    o = np.zeros(arrays["o_a"].shape, np.float32)
    for i, weight in zip("ab", weights, strict=True):
        of_row = (weight * inverse).transpose(0, 2, 1)[..., None]
        values = arrays[f"o_{i}"].astype(np.float32)
        o += np.where(of_row == 0, 0, of_row * np.where(of_row == 0, 0, values))
    return o.astype(kernel.problem.dtype.numpy), merged


def merge_context(kernel: MergeKernel) -> dict[str, Any]:
    """The template's variables beside the kernel."""
    return {
        "dtype": kernel.problem.dtype.cuda,
        "parameters": [parameter.cuda for parameter in kernel.parameters],
        "constants": {
            "kDimV": kernel.problem.head_dim_v,
            "kWarps": kernel.body.step,
            "kUnit": kernel.body.op.unit,
        },
    }


def num_merge_blocks(kernel: MergeKernel, num_rows: int) -> int:
    """The grid of a launch."""
    return math.ceil(num_rows / kernel.body.step)
