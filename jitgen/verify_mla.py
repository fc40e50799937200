"""The verifier of MLA decode: what must hold of a lowered kernel, whoever lowered it.

It walks the program once and keeps, for every buffer, what it holds. What an op reads must have
been written for it, in the same loop or, where it is carried through the loop over keys, before it:

    LoadQueries -> queries                        once, before the loop
    Fill        -> max = -inf, sum = 0, out = 0   before the loop, which carries them
    LoadKeys    -> keys                           in the loop, for every block
    Score       -> scores          queries, keys
    Mask        -> masked scores   scores
    MaskTokens  -> masked scores   scores, of sparse decode
    Soften      -> p, factor       masked scores; max, sum
    Attend                         p, keys, factor; out
    Merge       -> merged          max, sum, out, after the loop
    StoreOutput                    merged

Over an FP8 cache, where max begins at NO_MAX, and exponent is carried, too, -inf at first:

    ScaleQueries -> queries, query tail, unit     once, before the loop
    LoadTokens   -> codes, tail, ratios, units    in the loop, for every block
    ScoreTokens  -> scores          queries, query tail; all of the tokens
    WeighTokens  -> weights, growth units; exponent
    SoftenTokens -> weighted p, factor  masked scores, unit, weights, growth; max, sum
    AttendTokens                    weighted p, codes, ratios, factor; out
    Settle       -> settled out     out, max, sum, exponent, after the loop; for Merge
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from .dtypes import BF16, E4M3, F16, F32, DType
from .errors import ProblemError, ScheduleError, VerifyError
from .ir import Buffer
from .ir_mla import (
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
    Soften,
    Split,
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
from .limits import MAX_BOX, require
from .lower_mla import mla_tensors
from .problem_mla import check_mla
from .schedule import SWIZZLE_ATOM_BYTES
from .schedule_mla import (
    BLOCK_KEYS,
    CHUNK_COLUMNS,
    TOKEN_BLOCK_BYTES,
    check_mla_schedule,
    mla_smem_plan,
    num_tiles,
)
from .tokens_mla import CODES, NO_MAX, NUM_SCALES

SWIZZLE_BYTES = 128
TOKEN_PARTS = ("codes", "tail", "ratios", "units")  # fields of Tokens
# By what a buffer holds, if it is in shared memory: whether it has stages, and its swizzle.
IN_SMEM = {
    "queries": (False, SWIZZLE_BYTES),
    "query tail": (False, SWIZZLE_BYTES),
    "keys": (True, SWIZZLE_BYTES),
    "weighted p": (True, SWIZZLE_BYTES),
    **dict.fromkeys(TOKEN_PARTS, (True, 0)),
}
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
    shape = (split, body.tile_rows, body.tiles)
    planned = (
        Split(BLOCK_KEYS, schedule.overhead, schedule.slack, schedule.whole),
        schedule.tile_rows,
        num_tiles(kernel.problem, schedule.tile_rows),
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
    ) -> None:
        space = "smem" if what in IN_SMEM else "registers"
        expected = (dtype, shape, space, *IN_SMEM.get(what, (False, 0)))
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
        require("factor" in self.buffers, name, "attends to nothing")

    def fill(self, op: Fill) -> None:
        require(not self.in_loop and not self.has_looped, op, "must come before the loop")
        rows, columns = self.rows, self.kernel.problem.head_dim_v
        is_fp8 = self.kernel.problem.is_fp8
        if op.dst.shape == (1,):
            require(is_fp8 and op.value == -math.inf, op, "an exponent begins at -inf")
            self.write(op, "exponent", op.dst, F32, (1,))
        elif op.value == (NO_MAX if is_fp8 else -math.inf):
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
        require(not problem.is_fp8, op, "cannot load for an FP8 cache")
        if isinstance(op, LoadKeys):
            require(op.src == tensors["kv_cache"], op, "must load the cache")
            require(op.table == tensors["block_table"], op, "must look up the block table")
            fits = BLOCK_KEYS % op.box[0] == problem.page % op.box[0] == 0
            require(fits, op, f"boxes of {op.box[0]} keys do not make up blocks and pages")
            self.write(op, "keys", op.dst, problem.dtype, (BLOCK_KEYS, columns))
        else:
            require(op.src == tensors["q"], op, "must load the queries")
            need = min(self.rows, problem.num_rows)
            require(op.box[0] == need, op, f"must load {need} rows")
            self.write(op, "queries", op.dst, problem.dtype, (self.rows, columns))
        require(0 < op.box[0] <= MAX_BOX, op, f"box {op.box} is too large")
        span = op.box[1] * problem.dtype.size_bytes
        require(span == SWIZZLE_BYTES, op, f"box {op.box} is not one swizzle span wide")
        require(columns % CHUNK_COLUMNS == 0, op, f"{columns} columns are not whole chunks")

    def scale_queries(self, op: ScaleQueries) -> None:
        problem = self.kernel.problem
        require(not self.in_loop and not self.has_looped, op, "must come before the loop")
        require(problem.is_fp8, op, "scales for a cache that is not FP8")
        require(op.src == mla_tensors(problem)["q"], op, "must load the queries")
        rest = problem.head_dim_qk - CODES
        self.write(op, "queries", op.dst, F16, (self.rows, CODES))
        self.write(op, "query tail", op.tail, BF16, (self.rows, rest))
        self.write(op, "unit", op.unit, F32, (1,))

    def load_tokens(self, op: LoadTokens) -> None:
        problem = self.kernel.problem
        tensors, tokens = mla_tensors(problem), op.tokens
        require(self.in_loop, op, "is in the wrong loop")
        require(problem.is_fp8, op, "loads tokens of a cache that is not FP8")
        where = tensors["indices" if problem.sparse else "block_table"]
        require((op.src, op.where) == (tensors["kv_cache"], where), op, f"must look up {where}")
        rest = problem.head_dim_qk - CODES
        self.write(op, "codes", tokens.codes, E4M3, (BLOCK_KEYS, CODES))
        self.write(op, "tail", tokens.tail, BF16, (BLOCK_KEYS, rest))
        self.write(op, "ratios", tokens.ratios, F16, (BLOCK_KEYS, NUM_SCALES))
        self.write(op, "units", tokens.units, F32, (BLOCK_KEYS,))

    def read_tokens(self, op: MlaStmt, tokens: Tokens) -> None:
        for what in TOKEN_PARTS:
            self.read(op, (getattr(tokens, what), what))

    def score_tokens(self, op: ScoreTokens) -> None:
        self.read(op, (op.queries, "queries"), (op.query_tail, "query tail"))
        self.read_tokens(op, op.tokens)
        self.write(op, "scores", op.dst, F32, (self.rows, BLOCK_KEYS))

    def weigh_tokens(self, op: WeighTokens) -> None:
        require(self.in_loop, op, "must be in the loop")
        self.read(op, (op.units, "units"), (op.exponent, "exponent"))
        self.write(op, "weights", op.weights, F32, (BLOCK_KEYS,))
        self.write(op, "growth", op.growth, F32, (1,))

    def soften_tokens(self, op: SoftenTokens) -> None:
        require(self.in_loop, op, "must be in the loop")
        self.read(op, (op.scores, "masked scores"), (op.max, "max"), (op.sum, "sum"))
        self.read(op, (op.unit, "unit"), (op.weights, "weights"), (op.growth, "growth"))
        for buffer in (op.scores, op.weights, op.growth):
            del self.holds[buffer.name]
        self.write(op, "weighted p", op.p, F16, (self.rows, BLOCK_KEYS))
        self.write(op, "factor", op.factor, F32, (self.rows,))

    def attend_tokens(self, op: AttendTokens) -> None:
        self.read(op, (op.p, "weighted p"), (op.factor, "factor"), (op.out, "out"))
        self.read_tokens(op, op.tokens)
        tokens = (getattr(op.tokens, what) for what in TOKEN_PARTS)
        for buffer in (op.p, op.factor, *tokens):
            del self.holds[buffer.name]

    def settle(self, op: Settle) -> None:
        require(self.has_looped, op, "must come after the loop")
        self.read(op, (op.out, "out"), (op.max, "max"), (op.sum, "sum"))
        self.read(op, (op.exponent, "exponent"))
        self.holds[op.out.name], self.buffers["settled out"] = "settled out", op.out

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
        out = "settled out" if self.kernel.problem.is_fp8 else "out"
        self.read(op, (op.out, out), (op.max, "max"), (op.sum, "sum"))
        for buffer, what in ((op.out, "out"), (op.max, "max"), (op.sum, "sum")):
            self.holds[buffer.name] = f"merged {what}"
            self.buffers[f"merged {what}"] = buffer

    def store(self, op: StoreOutput) -> None:
        self.read(op, (op.out, "merged out"), (op.max, "merged max"), (op.sum, "merged sum"))
        tensors = mla_tensors(self.kernel.problem)
        require((op.o, op.lse) == (tensors["o"], tensors["lse"]), op, "must store o and lse")
        require(op.sink == tensors.get("sink"), op, "must have the problem's sink")
        require(not self.is_stored, op, "stores a second time")
        self.is_stored = True

    def check_smem(self) -> None:
        """The swizzled tiles lie on their boundaries, and all buffers have the room they need."""
        plan, sizes, offsets = (
            self.kernel.smem,
            dict(self.kernel.smem.sizes),
            self.kernel.smem.offsets,
        )
        for name, need, is_swizzled in self.regions():
            require(sizes[name] >= need, plan, f"{name} need {need} B")
            aligned = offsets[name] % SWIZZLE_ATOM_BYTES == 0
            require(aligned or not is_swizzled, plan, f"{name} at {offsets[name]}")
        limit = self.kernel.target.smem_per_block_bytes
        require(plan.total_bytes <= limit, plan, f"exceeds {limit} B")

    def regions(self) -> Iterator[tuple[str, int, bool]]:
        """Of a buffer in shared memory: its name, the bytes it needs, whether it is swizzled."""
        stages, held = self.kernel.schedule.num_stages, self.buffers
        if not self.kernel.problem.is_fp8:
            yield "queries", held["queries"].num_bytes, True
            yield "keys", stages * held["keys"].num_bytes, True
            return
        yield "queries", held["queries"].num_bytes + held["query tail"].num_bytes, True
        yield "p", 2 * held["weighted p"].num_bytes, True
        in_cache = held["codes"].num_bytes + held["tail"].num_bytes
        yield "tokens", stages * (in_cache + BLOCK_KEYS * NUM_SCALES * F32.size_bytes), False
        described = held["ratios"].num_bytes + held["units"].num_bytes
        require(described <= TOKEN_BLOCK_BYTES, self.kernel.smem, f"{described} B of a block")
        yield "token_blocks", stages * TOKEN_BLOCK_BYTES, False
