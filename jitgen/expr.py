"""Epilogue expressions: what happens to an accumulator on its way to memory.

An expression is built once from `acc`, operands and functions; the interpreter evaluates it and the
code generator renders it. Every node is a float32 value; each operation rounds once, to nearest
even.

    y = silu(acc + vector("bias")) + matrix("residual")
    d = jitgen.gemm(a, b, scales, epilogue=y.bind(bias=bias, residual=residual))
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dtypes import ALL, BF16, F32, DType, dtype_of
from .errors import ProblemError

# Operations by name: number of arguments, and by how many units in the last place of its float32
# result the GPU's function may differ from the interpreter's (0: equal bits), beside 2^-121
# absolutely. The bounds behind them, of expf (2) and erfcf (4), are those of the CUDA C++
# Programming Guide, "Mathematical Functions Appendix", and of rcp.approx (1) that of the PTX ISA.
# silu adds the roundings of two additions, of a multiplication, and of the interpreter's exp and
# division, gelu those of its erfc and a multiplication; a unit at the bottom of a binade is two at
# its top. The absolute part covers silu where expf overflows on one side only
# (near x = -88.72, where silu is 3e-37) and gelu where erfc is subnormal.
OPERATIONS: dict[str, tuple[int, int]] = {
    "add": (2, 0),
    "sub": (2, 0),
    "mul": (2, 0),
    "maximum": (2, 0),
    "relu": (1, 0),
    "silu": (1, 11),
    "gelu": (1, 11),
}


OPERAND_AXES = ((), ("n",), ("m",), ("m", "n"))


@dataclass(frozen=True)
class Expr:
    """A node of an epilogue expression."""

    def __add__(self, other: Expr | float) -> Expr:
        return Apply("add", (self, as_expr(other)))

    def __radd__(self, other: float) -> Expr:
        return Apply("add", (as_expr(other), self))

    def __sub__(self, other: Expr | float) -> Expr:
        return Apply("sub", (self, as_expr(other)))

    def __rsub__(self, other: float) -> Expr:
        return Apply("sub", (as_expr(other), self))

    def __mul__(self, other: Expr | float) -> Expr:
        return Apply("mul", (self, as_expr(other)))

    def __rmul__(self, other: float) -> Expr:
        return Apply("mul", (as_expr(other), self))

    def bind(self, /, **tensors: Any) -> Bound:
        """This expression with a tensor for each of its operands, for `gemm(epilogue=...)`."""
        return Bound(self, tensors)


@dataclass(frozen=True)
class Accumulator(Expr):
    """The promoted float32 accumulator."""

    def __str__(self) -> str:
        return "acc"


@dataclass(frozen=True)
class Half(Expr):
    """The promoted accumulator of one half of B's rows: D has half as many columns as B has rows.

    Column c of `gate` is that of row c of B, column c of `up` that of row n / 2 + c: both weights
    stacked, as torch.cat((gate_proj, up_proj)) does it.
    """

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Constant(Expr):
    """A float32 constant; equal only to one of the same bits, so that 0.0 is not -0.0."""

    value: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._bits == other._bits

    def __hash__(self) -> int:
        return hash(self._bits)

    @property
    def _bits(self) -> bytes:
        return struct.pack("<d", self.value)

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Operand(Expr):
    """A tensor read by the epilogue: `axes` names the output axes that it spans, in order."""

    name: str
    dtype: DType
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.axes)}]"


@dataclass(frozen=True)
class Apply(Expr):
    """An operation of OPERATIONS on its arguments."""

    op: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})"


@dataclass(frozen=True)
class Cast(Expr):
    """Rounding to `dtype` and back to float32."""

    dtype: DType
    arg: Expr

    def __str__(self) -> str:
        return f"cast({self.arg}, {self.dtype})"


@dataclass(frozen=True)
class Bound:
    """An expression and the tensors of its operands, by name."""

    expr: Expr
    tensors: Mapping[str, Any]


acc = Accumulator()
gate, up = Half("gate"), Half("up")


def vector(name: str, dtype: object = BF16) -> Expr:
    """An operand [n]: one value per output column, such as a bias. dtype: bfloat16 or float32."""
    return Operand(name, dtype_of(dtype), ("n",))


def matrix(name: str, dtype: object = BF16) -> Expr:
    """An operand [m, n], row-major: one value per output element, such as a residual."""
    return Operand(name, dtype_of(dtype), ("m", "n"))


def per_row(name: str, dtype: object = F32) -> Expr:
    """An operand [m]: one value per output row, such as a token's routing weight."""
    return Operand(name, dtype_of(dtype), ("m",))


def scalar(name: str) -> Expr:
    """A float32 operand of one element, read on the device."""
    return Operand(name, F32, ())


def relu(x: Expr) -> Expr:
    """max(x, 0); NaN stays NaN."""
    return Apply("relu", (as_expr(x),))


def silu(x: Expr) -> Expr:
    """x / (1 + exp(-x))."""
    return Apply("silu", (as_expr(x),))


def gelu(x: Expr) -> Expr:
    """0.5 * x * erfc(-x / sqrt(2)): the exact GELU, not its tanh approximation."""
    return Apply("gelu", (as_expr(x),))


def maximum(x: Expr, y: Expr | float) -> Expr:
    """The larger of both; NaN if either is NaN."""
    return Apply("maximum", (as_expr(x), as_expr(y)))


def cast(x: Expr, dtype: object) -> Expr:
    """x rounded to `dtype` (bfloat16 or float32), to nearest even."""
    return Cast(dtype_of(dtype), as_expr(x))


def as_expr(value: Expr | float) -> Expr:
    """`value` as an expression; numbers are rounded to float32."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, (int, float, np.floating)):
        with contextlib.suppress(OverflowError), np.errstate(over="ignore"):
            rounded = float(np.float32(value))
            if math.isfinite(rounded):
                return Constant(rounded)
    raise ProblemError(f"an epilogue takes expressions and finite float32 numbers, got {value!r}")


def walk(expr: Expr) -> Iterator[Expr]:
    """Every node of `expr`, arguments before the node that uses them."""
    children: tuple[object, ...] = ()
    if isinstance(expr, Apply):
        children = expr.args
    elif isinstance(expr, Cast):
        children = (expr.arg,)
    for child in children:
        if not isinstance(child, Expr):
            raise ProblemError(f"epilogue node {type(expr).__name__} has an argument {child!r}")
        yield from walk(child)
    yield expr


def operands(expr: Expr) -> tuple[Operand, ...]:
    """The operands of `expr`, each once, in order of first use."""
    return tuple(dict.fromkeys(node for node in walk(expr) if isinstance(node, Operand)))


def is_gated(expr: Expr) -> bool:
    """Whether the expression is one of `gate` and `up`."""
    return any(isinstance(node, Half) for node in walk(expr))


def is_exact(expr: Expr) -> bool:
    """Whether the GPU's result must equal the interpreter's bit for bit."""
    return all(OPERATIONS[node.op][1] == 0 for node in walk(expr) if isinstance(node, Apply))


def check_expr(expr: object) -> None:
    """Raise ProblemError unless `expr` is a well-formed epilogue expression."""
    if not isinstance(expr, Expr):
        raise ProblemError(
            f"epilogue must be an expression of jitgen.acc, got {type(expr).__name__}"
        )
    seen: dict[str, Operand] = {}
    if is_gated(expr) and any(isinstance(node, Accumulator) for node in walk(expr)):
        raise ProblemError("an epilogue takes either acc, or gate and up")
    for node in walk(expr):
        match node:
            case Apply():
                _check_operation(node)
            case Operand():
                _check_operand(node, seen)
            case Cast():
                if node.dtype not in (BF16, F32):
                    got = getattr(node.dtype, "name", node.dtype)
                    raise ProblemError(f"epilogue casts to bfloat16 or float32, not to {got}")
            case Constant():
                as_expr(node.value)
            case Accumulator() | Half("gate" | "up"):
                pass
            case _:
                raise ProblemError(f"epilogue node {node!r} has no meaning: build on jitgen.acc")


def _check_operation(node: Apply) -> None:
    arity = OPERATIONS.get(node.op, (None, 0))[0]
    if arity != len(node.args):
        raise ProblemError(
            f"epilogue operation {node.op} with {len(node.args)} arguments is unknown:"
            f" use {', '.join(OPERATIONS)}"
        )


def _check_operand(node: Operand, seen: dict[str, Operand]) -> None:
    if not node.name.isidentifier() or node.name.startswith("_") or not node.name.isascii():
        raise ProblemError(f"epilogue operand {node.name!r}: its name must be a plain identifier")
    if node.dtype not in (BF16, F32):
        legal = ", ".join(d.name for d in ALL if d in (BF16, F32))
        raise ProblemError(
            f"epilogue operand {node.name}: dtype {node.dtype.name}, must be {legal}"
        )
    if node.axes not in OPERAND_AXES:
        raise ProblemError(
            f"epilogue operand {node}: its axes must be one of {OPERAND_AXES}: use scalar, vector,"
            " per_row or matrix"
        )
    if seen.setdefault(node.name, node) != node:
        raise ProblemError(
            f"epilogue operand {node.name} is declared twice: {seen[node.name]} and {node}"
        )
