"""The interpreter of MLA decode: the meaning of every op of its tile IR, on NumPy arrays.

numerics="hopper" follows the schedule (order of blocks and parts, rounding of p, FP32 results) with
wgmma as `numerics_16` models it. It is not the GPU's result bit for bit, because three things are
not modelled: ex2.approx (2 units in the last place), the order in which a row of p is summed, and
that of a merge. Each moves a result by a few 2^-23 of its size; but a p that lies near the middle
of two bfloat16 may then round the other way, by 2^-8 of that p. With n keys of like weight that is
2^-8 / n of a value for the few p concerned. So GPU and interpreter agree to 2^-7 of the largest
|v| / sqrt(n), which the tests allow, and mostly to far less.
numerics="exact" computes in float64, p too, and rounds o and lse once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ProblemError
from .ir_mla import (
    Attend,
    Fill,
    ForKeys,
    LoadKeys,
    LoadQueries,
    Mask,
    Merge,
    MlaKernel,
    MlaStmt,
    Score,
    Segment,
    Soften,
    StoreOutput,
)
from .numerics_16 import wgmma_16

Array = NDArray[Any]
Numerics = Literal["hopper", "exact"]
LOG2_E = math.log2(math.e)


def interpret_mla(
    kernel: MlaKernel,
    tensors: Mapping[str, Array],
    *,
    softmax_scale: float,
    num_parts: int,
    numerics: Numerics = "hopper",
) -> tuple[Array, Array]:
    """(o, lse) of the problem, computed part by part as the kernel says.

    Parameters
    ----------
    tensors : by name: q, kv_cache of the problem's dtype, block_table int32 [b, max_pages],
        seqlens_k int32 [b]
    softmax_scale : factor of the scores
    num_parts : parts that the keys of all sequences are cut into
    numerics : "hopper" or "exact", see above

    Raises
    ------
    ProblemError : a tensor is missing, or has another dtype or shape than the kernel's
    """
    _check_tensors(kernel, tensors)
    if numerics not in ("hopper", "exact"):
        raise ProblemError(f'numerics must be "hopper" or "exact", got {numerics!r}')
    problem, batch = kernel.problem, len(tensors["seqlens_k"])
    shape = (batch, problem.num_queries, problem.num_heads, problem.head_dim_v)
    o = np.full(shape, np.nan, problem.dtype.numpy)
    lse = np.full((batch, problem.num_heads, problem.num_queries), np.nan, np.float32)
    parts = kernel.body.split.parts(tensors["seqlens_k"].tolist(), num_parts)
    for tile in range(kernel.body.tiles):
        shared: dict[int, list[_Machine]] = {}
        for segment in (segment for part in parts for segment in part):
            machine = _Machine(
                kernel, tensors, segment, tile, softmax_scale, numerics == "exact", o, lse
            )
            machine.others = shared.setdefault(segment.sequence, [])
            machine.run(kernel.body.body)
    return o, lse


@dataclass
class _Machine:
    """One part at work on one segment, for one tile of query rows."""

    kernel: MlaKernel
    tensors: Mapping[str, Array]
    segment: Segment
    tile: int
    softmax_scale: float
    exact: bool
    o: Array
    lse: Array
    block: int = 0
    others: list[_Machine] = field(default_factory=list)  # the parts before, of this sequence
    buffers: dict[str, Array] = field(default_factory=dict)

    @property
    def real(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.exact else np.float32)

    @property
    def length(self) -> int:
        return max(int(self.tensors["seqlens_k"][self.segment.sequence]), 0)

    @property
    def rows(self) -> Array:
        """The tile's query rows, those beyond the last one included."""
        size = self.kernel.body.tile_rows
        return self.tile * size + np.arange(size)

    def run(self, stmts: tuple[MlaStmt, ...]) -> None:
        for stmt in stmts:
            match stmt:
                case ForKeys():
                    for block in range(self.segment.begin, self.segment.end):
                        self.block = block
                        self.run(stmt.body)
                case Fill():
                    self.buffers[stmt.dst.name] = np.full(stmt.dst.shape, stmt.value, self.real)
                case LoadQueries():
                    self.load_queries(stmt)
                case LoadKeys():
                    self.load_keys(stmt)
                case Score():
                    a, b = self.buffers[stmt.a.name], self.buffers[stmt.b.name]
                    self.buffers[stmt.dst.name] = self.mma(a, b)
                case Mask():
                    self.mask(stmt)
                case Soften():
                    self.soften(stmt)
                case Attend():
                    values = self.buffers[stmt.values.name][:, : stmt.out.shape[1]]
                    out = self.buffers[stmt.out.name]
                    out *= self.buffers[stmt.factor.name][:, None]
                    self.buffers[stmt.out.name] = self.mma(
                        self.buffers[stmt.p.name], np.ascontiguousarray(values.T), out
                    )
                case Merge():
                    self.merge(stmt)
                case StoreOutput():
                    self.store(stmt)

    def mma(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """a @ b^T + out"""
        if self.exact:
            product: Array = a.astype(np.float64) @ b.astype(np.float64).T
            return product if out is None else out + product
        return wgmma_16(a, b, out)

    def load_queries(self, op: LoadQueries) -> None:
        problem = self.kernel.problem
        source = self.tensors["q"][self.segment.sequence].reshape(problem.num_rows, -1)
        rows = source[self.rows[0] : self.rows[-1] + 1]
        tile = np.zeros(op.dst.shape, op.dst.dtype.numpy)
        tile[: len(rows)] = rows
        self.buffers[op.dst.name] = tile

    def load_keys(self, op: LoadKeys) -> None:
        page, first = self.kernel.problem.page, self.block * op.dst.shape[0]
        keys = np.arange(first, min(first + op.dst.shape[0], self.length))
        pages = self.tensors["block_table"][self.segment.sequence][keys // page]
        tile = np.zeros(op.dst.shape, op.dst.dtype.numpy)
        tile[: len(keys)] = self.tensors["kv_cache"][pages, keys % page, 0]
        self.buffers[op.dst.name] = tile

    def mask(self, op: Mask) -> None:
        problem, scores = self.kernel.problem, self.buffers[op.scores.name]
        token = np.minimum(self.rows // problem.num_heads, problem.num_queries - 1)
        later = problem.num_queries - 1 - token if op.causal else np.zeros_like(token)
        keys = self.block * scores.shape[1] + np.arange(scores.shape[1])
        scores[keys[None, :] >= (self.length - later)[:, None]] = -np.inf

    def soften(self, op: Soften) -> None:
        scale = self.real.type(self.softmax_scale * LOG2_E)
        scores, top = self.buffers[op.scores.name], self.buffers[op.max.name]
        new = np.maximum(top, scores.max(axis=1) * scale)
        base = np.where(new == -np.inf, 0, new).astype(self.real)
        e = self.exp2(scores.astype(np.float64) * scale - base[:, None])
        factor = self.exp2(top.astype(np.float64) - base)
        self.buffers[op.max.name] = new
        self.buffers[op.factor.name] = factor
        self.buffers[op.sum.name] = self.buffers[op.sum.name] * factor + e.sum(axis=1)
        self.buffers[op.p.name] = e if self.exact else e.astype(op.p.dtype.numpy)

    def exp2(self, x: Array) -> Array:
        """2^x of float64, to nearest; results below the normal range are 0 (ex2.approx.ftz)."""
        y = np.exp2(x).astype(self.real)
        return y if self.exact else np.where(y < np.finfo(np.float32).tiny, 0, y).astype(self.real)

    def merge(self, op: Merge) -> None:
        """The last of the parts that share a sequence has the result of all; the others, none."""
        self.others.append(self)
        if len(self.others) < self.segment.num_parts:
            return
        names = op.max.name, op.sum.name, op.out.name
        top, total, out = (self.others[0].buffers[name] for name in names)
        for other in self.others[1:]:
            new = np.maximum(top, other.buffers[op.max.name])
            base = np.where(new == -np.inf, 0, new).astype(np.float64)
            mine, theirs = self.exp2(top - base), self.exp2(other.buffers[op.max.name] - base)
            total = total * mine + other.buffers[op.sum.name] * theirs
            out = out * mine[:, None] + other.buffers[op.out.name] * theirs[:, None]
            top = new
        for name, value in zip(names, (top, total, out), strict=True):
            self.buffers[name] = value

    def store(self, op: StoreOutput) -> None:
        problem = self.kernel.problem
        if len(self.others) < self.segment.num_parts:
            return
        total, top = self.buffers[op.sum.name], self.buffers[op.max.name]
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.where(total == 0, 0, 1 / total).astype(self.real)
            log = np.where(total == 0, np.inf, (top + np.log2(total)) / LOG2_E)
        rows = self.rows[self.rows < problem.num_rows]
        out = (self.buffers[op.out.name] * factor[:, None])[: len(rows)]
        tokens, heads = rows // problem.num_heads, rows % problem.num_heads
        sequence = self.segment.sequence
        self.o[sequence, tokens, heads] = out.astype(self.o.dtype)
        self.lse[sequence, heads, tokens] = log[: len(rows)]


def _check_tensors(kernel: MlaKernel, tensors: Mapping[str, Array]) -> None:
    names = [tensor.name for tensor in kernel.tensors if tensor.name not in ("o", "lse")]
    if set(tensors) != set(names):
        raise ProblemError(f"kernel takes tensors {', '.join(names)}; got {', '.join(tensors)}")
    batch = len(tensors["seqlens_k"])
    for tensor in kernel.tensors[: len(names)]:
        array = tensors[tensor.name]
        dtype = "int32" if tensor.dtype == "i32" else kernel.problem.dtype.numpy
        wanted = tuple(batch if extent == "b" else extent for extent in tensor.shape)
        fits = len(wanted) == array.ndim and all(
            isinstance(want, str) or want == got
            for want, got in zip(wanted, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            raise ProblemError(
                f"{tensor.name} is {array.dtype}{list(array.shape)}, the kernel takes {tensor}"
            )
