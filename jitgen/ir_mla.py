"""The tile IR of MLA decode: the program of one thread block.

    kernel ::= MlaKernel(name, problem, schedule, target, tensors, smem, body)
    body   ::= ForSegments(split, stmt*)
    stmt   ::= ForKeys(step, stmt*) | op
    op     ::= Fill(dst, value)             dst = value
             | LoadQueries(dst, src)        dst = the tile's rows of q
             | LoadKeys(dst, src, table)    dst = the block's keys, where the block table has them;
                                            0 beyond the sequence's end
             | Score(dst, a, b)             dst = a @ b^T, a chain of k16 steps that starts at 0
             | Mask(scores, causal)         -inf for keys that a row must not see
             | MaskTokens(scores, indices)  -inf where a list has no token of the cache
             | Soften(p, scores, ...)       online softmax, see there
             | Attend(out, p, values, ...)  out = out * factor + p @ the first columns of values
             | Merge(out, max, sum)         the parts' results become one, in the order of parts
             | StoreOutput(o, lse, ...)     o = out / sum, lse = log(sum) + max, in natural units
             | an op of ir_mla_fp8          over an FP8 cache

A segment is a range of blocks of one sequence's keys, worked on by one part for every tile of
query rows; Split says which. The order of blocks within a segment, and of parts in a merge, is that
of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .ir import Buffer, MlaTensor
from .ir_mla_fp8 import TokenOp
from .problem_mla import MlaDecode
from .schedule import WARPGROUP_THREADS
from .schedule_mla import MlaSchedule, MlaSmemPlan, registers
from .target import Target

# By which scores may exceed the maximum that p is relative to, in log2: kMaxSlack of
# templates/include/jitgen/mla_softmax.cuh.
MAX_SLACK = 8.0


@dataclass(frozen=True)
class Segment:
    """Blocks [begin, end) of a sequence's keys, of which `num_parts` parts from `first_part` on
    have some. A sequence without keys has one segment, without blocks."""

    sequence: int
    begin: int
    end: int
    first_part: int
    num_parts: int


@dataclass(frozen=True)
class Split:
    """How the keys of all sequences are cut into parts, in the order of sequences.

    A sequence costs one for each of its blocks of `block_keys` keys, one at least, and a part takes
    a range of `span` costs. Of the spans from an equal share on, `slack` are tried. The first with
    which the sequences fit is taken: each into parts of its own, so that all begin where a part
    does; or, if there are more sequences than parts, side by side, and none that begins within a
    part extends beyond it. If none fits, a sequence costs `overhead` more, ahead of its blocks, and
    is cut wherever an equal share ends. If `whole`, it is not cut, and belongs to the part in whose
    range its cost begins. The kernel makes the same plan from the lengths on the device:
    templates/include/jitgen/mla_plan.cuh.
    """

    block_keys: int
    overhead: int
    slack: int
    whole: bool = False

    def parts(self, lengths: Sequence[int], num_parts: int) -> list[list[Segment]]:
        """The segments of every part."""
        blocks = [-(-max(length, 0) // self.block_keys) for length in lengths]
        counts = [max(count, 1) for count in blocks]
        span, lead, unit = self._grid(counts, num_parts)
        parts: list[list[Segment]] = [[] for _ in range(num_parts)]
        position = 0
        for sequence, count in enumerate(blocks):
            first, end = position + lead, position + lead + count
            if self.whole:
                parts[position // span].append(Segment(sequence, 0, count, 0, 1))
                position = first + -(-max(count, 1) // unit) * unit
                continue
            if count == 0:
                parts[position // span].append(Segment(sequence, 0, 0, first // span, 1))
            sharing = range(first // span, (end - 1) // span + 1 if count else 0)
            for part in sharing:
                begin, stop = max(part * span, first), min((part + 1) * span, end)
                parts[part].append(
                    Segment(sequence, begin - first, stop - first, sharing.start, len(sharing))
                )
            position = first + -(-max(count, 1) // unit) * unit
        return parts

    def is_apart(self, lengths: Sequence[int], num_parts: int) -> bool:
        """Whether each sequence has parts of its own, so that a part has one segment at most."""
        blocks = [max(-(-length // self.block_keys), 1) for length in lengths]
        span, _, unit = self._grid(blocks, num_parts)
        return unit == span or len(blocks) == 1

    def _grid(self, blocks: list[int], num_parts: int) -> tuple[int, int, int]:
        """A part's span, what a sequence costs ahead of its blocks, and what these are rounded up
        to a multiple of."""
        total = sum(blocks)
        share = -(-total // num_parts)
        for span in range(share, share + self.slack):
            if len(blocks) <= num_parts:
                if sum(-(-count // span) for count in blocks) <= num_parts:
                    return span, 0, span
            else:
                ends = accumulate(blocks)
                starts = ((end - count) % span for end, count in zip(ends, blocks, strict=True))
                if not any(
                    start > 0 and start + count > span
                    for start, count in zip(starts, blocks, strict=True)
                ):
                    return span, 0, 1
        return -(-(total + len(blocks) * self.overhead) // num_parts), self.overhead, 1

    def __str__(self) -> str:
        note = ", each whole" if self.whole else ""
        return (
            f"blocks of {self.block_keys} keys, overhead {self.overhead}, slack {self.slack}{note}"
        )


@dataclass(frozen=True)
class Fill:
    dst: Buffer
    value: float

    def __str__(self) -> str:
        return f"{self.dst.name} = {self.value:g}"


@dataclass(frozen=True)
class LoadQueries:
    """`box`: rows and columns that one TMA instruction moves."""

    dst: Buffer
    src: MlaTensor
    box: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.dst.name} = load {self.src.name}[sequence, rows:+{self.dst.shape[0]}] via tma"
        )


@dataclass(frozen=True)
class LoadKeys:
    """`box`: as above, within one page."""

    dst: Buffer
    src: MlaTensor
    table: MlaTensor
    box: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.dst.name} = load {self.src.name}[{self.table.name}[sequence, key / page],"
            f" key % page] for key:+{self.dst.shape[0]} via tma"
        )


@dataclass(frozen=True)
class Score:
    dst: Buffer
    a: Buffer
    b: Buffer

    def __str__(self) -> str:
        return f"{self.dst.name} = mma({self.a.name}, {self.b.name})"


@dataclass(frozen=True)
class Mask:
    """Scores of keys from a row's limit on become -inf: the sequence's length, and with `causal`
    one less for each query token that comes after the row's."""

    scores: Buffer
    lengths: MlaTensor
    causal: bool

    def __str__(self) -> str:
        later = " - later tokens" if self.causal else ""
        return f"{self.scores.name} = -inf where key >= {self.lengths.name}[sequence]{later}"


@dataclass(frozen=True)
class MaskTokens:
    """Scores of keys become -inf that a query token's list does not have: beyond its length, or
    no token of the cache (-1, say)."""

    scores: Buffer
    indices: MlaTensor

    def __str__(self) -> str:
        return f"{self.scores.name} = -inf where {self.indices.name}[token, key] is no token"


@dataclass(frozen=True)
class Soften:
    """Online softmax, in units of log2; scale = softmax_scale * log2(e), a run-time float32:

    highest = rowmax(scores) * scale; top = highest if highest > max + MAX_SLACK, else max;
    factor = 2^(max - top); max = top;
    e = 2^(scores * scale - top); sum = sum * factor + rowsum(e); p = e rounded to p's dtype.
    Where top is -inf (no keys so far), 0 takes its place in the differences. So e and p are
    2^MAX_SLACK at most, and sums and outputs are hardly ever scaled.
    """

    p: Buffer
    scores: Buffer
    max: Buffer
    sum: Buffer
    factor: Buffer

    def __str__(self) -> str:
        p, scores, top = self.p.name, self.scores.name, self.max.name
        return (
            f"{top}, {self.factor.name} = max({top}, scale * {scores}) if that is more than"
            f" {MAX_SLACK:g} above, 2^(old - new);"
            f" {p} = 2^(scale * {scores} - {top}); {self.sum.name} += rowsum({p})"
        )


@dataclass(frozen=True)
class Attend:
    out: Buffer
    p: Buffer
    values: Buffer
    factor: Buffer

    def __str__(self) -> str:
        out, columns = self.out.name, self.out.shape[1]
        return (
            f"{out} = {out} * {self.factor.name} + mma({self.p.name},"
            f" {self.values.name}[:, :{columns}]^T)"
        )


@dataclass(frozen=True)
class Merge:
    """The parts that share the sequence give their results to each other.

    meet : 2 if parts 2 i and 2 i + 1 first merge theirs, in the shared memory of their cluster,
        where each sequence has parts of its own
    """

    out: Buffer
    max: Buffer
    sum: Buffer
    meet: int

    def __str__(self) -> str:
        note = ", pairs first" if self.meet > 1 else ""
        return f"{self.out.name}, {self.max.name}, {self.sum.name} = merge over the parts{note}"


@dataclass(frozen=True)
class StoreOutput:
    """A row without keys: o = 0 and lse = +inf. With a sink of its head, a row's sum has e^sink
    more where o is divided by it; lse is without."""

    o: MlaTensor
    lse: MlaTensor
    sink: MlaTensor | None
    out: Buffer
    max: Buffer
    sum: Buffer

    def __str__(self) -> str:
        more = f"({self.sum.name} + e^sink)" if self.sink else self.sum.name
        return (
            f"store {self.o.name} = {self.out.name} / {more},"
            f" {self.lse.name} = ln(2^{self.max.name} * {self.sum.name})"
        )


@dataclass(frozen=True)
class ForKeys:
    """`body` for each `step` keys of the segment, ascending."""

    step: int
    body: tuple[MlaStmt, ...]


@dataclass(frozen=True)
class ForSegments:
    """`body` for each segment of the part, for a tile of `tile_rows` query rows.

    `tiles` blocks work on the tiles of a part.
    """

    split: Split
    tile_rows: int
    tiles: int
    body: tuple[MlaStmt, ...]


MlaStmt = (
    Fill
    | LoadQueries
    | LoadKeys
    | Score
    | Mask
    | MaskTokens
    | Soften
    | Attend
    | Merge
    | StoreOutput
    | TokenOp
    | ForKeys
)


@dataclass(frozen=True)
class MlaParameter:
    """A kernel argument: its name and C++ declaration."""

    name: str
    cuda: str


@dataclass(frozen=True)
class MlaKernel:
    """A lowered kernel: what the interpreter runs, the template renders and the verifier checks."""

    name: str
    family: str
    problem: MlaDecode
    schedule: MlaSchedule
    target: Target
    tensors: tuple[MlaTensor, ...]
    smem: MlaSmemPlan
    body: ForSegments

    @property
    def num_threads(self) -> int:
        """Threads of a block: the math warpgroups and the producer's."""
        return WARPGROUP_THREADS * len(registers(self.problem))

    @property
    def parameters(self) -> tuple[MlaParameter, ...]:
        """The kernel's arguments, in order."""
        fp8, sparse = self.problem.is_fp8, self.problem.sparse
        maps = () if fp8 else ("map_q", "map_kv")
        where = ("indices", "topk_length") if sparse else ("block_table", "seqlens_k")
        pointers = {
            **({"q": f"const {self.problem.dtype.cuda}*", "kv_cache": "const u8*"} if fp8 else {}),
            **dict.fromkeys(where, "const int*"),
            "o": f"{self.problem.dtype.cuda}*",
            "lse": "float*",
            "partial_out": "float*",
            "partial_states": "float*",
            "counters": "u32*",
            **({"sink": "const float*"} if self.problem.sink else {}),
        }
        strides = ("indices_stride", "num_tokens", "topk") if sparse else ("block_table_stride",)
        pitch = ("pitch_q",) if fp8 else ()
        scalars = (*pitch, "num_sequences", *strides, "page_rows", "scale_log2")
        return (
            *(MlaParameter(name, f"const __grid_constant__ TensorMap {name}") for name in maps),
            *(MlaParameter(name, f"{kind} {name}") for name, kind in pointers.items()),
            *(MlaParameter(name, f"u32 {name}") for name in scalars),
        )

    def __str__(self) -> str:
        body = self.body
        lines = [f"kernel {self.name}({', '.join(map(str, self.tensors))})"]
        lines += [f"  schedule {self.schedule}", f"  smem {self.smem.total_bytes} B"]
        lines.append(f"  for segment of the part ({body.split}), rows:+{body.tile_rows}:")
        lines += _format(body.body, 4)
        return "\n".join(lines)


def walk_mla(stmts: tuple[MlaStmt, ...]) -> Iterator[MlaStmt]:
    """Every statement, loops before their bodies."""
    for stmt in stmts:
        yield stmt
        if isinstance(stmt, ForKeys):
            yield from walk_mla(stmt.body)


def _format(stmts: tuple[MlaStmt, ...], indent: int) -> list[str]:
    lines = []
    for stmt in stmts:
        if isinstance(stmt, ForKeys):
            lines.append(f"{' ' * indent}for keys of the segment by {stmt.step}:")
            lines += _format(stmt.body, indent + 2)
        else:
            lines.append(f"{' ' * indent}{stmt}")
    return lines
