"""The verifier: what must hold of a lowered kernel, whoever lowered it.

It trusts no field that it can derive.
"""

from __future__ import annotations

import math

from .dtypes import F32
from .errors import VerifyError
from .ir import (
    Buffer,
    Evaluate,
    ForK,
    Kernel,
    Load,
    Mma,
    Promote,
    Store,
    Traversal,
    Window,
    Zero,
    walk,
)
from .schedule import (
    REGISTER_SPLIT,
    SWIZZLE_ATOM_BYTES,
    accumulator_registers,
    num_barriers,
    num_parts,
    num_scale_stages,
    part_columns,
)

MAX_BOX = 256  # elements of a TMA box in each dimension (CUDA driver API, cuTensorMapEncodeTiled)


def verify(kernel: Kernel) -> None:
    """Raise VerifyError, naming the op and the rule, unless `kernel` is sound.

    Checked: every tile of D is computed and stored exactly once; the K blocks cover k once, in
    order; buffers are written before they are read and their shapes fit; boxes and alignments are
    what TMA and wgmma take; shared memory and registers suffice.
    """
    traversal = kernel.body.traversal
    _check_coverage(traversal, kernel.problem.n)
    _check_dataflow(kernel)
    tile = {"m": traversal.block_m, "n": traversal.block_n}
    for stmt in walk(kernel.body.body):
        match stmt:
            case ForK():
                around = tile.get("k", kernel.problem.k)
                _require(
                    stmt.extent == around, stmt, f"covers {stmt.extent} of {around} positions of k"
                )
                _require(
                    "k" not in tile or around % stmt.step == 0,
                    stmt,
                    f"{stmt.step} does not divide {around}",
                )
                tile["k"] = stmt.step
            case Load():
                _check_load(stmt, tile, kernel)
            case Mma():
                m, n, k = *stmt.dst.shape, stmt.a.shape[1]
                _require(
                    stmt.a.shape == (m, k) and stmt.b.shape == (n, k), stmt, "shapes do not fit"
                )
                _require(
                    m % 64 == 0 and n % 8 == 0 and n <= 256 and k % 32 == 0, stmt, "no such wgmma"
                )
                for operand in (stmt.a, stmt.b):
                    _require(
                        operand.swizzle_bytes == 128,
                        stmt,
                        f"{operand.name} is not swizzled over 128 bytes",
                    )
            case Promote():
                _check_promote(stmt, tile)
            case Evaluate():
                _require(stmt.src.shape == stmt.dst.shape, stmt, "shapes do not fit")
                _require(stmt.src.dtype == F32, stmt, "evaluates float32 accumulators")
            case Store():
                _check_store(stmt, tile)
            case Zero():
                pass
    _check_smem(kernel)
    _check_registers(kernel)


def _require(condition: bool, op: object, rule: str) -> None:
    if not condition:
        raise VerifyError(f"{op}: {rule}")


def _check_coverage(traversal: Traversal, n: int) -> None:
    """Each tile of a few small and odd grids is visited once."""
    for rows in (1, 2, 3, traversal.group, traversal.group + 1, 2 * traversal.group + 3):
        m = rows * traversal.block_m * traversal.cluster_m - 1
        columns = min(n, 5 * traversal.block_n * traversal.cluster_n)
        seen = list(traversal.tiles(m, columns))
        inside = [(row, column) for row, column in seen if row < m and column < columns]
        expected = {
            (row, column)
            for row in range(0, m, traversal.block_m)
            for column in range(0, columns, traversal.block_n)
        }
        _require(
            len(seen) == len(set(seen)) and set(inside) == expected,
            traversal,
            f"does not cover {m} x {columns} once",
        )


def _check_dataflow(kernel: Kernel) -> None:
    """Every buffer is written before it is read, and D is stored once, outside the K loop."""
    written: set[str] = set()
    for stmt in walk(kernel.body.body):
        reads: tuple[Buffer, ...] = ()
        match stmt:
            case Zero() | Load():
                written.add(stmt.dst.name)
            case Mma():
                reads = (stmt.a, stmt.b)
            case Promote():
                reads = (stmt.acc, stmt.part, *stmt.scales)
            case Evaluate():
                reads = (stmt.src,)
            case Store():
                reads = (stmt.src,)
        for buffer in reads:
            _require(buffer.name in written, stmt, f"reads {buffer.name} before it is written")
        if isinstance(stmt, (Mma, Evaluate)):
            written.add(stmt.dst.name)
    stores = [stmt for stmt in kernel.body.body if isinstance(stmt, Store)]
    _require(len(stores) == 1, kernel.name, f"stores D {len(stores)} times in a tile")


def _check_windows(op: object, windows: tuple[Window, ...], tile: dict[str, int]) -> None:
    for window in windows:
        size = tile.get(window.axis)
        _require(window.size == size, op, f"window {window} is not the tile's {size}")


def _check_load(op: Load, tile: dict[str, int], kernel: Kernel) -> None:
    _check_windows(op, op.windows, tile)
    for window, dim, extent in zip(op.windows, op.src.dims, op.dst.shape, strict=True):
        _require(
            window.axis == dim.axis and window.block == dim.block,
            op,
            f"window {window} is not of {dim}",
        )
        # Tiles begin at multiples of their size: one that begins inside a block may touch one more
        # element.
        end = dim.extent or math.lcm(window.size, window.block)
        starts = range(0, min(end, math.lcm(window.size, window.block)), window.size)
        need = max(
            (min(s + window.size, end) - 1) // window.block - s // window.block + 1 for s in starts
        )
        _require(extent >= need, op, f"holds {extent} of {need} elements along {window.axis}")
    if op.via == "tma":
        rows, columns = op.box
        _require(
            rows * op.multicast == op.dst.shape[0] and rows % 8 == 0,
            op,
            "cannot be split over the cluster",
        )
        _check_box(op, op.box, op.dst)
        _require(
            columns * op.dst.dtype.size_bytes == op.dst.swizzle_bytes,
            op,
            "a row is not one swizzle span",
        )
        _require(op.src.dims[-1].extent is not None, op, "the contiguous extent must be known")
        _require(
            (op.src.dims[-1].extent or 0) * op.dst.dtype.size_bytes % 16 == 0,
            op,
            "rows are not 16-byte units",
        )
    else:
        _require(op.multicast == 1 and op.dst.dtype.size_bytes == 4, op, "is for 4-byte elements")
    _require(op.dst.pipelined, op, "must write a pipelined buffer")
    _require(kernel.schedule.num_stages >= 2, op, "needs at least two stages")


def _check_box(op: object, box: tuple[int, ...], buffer: Buffer) -> None:
    _require(
        all(0 < extent <= MAX_BOX for extent in box), op, f"box {box} exceeds {MAX_BOX} elements"
    )
    _require(
        box[-1] * buffer.dtype.size_bytes <= buffer.swizzle_bytes,
        op,
        f"box {box} is wider than the swizzle span",
    )


def _check_promote(op: Promote, tile: dict[str, int]) -> None:
    _require(op.acc.shape == op.part.shape, op, "shapes do not fit")
    _check_windows(op, op.windows, tile)
    _require(
        tuple(window.axis for window in op.windows) == ("m", "n"), op, "scales rows, then columns"
    )
    _require(all(scale.dtype == F32 for scale in op.scales), op, "scales are float32")
    _require(op.scales[0].shape[1] == op.scales[1].shape[1], op, "scales cover different K blocks")


def _check_store(op: Store, tile: dict[str, int]) -> None:
    _check_windows(op, op.windows, tile)
    rows, columns = op.src.shape
    _check_box(op, op.box, op.src)
    _require(
        rows % op.box[0] == 0 and columns % op.box[1] == 0,
        op,
        f"box {op.box} does not tile {op.src.shape}",
    )
    _require(op.dst.dtype == op.src.dtype, op, "dtypes differ")
    _require(
        (op.dst.dims[-1].extent or 0) * op.dst.dtype.size_bytes % 16 == 0,
        op,
        "rows are not 16-byte units",
    )


def _check_smem(kernel: Kernel) -> None:
    """Buffers do not overlap, swizzled tiles are aligned, and all fit."""
    plan, stages = kernel.smem, kernel.schedule.num_stages
    copies = {"tma": stages, "registers": num_scale_stages(kernel.schedule)}
    num_bytes = {
        op.dst.name: op.dst.num_bytes * (copies[op.via] if isinstance(op, Load) else 1)
        for op in walk(kernel.body.body)
        if isinstance(op, (Load, Evaluate))
    }
    regions = [
        (plan.a, num_bytes["smem_a"], SWIZZLE_ATOM_BYTES),
        (plan.b, num_bytes["smem_b"], SWIZZLE_ATOM_BYTES),
        (plan.d, num_bytes["smem_d"], SWIZZLE_ATOM_BYTES),
        (plan.scales, num_bytes["smem_sfa"] + num_bytes["smem_sfb"], 16),
        (plan.barriers, 8 * num_barriers(kernel.schedule), 8),
    ]
    end = 0
    for offset, size, alignment in regions:
        _require(
            offset >= end and offset % alignment == 0,
            plan,
            f"a buffer at {offset} overlaps or is misaligned",
        )
        end = offset + size
    _require(
        end <= plan.total_bytes <= kernel.target.smem_per_block_bytes,
        plan,
        "does not fit in shared memory",
    )


def _check_registers(kernel: Kernel) -> None:
    """Accumulators fit a math thread's registers, and all threads' registers fit the SM's."""
    math_threads = 128 * kernel.schedule.num_math_warpgroups
    producer, math = REGISTER_SPLIT[kernel.schedule.num_math_warpgroups]
    promoted = {op.acc.name: op.acc for op in walk(kernel.body.body) if isinstance(op, Promote)}
    elements = sum(buffer.num_bytes // 4 for buffer in promoted.values())
    columns = part_columns(kernel.problem, kernel.schedule) or 0
    _require(columns > 0, kernel.name, "has no registers for partial accumulators")
    need = elements // math_threads + num_parts(kernel.schedule) * columns // 2
    free = accumulator_registers(kernel.problem, kernel.schedule)
    _require(
        need <= free < math, kernel.name, f"accumulators take {need} of {free} registers a thread"
    )
    total = 128 * producer + math_threads * math
    # setmaxnreg moves registers within what the block got at its launch: an equal share a thread,
    # in steps of 8.
    share = kernel.target.registers_per_sm // kernel.num_threads // 8 * 8
    share = min(share, kernel.target.max_registers_per_thread)
    _require(
        total <= share * kernel.num_threads,
        kernel.name,
        f"takes {total} registers of {share} a thread",
    )
