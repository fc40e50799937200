"""The verifier: sound kernels pass, and every way of breaking one is caught.

Each mutation changes a lowered kernel by hand, as a fault in lowering would, and breaks a promise
of `verify`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from jitgen import BF16, F32, Gemm, Schedule, acc, matrix, vector
from jitgen.errors import VerifyError
from jitgen.ir import (
    Dim,
    Evaluate,
    ForK,
    Load,
    Mma,
    Promote,
    Reduce,
    Stmt,
    Store,
    Tensor,
    Window,
    Zero,
    walk,
)
from jitgen.kernel import Kernel
from jitgen.lower import lower
from jitgen.target import SM90A
from jitgen.traversal import Traversal
from jitgen.verify import verify

Edit = Callable[[Any], "Stmt | tuple[Stmt, ...]"]
Mutation = Callable[[Kernel], Kernel]

EPILOGUE = acc + vector("bias") + matrix("residual")
# 128 x 96 tiles, 2192 = 17.125 K blocks: two rows of sfb, ragged ends of n and k, scales in chunks.
KERNEL = lower(Gemm(456, 2192, BF16, EPILOGUE), Schedule(128, 96, 3, 2))
SQUARE = lower(Gemm(512, 1024, F32), Schedule(128, 128, 3, 2))
CLUSTER = lower(Gemm(576, 2192), Schedule(128, 128, 3, 2, 2, 1))
# Of 18 K blocks 5, 5, 5 and 3; of 96 columns 32, 32, 32 and none.
SPLIT = lower(Gemm(456, 2192, BF16, EPILOGUE), Schedule(128, 96, 3, 2, split_k=4))
# Of 24 rows 16 and 8.
SWAPPED_SPLIT = lower(
    Gemm(456, 2192, BF16, EPILOGUE), Schedule(24, 128, 3, 2, split_k=2, swap_ab=True)
)
SWAPPED = lower(Gemm(456, 2192, BF16, EPILOGUE), Schedule(24, 128, 3, 2, swap_ab=True))
PINGPONG = lower(Gemm(456, 2192, BF16, EPILOGUE), Schedule(128, 96, 3, 2, pingpong=True))
VARIANTS = {
    "whole": KERNEL,
    "split": SPLIT,
    "swapped": SWAPPED,
    "swapped split": SWAPPED_SPLIT,
    "pingpong": PINGPONG,
}


# --- editing ------------------------------------------------------------------------------------


def edit(kernel: Kernel, kind: type, change: Edit, name: str = "") -> Kernel:
    """`kernel` with each op of `kind` (and of that source or position) replaced by `change(op)`."""
    count = 0

    def visit(stmts: Iterable[Stmt]) -> tuple[Stmt, ...]:
        nonlocal count
        out: list[Stmt] = []
        for stmt in stmts:
            if isinstance(stmt, kind) and name in ("", _name(stmt)):
                changed = change(stmt)
                count += 1
                out += changed if isinstance(changed, tuple) else (changed,)
            elif isinstance(stmt, ForK):
                out.append(replace(stmt, body=visit(stmt.body)))
            else:
                out.append(stmt)
        return tuple(out)

    mutated = replace(kernel, body=replace(kernel.body, body=visit(kernel.body.body)))
    assert count, f"no {kind.__name__} {name} to change"
    return mutated


def _name(stmt: Stmt) -> str:
    if isinstance(stmt, Load):
        return stmt.src.name
    return "inner" if isinstance(stmt, ForK) and not _loops(stmt.body) else ""


def _loops(stmts: Iterable[Stmt]) -> list[ForK]:
    return [stmt for stmt in stmts if isinstance(stmt, ForK)]


def set_op(kind: type, name: str = "", **fields: Any) -> Mutation:
    return lambda kernel: edit(kernel, kind, lambda op: replace(op, **fields), name)


def drop(kind: type, name: str = "") -> Mutation:
    return lambda kernel: edit(kernel, kind, lambda op: (), name)


def set_buffer(kind: type, field: str, name: str = "", **fields: Any) -> Mutation:
    """Changes fields of one buffer operand of an op, there only."""

    def change(op: Any) -> Any:
        return replace(op, **{field: replace(getattr(op, field), **fields)})

    return lambda kernel: edit(kernel, kind, change, name)


def set_window(kind: type, index: int, name: str = "", **fields: Any) -> Mutation:
    def change(op: Any) -> Any:
        windows = list(op.windows)
        windows[index] = replace(windows[index], **fields)
        return replace(op, windows=tuple(windows))

    return lambda kernel: edit(kernel, kind, change, name)


def set_windows(
    kind: type, name: str, make: Callable[[tuple[Window, ...]], tuple[Window, ...]]
) -> Mutation:
    return lambda kernel: edit(kernel, kind, lambda op: replace(op, windows=make(op.windows)), name)


def rename_buffer(kernel: Kernel, name: str, **fields: Any) -> Kernel:
    """Changes a buffer wherever it occurs, as lowering would that made it so."""

    def change(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(change, value))
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        if type(value).__name__ == "Buffer" and value.name == name:  # type: ignore[attr-defined]
            return replace(value, **fields)  # type: ignore[type-var]
        return replace(
            value, **{f.name: change(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )  # type: ignore[type-var]

    return replace(kernel, body=change(kernel.body))


def set_traversal(**fields: Any) -> Mutation:
    return lambda kernel: replace(
        kernel, body=replace(kernel.body, traversal=replace(kernel.body.traversal, **fields))
    )


def with_traversal(kind: type[Traversal]) -> Mutation:
    def mutate(kernel: Kernel) -> Kernel:
        fields = dataclasses.asdict(kernel.body.traversal)
        return replace(kernel, body=replace(kernel.body, traversal=kind(**fields)))

    return mutate


def set_smem(**offsets: Any) -> Mutation:
    """Offsets by name; a callable gets the plan."""

    def mutate(kernel: Kernel) -> Kernel:
        values = {k: v(kernel.smem) if callable(v) else v for k, v in offsets.items()}
        return replace(kernel, smem=replace(kernel.smem, **values))

    return mutate


def set_schedule(**fields: Any) -> Mutation:
    return lambda kernel: replace(kernel, schedule=replace(kernel.schedule, **fields))


def set_body(make: Callable[[tuple[Stmt, ...]], tuple[Stmt, ...]]) -> Mutation:
    return lambda kernel: replace(kernel, body=replace(kernel.body, body=make(kernel.body.body)))


def of_kind(stmts: Iterable[Stmt], kind: type) -> tuple[Any, ...]:
    return tuple(stmt for stmt in stmts if isinstance(stmt, kind))


def set_source(source: str, /, **fields: Any) -> Mutation:
    return lambda kernel: edit(
        kernel, Load, lambda op: replace(op, src=replace(op.src, **fields)), source
    )


def after_loop(kernel: Kernel, extra: Iterable[Stmt]) -> Kernel:
    """`kernel` with more ops after its outermost K loop."""
    body = [(stmt, *extra) if isinstance(stmt, ForK) else (stmt,) for stmt in kernel.body.body]
    return replace(
        kernel, body=replace(kernel.body, body=tuple(s for stmts in body for s in stmts))
    )


def in_loop(kernel: Kernel, extra: Iterable[Stmt]) -> Kernel:
    """`kernel` with more ops at the start of its innermost K loop."""
    return edit(kernel, ForK, lambda loop: replace(loop, body=(*extra, *loop.body)), "inner")


def edit_split(
    make: Callable[[tuple[Any, ...]], Iterable[Stmt]] = lambda body: body, **fields: Any
) -> Mutation:
    """The outermost loop of k with another body, or other fields."""

    def mutate(kernel: Kernel) -> Kernel:
        loop, *rest = kernel.body.body
        assert isinstance(loop, ForK)
        return set_body(lambda _: (replace(loop, body=tuple(make(loop.body)), **fields), *rest))(
            kernel
        )

    return mutate


def ops(kernel: Kernel, *kinds: type) -> tuple[Any, ...]:
    return tuple(stmt for stmt in walk(kernel.body.body) if isinstance(stmt, kinds))


# --- bad traversals -----------------------------------------------------------------------------


class SkipsLastRow(Traversal):
    def grid(self, m: int, n: int) -> tuple[int, int]:
        rows, columns = super().grid(m, n)
        return max(rows - 1, 1), columns


class FloorsColumns(Traversal):
    def grid(self, m: int, n: int) -> tuple[int, int]:
        return super().grid(m, n)[0], max(n // (self.block_n * self.cluster_n), 1)


class RepeatsFirstTile(Traversal):
    def cluster_tile(self, index: int, m: int, n: int) -> tuple[int, int]:
        return super().cluster_tile(0, m, n)


class ForgetsRaggedGroup(Traversal):
    def cluster_tile(self, index: int, m: int, n: int) -> tuple[int, int]:
        _, columns = self.grid(m, n)
        first = index // (self.group * columns) * self.group
        within = index - first * columns
        return first + within % self.group, within // self.group


# --- mutations ----------------------------------------------------------------------------------

COVERAGE: dict[str, Mutation] = {
    "traversal skips the last row": with_traversal(SkipsLastRow),
    "traversal floors the columns": with_traversal(FloorsColumns),
    "traversal repeats the first tile": with_traversal(RepeatsFirstTile),
    "traversal forgets a ragged last group": with_traversal(ForgetsRaggedGroup),
    "traversal in groups of none": set_traversal(group=0),
    "traversal has lower tiles than the program": set_traversal(block_m=64),
    "traversal has higher tiles than the program": set_traversal(block_m=256),
    "traversal has narrower tiles than the program": set_traversal(block_n=48),
    "traversal of a cluster that is not launched": set_traversal(cluster_m=2),
    "schedule of another block_m": set_schedule(block_m=256),
    "schedule of another block_n": set_schedule(block_n=48),
    "schedule of another cluster": set_schedule(cluster_n=2),
    "schedule of one warpgroup, boxes of two": set_schedule(num_math_warpgroups=1),
    "store missing": drop(Store),
    "store twice": lambda kernel: edit(kernel, Store, lambda op: (op, op)),
    "store in the K loop": lambda kernel: in_loop(
        drop(Store)(drop(Evaluate)(kernel)), ops(kernel, Evaluate, Store)
    ),
    "store in the K loop and after it": lambda kernel: in_loop(
        kernel, ops(kernel, Evaluate, Store)
    ),
    "store of half the rows": set_window(Store, 0, size=64),
    "store of half the columns": set_window(Store, 1, size=48),
    "store transposed": set_windows(Store, "", lambda windows: windows[::-1]),
    "store of one dimension": set_windows(Store, "", lambda windows: windows[:1]),
    "store of blocks": set_window(Store, 1, block=8),
    "store to another tensor": lambda kernel: edit(
        kernel, Store, lambda op: replace(op, dst=replace(op.dst, name="bias"))
    ),
    "store to a narrower tensor": lambda kernel: edit(
        kernel,
        Store,
        lambda op: replace(op, dst=replace(op.dst, dims=(Dim("m", None), Dim("n", 64)))),
    ),
}

K_BLOCKS: dict[str, Mutation] = {
    "K loop short": lambda kernel: edit_outer(kernel, extent=2192 - 128),
    "K loop long": lambda kernel: edit_outer(kernel, extent=2192 + 128),
    "K loop twice": lambda kernel: after_loop(kernel, of_kind(kernel.body.body, ForK)),
    "K loop missing": set_body(lambda body: tuple(s for s in body if not isinstance(s, ForK))),
    "K loop by 64": set_op(ForK, "inner", step=64),
    "K loop by 256": set_op(ForK, "inner", step=256),
    "K loop by none": set_op(ForK, "inner", step=0),
    "chunks of scales skipped": lambda kernel: edit_outer(kernel, step=4096),
    "chunk half covered": lambda kernel: edit(
        kernel, ForK, lambda op: replace(op, extent=op.extent // 2), "inner"
    ),
    "chunk covered twice": lambda kernel: edit(kernel, ForK, lambda op: (op, op), "inner"),
    "part not promoted": drop(Promote),
    "part promoted twice": lambda kernel: edit(kernel, Promote, lambda op: (op, op)),
    "part promoted after the loop only": lambda kernel: after_loop(
        drop(Promote)(kernel), ops(kernel, Promote)
    ),
    "sums not zeroed": drop(Zero),
    "sums zeroed at every K block": lambda kernel: in_loop(kernel, ops(kernel, Zero)),
    "sums zeroed after the K loop": lambda kernel: after_loop(kernel, ops(kernel, Zero)),
    "epilogue before the K loop": set_body(
        lambda body: (
            *of_kind(body, Zero),
            *of_kind(body, Evaluate),
            *of_kind(body, ForK),
            *of_kind(body, Store),
        )
    ),
}

DATAFLOW: dict[str, Mutation] = {
    "a not loaded": drop(Load, "a"),
    "b not loaded": drop(Load, "b"),
    "sfa not loaded": drop(Load, "sfa"),
    "sfb not loaded": drop(Load, "sfb"),
    "no mma": drop(Mma),
    "no epilogue": drop(Evaluate),
    "stored before the epilogue": set_body(
        lambda body: (*body[:-2], *of_kind(body, Store), *of_kind(body, Evaluate))
    ),
    "multiplied before loaded": lambda kernel: edit(
        kernel,
        ForK,
        lambda loop: replace(
            loop, body=tuple(sorted(loop.body, key=lambda s: not isinstance(s, Mma)))
        ),
        "inner",
    ),
    "promoted before multiplied": lambda kernel: edit(
        kernel,
        ForK,
        lambda loop: replace(
            loop, body=tuple(sorted(loop.body, key=lambda s: not isinstance(s, Promote)))
        ),
        "inner",
    ),
    "epilogue of another expression": set_op(Evaluate, expr=acc),
    "epilogue without its operands": set_op(Evaluate, operands=()),
    "epilogue of an operand that is no argument": set_op(
        Evaluate, expr=acc + vector("other"), operands=(Tensor("other", BF16, (Dim("n", 456),)),)
    ),
}

SHAPES: dict[str, Mutation] = {
    "a window of half the rows": set_window(Load, 0, "a", size=64),
    "a window of half a K block": set_window(Load, 1, "a", size=64),
    "a window along n": set_window(Load, 0, "a", axis="n"),
    "a windows swapped": set_windows(Load, "a", lambda windows: windows[::-1]),
    "a window missing": set_windows(Load, "a", lambda windows: windows[:1]),
    "b window of the wrong width": set_window(Load, 0, "b", size=128),
    "b window of blocks": set_window(Load, 0, "b", block=128),
    "sfa window of blocks": set_window(Load, 0, "sfa", block=128),
    "sfa window of another K block": set_window(Load, 1, "sfa", block=64),
    "sfb window of single columns": set_window(Load, 0, "sfb", block=1),
    "sfb buffer of one row": lambda kernel: rename_buffer(
        kernel, "smem_sfb", shape=(1, *buffer(kernel, "smem_sfb").shape[1:])
    ),
    "sfa buffer of half the rows": lambda kernel: rename_buffer(
        kernel, "smem_sfa", shape=(64, *buffer(kernel, "smem_sfa").shape[1:])
    ),
    "promotion windows swapped": set_windows(Promote, "", lambda windows: windows[::-1]),
    "promotion window of half the rows": set_window(Promote, 0, size=64),
    "promotion by the scale of another block": set_window(Promote, 1, block=64),
    "promotion by rows in blocks": set_window(Promote, 0, block=128),
    "promotion scales swapped": lambda kernel: edit(
        kernel, Promote, lambda op: replace(op, scales=op.scales[::-1])
    ),
    "promotion of another shape": set_buffer(Promote, "part", shape=(128, 128)),
    "sums of another shape": lambda kernel: rename_buffer(kernel, "acc", shape=(128, 128)),
    "mma operands swapped": lambda kernel: edit(
        kernel, Mma, lambda op: replace(op, a=op.b, b=op.a)
    ),
    "mma into another shape": set_buffer(Mma, "dst", shape=(128, 128)),
    "epilogue into another shape": set_buffer(Evaluate, "dst", shape=(128, 128)),
    "epilogue of bf16 sums": set_buffer(Evaluate, "src", dtype=BF16),
    "a of another type": set_source("a", dtype=BF16),
    "b of another type": set_source("b", dtype=F32),
    "sfa of another type": set_source("sfa", dtype=BF16),
    "tile of a of another type": lambda kernel: rename_buffer(
        kernel, "smem_a", dtype=BF16, shape=(128, 64)
    ),
    "d of another type than its tile": lambda kernel: edit(
        kernel, Store, lambda op: replace(op, dst=replace(op.dst, dtype=F32))
    ),
    "b of fewer rows": set_source("b", dims=(Dim("n", 64), Dim("k", 2192))),
    "a of another k": set_source("a", dims=(Dim("m", None), Dim("k", 1024))),
    "a from a tensor that is no argument": set_source("a", name="other"),
}

HARDWARE: dict[str, Mutation] = {
    "a tile not swizzled over 128 bytes": lambda kernel: rename_buffer(
        kernel, "smem_a", swizzle_bytes=64
    ),
    "b tile not swizzled": lambda kernel: rename_buffer(kernel, "smem_b", swizzle_bytes=0),
    "d tile of no swizzle span": lambda kernel: rename_buffer(kernel, "smem_d", swizzle_bytes=96),
    "a box of 512 rows": lambda kernel: rename_buffer(kernel, "smem_a", shape=(512, 128)),
    "a split into shares of 4 rows": set_op(Load, "a", multicast=32),
    "a split into shares that do not add up": set_op(Load, "a", multicast=3),
    "a multicast in a cluster of one": set_op(Load, "a", multicast=2),
    "scales multicast": set_op(Load, "sfa", multicast=2),
    "a as scales are loaded": lambda kernel: edit(
        kernel, Load, lambda op: replace(op, via=ops(kernel, Load)[0].via), "a"
    ),
    "sfa by tma": set_op(Load, "sfa", via="tma"),
    "a not pipelined": lambda kernel: rename_buffer(kernel, "smem_a", pipelined=False),
    "sfa not pipelined": lambda kernel: rename_buffer(kernel, "smem_sfa", pipelined=False),
    "one stage": set_schedule(num_stages=1),
    "store box wider than its swizzle span": set_op(Store, box=(64, 96)),
    "store box of 512 rows": set_op(Store, box=(512, 32)),
    "store box of no rows": set_op(Store, box=(0, 32)),
    "store box that does not tile the rows": set_op(Store, box=(48, 32)),
    "store box that does not tile the columns": set_op(Store, box=(64, 28)),
    "store box of half a warpgroup": set_op(Store, box=(32, 32)),
    "store box of half a swizzle span": set_op(Store, box=(64, 16)),
    "rows of d that are not 16-byte units": lambda kernel: edit(
        kernel,
        Store,
        lambda op: replace(op, dst=replace(op.dst, dims=(Dim("m", None), Dim("n", 580)))),
    ),
    "rows of a that are not 16-byte units": set_source("a", dims=(Dim("m", None), Dim("k", 2200))),
    "a of unknown k": set_source("a", dims=(Dim("m", None), Dim("k", None))),
    "mma of 96 rows": lambda kernel: rename_buffer(
        rename_buffer(kernel, "smem_a", shape=(96, 128)), "part", shape=(96, 96)
    ),
    "mma of 264 columns": lambda kernel: rename_buffer(
        rename_buffer(kernel, "smem_b", shape=(264, 128)), "part", shape=(128, 264)
    ),
}

RESOURCES: dict[str, Mutation] = {
    "smem: a and b overlap": set_smem(b=lambda plan: plan.a),
    "smem: b overlaps the last stage of a": set_smem(b=lambda plan: plan.b - 1024),
    "smem: d overlaps b": set_smem(d=lambda plan: plan.d - 1024),
    "smem: scales overlap d": set_smem(scales=lambda plan: plan.scales - 16),
    "smem: barriers overlap the scales": set_smem(barriers=lambda plan: plan.barriers - 16),
    "smem: b misaligned": set_smem(
        b=lambda plan: plan.b + 512, total_bytes=lambda plan: plan.total_bytes + 1024
    ),
    "smem: a begins before memory": set_smem(a=-1024),
    "smem: barriers misaligned": set_smem(
        barriers=lambda plan: plan.barriers + 4, total_bytes=lambda plan: plan.total_bytes + 16
    ),
    "smem: barriers beyond the end": set_smem(total_bytes=lambda plan: plan.total_bytes - 8),
    "smem: beyond 227 KiB": set_smem(total_bytes=232_448 + 16),
    "smem: beyond the target": lambda kernel: replace(
        kernel, target=replace(SM90A, smem_per_block_bytes=kernel.smem.total_bytes - 1)
    ),
    "smem: planned for fewer stages": set_schedule(num_stages=4),
    "registers: three warpgroups for 128 rows": set_schedule(num_math_warpgroups=3),
    "registers: a number of warpgroups that has no split": set_schedule(num_math_warpgroups=4),
    "registers: more than the SM has": lambda kernel: replace(
        kernel, target=replace(SM90A, registers_per_sm=32768)
    ),
}

ZERO, CHUNKS, REDUCE = SPLIT.body.body[0].body  # type: ignore[union-attr]
EVALUATE, STORE = SPLIT.body.body[1:]
OUTERMOST = "must be the outermost loop"

# Mutations of SPLIT, and the rule that each breaks.
SPLIT_RULES: dict[str, tuple[Mutation, str]] = {
    "schedule of no split": (set_schedule(split_k=1), "on 4 blocks: must be on 1"),
    "schedule of fewer blocks": (set_schedule(split_k=3), "on 4 blocks: must be on 3"),
    "schedule of blocks without k": (set_schedule(split_k=7), "choose 6"),
    "schedule of a cluster of tiles": (set_schedule(cluster_m=2), "takes the whole cluster"),
    "loop on fewer blocks": (edit_split(num_blocks=3), "on 3 blocks: must be on 4"),
    "loop over less of k": (edit_split(extent=2192 - 128), "must be 2192 by 640"),
    "loop beyond k": (edit_split(extent=4 * 640), "must be 2192 by 640"),
    "parts of fewer K blocks": (edit_split(step=512), "must be 2192 by 640"),
    "parts of more K blocks": (edit_split(step=768), "must be 2192 by 640"),
    "parts of no K blocks": (edit_split(step=0), "must be 2192 by 640"),
    "parts of partial K blocks": (edit_split(step=548), "must be 2192 by 640"),
    "loop of one block": (edit_split(num_blocks=1), "must come before the K loop"),
    "chunks of the whole k": (
        edit_split(lambda _: (ZERO, replace(CHUNKS, extent=2192), REDUCE)),
        "covers 2192 of 640 positions of k",
    ),
    "chunks of less than a part": (
        edit_split(lambda _: (ZERO, replace(CHUNKS, extent=512), REDUCE)),
        "covers 512 of 640 positions of k",
    ),
    "no loop over blocks": (
        set_body(lambda _: (ZERO, CHUNKS, EVALUATE, STORE)),
        "covers 640 of 2192 positions of k",
    ),
    "no loop over blocks, yet all of k": (
        set_body(lambda _: (ZERO, replace(CHUNKS, extent=2192), EVALUATE, STORE)),
        "blocks do not share k",
    ),
    "loop over blocks in itself": (
        edit_split(lambda _: (SPLIT.body.body[0],)),
        OUTERMOST,
    ),
    "loop over blocks in a K loop": (
        set_body(lambda body: (ForK(2192, 640, body[:1]), *body[1:])),
        OUTERMOST,
    ),
    "loop over blocks after another": (
        set_body(lambda body: (body[0], *body)),
        "must come before total is written",
    ),
    "chunks on blocks": (
        edit_split(lambda _: (ZERO, replace(CHUNKS, num_blocks=4), REDUCE)),
        OUTERMOST,
    ),
    "K blocks on blocks": (set_op(ForK, "inner", num_blocks=4), OUTERMOST),
    "chunks on no block": (
        edit_split(lambda _: (ZERO, replace(CHUNKS, num_blocks=0), REDUCE)),
        "block",
    ),
    "K blocks on fewer blocks than none": (set_op(ForK, "inner", num_blocks=-1), "block"),
    "empty": (edit_split(lambda _: ()), "must leave the sums and only them"),
    "no zeros": (drop(Zero), "acc must hold zeros, holds nothing"),
    # They are those of the first part only: the second would begin with the first one's sums.
    "zeros of all parts": (
        set_body(lambda body: (ZERO, replace(body[0], body=(CHUNKS, REDUCE)), *body[1:])),
        "acc",
    ),
    "zeros after the K loop": (
        edit_split(lambda _: (CHUNKS, ZERO, REDUCE)),
        "acc must hold zeros, holds nothing",
    ),
    "no reduce": (drop(Reduce), "must leave the sums and only them"),
    "reduce before the K loop": (
        edit_split(lambda _: (ZERO, REDUCE, CHUNKS)),
        "acc must hold partial sums, holds zeros",
    ),
    "reduce before everything": (
        edit_split(lambda _: (REDUCE, ZERO, CHUNKS)),
        "acc must hold partial sums, holds nothing",
    ),
    "reduce of every chunk": (
        edit_split(lambda _: (ZERO, replace(CHUNKS, body=(*CHUNKS.body, REDUCE)))),
        "must come after one block's part of k",
    ),
    "reduce of every K block": (
        lambda kernel: edit(drop(Reduce)(kernel), Promote, lambda op: (op, REDUCE)),
        "must come after one block's part of k",
    ),
    "reduce twice": (
        edit_split(lambda body: (*body, REDUCE)),
        "acc must hold partial sums, holds nothing",
    ),
    "reduce after the loop over blocks": (
        set_body(lambda body: (replace(body[0], body=(ZERO, CHUNKS)), REDUCE, *body[1:])),
        "must leave the sums and only them",
    ),
    "reduce once more after the loop over blocks": (
        set_body(lambda body: (body[0], REDUCE, *body[1:])),
        "must come after one block's part of k",
    ),
    "reduce of the product": (
        set_op(Reduce, src=ops(SPLIT, Mma)[0].dst),
        "part must hold partial sums, holds nothing",
    ),
    "reduce into the partial sums": (set_op(Reduce, dst=REDUCE.src), "overwrites acc"),
    "total of a slice": (set_buffer(Reduce, "dst", shape=(128, 32)), "total has shape"),
    "total in bf16": (set_buffer(Reduce, "dst", dtype=BF16), "total has dtype"),
    "total in smem": (set_buffer(Reduce, "dst", space="smem"), "total has space"),
    "partial sums of another shape": (set_buffer(Reduce, "src", shape=(64, 96)), "acc has shape"),
    "inbox of one sender": (set_buffer(Reduce, "inbox", shape=(1, 128, 32)), "inbox has shape"),
    "inbox of this block too": (set_buffer(Reduce, "inbox", shape=(4, 128, 32)), "inbox has shape"),
    "inbox of half the rows": (set_buffer(Reduce, "inbox", shape=(3, 64, 32)), "inbox has shape"),
    "inbox of all columns": (set_buffer(Reduce, "inbox", shape=(3, 128, 96)), "inbox has shape"),
    "inbox of fewer columns": (set_buffer(Reduce, "inbox", shape=(3, 128, 16)), "inbox has shape"),
    "inbox without senders": (set_buffer(Reduce, "inbox", shape=(128, 32)), "inbox has shape"),
    "inbox in bf16": (set_buffer(Reduce, "inbox", dtype=BF16), "inbox has dtype"),
    "inbox in registers": (set_buffer(Reduce, "inbox", space="registers"), "inbox has space"),
    "inbox in stages": (set_buffer(Reduce, "inbox", pipelined=True), "inbox has pipelined"),
    "inbox swizzled": (set_buffer(Reduce, "inbox", swizzle_bytes=128), "inbox has swizzle_bytes"),
    **{
        f"inbox in {name}": (
            set_op(Reduce, inbox=replace(REDUCE.inbox, name=name)),
            f"overwrites {name}",
        )
        for name in ("smem_a", "smem_b", "smem_sfa", "smem_sfb", "acc", "part", "total", "smem_d")
    },
    "epilogue of partial sums": (set_op(Evaluate, src=REDUCE.src), "acc must hold sums"),
    "epilogue in the loop over blocks": (
        set_body(lambda body: (replace(body[0], body=(*body[0].body, EVALUATE)), STORE)),
        "must come after the K loop",
    ),
    "epilogue of every part": (
        set_body(
            lambda body: (
                replace(body[0], body=(ZERO, CHUNKS, replace(EVALUATE, src=REDUCE.src))),
                STORE,
            )
        ),
        "must come after the K loop",
    ),
    "epilogue before the loop over blocks": (
        set_body(lambda body: (EVALUATE, body[0], STORE)),
        "total must hold sums, holds nothing",
    ),
    "store in the loop over blocks": (
        set_body(lambda body: (replace(body[0], body=(*body[0].body, STORE)), EVALUATE)),
        "smem_d must hold result, holds nothing",
    ),
    "epilogue and store in the loop over blocks": (
        set_body(lambda body: (replace(body[0], body=(*body[0].body, EVALUATE, STORE)),)),
        "must come after the K loop",
    ),
    "scales of a part loaded at once": (
        edit_split(
            lambda _: (ZERO, *CHUNKS.body[:2], replace(CHUNKS, body=CHUNKS.body[2:]), REDUCE)
        ),
        "is 0 loops of k deep|the tile is",
    ),
    "smem: inbox overlaps d": (
        set_smem(inbox=lambda plan: plan.inbox - 16),
        r"inbox at \d+ overlaps",
    ),
    "smem: inbox in a": (set_smem(inbox=lambda plan: plan.a), r"inbox at \d+ overlaps"),
    "smem: inbox misaligned": (
        set_smem(inbox=lambda plan: plan.inbox + 8),
        "inbox at .* is not 16-aligned",
    ),
    "smem: no room for the inbox": (
        set_smem(scales=lambda plan: plan.inbox),
        r"scales at \d+ overlaps",
    ),
    "smem: scales overlap the inbox": (
        set_smem(scales=lambda plan: plan.scales - 16),
        r"scales at \d+ overlaps",
    ),
    "smem: no room for the inbox's barrier": (
        set_smem(total_bytes=lambda plan: plan.total_bytes - 8),
        "needs .* bytes",
    ),
}

ALL = {
    f"{group}: {name}": mutation
    for group, mutations in {
        "coverage": COVERAGE,
        "k": K_BLOCKS,
        "dataflow": DATAFLOW,
        "shapes": SHAPES,
        "hardware": HARDWARE,
        "resources": RESOURCES,
    }.items()
    for name, mutation in mutations.items()
}


def edit_outer(kernel: Kernel, **fields: Any) -> Kernel:
    """The outermost K loop with other fields."""
    body = tuple(replace(s, **fields) if isinstance(s, ForK) else s for s in kernel.body.body)
    return replace(kernel, body=replace(kernel.body, body=body))


def buffer(kernel: Kernel, name: str) -> Any:
    return next(
        op.dst
        for op in walk(kernel.body.body)
        if isinstance(op, (Load, Evaluate)) and op.dst.name == name
    )


# Of tiles of 96 columns or of their rows of wgmma: sound, or no change, in swapped tiles of 128.
PLAIN_TILE_ONLY = {
    "coverage: schedule of one warpgroup, boxes of two",
    "shapes: b window of the wrong width",
    "shapes: sfb buffer of one row",
}


@pytest.mark.parametrize("mutation", ALL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_rejects(variant: str, mutation: str) -> None:
    kernel = VARIANTS[variant]
    if kernel.schedule.swap_ab and mutation in PLAIN_TILE_ONLY:
        pytest.skip("the mutation is one of a plain tile")
    mutated = ALL[mutation](kernel)
    assert mutated != kernel
    with pytest.raises(VerifyError) as caught:
        verify(mutated)
    assert ": " in str(caught.value)  # the op, then the rule


@pytest.mark.parametrize(("mutation", "rule"), SPLIT_RULES.values(), ids=SPLIT_RULES)
def test_verify_rejects_split(mutation: Mutation, rule: str) -> None:
    mutated = mutation(SPLIT)
    assert mutated != SPLIT
    with pytest.raises(VerifyError, match=rule):
        verify(mutated)


def test_verify_rejects_split_of_a_kernel_that_the_schedule_leaves_whole() -> None:
    for extra, rule in (
        ((REDUCE,), "must come after one block's part of k"),
        ((replace(REDUCE, dst=REDUCE.src),), "must come after one block's part of k"),
    ):
        with pytest.raises(VerifyError, match=rule):
            verify(after_loop(KERNEL, extra))
    with pytest.raises(VerifyError, match="blocks do not share k as planned"):
        verify(set_schedule(split_k=4)(KERNEL))
    with pytest.raises(VerifyError, match="on 4 blocks: must be on 1"):
        verify(set_body(lambda _: SPLIT.body.body)(KERNEL))


def test_verify_rejects_store_box_across_the_slices_of_two_blocks() -> None:
    # Two boxes of 64 columns tile the 128, but not slices of 48, 48 and 32.
    kernel = lower(Gemm(456, 2192), Schedule(128, 128, 3, 2, split_k=3))
    wide = set_op(Store, box=(64, 64))(rename_buffer(kernel, "smem_d", swizzle_bytes=128))
    with pytest.raises(VerifyError, match="boxes of 64 columns do not tile"):
        verify(wide)
    verify(kernel)


def test_verify_rejects_swapped_operands_of_a_square_mma() -> None:
    """The shapes fit, yet the tile is that of D transposed."""
    swapped = edit(SQUARE, Mma, lambda op: replace(op, a=op.b, b=op.a))
    with pytest.raises(VerifyError):
        verify(swapped)


def test_verify_rejects_b_loaded_from_a() -> None:
    loads = {op.src.name: op for op in walk(SQUARE.body.body) if isinstance(op, Load)}
    with pytest.raises(VerifyError):
        verify(edit(SQUARE, Load, lambda op: replace(op, src=loads["a"].src), "b"))


@pytest.mark.parametrize("kernel", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_verify_rejects_turns_that_are_not_the_schedules(kernel: Kernel, turns: int) -> None:
    mutated = replace(kernel, body=replace(kernel.body, num_turns=turns))
    if turns == (2 if kernel is PINGPONG else 1):
        verify(mutated)
        return
    with pytest.raises(VerifyError, match=f"takes {turns} turns, not as {kernel.schedule}"):
        verify(mutated)


@pytest.mark.parametrize("kernel", VARIANTS.values(), ids=VARIANTS)
def test_verify_rejects_mma_swapped_against_the_schedule(kernel: Kernel) -> None:
    swap_ab = kernel.schedule.swap_ab
    with pytest.raises(VerifyError, match=rf"mma\(.*: swap_ab must be {swap_ab}"):
        verify(set_op(Mma, swap_ab=not swap_ab)(kernel))


@pytest.mark.parametrize(
    ("kernel", "box"),
    [
        (PINGPONG, (64, 32)),  # that of two warpgroups which share a tile
        (KERNEL, (128, 32)),
        (SWAPPED, (12, 64)),
        (SWAPPED, (8, 64)),
        (SWAPPED_SPLIT, (24, 64)),  # across the slices of both blocks
        (SWAPPED_SPLIT, (16, 64)),
        (SWAPPED, (24, 32)),  # not the swizzled span
        (SWAPPED, (24, 128)),
    ],
    ids=lambda v: str(v) if isinstance(v, tuple) else "",
)
def test_verify_rejects_store_box(kernel: Kernel, box: tuple[int, int]) -> None:
    (store,) = ops(kernel, Store)
    assert store.box != box
    with pytest.raises(VerifyError, match=rf"box \({box[0]}, {box[1]}\) must be \("):
        verify(set_op(Store, box=box)(kernel))


def test_verify_rejects_inbox_that_is_not_as_wgmma_counts() -> None:
    (reduce,) = ops(SWAPPED_SPLIT, Reduce)
    assert reduce.inbox.shape == (1, 128, 16)
    for shape in ((1, 24, 64), (1, 128, 8), (1, 128, 24), (2, 128, 16), (1, 16, 128)):
        with pytest.raises(VerifyError):
            verify(set_buffer(Reduce, "inbox", shape=shape)(SWAPPED_SPLIT))


def test_verify_rejects_results_of_turns_in_one_place() -> None:
    """Each turn has a result of its own: a plan for one is too small."""
    nbytes = 128 * 96 * 2
    with pytest.raises(VerifyError, match=r"overlaps"):
        verify(set_smem(scales=lambda plan: plan.scales - nbytes)(PINGPONG))
    with pytest.raises(VerifyError, match=r"overlaps"):
        verify(
            set_smem(
                inbox=lambda plan: plan.inbox - nbytes,
                scales=lambda plan: plan.scales - nbytes,
                barriers=lambda plan: plan.barriers - nbytes,
                total_bytes=lambda plan: plan.total_bytes - nbytes,
            )(PINGPONG)
        )


@pytest.mark.parametrize("name", ["a", "b"])
def test_verify_rejects_multicast_that_is_not_the_clusters(name: str) -> None:
    wrong = {"a": 2, "b": 1}[name]  # in a cluster of 2 x 1, A is not shared and B is shared by 2
    with pytest.raises(VerifyError):
        verify(edit(CLUSTER, Load, lambda op: replace(op, multicast=wrong), name))


# --- what must not be rejected ------------------------------------------------------------------

SOUND: dict[str, Mutation] = {
    "as lowered": lambda kernel: kernel,
    "another name": lambda kernel: replace(kernel, name="other"),
    "gaps in shared memory": lambda kernel: replace(
        kernel,
        smem=replace(
            kernel.smem,
            d=kernel.smem.d + 1024,
            inbox=kernel.smem.inbox + 1024 + 16,
            scales=kernel.smem.scales + 2048,
            groups=kernel.smem.groups + 2048 + 16,
            barriers=kernel.smem.barriers + 2048 + 16,
            total_bytes=kernel.smem.total_bytes + 4096,
        ),
    ),
    "a larger target": lambda kernel: replace(
        kernel, target=replace(SM90A, smem_per_block_bytes=300_000, registers_per_sm=131_072)
    ),
}


@pytest.mark.parametrize("mutation", SOUND.values(), ids=SOUND)
@pytest.mark.parametrize(
    "kernel",
    [SQUARE, CLUSTER, *VARIANTS.values()],
    ids=["square", "cluster", *VARIANTS],
)
def test_verify_accepts(kernel: Kernel, mutation: Mutation) -> None:
    mutated = mutation(kernel)
    verify(mutated)
    assert mutated.body == kernel.body
