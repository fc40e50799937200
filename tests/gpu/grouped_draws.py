"""Random grouped calls: layouts, counts, faulty tensors, schedules; run and compared."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import jitgen
from jitgen import Contiguous, GroupedGemm, Masked, Ragged, Schedule
from jitgen.dtypes import BF16, E4M3, F32
from jitgen.expr import acc, gate, matrix, operands, per_row, relu, up, vector
from jitgen.groups import rows_of_groups
from jitgen.interpret import interpret, tiles_of
from jitgen.ir import Tile
from jitgen.layouts import GroupLayout
from jitgen.lower import lower
from jitgen.schedule import max_stages, tile_columns
from jitgen.tuning.space import candidates, is_legal

from .draws import CANARY, SFA_LAYOUTS, to_numpy

Array = np.ndarray[Any, Any]

LAYOUTS = ("ragged", "masked", "group_of_row", "group_ends")
COUNTS = ("mixed", "ones", "all-empty", "one-giant", "many", "single", "faulty")
EPILOGUES = {
    "plain": acc,
    "bias": acc + vector("bias"),
    "bias-relu-residual": relu(acc + vector("bias", F32)) + matrix("residual"),
}
# Exact ones, of every kind of operand and result: dtype of D, epilogue, ue8m0.
RESULTS = (
    (E4M3, relu(gate) * up, False),
    (E4M3, relu(gate) * up * per_row("weight"), True),
    (E4M3, acc + vector("bias"), False),
    (BF16, relu(gate) * up + vector("bias"), False),
    (F32, gate - up * per_row("weight", BF16), False),
    (BF16, acc * per_row("weight"), False),
)
MAX_WORK = 2 * 10**8  # multiply-adds that the interpreter does for one draw


@dataclass(frozen=True)
class Draw:
    """One call: everything but the data."""

    problem: GroupedGemm
    schedule: Schedule
    counts: str
    epilogue: str
    sfa_layout: str
    seed: int

    def __str__(self) -> str:
        return f"{self.problem}; {self.schedule}; {self.counts} {self.epilogue} {self.sfa_layout}"


def draw_result(rng: random.Random, index: int, *, small: bool = False) -> Draw:
    """The `index`-th random call whose D is gated or quantized, or weighted by row."""
    base = draw(rng, index, small=small)
    dtype, epilogue, ue8m0 = RESULTS[index % len(RESULTS)]
    n = rng.choice((256,) if small or base.counts == "many" else (256, 512, 768))
    problem = replace(base.problem, n=n, d_dtype=dtype, epilogue=epilogue, ue8m0=ue8m0)
    schedule = rng.choice(list(candidates(problem)))
    return replace(base, problem=problem, schedule=schedule, epilogue=str(epilogue))


def draw(rng: random.Random, index: int, *, small: bool = False) -> Draw:
    """The `index`-th random call: layouts and counts in turn."""
    layout = LAYOUTS[index % len(LAYOUTS)]
    counts = COUNTS[index // len(LAYOUTS) % len(COUNTS)]
    groups = {"single": 1, "many": rng.choice((33, 100, 256, 512))}.get(counts, rng.randint(2, 12))
    n, k = rng.choice((8, 72, 264, 576)), rng.choice((16, 128, 144, 576, 1040, 2048))
    if small or counts == "many":
        groups, n, k = min(groups, 40 if small else 512), rng.choice((72, 136)), 144
    epilogue = rng.choice(list(EPILOGUES))
    problem = GroupedGemm(
        *(n, k, rng.choice((BF16, F32)), EPILOGUES[epilogue]),
        num_groups=groups,
        layout=layout,  # type: ignore[arg-type]
        alignment=rng.choice((1, 64, 128)) if layout == "group_ends" else 1,
    )
    schedule = rng.choice(list(candidates(problem)))
    if rng.random() < 0.3:
        cluster = rng.choice(((2, 2), (4, 1), (1, 4)))
        larger = replace(schedule, cluster_m=cluster[0], cluster_n=cluster[1])
        schedule = larger if is_legal(problem, larger) else schedule
    schedule = replace(schedule, raster_group=rng.choice((1, 3, 8, 16)))
    stages = range(2, min(max_stages(problem, schedule), 32) + 1)
    shallower = [replace(schedule, num_stages=depth) for depth in stages]
    schedule = rng.choice([s for s in shallower if is_legal(problem, s)])
    return Draw(problem, schedule, counts, epilogue, rng.choice(SFA_LAYOUTS), rng.getrandbits(31))


def row_counts(d: Draw, rng: random.Random) -> list[int]:
    """Rows of every group."""
    groups = d.problem.num_groups
    if d.counts == "all-empty":
        return [0] * groups
    if d.counts == "ones":
        return [rng.choice((0, 1, 1, 2)) for _ in range(groups)]
    if d.counts == "many":
        return [rng.choice((0, 0, 1, 5, 20)) for _ in range(groups)]
    counts = [rng.choice((0, 1, 7, 63, 64, 65, 128, 130, 200)) for _ in range(groups)]
    if d.counts in ("one-giant", "single"):
        counts[rng.randrange(groups)] = rng.randint(500, 1500)
    return counts


def make_layout(d: Draw, rng: random.Random) -> tuple[np.ndarray[Any, Any], int]:
    """The layout's tensor and m: with rows of no group, and with anything in it if faulty."""
    counts, layout, unit = row_counts(d, rng), d.problem.layout, d.problem.alignment
    if layout == "masked":
        values, m = counts, max(counts) + rng.choice((0, 1, 70)) or 1
    else:
        begins, ends, end = [], [], rng.choice((0, 3, 64)) if layout == "ragged" else 0
        first = end
        for count in counts:
            begins.append(-(-end // unit) * unit)
            end = begins[-1] + count
            ends.append(end)
        m = end + rng.choice((0, 1, 70)) or 1
        values = [first, *ends] if layout == "ragged" else ends
        if layout == "group_of_row":
            values = [-1] * m
            for group, begin, count in zip(range(m), begins, counts, strict=False):
                values[begin : begin + count] = [group] * count
            if rng.random() < 0.5:  # holes
                values = [-1 if rng.random() < 0.05 else value for value in values]
    if d.counts == "faulty":
        wild = (-(2**31), -7, -1, 0, 3, m // 2, m, m + 5, 2**31 - 1)
        values = [rng.choice(wild) if rng.random() < 0.3 else value for value in values]
    return np.array(values, np.int32), m


def make_inputs(d: Draw) -> dict[str, torch.Tensor]:
    """Random operands on the GPU; what is no group's holds NaN in A and its scales."""
    generator = torch.Generator("cuda").manual_seed(d.seed)
    p = d.problem
    values, m = make_layout(d, random.Random(d.seed))
    outer = (p.num_groups, m) if p.layout == "masked" else (m,)
    k_blocks = -(-p.k // 128)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    owned = torch.zeros(outer, dtype=torch.bool, device="cuda")
    for group, (begin, end) in enumerate(rows_of_groups(p, values, m)):
        part = owned[group] if p.layout == "masked" else owned
        part[begin:end] = True
    if p.layout == "group_of_row":
        owned &= torch.from_numpy((values >= 0) & (values < p.num_groups)).cuda()
    a = (8 * normal(*outer, p.k)).to(torch.float8_e4m3fn)
    sfa = torch.exp(normal(*outer, k_blocks))
    a.view(torch.uint8)[~owned] = 0x7F
    sfa[~owned] = float("nan")
    tensors = {
        "a": a,
        "b": torch.empty(p.num_groups, p.n, p.k, dtype=torch.float8_e4m3fn, device="cuda"),
        "sfa": laid_out(sfa, d.sfa_layout),
        "sfb": torch.exp(normal(p.num_groups, -(-p.n // 128), k_blocks)),
        "groups": torch.from_numpy(values).cuda(),
    }
    for b in tensors["b"]:  # one after the other: all in float32 would be large
        b.copy_(8 * normal(p.n, p.k))
    for operand in operands(p.epilogue):
        rows = outer if "m" in operand.axes else (p.num_groups,)
        value = normal(*rows, *((p.columns,) if "n" in operand.axes else ()))
        tensors[operand.name] = value.to(getattr(torch, operand.dtype.name))
    tensors["owned"] = owned
    return tensors


def laid_out(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """The same scales in another memory layout; padding holds NaN."""
    *outer, rows, columns = scale.shape
    pad = 3 if layout.endswith("padded") else 0
    if layout.startswith("row"):
        memory = scale.new_full((*outer, rows, columns + pad), float("nan"))[..., :columns]
    else:
        memory = scale.new_full((*outer, columns, rows + pad), float("nan"))[..., :rows].mT
    return memory.copy_(scale)


def layout_of(d: Draw, groups: torch.Tensor) -> GroupLayout:
    match d.problem.layout:
        case "ragged":
            return Ragged(groups)
        case "masked":
            return Masked(groups, expected_rows=64)
        case "group_of_row":
            return Contiguous(group_of_row=groups)
        case _:
            return Contiguous(group_ends=groups, alignment=d.problem.alignment)


def run(d: Draw, inputs: dict[str, torch.Tensor], out: Any, **options: Any) -> None:
    bound = {operand.name: inputs[operand.name] for operand in operands(d.problem.epilogue)}
    result = jitgen.grouped_gemm(
        inputs["a"],
        inputs["b"],
        (inputs["sfa"], inputs["sfb"]),
        layout=layout_of(d, inputs["groups"]),
        out=out,
        epilogue=d.problem.epilogue.bind(**bound),
        ue8m0=d.problem.ue8m0,
        **options,
    )
    assert result is out


def run_and_compare(d: Draw, *, num_runs: int = 3) -> None:
    """Run between canaries, several times; compare as many tiles as MAX_WORK allows."""
    inputs = make_inputs(d)
    owned, n = inputs.pop("owned"), d.problem.columns
    dtype = getattr(torch, d.problem.d_dtype.name)
    # Two rows before and two behind, and where a result need not be contiguous some columns.
    edge = 32 // dtype.itemsize
    memories = [_canaries((owned.numel() + 4, n + 2 * edge), dtype)]
    outs = [memories[0][2:-2, edge : n + edge].unflatten(0, owned.shape)]
    if d.problem.is_quantized:
        memories.append(_canaries((owned.numel() + 4, n // 128), torch.float32))
        outs.append(memories[1][2:-2].unflatten(0, owned.shape))
    first: list[torch.Tensor] = []
    for turn in range(num_runs):
        for out in outs:
            _words(out)[owned] = _words(torch.full((1,), float("nan"), device="cuda").to(out.dtype))
        run(d, inputs, tuple(outs) if len(outs) > 1 else outs[0], schedule=d.schedule)
        first = first or [memory.clone() for memory in memories]
        for memory, before in zip(memories, first, strict=True):
            same = torch.equal(_words(memory), _words(before))
            assert same, f"run {turn} differs from the first: {d}"
    for out in outs:
        assert not torch.isnan(out.float()).any(), f"elements of D were not written: {d}"
    compare(d, inputs, *outs)
    for memory, out in zip(memories, outs, strict=True):
        untouched = _words(_canaries((1,), memory.dtype))
        _words(out)[owned] = untouched
        assert torch.all(_words(memory) == untouched), f"canaries lost: {d}"


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _canaries(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 3.5 if dtype.itemsize == 1 else CANARY, device="cuda").to(dtype)


def compare(d: Draw, inputs: dict[str, torch.Tensor], *outs: torch.Tensor) -> None:
    """Tiles of the results against the interpreter's, bit for bit."""
    kernel, s = lower(d.problem, d.schedule), d.schedule
    host = {name: to_numpy(t) for name, t in inputs.items()}
    results = [to_numpy(out) for out in outs]
    expected = [got.copy() for got in results]  # what no group owns is checked by the canaries
    columns = d.problem.columns
    tiles = [t for t in tiles_of(kernel, host) if t.row < (t.end or 0) and t.column < columns]
    most = max(MAX_WORK // (s.block_m * s.block_n * d.problem.k), 2)
    tiles = random.Random(d.seed).sample(tiles, min(most, len(tiles)))
    interpret(kernel, host, tiles=tiles, out=tuple(expected) if len(outs) > 1 else expected[0])
    for got, want in zip(results, expected, strict=True):
        _compare_tiles(d, tiles, got, want, columns // got.shape[-1])


def _compare_tiles(
    d: Draw,
    tiles: list[Tile],
    got: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    block: int,
) -> None:
    word = np.dtype(f"u{got.dtype.itemsize}")
    for tile in tiles:
        where = _where(d, tile, block)
        wrong = np.argwhere(got[where].view(word) != expected[where].view(word))
        if len(wrong):
            i = tuple(wrong[0])
            raise AssertionError(
                f"{d}: {len(wrong)} of {got[where].size} elements of {tile} differ, first at {i}:"
                f" got {got[where][i]}, expected {expected[where][i]}"
            )


def _where(d: Draw, tile: Tile, block: int) -> tuple[Any, ...]:
    """The tile's part of D, or of something that has an element for `block` columns of D."""
    rows = slice(tile.row, min(tile.row + d.schedule.block_m, tile.end or 0))
    end = tile.column + tile_columns(d.problem, d.schedule)
    columns = slice(tile.column // block, -(-end // block))
    return (tile.group, rows, columns) if d.problem.layout == "masked" else (rows, columns)
