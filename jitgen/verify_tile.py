"""The verifier of a tile's program: of a GEMM, dense or grouped.

It walks the program once and keeps, for every buffer, what it holds. A buffer is written once, as
the problem and the loops around it demand, and what it holds is read once, where it is still of the
tile or K block at hand:

    Load      -> tile of a, tile of b     in the inner K loop, for every K block
    Load      -> tile of sfa, tile of sfb in the outer K loop, for as many K blocks as it steps over
    Mma       -> product                  tile of a, tile of b
    Zero      -> zeros                    before the K loops
    Promote   -> sums                     zeros, product, tile of sfa, tile of sfb
    Reduce    -> sums                     partial sums, where blocks share the k of a tile
    Evaluate  -> result                   sums, after the K loops; values, if D has scales
    Quantize  -> result                   values
    Store                                 result
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .dtypes import E4M3, F32
from .errors import VerifyError
from .expr import operands
from .ir import (
    Axis,
    Buffer,
    Dim,
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
    Window,
    Zero,
)
from .kernel import Kernel
from .limits import check_tma, require
from .problem import D_SCALE, adds_to_d, is_k_grouped
from .schedule import BLOCK_K, SCALE_BLOCKS, part_columns, slice_columns, split_blocks

SWIZZLE_BYTES = 128  # of the tiles that wgmma reads, whose descriptors say so
SWIZZLE_SPANS = (32, 64, 128)


@dataclass(frozen=True)
class _Value:
    """What `buffer` holds, written in a loop nest of `depth`."""

    what: str
    buffer: Buffer
    depth: int

    def __str__(self) -> str:
        return f"{self.what}, written {self.depth} loops deep"


@dataclass
class Block:
    """One thread block at work on one tile: the tile's size in each axis and the values at hand."""

    kernel: Kernel
    tensors: dict[str, Tensor]
    tile: dict[Axis, int]
    depth: int = 0  # loops of one block's k around the op at hand
    is_part: bool = False  # whether blocks share k, and the op at hand is one block's
    values: dict[str, _Value] = field(default_factory=dict)  # by buffer
    written: dict[str, Buffer] = field(default_factory=dict)  # by what they hold or held

    def run(self, stmts: tuple[Stmt, ...]) -> None:
        for stmt in stmts:
            match stmt:
                case ForK():
                    if stmt.num_blocks == 1:
                        self.loop(stmt)
                    else:
                        self.split(stmt)
                case Zero():
                    require(self.depth == 0, stmt, "must come before the K loop")
                    self.write(stmt, "zeros", stmt.dst, self.accumulator(stmt.dst))
                case Load():
                    self.load(stmt)
                case Mma():
                    self.mma(stmt)
                case Promote():
                    self.promote(stmt)
                case Reduce():
                    self.reduce(stmt)
                case Evaluate():
                    self.evaluate(stmt)
                case Quantize():
                    self.quantize(stmt)
                case Store():
                    self.store(stmt)

    def write(self, op: Stmt, what: str, buffer: Buffer, expected: Buffer) -> None:
        """`buffer`, which must be as expected, holds `what` from here to the end of the loop."""
        _require_same(buffer, expected, op)
        self.claim(op, what, buffer)
        self.values[buffer.name] = _Value(what, buffer, self.depth)

    def claim(self, op: Stmt, what: str, buffer: Buffer) -> None:
        """`buffer` is for `what` only."""
        require(what not in self.written, op, f"writes {what} a second time")
        names = [other.name for other in self.written.values()]
        require(buffer.name not in names, op, f"overwrites {buffer.name}")
        self.written[what] = buffer

    def read(self, op: Stmt, what: str, buffer: Buffer, depth: int) -> None:
        """`buffer` holds `what`, which was written `depth` loops deep; nobody else reads it."""
        value = self.values.pop(buffer.name, None)
        if value is None or (value.what, value.depth) != (what, depth):
            raise VerifyError(f"{op}: {buffer.name} must hold {what}, holds {value or 'nothing'}")
        _require_same(buffer, value.buffer, op)

    def end(self, op: str) -> None:
        """What was written in the loop that ends here, or in the tile, was read there."""
        for value in self.values.values():
            require(value.depth < self.depth, op, f"{value.buffer.name} is unread: {value}")

    def split(self, loop: ForK) -> None:
        """The loop whose steps are those of the blocks of a cluster."""
        problem, schedule = self.kernel.problem, self.kernel.schedule
        name = f"for {loop.extent} of k by {loop.step} on {loop.num_blocks} blocks"
        require(self.depth == 0 and not self.is_part, name, "must be the outermost loop")
        before = ", ".join(self.values)
        require(not before, name, f"must come before {before} is written: each part begins anew")
        require(loop.num_blocks == schedule.split_k, name, f"must be on {schedule.split_k}")
        step, extent = split_blocks(problem, schedule) * BLOCK_K, self.tile["k"]
        require((loop.extent, loop.step) == (extent, step), name, f"must be {extent} by {step}")
        self.tile["k"], self.is_part = loop.step, True
        self.run(loop.body)
        self.tile["k"], self.is_part = extent, False
        unread = [value for value in self.values.values() if value.what != "sums"]
        require(not unread and "sums" in self.written, name, "must leave the sums and only them")

    def reduce(self, op: Reduce) -> None:
        require(self.is_part and self.depth == 0, op, "must come after one block's part of k")
        self.read(op, "partial sums", op.src, 0)
        senders, columns = self.kernel.schedule.split_k - 1, slice_columns(self.kernel.schedule)
        shape = (senders, self.kernel.schedule.mma_tile[0], columns)
        _require_same(op.inbox, Buffer(op.inbox.name, F32, shape, "smem"), op)
        self.claim(op, "inbox", op.inbox)
        self.write(op, "sums", op.dst, self.accumulator(op.dst))

    def loop(self, loop: ForK) -> None:
        name, around = f"for {loop.extent} of k by {loop.step}", self.tile["k"]
        require(loop.extent == around, name, f"covers {loop.extent} of {around} positions of k")
        require(loop.step > 0, name, "must step forwards")
        # Only the last step of the outermost loop may be cut short, by the end of k.
        require(self.depth == 0 or around % loop.step == 0, name, f"does not divide {around}")
        require(bool(loop.body), name, "is empty")
        self.tile["k"], self.depth = loop.step, self.depth + 1
        self.run(loop.body)
        self.end(name)
        self.tile["k"], self.depth = around, self.depth - 1

    def windows(self, tensor: Tensor) -> tuple[Window, ...]:
        """Those of the tile and K block at hand, in the part of the tensor that is its group's."""
        dims = (dim for dim in tensor.dims if dim.axis not in ("g", "h"))
        return tuple(Window(dim.axis, self.tile[dim.axis], dim.block) for dim in dims)

    def accumulator(self, buffer: Buffer) -> Buffer:
        """What an accumulator called like `buffer` must be."""
        columns = self.tile["n"] * self.kernel.problem.num_halves
        return Buffer(buffer.name, F32, (self.tile["m"], columns), "registers")

    def load(self, op: Load) -> None:
        name = op.src.name
        require(name in ("a", "b", "sfa", "sfb"), op, f"{name} is not loaded into a buffer")
        _require_same(op.src, self.tensors[name], op)
        windows = self.windows(op.src)
        require(op.windows == windows, op, f"the tile is [{', '.join(map(str, windows))}]")
        is_tile = name in ("a", "b")
        require(self.depth == (2 if is_tile else 1), op, f"is {self.depth} loops of k deep")
        via = "tma" if is_tile else "registers"
        require(op.via == via, op, f"must be loaded via {via}")
        # Blocks side by side along n share the rows of A, those along m the rows of B.
        schedule = self.kernel.schedule
        sharing = schedule.cluster_n if name == "a" else schedule.cluster_m
        shares = sharing if is_tile else 1
        require(op.multicast == shares, op, f"must be multicast {shares}")
        by_row = name in ("sfa", "sfb") and op.src.dims[-2].block == 1
        require(op.any_strides == by_row, op, "scales of every row have any strides, no others")
        rows, width = map(_num_elements, windows, op.src.dims[-2:])
        shape = rows * (2 if any(dim.axis == "h" for dim in op.src.dims) else 1), width
        swizzle_bytes = SWIZZLE_BYTES if is_tile else 0
        expected = Buffer(op.dst.name, op.src.dtype, shape, "smem", True, swizzle_bytes)
        self.write(op, f"tile of {name}", op.dst, expected)
        if is_tile:
            # A share of the tile must begin on a swizzle atom of 8 rows.
            require(shape[0] % (8 * op.multicast) == 0, op, f"{shape[0]} rows cannot be split")
            require(op.box[0] % 8 == 0, op, f"boxes of {op.box[0]} rows split swizzle atoms")
            check_tma(op, op.src, op.dst, op.box)
        else:
            chunk = SCALE_BLOCKS * BLOCK_K
            require(windows[1].size == chunk, op, f"must take the scales of {chunk} of k")

    def mma(self, op: Mma) -> None:
        for buffer, name in ((op.a, "a"), (op.b, "b")):
            self.read(op, f"tile of {name}", buffer, self.depth)
            require(buffer.dtype == E4M3, op, f"{name} is {buffer.dtype}, wgmma takes {E4M3}")
        schedule = self.kernel.schedule
        require(op.swap_ab == schedule.swap_ab, op, f"swap_ab must be {schedule.swap_ab}")
        columns = part_columns(self.kernel.problem, schedule) or 0
        tile = (self.tile["m"], self.tile["n"] * self.kernel.problem.num_halves)
        wide, narrow = tile[::-1] if op.swap_ab else tile
        require(
            wide % 64 == 0
            and columns in range(8, 257, 8)
            and narrow % columns == 0
            and self.tile["k"] % 32 == 0,
            op,
            f"no wgmma of {columns} columns computes this tile",
        )
        self.write(op, "product", op.dst, self.accumulator(op.dst))

    def promote(self, op: Promote) -> None:
        sfa, sfb = self.tensors["sfa"], self.tensors["sfb"]
        self.read(op, "product", op.part, self.depth)
        self.read(op, "zeros", op.acc, 0)
        require(len(op.scales) == 2, op, "takes two scales")
        for buffer, tensor in zip(op.scales, (sfa, sfb), strict=True):
            self.read(op, f"tile of {tensor.name}", buffer, self.depth - 1)
        require(
            self.is_part == (self.kernel.schedule.split_k > 1),
            op,
            "blocks do not share k as planned",
        )
        windows = (self.windows(sfa)[0], self.windows(sfb)[0])
        require(op.windows == windows, op, f"scales by {', '.join(map(str, windows))}")
        require(
            self.tile["k"] == sfa.dims[-1].block == sfb.dims[-1].block == BLOCK_K,
            op,
            f"takes one scale for {self.tile['k']} of k",
        )
        # The sums are those of the whole k, or part, where the loops from zeros on have ended.
        what = "partial sums" if self.is_part else "sums"
        self.written[what] = op.acc
        self.values[op.acc.name] = _Value(what, op.acc, 0)

    def evaluate(self, op: Evaluate) -> None:
        problem = self.kernel.problem
        require(self.depth == 0 and not self.is_part, op, "must come after the K loop")
        self.read(op, "sums", op.src, 0)
        require(op.expr == problem.epilogue, op, f"the epilogue is {problem.epilogue}")
        tensors = tuple(self.tensors[operand.name] for operand in operands(op.expr))
        require(op.operands == tensors, op, f"reads {', '.join(map(str, tensors)) or 'nothing'}")
        shape = (self.tile["m"], self.tile["n"])
        if problem.is_quantized:
            self.write(op, "values", op.dst, Buffer(op.dst.name, F32, shape, "registers"))
        else:
            self.write_result(op, op.dst)

    def quantize(self, op: Quantize) -> None:
        problem = self.kernel.problem
        require(problem.is_quantized, op, "D has no scales")
        self.read(op, "values", op.src, 0)
        _require_same(op.scales, self.tensors["sfd"], op)
        windows = self.windows(op.scales)
        require(op.windows == windows, op, f"the tile is [{', '.join(map(str, windows))}]")
        require(self.tile["n"] % D_SCALE.k == 0, op, "a block of 128 columns is not of one tile")
        require(op.power_of_two == problem.ue8m0, op, "rounds scales otherwise than the problem")
        self.write_result(op, op.dst)

    def write_result(self, op: Evaluate | Quantize, buffer: Buffer) -> None:
        problem, shape = self.kernel.problem, (self.tile["m"], self.tile["n"])
        span = buffer.swizzle_bytes
        require(span in SWIZZLE_SPANS, op, f"swizzles {buffer.name} over {span} bytes")
        expected = Buffer(buffer.name, problem.d_dtype, shape, "smem", swizzle_bytes=span)
        self.write(op, "result", buffer, expected)

    def store(self, op: Store) -> None:
        require(self.depth == 0, op, "must come after the K loop")
        self.read(op, "result", op.src, 0)
        _require_same(op.dst, self.tensors["d"], op)
        windows = self.windows(op.dst)
        require(op.windows == windows, op, f"the tile is [{', '.join(map(str, windows))}]")
        schedule = self.kernel.schedule
        columns = op.src.swizzle_bytes // op.src.dtype.size_bytes
        # Who stores what: a warpgroup its rows, a block of a split cluster its slice of the columns
        # of wgmma, which are the tile's rows if A and B are swapped.
        of_warpgroup = schedule.mma_tile[0] // schedule.tile_warpgroups
        columns_of_mma = schedule.mma_tile[1] // self.kernel.problem.num_halves
        of_block = math.gcd(columns_of_mma, slice_columns(schedule))
        parts = (of_block, of_warpgroup) if schedule.swap_ab else (of_warpgroup, of_block)
        require(op.box == (parts[0], columns), op, f"box {op.box} must be ({parts[0]}, {columns})")
        require(parts[1] % columns == 0, op, f"boxes of {columns} columns do not tile {parts[1]}")
        check_tma(op, op.dst, op.src, op.box)
        problem = self.kernel.problem
        must = "must add to D in float32 where groups are parts of k, and there only"
        require(op.adds == adds_to_d(problem), op, must)
        by_row = "groups" in self.tensors and not is_k_grouped(problem)
        require(op.by_row == by_row, op, "must write by row at a group's end, and there only")


def _require_same(got: Buffer | Tensor, expected: Buffer | Tensor, op: object) -> None:
    for name, value in vars(expected).items():
        actual = getattr(got, name)
        require(actual == value, op, f"{got.name} has {name} {actual}, must have {value}")


def _num_elements(window: Window, dim: Dim) -> int:
    """Elements that a buffer holds of a window: all, but of blocked rows those within the tensor.

    Tiles begin at multiples of their size: one that begins inside a block may touch one more.
    """
    if window.block == 1 or window.axis == "k":
        return -(-window.size // window.block)
    period = math.lcm(window.size, window.block)
    end = dim.extent or period
    return max(
        (min(start + window.size, end) - 1) // window.block - start // window.block + 1
        for start in range(0, min(end, period), window.size)
    )
