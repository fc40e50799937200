"""The verifier of MLA decode: what must hold of a lowered kernel, whoever lowered it.

It walks the program once and keeps, for every buffer, what it holds. What an op reads must have
been written for it, in the same loop or, where it is carried through the loop over keys, before it:

    LoadQueries -> queries                        once, before the loop
    Fill        -> max = -inf, sum = 0, out = 0   before the loop, which carries them
    LoadKeys    -> keys                           in the loop, for every block
    LoadTokens  -> keys                           the same, of an FP8 cache
    Score       -> scores          queries, keys
    Mask        -> masked scores   scores
    MaskTokens  -> masked scores   scores, of sparse decode
    Soften      -> p, factor       masked scores; max, sum
    Attend                         p, keys, factor; out
    Merge       -> merged          max, sum, out, after the loop
    StoreOutput                    merged
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from .dtypes import F32, DType
from .errors import ProblemError, ScheduleError, VerifyError
from .ir import Buffer
from .ir_mla import (
    Attend,
    Fill,
    ForKeys,
    LoadKeys,
    LoadQueries,
    LoadTokens,
    Mask,
    MaskTokens,
    Merge,
    MlaKernel,
    MlaStmt,
    Score,
    Soften,
    Split,
    StoreOutput,
)
from .limits import MAX_BOX, require
from .lower_mla import mla_tensors
from .problem_mla import TOKEN_BYTES, check_mla
from .schedule import SWIZZLE_ATOM_BYTES
from .schedule_mla import (
    BLOCK_KEYS,
    CHUNK_BYTES,
    CHUNK_COLUMNS,
    LOADER_WARPS,
    check_mla_schedule,
    mla_smem_plan,
    num_tiles,
    own_tokens,
    stages_tokens,
)

SWIZZLE_BYTES = 128
NUM_SPLIT_TRIALS = ((0, 1, 64, 65, 1000), (3,), (0, 0), (129,) * 7)  # lengths


def verify_mla(kernel: MlaKernel) -> None:
    """Raise VerifyError, naming the op and the rule, unless `kernel` is sound.

    Checked: every block of keys belongs to one part, and every query row to one tile; every op gets
    what the problem asks of it, in buffers of the right type and shape; boxes are what TMA takes
    and lie within a page; the buffers fit into shared memory as planned.
    """
    try:
        check_mla(kernel.problem)
        check_mla_schedule(kernel.problem, kernel.schedule, kernel.target)
    except (ProblemError, ScheduleError) as error:
        raise VerifyError(f"{kernel.name}: {error}") from error
    tensors = tuple(mla_tensors(kernel.problem).values())
    require(kernel.tensors == tensors, kernel.name, f"takes {kernel.tensors}, not {tensors}")
    _check_split(kernel)
    plan = mla_smem_plan(kernel.problem, kernel.schedule)
    require(kernel.smem == plan, kernel.smem, f"must be {plan}")
    block = _Block(kernel)
    block.run(kernel.body.body)
    require(block.is_stored, kernel.name, "does not store o and lse")
    block.check_smem()


def _check_split(kernel: MlaKernel) -> None:
    """The parts of a few batches cover every block once, in order, and agree on who shares what."""
    body, schedule = kernel.body, kernel.schedule
    split = body.split
    shape = (split, body.tile_rows, body.tiles, body.cluster)
    planned = (
        Split(BLOCK_KEYS, schedule.overhead, schedule.slack, schedule.whole),
        schedule.tile_rows,
        num_tiles(kernel.problem, schedule.tile_rows),
        schedule.cluster,
    )
    require(shape == planned, split, f"is {shape}, the schedule's is {planned}")
    for lengths in NUM_SPLIT_TRIALS:
        for num_parts in (1, 3, 132):
            parts = split.parts(lengths, num_parts)
            seen = [
                (segment.sequence, block, part)
                for part, segments in enumerate(parts)
                for segment in segments
                for block in range(segment.begin, segment.end)
            ]
            expected = [
                (sequence, block)
                for sequence, length in enumerate(lengths)
                for block in range(-(-length // split.block_keys))
            ]
            blocks = [(sequence, block) for sequence, block, _ in seen]
            parts_of = {sequence: part for sequence, _, part in seen}
            is_whole = all(part == parts_of[sequence] for sequence, _, part in seen)
            require(is_whole or not split.whole, split, f"cuts {lengths} in {num_parts} parts")
            require(blocks == expected, split, f"does not cover {lengths} in {num_parts} parts")
            for segment in (segment for segments in parts for segment in segments):
                owners = {part for sequence, _, part in seen if sequence == segment.sequence}
                sharing = range(segment.first_part, segment.first_part + segment.num_parts)
                agree = len(owners) == 1 if split.whole else owners == set(sharing)
                require(not owners or agree, split, f"{segment} is of {owners}")


@dataclass
class _Block:
    """One thread block: what its buffers hold, by name."""

    kernel: MlaKernel
    holds: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)  # by what they hold or held
    in_loop: bool = False
    has_looped: bool = False
    is_stored: bool = False
    waiting_bytes: int = 0  # of tokens of an FP8 cache

    @property
    def rows(self) -> int:
        """Query rows of a tile, those beyond the last one included."""
        return self.kernel.schedule.tile_rows

    def run(self, stmts: tuple[MlaStmt, ...]) -> None:
        for stmt in stmts:
            match stmt:
                case ForKeys():
                    self.loop(stmt)
                case Fill():
                    self.fill(stmt)
                case LoadQueries() | LoadKeys():
                    self.load(stmt)
                case LoadTokens():
                    self.load_tokens(stmt)
                case Score():
                    self.read(stmt, (stmt.a, "queries"), (stmt.b, "keys"))
                    self.write(stmt, "scores", stmt.dst, F32, (self.rows, BLOCK_KEYS))
                case Mask() | MaskTokens():
                    self.mask(stmt)
                case Soften():
                    self.soften(stmt)
                case Attend():
                    self.read(stmt, (stmt.p, "p"), (stmt.values, "keys"), (stmt.factor, "factor"))
                    self.read(stmt, (stmt.out, "out"))
                    for name in (stmt.p.name, stmt.values.name, stmt.factor.name):
                        del self.holds[name]
                case Merge():
                    self.merge(stmt)
                case StoreOutput():
                    self.store(stmt)

    def read(self, op: MlaStmt, *reads: tuple[Buffer, str]) -> None:
        for buffer, what in reads:
            held = self.holds.get(buffer.name, "nothing")
            require(held == what, op, f"{buffer.name} must hold {what}, holds {held}")
            declared = self.buffers[what]
            require(buffer == declared, op, f"{buffer} was written as {declared}")

    def write(
        self,
        op: MlaStmt,
        what: str,
        buffer: Buffer,
        dtype: DType,
        shape: tuple[int, ...],
        *,
        smem: bool = False,
    ) -> None:
        space, swizzle = ("smem", SWIZZLE_BYTES) if smem else ("registers", 0)
        expected = (dtype, shape, space, what == "keys", swizzle)
        got = (buffer.dtype, buffer.shape, buffer.space, buffer.pipelined, buffer.swizzle_bytes)
        require(got == expected, op, f"{buffer} must be {expected}")
        require(what not in self.buffers, op, f"writes {what} a second time")
        taken = buffer.name in (other.name for other in self.buffers.values())
        require(not taken, op, f"overwrites {buffer.name}")
        self.buffers[what], self.holds[buffer.name] = buffer, what

    def loop(self, loop: ForKeys) -> None:
        name = f"for keys by {loop.step}"
        require(not self.in_loop and not self.has_looped, name, "must be the only loop")
        require(loop.step == BLOCK_KEYS, name, f"must step by {BLOCK_KEYS}")
        before = set(self.holds)
        self.in_loop = True
        self.run(loop.body)
        self.in_loop, self.has_looped = False, True
        unread = set(self.holds) - before
        require(not unread, name, f"leaves {', '.join(sorted(unread))} unread")
        require("p" in self.buffers, name, "attends to nothing")

    def fill(self, op: Fill) -> None:
        require(not self.in_loop and not self.has_looped, op, "must come before the loop")
        rows, columns = self.rows, self.kernel.problem.head_dim_v
        if op.value == -math.inf:
            self.write(op, "max", op.dst, F32, (rows,))
        elif len(op.dst.shape) == 1:
            require(op.value == 0, op, "a sum begins at 0")
            self.write(op, "sum", op.dst, F32, (rows,))
        else:
            require(op.value == 0, op, "outputs begin at 0")
            self.write(op, "out", op.dst, F32, (rows, columns))

    def load(self, op: LoadQueries | LoadKeys) -> None:
        problem, tensors = self.kernel.problem, mla_tensors(self.kernel.problem)
        columns = problem.head_dim_qk
        is_keys = isinstance(op, LoadKeys)
        require(self.in_loop == is_keys and not self.has_looped, op, "is in the wrong loop")
        if isinstance(op, LoadKeys):
            require(not problem.is_fp8, op, "cannot load an FP8 cache")
            require(op.src == tensors["kv_cache"], op, "must load the cache")
            require(op.table == tensors["block_table"], op, "must look up the block table")
            require(op.multicast == self.kernel.body.cluster, op, "must be shared by the cluster")
            whole = BLOCK_KEYS % (op.box[0] * op.multicast) == 0
            fits = whole and problem.page % op.box[0] == 0
            require(fits, op, f"boxes of {op.box[0]} keys do not make up blocks and pages")
            self.write(op, "keys", op.dst, problem.dtype, (BLOCK_KEYS, columns), smem=True)
        else:
            require(op.src == tensors["q"], op, "must load the queries")
            need = min(self.rows, problem.num_rows)
            require(op.box[0] == need, op, f"must load {need} rows")
            self.write(op, "queries", op.dst, problem.dtype, (self.rows, columns), smem=True)
        require(0 < op.box[0] <= MAX_BOX, op, f"box {op.box} is too large")
        span = op.box[1] * problem.dtype.size_bytes
        require(span == SWIZZLE_BYTES, op, f"box {op.box} is not one swizzle span wide")
        require(columns % CHUNK_COLUMNS == 0, op, f"{columns} columns are not whole chunks")

    def load_tokens(self, op: LoadTokens) -> None:
        problem, schedule = self.kernel.problem, self.kernel.schedule
        tensors = mla_tensors(problem)
        require(self.in_loop, op, "is in the wrong loop")
        require(problem.is_fp8, op, "decodes a cache that is not FP8")
        where = tensors["indices" if problem.sparse else "block_table"]
        require((op.src, op.where) == (tensors["kv_cache"], where), op, f"must look up {where}")
        require(op.num_warps == LOADER_WARPS, op, f"the producer has {LOADER_WARPS} warps")
        require(op.multicast == self.kernel.body.cluster, op, "must be shared by the cluster")
        room = 0
        require(op.waiting == room, op, f"must have {room} tokens waiting in shared memory")
        self.waiting_bytes = op.waiting * TOKEN_BYTES
        shape = BLOCK_KEYS, problem.head_dim_qk
        self.write(op, "keys", op.dst, problem.dtype, shape, smem=True)

    def mask(self, op: Mask | MaskTokens) -> None:
        self.read(op, (op.scores, "scores"))
        problem, tensors = self.kernel.problem, mla_tensors(self.kernel.problem)
        require(isinstance(op, MaskTokens) == problem.sparse, op, "is not the problem's mask")
        if isinstance(op, MaskTokens):
            require(op.indices == tensors["indices"], op, "must mask by the lists")
        else:
            require(op.lengths == tensors["seqlens_k"], op, "must mask by the lengths")
            require(op.causal == problem.causal, op, "is not the problem's mask")
        self.holds[op.scores.name] = "masked scores"
        self.buffers["masked scores"] = op.scores

    def soften(self, op: Soften) -> None:
        require(self.in_loop, op, "must be in the loop")
        self.read(op, (op.scores, "masked scores"), (op.max, "max"), (op.sum, "sum"))
        del self.holds[op.scores.name]
        self.write(op, "p", op.p, self.kernel.problem.dtype, (self.rows, BLOCK_KEYS))
        self.write(op, "factor", op.factor, F32, (self.rows,))

    def merge(self, op: Merge) -> None:
        require(self.has_looped, op, "must come after the loop")
        meet = self.kernel.schedule.meet
        require(op.meet == meet, op, f"must merge {meet} parts at a time first")
        self.read(op, (op.out, "out"), (op.max, "max"), (op.sum, "sum"))
        for buffer in (op.out, op.max, op.sum):
            what = f"merged {self.holds[buffer.name]}"
            self.holds[buffer.name], self.buffers[what] = what, buffer

    def store(self, op: StoreOutput) -> None:
        self.read(op, (op.out, "merged out"), (op.max, "merged max"), (op.sum, "merged sum"))
        tensors = mla_tensors(self.kernel.problem)
        require((op.o, op.lse) == (tensors["o"], tensors["lse"]), op, "must store o and lse")
        require(op.sink == tensors.get("sink"), op, "must have the problem's sink")
        require(not self.is_stored, op, "stores a second time")
        self.is_stored = True

    def check_smem(self) -> None:
        """The swizzled tiles lie on their boundaries, apart, and hold what is loaded."""
        if self.kernel.problem.is_fp8:
            return
        plan, stages = self.kernel.smem, self.kernel.schedule.num_stages
        end = 0
        for name, offset, size in self.regions(stages):
            require(offset >= end and offset % SWIZZLE_ATOM_BYTES == 0, plan, f"{name} at {offset}")
            end = offset + size
        limit = self.kernel.target.smem_per_block_bytes
        require(end <= plan.states < plan.total_bytes <= limit, plan, f"exceeds {limit} B")
        apart = plan.p > plan.queries or plan.p + CHUNK_BYTES <= plan.keys
        require(apart, plan, f"outputs on their way at {plan.p} meet keys")

    def regions(self, stages: int) -> Iterator[tuple[str, int, int]]:
        plan = self.kernel.smem
        yield "queries", plan.queries, self.buffers["queries"].num_bytes
        yield "keys", plan.keys, stages * self.buffers["keys"].num_bytes
        if plan.p > plan.queries:
            yield "p", plan.p, CHUNK_BYTES
        yield "tokens", plan.tokens, self.waiting_bytes
