"""The interpreter of MLA decode: the meaning of every op of its tile IR, on NumPy arrays.

numerics="hopper" follows the schedule (order of blocks and parts, rounding of p, FP32 results) with
wgmma as `numerics_16` models it. It is not the GPU's result bit for bit, because three things are
not modelled: ex2.approx (2 units in the last place), the order in which a row of p is summed, and
that of a merge. Each moves a result by a few 2^-23 of its size; but a p that lies near the middle
of two bfloat16 may then round the other way, by 2^-8 of that p. With n keys of like weight that is
2^-8 / n of a value for the few p concerned. So GPU and interpreter agree to 2^-7 of the largest
|v| / sqrt(n), which the tests allow, and mostly to far less.
Over an FP8 cache p are float16: 2^-10 of the largest |v|. There a fourth thing is not modelled: a
block of keys whose scores are just at the slack may have maxima grow or not, which rounds its p
anew, to no more than that.
numerics="exact" computes in float64, p too, and rounds o and lse once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType
from .errors import ProblemError
from .ir_mla import (
    MAX_SLACK,
    Attend,
    Fill,
    ForKeys,
    LoadKeys,
    LoadQueries,
    Mask,
    MaskTokens,
    Merge,
    MlaKernel,
    MlaStmt,
    Score,
    Segment,
    Soften,
    StoreOutput,
)
from .ir_mla_fp8 import (
    AttendTokens,
    LoadTokens,
    ScaleQueries,
    ScoreTokens,
    Settle,
    SoftenTokens,
    Tokens,
    WeighTokens,
)
from .numerics_16 import wgmma_16
from .problem_mla import SCALE_COLUMNS
from .tokens_mla import (
    CODE_UNITS,
    LEAST_UNIT,
    UNIT_SLACK,
    WEIGHT_EXPONENT,
    split_tokens,
)

Array = NDArray[Any]
Numerics = Literal["hopper", "exact"]
LOG2_E = math.log2(math.e)
DTYPES = {"i32": np.dtype("int32"), "u8": np.dtype("uint8"), "f32": np.dtype("float32")}


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
    tensors : by name, as the kernel's: q, kv_cache, block_table, seqlens_k; of sparse decode
        indices and topk_length in place of the last two
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
    problem, batch = kernel.problem, len(tensors["q"])
    shape = (batch, problem.num_queries, problem.num_heads, problem.head_dim_v)
    o = np.full(shape, np.nan, problem.dtype.numpy)
    lse = np.full((batch, problem.num_heads, problem.num_queries), np.nan, np.float32)
    lengths = _lengths(kernel, tensors)
    parts = kernel.body.split.parts(lengths, num_parts)
    is_apart = kernel.body.split.is_apart(lengths, num_parts)
    for tile in range(kernel.body.tiles):
        shared: dict[int, list[_Machine]] = {}
        for segment in (segment for part in parts for segment in part):
            length = lengths[segment.sequence]
            machine = _Machine(
                kernel, tensors, segment, length, tile, softmax_scale, numerics == "exact", o, lse
            )
            machine.is_apart = is_apart
            machine.others = shared.setdefault(segment.sequence, [])
            machine.run(kernel.body.body)
    return o, lse


def _lengths(kernel: MlaKernel, tensors: Mapping[str, Array]) -> list[int]:
    """Keys of each sequence, or of each query token of sparse decode."""
    if not kernel.problem.sparse:
        return [max(length, 0) for length in tensors["seqlens_k"].tolist()]
    each = tensors["topk_length"].clip(0, tensors["indices"].shape[2])
    lengths: list[int] = np.repeat(each, kernel.problem.num_tokens).tolist()
    return lengths


@dataclass
class _Machine:
    """One part at work on one segment, for one tile of query rows."""

    kernel: MlaKernel
    tensors: Mapping[str, Array]
    segment: Segment
    length: int
    tile: int
    softmax_scale: float
    exact: bool
    o: Array
    lse: Array
    is_apart: bool = False  # each part has one segment at most
    block: int = 0
    others: list[_Machine] = field(default_factory=list)  # the parts before, of this sequence
    buffers: dict[str, Array] = field(default_factory=dict)

    @property
    def real(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.exact else np.float32)

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
                    self.buffers[stmt.dst.name] = self.queries
                case LoadKeys():
                    self.load_keys(stmt)
                case Score():
                    a, b = self.buffers[stmt.a.name], self.buffers[stmt.b.name]
                    self.buffers[stmt.dst.name] = self.mma(a, b)
                case Mask():
                    self.mask(stmt)
                case MaskTokens():
                    scores = self.buffers[stmt.scores.name]
                    scores[:, self.tokens(scores.shape[1]) < 0] = -np.inf
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
                case ScaleQueries():
                    self.scale_queries(stmt)
                case LoadTokens():
                    self.load_tokens(stmt)
                case ScoreTokens():
                    self.score_tokens(stmt)
                case WeighTokens():
                    self.weigh_tokens(stmt)
                case SoftenTokens():
                    self.soften_tokens(stmt)
                case AttendTokens():
                    self.attend_tokens(stmt)
                case Settle():
                    self.settle(stmt)

    def rounded(self, x: Array, dtype: DType) -> Array:
        """x in a buffer of `dtype`; float64 stays exact."""
        return x if self.exact else x.astype(dtype.numpy)

    def mma(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """a @ b^T + out"""
        if self.exact:
            product: Array = a.astype(np.float64) @ b.astype(np.float64).T
            return product if out is None else out + product
        return wgmma_16(a, b, out)

    @property
    def queries(self) -> Array:
        """The tile's rows of q, 0 beyond the last one."""
        problem = self.kernel.problem
        source = self.tensors["q"].reshape(-1, problem.num_rows, problem.head_dim_qk)
        rows = source[self.segment.sequence][self.rows[0] : self.rows[-1] + 1]
        tile = np.zeros((self.kernel.body.tile_rows, problem.head_dim_qk), problem.dtype.numpy)
        tile[: len(rows)] = rows
        return tile

    def load_keys(self, op: LoadKeys) -> None:
        page, first = self.kernel.problem.page, self.block * op.dst.shape[0]
        keys = np.arange(first, min(first + op.dst.shape[0], self.length))
        pages = self.tensors["block_table"][self.segment.sequence][keys // page]
        tile = np.zeros(op.dst.shape, op.dst.dtype.numpy)
        tile[: len(keys)] = self.tensors["kv_cache"][pages, keys % page, 0]
        self.buffers[op.dst.name] = tile

    def tokens(self, count: int) -> Array:
        """Where in the cache the block's keys are, a page's one after the other; -1 for none."""
        page, sequence = self.kernel.problem.page, self.segment.sequence
        keys = self.block * count + np.arange(count)
        there, tokens = keys < self.length, np.full(count, -1, np.int64)
        if not self.kernel.problem.sparse:
            pages = self.tensors["block_table"][sequence][keys[there] // page].astype(np.int64)
            tokens[there] = pages * page + keys[there] % page
            return tokens
        listed = self.tensors["indices"].reshape(-1, self.tensors["indices"].shape[2])[sequence]
        tokens[there] = listed[keys[there]]
        tokens[tokens >= len(self.tensors["kv_cache"]) * page] = -1
        return np.maximum(tokens, -1)

    def scale_queries(self, op: ScaleQueries) -> None:
        q, columns = self.queries, op.dst.shape[1]
        largest = int((q.view(np.uint16) & 0x7FFF).max())
        exponent = min(141 - (largest >> 7), 126)
        scaled = np.ldexp(q.astype(self.real), exponent)
        self.buffers[op.dst.name] = self.rounded(scaled[:, :columns], op.dst.dtype)
        self.buffers[op.tail.name] = self.rounded(scaled[:, columns:], op.tail.dtype)
        self.buffers[op.unit.name] = np.ldexp(np.ones(1, self.real), -exponent)

    def load_tokens(self, op: LoadTokens) -> None:
        at = self.tokens(op.tokens.units.shape[0])
        page, there = self.kernel.problem.page, at >= 0
        found = self.tensors["kv_cache"][at[there] // page, at[there] % page, 0]
        codes, scales, tail = split_tokens(found)
        scales = scales.astype(self.real)
        units = np.maximum(np.abs(scales).max(axis=1), self.real.type(LEAST_UNIT))
        ratios = scales * self.real.type(CODE_UNITS) / units[:, None]
        of_buffers = (
            (op.tokens.codes, codes),
            (op.tokens.tail, tail),
            (op.tokens.ratios, self.rounded(ratios, op.tokens.ratios.dtype)),
            (op.tokens.units, units),
        )
        for buffer, values in of_buffers:
            block = np.zeros(buffer.shape, values.dtype)
            block[there] = values
            self.buffers[buffer.name] = block

    def decode(self, tokens: Tokens) -> Array:
        """The columns of codes, in units of CODE_UNITS a token's unit."""
        codes, ratios = self.buffers[tokens.codes.name], self.buffers[tokens.ratios.name]
        of_code = np.repeat(ratios.astype(self.real), SCALE_COLUMNS, axis=1)
        return self.rounded(codes.astype(self.real) * of_code, tokens.ratios.dtype)

    def score_tokens(self, op: ScoreTokens) -> None:
        units = self.buffers[op.tokens.units.name] / self.real.type(CODE_UNITS)
        scores = self.mma(self.buffers[op.queries.name], self.decode(op.tokens)) * units
        self.buffers[op.dst.name] = self.mma(
            self.buffers[op.query_tail.name], self.buffers[op.tokens.tail.name], scores
        )

    def weigh_tokens(self, op: WeighTokens) -> None:
        units, before = self.buffers[op.units.name], self.buffers[op.exponent.name][0]
        exponent, growth = before, 0.0
        if units.any():
            least = np.frexp(units.max())[1]  # that with which all units are below 2^exponent
            exponent = least if least - 1 >= before + UNIT_SLACK else before
            growth = max(before - exponent, -126) if before > -np.inf else 0.0
        weight = np.exp2(WEIGHT_EXPONENT - exponent) if exponent > -np.inf else 0.0
        self.buffers[op.exponent.name] = np.full(1, exponent, self.real)
        self.buffers[op.growth.name] = np.full(1, np.exp2(growth), self.real)
        self.buffers[op.weights.name] = units * self.real.type(weight)

    def soften_tokens(self, op: SoftenTokens) -> None:
        scores, top = self.buffers[op.scores.name], self.buffers[op.max.name]
        growth = self.buffers[op.growth.name]
        scale = self.real.type(self.softmax_scale * LOG2_E) * self.buffers[op.unit.name][0]
        with np.errstate(over="ignore"):
            limit = (self.real.type(MAX_SLACK) + top) * (1 / scale)
        highest, new = scores.max(axis=1), top
        if growth[0] != 1 or np.any(highest > limit):
            new = np.maximum(top, highest * scale)
        e = self.exp2(scores.astype(np.float64) * scale - new.astype(np.float64)[:, None])
        factor = self.exp2(top.astype(np.float64) - new)
        self.buffers[op.max.name] = new
        self.buffers[op.factor.name] = factor * growth
        self.buffers[op.sum.name] = self.buffers[op.sum.name] * factor + e.sum(axis=1)
        self.buffers[op.p.name] = self.rounded(e * self.buffers[op.weights.name], op.p.dtype)

    def attend_tokens(self, op: AttendTokens) -> None:
        values = self.decode(op.tokens)[:, : op.out.shape[1]]
        out = self.buffers[op.out.name] * self.buffers[op.factor.name][:, None]
        p = self.buffers[op.p.name]
        self.buffers[op.out.name] = self.mma(p, np.ascontiguousarray(values.T), out)

    def settle(self, op: Settle) -> None:
        exponent = self.buffers[op.exponent.name][0]
        if exponent > -np.inf:
            factor = self.real.type(np.exp2(exponent - WEIGHT_EXPONENT) / CODE_UNITS)
            self.buffers[op.out.name] = self.buffers[op.out.name] * factor
        self.buffers[op.max.name][self.buffers[op.sum.name] == 0] = -np.inf

    def mask(self, op: Mask) -> None:
        problem, scores = self.kernel.problem, self.buffers[op.scores.name]
        token = np.minimum(self.rows // problem.num_heads, problem.num_queries - 1)
        later = problem.num_queries - 1 - token if op.causal else np.zeros_like(token)
        keys = self.block * scores.shape[1] + np.arange(scores.shape[1])
        scores[keys[None, :] >= (self.length - later)[:, None]] = -np.inf

    def soften(self, op: Soften) -> None:
        scale = self.real.type(self.softmax_scale * LOG2_E)
        scores, top = self.buffers[op.scores.name], self.buffers[op.max.name]
        highest = scores.max(axis=1) * scale
        new = np.where(highest > top + self.real.type(MAX_SLACK), highest, top)
        base = np.where(new == -np.inf, 0, new).astype(self.real)
        e = self.exp2(scores.astype(np.float64) * scale - base[:, None])
        factor = self.exp2(top.astype(np.float64) - base)
        self.buffers[op.max.name] = new
        self.buffers[op.factor.name] = factor
        self.buffers[op.sum.name] = self.buffers[op.sum.name] * factor + e.sum(axis=1)
        self.buffers[op.p.name] = self.rounded(e, op.p.dtype)

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
        results = [tuple(other.buffers[name] for name in names) for other in self.others]
        if op.meet > 1 and self.is_apart:
            groups: dict[int, list[tuple[Array, ...]]] = {}
            for part, result in enumerate(results, self.segment.first_part):
                groups.setdefault(part // op.meet, []).append(result)
            results = [functools.reduce(self.merge_two, group) for group in groups.values()]
        merged = functools.reduce(self.merge_two, results)
        for name, value in zip(names, merged, strict=True):
            self.buffers[name] = value

    def merge_two(self, one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
        """Maxima, sums and outputs of both."""
        top = np.maximum(one[0], other[0])
        base = np.where(top == -np.inf, 0, top).astype(np.float64)
        mine, theirs = self.exp2(one[0] - base), self.exp2(other[0] - base)
        out = one[2] * mine[:, None] + other[2] * theirs[:, None]
        return top, one[1] * mine + other[1] * theirs, out

    def sinks(self, op: StoreOutput, top: Array) -> Array:
        """What the heads' sinks add to the rows' sums."""
        if op.sink is None:
            return np.zeros_like(top)
        heads = self.rows % self.kernel.problem.num_heads
        return self.exp2(self.tensors[op.sink.name][heads].astype(np.float64) * LOG2_E - top)

    def store(self, op: StoreOutput) -> None:
        problem = self.kernel.problem
        if len(self.others) < self.segment.num_parts:
            return
        total, top = self.buffers[op.sum.name], self.buffers[op.max.name]
        with np.errstate(divide="ignore", invalid="ignore"):
            more = total + self.sinks(op, top)
            factor = np.where(total == 0, 0, 1 / more).astype(self.real)
            log = np.where(total == 0, np.inf, (top + np.log2(total)) / LOG2_E)
        rows = self.rows[self.rows < problem.num_rows]
        out = (self.buffers[op.out.name] * factor[:, None])[: len(rows)]
        sequence, token = divmod(self.segment.sequence, problem.num_tokens)
        tokens, heads = token + rows // problem.num_heads, rows % problem.num_heads
        self.o[sequence, tokens, heads] = out.astype(self.o.dtype)
        self.lse[sequence, heads, tokens] = log[: len(rows)]


def _check_tensors(kernel: MlaKernel, tensors: Mapping[str, Array]) -> None:
    names = [tensor.name for tensor in kernel.tensors if tensor.name not in ("o", "lse")]
    if set(tensors) != set(names):
        raise ProblemError(f"kernel takes tensors {', '.join(names)}; got {', '.join(tensors)}")
    batch = len(tensors["q"])
    for tensor in kernel.tensors[: len(names)]:
        array = tensors[tensor.name]
        dtype = DTYPES.get(tensor.dtype, kernel.problem.dtype.numpy)
        wanted = tuple(batch if extent == "b" else extent for extent in tensor.shape)
        fits = len(wanted) == array.ndim and all(
            isinstance(want, str) or want == got
            for want, got in zip(wanted, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            raise ProblemError(
                f"{tensor.name} is {array.dtype}{list(array.shape)}, the kernel takes {tensor}"
            )
