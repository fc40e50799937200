"""The tile IR: the program of one thread block, which is interpreted, rendered and verified.

    kernel ::= Kernel(name, problem, schedule, tensors, smem, body)      in jitgen.kernel
    body   ::= ForTiles(traversal, stmt*, num_turns, groups)
    stmt   ::= ForK(extent, step, stmt*, num_blocks) | op
    op     ::= Zero(dst)                     dst = 0
             | Load(dst, src, windows, ...)  dst = src[windows], 0 beyond the tensor's end
             | Mma(dst, a, b, swap_ab)       dst = a @ b^T, a chain of k32 steps that starts at 0
             | Promote(acc, part, scales)    acc = fma(rn(scales[0] * scales[1]), part, acc)
             | Reduce(dst, src, ...)         dst = src in the first part of k, then rn(dst + src)
             | Evaluate(dst, src, expr)      dst = expr(src), rounded to dst's dtype
             | Quantize(dst, scales, src)    dst, scales = src as E4M3 with a scale a 1x128 block
             | Store(dst, src, windows)      dst[windows] = src, clipped at the end of its rows; or
                                             dst[windows] += src

A Window says which elements of one tensor dimension belong to the current tile: those that scale or
hold the tile's `size` positions along `axis`, one element for every `block` positions. Promote
takes the scales of the K block at hand.

A tensor with an `h` axis, of two halves, takes part with the same window of each, one below the
other; see jitgen.expr.Half. With `groups` a tile is of one group: of tensors that have a `g` axis,
the first, it sees that group's part, and it neither reads nor writes rows that are not the group's.
Where groups have parts of k instead, a tile's loops over k run over its group's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .dtypes import DType
from .expr import Expr
from .groups import Rows
from .traversal import Traversal

Axis = Literal["g", "h", "m", "n", "k"]


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: `extent` positions along `axis`, one element a `block` of them.

    The extent is None if it is known at run time only.
    """

    axis: Axis
    extent: int | None
    block: int = 1

    @property
    def num_elements(self) -> int | None:
        return None if self.extent is None else -(-self.extent // self.block)

    def __str__(self) -> str:
        size = str(self.num_elements) if self.extent is not None else self.axis
        return size if self.extent is not None or self.block == 1 else f"{self.axis}/{self.block}"


@dataclass(frozen=True)
class Tensor:
    """A kernel argument in global memory."""

    name: str
    dtype: DType
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class MlaTensor:
    """The same of other kernels than GEMM: extents known at run time only have a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Buffer:
    """A tile on the chip; pipelined buffers have one copy a stage.

    `swizzle_bytes` is the span of the TMA swizzle, 0 for none.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    space: Literal["smem", "registers"]
    pipelined: bool = False
    swizzle_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        count = self.dtype.size_bytes
        for extent in self.shape:
            count *= extent
        return count

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        swizzle = f" swizzle {self.swizzle_bytes}" if self.swizzle_bytes else ""
        return f"{self.name}: {self.dtype}[{shape}] in {self.space}{swizzle}"


@dataclass(frozen=True)
class Window:
    """Along `axis`, `size` positions from the tile's origin, one element a `block` of them."""

    axis: Axis
    size: int
    block: int = 1

    def __str__(self) -> str:
        return f"{self.axis}:+{self.size}" + (f"/{self.block}" if self.block > 1 else "")


@dataclass(frozen=True)
class Zero:
    dst: Buffer

    def __str__(self) -> str:
        return f"{self.dst.name} = 0"


@dataclass(frozen=True)
class Load:
    """dst = src[windows].

    `via`: "tma" for swizzled tiles, split over `multicast` blocks of the cluster, or "registers"
    for scales, contiguous unless `any_strides`.
    """

    dst: Buffer
    src: Tensor
    windows: tuple[Window, ...]
    via: Literal["tma", "registers"]
    multicast: int = 1
    any_strides: bool = False

    def __str__(self) -> str:
        note = f" multicast {self.multicast}" if self.multicast > 1 else ""
        source = f"{self.src.name}[{', '.join(map(str, self.windows))}]"
        return f"{self.dst.name} = load {source} via {self.via}{note}"

    @property
    def box(self) -> tuple[int, ...]:
        """The part of the tile that one copy loads: a block's share, of one half at a time."""
        parts = max(self.multicast, 2) if _has_halves(self.src) else self.multicast
        return (self.dst.shape[0] // parts, *self.dst.shape[1:])


@dataclass(frozen=True)
class Mma:
    """dst = a @ b^T; with `swap_ab` as (b @ a^T)^T: the rows of b are those of wgmma, which has 64.

    The bits are the same.
    """

    dst: Buffer
    a: Buffer
    b: Buffer
    swap_ab: bool = False

    def __str__(self) -> str:
        if self.swap_ab:
            return f"{self.dst.name} = mma({self.b.name}, {self.a.name})^T"
        return f"{self.dst.name} = mma({self.a.name}, {self.b.name})"


@dataclass(frozen=True)
class Promote:
    """acc = fma(scales[0] * scales[1], part, acc), with the scales of the K block at hand.

    `windows`: for each scale buffer, the window of its rows (of the m, then of the n axis). Its
    columns are the K blocks from where it was loaded.
    """

    acc: Buffer
    part: Buffer
    scales: tuple[Buffer, Buffer]
    windows: tuple[Window, Window]

    def __str__(self) -> str:
        scale = " * ".join(buffer.name for buffer in self.scales)
        return f"{self.acc.name} = fma({scale}, {self.part.name}, {self.acc.name})"


@dataclass(frozen=True)
class Reduce:
    """dst = src in the first step of a loop that blocks share, then rn(dst + src), in their order.

    `inbox`: where a block receives its columns of the other blocks' sums: [sender, row, column],
    as wgmma counts rows and columns.
    """

    dst: Buffer
    src: Buffer
    inbox: Buffer

    def __str__(self) -> str:
        return f"{self.dst.name} = {self.dst.name} + {self.src.name} via {self.inbox.name}"


@dataclass(frozen=True)
class Evaluate:
    """dst = expr(src); `operands` are the tensors that it reads straight from global memory."""

    dst: Buffer
    src: Buffer
    expr: Expr
    operands: tuple[Tensor, ...]

    def __str__(self) -> str:
        return f"{self.dst.name} = cast({self.expr}, {self.dst.dtype}) where acc = {self.src.name}"


@dataclass(frozen=True)
class Quantize:
    """dst = src * rn(448 / amax) as E4M3, and scales[windows] = rn(amax / 448), for every block.

    amax is that of the block, 448 * 2^-63 at least. `power_of_two`: scales are rounded up to one,
    and dst = src / scale.
    """

    dst: Buffer
    scales: Tensor
    src: Buffer
    windows: tuple[Window, ...]
    power_of_two: bool

    def __str__(self) -> str:
        where = f"{self.scales.name}[{', '.join(map(str, self.windows))}]"
        note = " to powers of two" if self.power_of_two else ""
        return f"{self.dst.name}, {where} = quantize({self.src.name}){note}"


@dataclass(frozen=True)
class Store:
    """dst[windows] = src; `box` is the part of the tile that one TMA store writes.

    `by_row`: where rows of the box are another group's, or none's, those of the tile's group are
    written one by one instead. `adds`: dst[windows] = rn(dst[windows] + src).
    """

    dst: Tensor
    src: Buffer
    windows: tuple[Window, ...]
    box: tuple[int, int]
    by_row: bool = False
    adds: bool = False

    def __str__(self) -> str:
        note = ", at a group's end by row" if self.by_row else ""
        where, sign = ", ".join(map(str, self.windows)), "+=" if self.adds else "="
        return f"store {self.dst.name}[{where}] {sign} {self.src.name} via tma{note}"


@dataclass(frozen=True)
class ForK:
    """`body` for each `step` of k, ascending, over `extent` positions.

    It begins where the loop around it stands, and does nothing beyond the end of that loop's step.
    With `num_blocks` > 1 each step is a block's of a cluster, in the order of their ranks.
    """

    extent: int
    step: int
    body: tuple[Stmt, ...]
    num_blocks: int = 1


class Tile(NamedTuple):
    """A block's tile: its origin in D; its group, and where that one's rows end (by default D's).

    If D has a matrix for each group, it is the origin in the group's. `k`: the group's part of it
    (by default all).
    """

    row: int
    column: int
    group: int = 0
    end: int | None = None
    k: Rows | None = None


@dataclass(frozen=True)
class ForTiles:
    """`body` for every tile of D or, with the tensor `groups`, of every group's rows, or of its D,
    in turn.

    `num_turns` tiles of a block are at work at once: their K loops run one after the other, each
    under the end of the tile before, on math warpgroups and with a buffer for the result of their
    own. With groups the device walks tiles in another order, and may cut the last by rows: no row
    depends on another.
    """

    traversal: Traversal
    body: tuple[Stmt, ...]
    num_turns: int = 1
    groups: Tensor | None = None

    def tiles(self, n: int, groups: Sequence[Rows]) -> Iterator[Tile]:
        """The tiles in order, group by group, so that those of one B are walked together."""
        for group, (begin, end) in enumerate(groups):
            for row, column in self.traversal.tiles(end - begin, n):
                yield Tile(begin + row, column, group, end)

    def tiles_of_parts(self, m: int, n: int, groups: Sequence[Rows]) -> Iterator[Tile]:
        """The same where each group has an m x n matrix of D, and a part of k that may be empty."""
        for group, part in enumerate(groups):
            for row, column in self.traversal.tiles(m, n) if part.begin < part.end else ():
                yield Tile(row, column, group, m, part)


Stmt = Zero | Load | Mma | Promote | Reduce | Evaluate | Quantize | Store | ForK


def walk(stmts: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """Every statement, loops before their bodies."""
    for stmt in stmts:
        yield stmt
        if isinstance(stmt, ForK):
            yield from walk(stmt.body)


def _has_halves(tensor: Tensor) -> bool:
    return any(dim.axis == "h" for dim in tensor.dims)
