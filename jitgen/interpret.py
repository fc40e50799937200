"""The interpreter: runs a Kernel on NumPy arrays. It is the meaning of every op of the tile IR.

numerics="hopper" predicts the GPU's result bit for bit (epilogues with gelu or silu: within the
bound that jitgen.expr.OPERATIONS states); numerics="exact" computes in float64 and rounds once,
when D is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .dtypes import F32, DType
from .errors import ProblemError
from .expr import Accumulator, Apply, Cast, Constant, Expr, Half, Operand
from .groups import Rows, rows_of_groups
from .ir import (
    Axis,
    Evaluate,
    ForK,
    Load,
    Mma,
    Promote,
    Quantize,
    Reduce,
    Stmt,
    Store,
    Tensor,
    Tile,
    Window,
    Zero,
)
from .kernel import Kernel
from .numerics import NAN_F32, fma_f32, quantize_rows, round_to, sum_f32, wgmma_e4m3
from .problem import D_SCALE, Gemm, GroupedGemm, adds_to_d, is_k_grouped
from .schedule import BLOCK_K

Array = NDArray[Any]
Numerics = Literal["hopper", "exact"]


def interpret(
    kernel: Kernel,
    tensors: Mapping[str, Array],
    *,
    numerics: Numerics = "hopper",
    tiles: Iterable[tuple[int, int] | Tile] | None = None,
    out: Any = None,
) -> Any:
    """D [m, n] in the problem's dtype, computed tile by tile as the kernel says.

    Parameters
    ----------
    tensors : the kernel's tensors by name, d left out: a float8_e4m3fn [m, k],
        b float8_e4m3fn [n, k], sfa float32 [m, ceil(k/128)],
        sfb float32 [ceil(n/b_scale.rows), ceil(k/128)], and the epilogue's operands; those of a
        grouped problem as `GroupedGemm` says, and groups int32
    numerics : "hopper" or "exact", see above
    tiles : the tiles to compute, or their origins (row, column); None for all of `tiles_of`
    out : where to put D; by default a new array, NaN where no tile is, or 0 if D is added to. A
        pair of arrays if D has scales: what comes back is D and sfd float32 [m, columns / 128] then

    Raises
    ------
    ProblemError : a tensor is missing, or has another dtype or shape than the kernel's
    """
    m = _check_tensors(kernel, tensors)
    problem = kernel.problem
    if numerics not in ("hopper", "exact"):
        raise ProblemError(f'numerics must be "hopper" or "exact", got {numerics!r}')
    rows = tensors["a"].shape[:-1]
    if out is None:
        outer = (len(tensors["groups"]) - 1,) if is_k_grouped(problem) else ()
        value = 0 if adds_to_d(problem) else np.nan
        out = np.full((*outer, *rows, problem.columns), value, problem.d_dtype.numpy)
        if problem.is_quantized:
            out = out, np.full((*rows, problem.columns // D_SCALE.k), np.nan, np.float32)
    results = dict(zip(("d", "sfd"), out if problem.is_quantized else (out,), strict=False))
    arrays = {t.name: _in_halves(t, {**tensors, **results}[t.name]) for t in kernel.tensors}
    # The part of each tensor that a tile of a group sees.
    parts = {t.name for t in kernel.tensors if t.dims and t.dims[0].axis == "g"}
    for tile in tiles_of(kernel, tensors) if tiles is None else tiles:
        row, column, group, end, part = Tile(*tile)
        k_begin, k_end = part or (0, problem.max_k)
        origin: dict[Axis, int] = {"m": row, "n": column, "k": k_begin}
        seen = {name: t[group] if name in parts else t for name, t in arrays.items()}
        named = seen["groups"] == group if _names_rows(problem) else None
        end = m if end is None else end
        machine = _Machine(seen, origin, numerics == "exact", k_end, end, named)
        machine.run(kernel.body.body)
    return out


def _in_halves(tensor: Tensor, array: Array) -> Array:
    """The array with an axis of its halves, if the tensor has one."""
    axes = [dim.axis for dim in tensor.dims]
    if "h" not in axes:
        return array
    at = axes.index("h")
    return array.reshape(*array.shape[:at], 2, array.shape[at] // 2, *array.shape[at + 1 :])


def tiles_of(kernel: Kernel, tensors: Mapping[str, Array]) -> Iterator[Tile]:
    """The tiles of D in the order of the traversal, those outside D included."""
    (*_, m, k), problem = tensors["a"].shape, kernel.problem
    rows = [Rows(0, m)]
    if isinstance(problem, GroupedGemm):
        if is_k_grouped(problem):
            parts = rows_of_groups(problem, tensors["groups"], k)
            return kernel.body.tiles_of_parts(m, problem.columns, parts)
        rows = rows_of_groups(problem, tensors["groups"], m)
    return kernel.body.tiles(problem.columns, rows)


def _names_rows(problem: Gemm) -> bool:
    return isinstance(problem, GroupedGemm) and problem.layout == "group_of_row"


@dataclass
class _Machine:
    """One thread block at work on one tile: its buffers, and the tile's origin in each axis.

    Rows of the tile end at `end_m`; if `named` is given, those are written that it is true for.
    """

    tensors: Mapping[str, Array]
    origin: dict[Axis, int]
    exact: bool
    k_end: int  # of the step of the loop at hand
    end_m: int
    named: Array | None
    columns: int = 0  # of D in the tile
    buffers: dict[str, Array] = field(default_factory=dict)
    loaded_k: dict[str, int] = field(default_factory=dict)

    def run(self, stmts: tuple[Stmt, ...]) -> None:
        for stmt in stmts:
            match stmt:
                case ForK():
                    begin, around = self.origin["k"], self.k_end
                    end = min(begin + stmt.extent, around)
                    for k in range(begin, end, stmt.step):
                        self.origin["k"], self.k_end = k, min(k + stmt.step, end)
                        self.run(stmt.body)
                    self.origin["k"], self.k_end = begin, around
                case Zero():
                    self.buffers[stmt.dst.name] = np.zeros(stmt.dst.shape, self.real)
                case Load():
                    self.load(stmt)
                case Mma():
                    a, b = self.buffers[stmt.a.name], self.buffers[stmt.b.name]
                    exact = self.exact
                    self.buffers[stmt.dst.name] = _matmul_f64(a, b) if exact else wgmma_e4m3(a, b)
                case Promote():
                    self.promote(stmt)
                case Reduce():
                    sums = self.buffers[stmt.src.name]
                    if stmt.dst.name in self.buffers:
                        sums = self.apply("add", self.buffers[stmt.dst.name], sums)
                    self.buffers[stmt.dst.name] = sums
                case Evaluate():
                    self.columns = stmt.dst.shape[1]
                    value = self.evaluate(stmt.expr, self.buffers[stmt.src.name])
                    value = np.broadcast_to(self.rounded(value, stmt.dst.dtype), stmt.dst.shape)
                    self.buffers[stmt.dst.name] = value
                case Quantize():
                    self.quantize(stmt)
                case Store():
                    self.put(stmt.dst, stmt.windows, self.buffers[stmt.src.name], stmt.adds)

    @property
    def real(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.exact else np.float32)

    def rounded(self, value: Array, dtype: DType) -> Array:
        if self.exact:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                value = value.astype(np.float32) if dtype == F32 else _round_to_odd(value)
        return round_to(value, dtype)

    def load(self, op: Load) -> None:
        """The windows of a tensor; zeros beyond its end."""
        source = self.tensors[op.src.name]
        rows, columns = self.clipped(op.windows, source.shape[-2:])
        inside = source[..., rows, columns]
        halves, (height, width) = source.shape[:-2], op.dst.shape
        tile = np.zeros((*halves, height // math.prod(halves), width), op.dst.dtype.numpy)
        tile[..., : inside.shape[-2], : inside.shape[-1]] = inside
        self.buffers[op.dst.name] = tile.reshape(op.dst.shape)
        self.loaded_k[op.dst.name] = self.origin["k"]

    def put(
        self, tensor: Tensor, windows: tuple[Window, ...], value: Array, adds: bool = False
    ) -> None:
        """tensor[windows] = value, or += value, in the rows of the tile's group."""
        target = self.tensors[tensor.name]
        rows, columns = self.clipped(windows, target.shape)
        value = value[: rows.stop - rows.start, : columns.stop - columns.start]
        if adds:
            value = sum_f32(target[rows, columns], value)
        if self.named is not None:
            named = self.named[rows]
            target[rows, columns][named] = value[named]
        else:
            target[rows, columns] = value

    def quantize(self, op: Quantize) -> None:
        blocks = self.buffers[op.src.name]
        blocks = blocks.reshape(len(blocks), -1, D_SCALE.k)
        values, scales = quantize_rows(blocks, op.power_of_two)
        self.buffers[op.dst.name] = values.reshape(op.dst.shape)
        self.put(op.scales, op.windows, scales)

    def clipped(self, windows: tuple[Window, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The slices that the windows cover, up to the tensor's end and that of the rows."""
        slices = []
        for window, extent in zip(windows, shape, strict=True):
            if window.axis == "m":
                extent = min(extent, -(-self.end_m // window.block))
            start = self.origin[window.axis] // window.block
            stop = (self.origin[window.axis] + window.size - 1) // window.block + 1
            slices.append(slice(min(start, extent), min(stop, extent)))
        return tuple(slices)

    def promote(self, op: Promote) -> None:
        """acc = fma(rn(scale_m * scale_n), part, acc), each scale spread over its block."""
        spread = []
        for scale, window in zip(op.scales, op.windows, strict=True):
            first = self.origin[window.axis]
            index = (first + np.arange(window.size)) // window.block - first // window.block
            block = (self.origin["k"] - self.loaded_k[scale.name]) // BLOCK_K
            values = self.buffers[scale.name][:, block].astype(self.real)
            # Each half has rows of its own, one half below the other.
            halves = self.buffers[op.part.name].shape[1] // window.size if window.axis == "n" else 1
            values = values.reshape(halves, -1)
            # Positions beyond the tensor take any scale: they are not stored.
            spread.append(values[:, np.minimum(index, values.shape[1] - 1)].ravel())
        with np.errstate(over="ignore", invalid="ignore"):
            scale = spread[0][:, None] * spread[1][None, :]
            acc, part = self.buffers[op.acc.name], self.buffers[op.part.name]
            self.buffers[op.acc.name] = (
                acc + scale * part if self.exact else fma_f32(scale, part, acc)
            )

    def evaluate(self, expr: Expr, acc: Array) -> Array:
        """The expression's value, of a shape that broadcasts to the tile's.

        Operands are zero beyond the tensor's end.
        """
        match expr:
            case Accumulator():
                return acc
            case Constant():
                return np.asarray(expr.value, self.real)
            case Half():
                first = 0 if expr.name == "gate" else self.columns
                return acc[:, first : first + self.columns]
            case Operand():
                return self.operand(expr, (len(acc), self.columns))
            case Apply():
                return self.apply(expr.op, *(self.evaluate(arg, acc) for arg in expr.args))
            case Cast():
                value = self.evaluate(expr.arg, acc)
                return value if self.exact else round_to(value, expr.dtype).astype(np.float32)
        raise TypeError(f"no meaning of {type(expr).__name__}")

    def apply(self, op: str, *args: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            value = np.asarray(_OPERATIONS[op](*args))
        if not self.exact:
            np.copyto(value, NAN_F32, where=np.isnan(value))
        return value

    def operand(self, operand: Operand, shape: tuple[int, ...]) -> Array:
        source = self.tensors[operand.name]
        if not operand.axes:
            return np.asarray(source, self.real).reshape(())
        sizes = dict(zip(("m", "n"), shape, strict=True))
        value = np.zeros([sizes[axis] for axis in operand.axes], self.real)
        slices = tuple(
            slice(self.origin[axis], min(self.origin[axis] + sizes[axis], extent))  # type: ignore[index]
            for axis, extent in zip(operand.axes, source.shape, strict=True)
        )
        inside = source[slices]
        value[tuple(slice(0, extent) for extent in inside.shape)] = inside
        return value[:, None] if operand.axes == ("m",) else value


def _matmul_f64(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return a.astype(np.float64) @ b.astype(np.float64).T


def _round_to_odd(x: Array) -> Array:
    """x, float64, in float32: a rounding to fewer bits that follows is as if it were the only one.

    Boldo and Melquiond 2008: what lies between two neighbours becomes the one with an odd last bit.
    """
    nearest = x.astype(np.float32)
    value, bits = nearest.astype(np.float64), nearest.view(np.uint32)
    bits -= np.abs(value) > np.abs(x)  # a step toward zero; NaN compares false
    bits |= (value > x) | (value < x)
    return nearest


def _maximum(x: Array, y: Array) -> Array:
    """As PTX `max.NaN`: NaN if either is, and +0 above -0, of which NumPy takes any."""
    return np.where((x == 0) & (y == 0), x + y, np.maximum(x, y))


def _relu(x: Array) -> Array:
    return np.where((x > 0) | np.isnan(x), x, x.dtype.type(0))


def _silu(x: Array) -> Array:
    exponential = np.exp(-x.astype(np.float64)).astype(x.dtype)
    y: Array = x / (x.dtype.type(1) + exponential)
    return y


def _gelu(x: Array) -> Array:
    one_half, factor = x.dtype.type(0.5), -x.dtype.type(math.sqrt(0.5))
    y: Array = (one_half * x) * _erfc(x * factor).astype(x.dtype)
    return y


_erfc = np.vectorize(math.erfc, otypes=[np.float64])

_OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "maximum": _maximum,
    "relu": _relu,
    "silu": _silu,
    "gelu": _gelu,
}


def _check_tensors(kernel: Kernel, tensors: Mapping[str, Array]) -> int:
    """The run-time extent m; raises unless every tensor is as the kernel declares it."""
    expected = {t.name: t for t in kernel.tensors if t.name not in ("d", "sfd")}
    if set(tensors) != set(expected):
        raise ProblemError(f"kernel takes tensors {', '.join(expected)}; got {', '.join(tensors)}")
    a = tensors["a"]
    m, k = a.shape[-2:] if a.ndim >= 2 else (0, 0)
    at_run_time = {"m": m, "k": k}
    for name, tensor in expected.items():
        array = tensors[name]
        shape: tuple[int | None, ...] = tuple(
            -(-at_run_time[dim.axis] // dim.block) if dim.extent is None else dim.num_elements
            for dim in tensor.dims
        )
        if any(dim.axis == "h" for dim in tensor.dims):
            *groups, halves, rows, columns = tensor.dims
            shape = (
                *(dim.num_elements for dim in groups),
                (halves.num_elements or 0) * (rows.num_elements or 0),
                columns.num_elements,
            )
        is_scalar = not shape and array.shape == (1,)
        if (array.shape != shape and not is_scalar) or array.dtype != tensor.dtype.numpy:
            raise ProblemError(
                f"{name} is {array.dtype}{list(array.shape)}, the kernel takes"
                f" {tensor.dtype.numpy}{list(shape)}"
            )
    return int(m)
