"""K-grouped GEMM on the GPU: D[g] += A[:, ks_g] B[:, ks_g]^T, bit for bit as interpreted.

JITGEN_TEST_SEED repeats a run's draws.
"""

from __future__ import annotations

import os
import random
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import Gemm, KGrouped, ScaleBlock, Schedule  # noqa: E402
from jitgen.groups import rows_of_groups  # noqa: E402
from jitgen.interpret import interpret, tiles_of  # noqa: E402
from jitgen.lower import lower  # noqa: E402
from jitgen.numerics import sum_f32  # noqa: E402
from jitgen.problem import GroupedGemm, of_k_groups  # noqa: E402
from jitgen.schedule import max_stages  # noqa: E402
from jitgen.tuning.space import candidates, is_legal  # noqa: E402

from . import draws as dense  # noqa: E402
from .draws import CANARY, SFA_LAYOUTS, bits, to_numpy  # noqa: E402
from .grouped_draws import laid_out  # noqa: E402

SEED = int(os.environ.get("JITGEN_TEST_SEED", secrets.randbits(31)))
NUM_DRAWS, NUM_DENSE_DRAWS = 84, 40
COUNTS = ("mixed", "ones", "all-empty", "one-giant", "many", "single", "faulty")
MAX_WORK = 4 * 10**7  # multiply-adds that the interpreter does for one draw


@dataclass(frozen=True)
class Draw:
    """One call: everything but the data."""

    problem: GroupedGemm
    schedule: Schedule
    m: int
    counts: str
    layouts: tuple[str, str]  # of sfa and sfb
    seed: int

    def __str__(self) -> str:
        return f"m{self.m} {self.problem}; {self.schedule}; {self.counts} {self.layouts}"


def draw(rng: random.Random, index: int) -> Draw:
    """The `index`-th random call: counts in turn."""
    counts = COUNTS[index % len(COUNTS)]
    groups = {"single": 1, "many": rng.choice((33, 100, 512))}.get(counts, rng.randint(2, 12))
    d_dtype, rows = rng.choice((jitgen.F32, jitgen.F32, jitgen.BF16)), rng.choice((1, 1, 128))
    n = rng.choice((8, 72, 200, 576))
    problem = of_k_groups(n, groups, d_dtype, ScaleBlock(rows, 128))
    m = rng.choice((1, 7, 64, 72)) if counts == "many" else rng.choice((1, 63, 72, 200, 576))
    schedule = rng.choice(list(candidates(problem)))
    if rng.random() < 0.3:
        cluster = rng.choice(((2, 2), (4, 1), (1, 4)))
        larger = replace(schedule, cluster_m=cluster[0], cluster_n=cluster[1])
        schedule = larger if is_legal(problem, larger) else schedule
    stages = range(2, min(max_stages(problem, schedule), 32) + 1)
    shallower = [replace(schedule, num_stages=depth) for depth in stages]
    schedule = rng.choice([s for s in shallower if is_legal(problem, s)])
    schedule = replace(schedule, raster_group=rng.choice((1, 3, 8, 16)))
    layouts = rng.choice(SFA_LAYOUTS), rng.choice(SFA_LAYOUTS)
    return Draw(problem, schedule, m, counts, layouts, rng.getrandbits(31))


def make_offsets(d: Draw, rng: random.Random) -> tuple[np.ndarray[Any, Any], int]:
    """The offsets and k, with columns of no group, and with anything in it if faulty."""
    choices = {"all-empty": (0,), "ones": (0, 1), "many": (0, 0, 1, 2)}
    counts = rng.choices(choices.get(d.counts, (0, 1, 2, 3, 5, 8, 9)), k=d.problem.num_groups)
    if d.counts in ("one-giant", "single"):
        counts[rng.randrange(len(counts))] = rng.randint(20, 70)
    offsets = rng.choice((0, 1, 3)) + np.cumsum([0, *counts])
    k = 128 * (int(offsets[-1]) + rng.choice((0, 1, 2)) or 1)
    values = [128 * int(offset) for offset in offsets]
    if d.counts == "faulty":
        wild = (-(2**31), -7, -1, 0, 3, k // 2, k // 2 + 70, k, k + 5, 2**31 - 1)
        values = [rng.choice(wild) if rng.random() < 0.3 else value for value in values]
    return np.array(values, np.int32), k


def make_inputs(d: Draw) -> dict[str, torch.Tensor]:
    """Random operands on the GPU; what is no group's holds NaN."""
    generator = torch.Generator("cuda").manual_seed(d.seed)
    values, k = make_offsets(d, random.Random(d.seed))
    owned = torch.zeros(k, dtype=torch.bool, device="cuda")
    for begin, end in rows_of_groups(d.problem, values, k):
        owned[begin:end] = True
    tensors = {"groups": torch.from_numpy(values).cuda()}
    for name, scales, rows, layout in (
        ("a", "sfa", d.m, d.layouts[0]),
        ("b", "sfb", d.problem.n, d.layouts[1]),
    ):
        x = torch.randn(rows, k, device="cuda", generator=generator)
        tensors[name] = (8 * x).to(torch.float8_e4m3fn)
        tensors[name].view(torch.uint8)[:, ~owned] = 0x7F
        block = d.problem.b_scale.rows if name == "b" else 1
        shape = -(-rows // block), k // 128
        scale = torch.exp(torch.randn(shape, device="cuda", generator=generator))
        scale[:, ~owned[::128]] = float("nan")
        tensors[scales] = laid_out(scale, layout if block == 1 else "row")
    return tensors


def run(d: Draw, inputs: dict[str, torch.Tensor], out: torch.Tensor, **options: Any) -> None:
    scales, layout = (inputs["sfa"], inputs["sfb"]), KGrouped(inputs["groups"])
    result = jitgen.grouped_gemm(
        *(inputs["a"], inputs["b"], scales), layout=layout, out=out, **options
    )
    assert result is out


def expect(d: Draw, inputs: dict[str, torch.Tensor], before: torch.Tensor) -> Any:
    """D after a run on `before` and, true where it is known, which of its elements are."""
    kernel, s = lower(d.problem, d.schedule), d.schedule
    host = {name: to_numpy(t) for name, t in inputs.items()}
    expected = to_numpy(before).copy()
    tiles = [t for t in tiles_of(kernel, host) if t.row < d.m and t.column < d.problem.n]
    known = np.ones(expected.shape, bool)
    for tile in tiles:
        known[tile.group] = False
    chosen, work = [], 0
    for tile in random.Random(d.seed).sample(tiles, len(tiles)):
        assert tile.k is not None
        work += s.block_m * s.block_n * (tile.k.end - tile.k.begin)
        if not chosen or work < MAX_WORK:
            chosen.append(tile)
            rows = slice(tile.row, tile.row + s.block_m)
            known[tile.group, rows, tile.column : tile.column + s.block_n] = True
    interpret(kernel, host, tiles=chosen, out=expected)
    return expected, known


def run_and_compare(d: Draw, *, num_runs: int = 3) -> None:
    """Run between canaries, several times; compare as many tiles as MAX_WORK allows."""
    inputs = make_inputs(d)
    groups, n, edge = d.problem.num_groups, d.problem.n, 8
    dtype = getattr(torch, d.problem.d_dtype.name)
    memory = torch.full((groups * d.m + 4, n + 2 * edge), CANARY, device="cuda", dtype=dtype)
    out = memory[2:-2, edge : n + edge].unflatten(0, (groups, d.m))
    before = torch.randn(groups, d.m, n, device="cuda").to(dtype)
    first: torch.Tensor | None = None
    for turn in range(num_runs):
        out.copy_(before)
        run(d, inputs, out, schedule=d.schedule)
        first = memory.clone() if first is None else first
        assert torch.equal(bits(memory), bits(first)), f"run {turn} differs from the first: {d}"
    expected, known = expect(d, inputs, before)
    wrong = known & (bits(out).cpu().numpy() != expected.view(f"i{dtype.itemsize}"))
    if wrong.any():
        i = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{d}: {wrong.sum()} of {known.sum()} elements differ, first at {i}:"
            f" got {to_numpy(out)[i]}, expected {expected[i]}"
        )
    assert not torch.isnan(out).any()
    out.fill_(CANARY)
    assert torch.all(bits(memory) == bits(memory.new_full((1,), CANARY))), f"canaries lost: {d}"


@pytest.mark.parametrize("index", range(NUM_DRAWS))
def test_k_grouped_equals_interpreter(index: int) -> None:
    run_and_compare(draw(random.Random(f"{SEED} {index}"), index))


# Products of scales formed ahead: all of a chain's, a part; half a chain each; swapped; in turns.
SMALL = (
    Schedule(128, 128, 3, 2, promotion="serial"),
    Schedule(128, 144, 2, 2, promotion="serial"),
    Schedule(64, 128, 2, 1, cluster_n=2),
    Schedule(96, 64, 3, 1, swap_ab=True),
    Schedule(64, 48, 4, 2, pingpong=True),
)


@pytest.mark.parametrize("schedule", SMALL, ids=str)
def test_k_grouped_small_equals_interpreter(schedule: Schedule) -> None:
    d = Draw(of_k_groups(200, 3), schedule, 136, "mixed", ("row-padded", "row"), 7)
    run_and_compare(d, num_runs=2)


@pytest.mark.parametrize("index", range(NUM_DENSE_DRAWS))
def test_gemm_with_a_scale_for_every_row_of_b_equals_interpreter(index: int) -> None:
    rng = random.Random(f"{SEED} {index}")
    d = dense.draw(rng, index)
    problem = replace(d.problem, b_scale=ScaleBlock(1, 128))
    legal = list(candidates(problem))
    dense.run_and_compare(replace(d, problem=problem, schedule=rng.choice(legal)), num_runs=3)


@pytest.mark.parametrize(("groups", "m", "n"), [(4, 1024, 2112), (8, 576, 4096), (128, 200, 576)])
def test_k_grouped_chooses_a_schedule_that_equals_interpreter(groups: int, m: int, n: int) -> None:
    d = Draw(of_k_groups(n, groups), Schedule(64, 64, 2, 1), m, "mixed", ("row", "row"), SEED)
    inputs = make_inputs(d)
    out = torch.randn(groups, m, n, device="cuda")
    before = out.clone()
    run(d, inputs, out)
    expected, known = expect(d, inputs, before)
    assert (to_numpy(out)[known].view(np.uint32) == expected[known].view(np.uint32)).all()


def test_k_grouped_without_out_adds_to_zeros() -> None:
    d = Draw(of_k_groups(200, 5), Schedule(64, 96, 3, 1), 72, "mixed", ("row", "column"), SEED)
    inputs = make_inputs(d)
    scales, layout = (inputs["sfa"], inputs["sfb"]), KGrouped(inputs["groups"])
    out = jitgen.grouped_gemm(inputs["a"], inputs["b"], scales, layout=layout, schedule=d.schedule)
    expected, known = expect(d, inputs, torch.zeros_like(out))
    assert (to_numpy(out)[known].view(np.uint32) == expected[known].view(np.uint32)).all()
    nothing = inputs["a"][:, :0], inputs["b"][:, :0], (scales[0][:, :0], scales[1][:, :0])
    empty = jitgen.grouped_gemm(*nothing, layout=layout)
    assert torch.equal(empty, torch.zeros_like(out))


def test_k_grouped_replays_in_a_cuda_graph_with_other_offsets() -> None:
    d = Draw(of_k_groups(264, 6), Schedule(128, 96, 3, 2), 200, "mixed", ("row", "row"), SEED)
    inputs = make_inputs(d)
    for name in ("a", "b"):
        x = torch.randn(inputs[name].shape, device="cuda")
        inputs[name].copy_(x.to(torch.float8_e4m3fn))
    inputs["sfa"].fill_(0.5)
    inputs["sfb"].fill_(2.0)
    out = torch.zeros(6, 200, 264, device="cuda")
    run(d, inputs, out, schedule=d.schedule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(d, inputs, out, schedule=d.schedule)
    groups, before = inputs["groups"], torch.randn_like(out)
    for change in (torch.zeros_like(groups), groups // 256 * 128, groups.clone()):
        groups.copy_(change)
        out.copy_(before)
        graph.replay()
        expected, known = expect(d, inputs, before)
        assert (to_numpy(out)[known].view(np.uint32) == expected[known].view(np.uint32)).all()


def test_k_grouped_adds_as_interpreted() -> None:
    """Subnormals, zeros of both signs, infinities, NaN and overflow, on either side."""
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1.1e-38, 1.17549435e-38, -1.2e-38, 1.0, -1.0]
    special += [3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 2.0**-24, 1.5 * 2**-24]
    # A product of one block with the identity: D += sfa * 1 * a, so sums are any float32 at all.
    values = torch.tensor(special, device="cuda")
    rows = len(special)
    a = torch.zeros(rows, 128, device="cuda")
    a[:, 0] = 1.0
    b = torch.zeros(64, 128, device="cuda")
    b[:, 0] = 1.0
    operands = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    scales = values[:, None].clone(), torch.ones(64, 1, device="cuda")
    before = values.repeat(4)[:64].expand(1, rows, 64).contiguous()
    out, offsets = before.clone(), torch.tensor([0, 128], dtype=torch.int32, device="cuda")
    jitgen.grouped_gemm(*operands, scales, layout=KGrouped(offsets), out=out)
    # A sum is fma(scale, 1, 0), which keeps subnormals.
    x = to_numpy(before)[0]
    y = np.broadcast_to(to_numpy(values)[:, None], x.shape)
    got, want = to_numpy(out)[0], sum_f32(x, np.where(y == 0, np.float32(0), y))
    wrong = got.view(np.uint32) != want.view(np.uint32)
    table = [(x[i], y[i], got[i], want[i]) for i in map(tuple, np.argwhere(wrong))]
    assert not wrong.any(), table[:40]


def test_k_grouped_reports_faulty_offsets_in_debug_mode() -> None:
    d = Draw(of_k_groups(72, 2), Schedule(64, 48, 3, 1), 64, "single", ("row", "row"), SEED)
    inputs = make_inputs(d)
    scales = inputs["sfa"], inputs["sfb"]
    offsets = torch.tensor([0, 100, 128], dtype=torch.int32, device="cuda")
    with pytest.raises(jitgen.ProblemError, match=r"groups\[1\] = 100 must be a multiple of 128"):
        jitgen.grouped_gemm(
            *(inputs["a"], inputs["b"], scales), layout=KGrouped(offsets), debug=True
        )


def test_gemm_takes_the_scales_of_every_row_of_b_in_any_strides() -> None:
    a, sfa = jitgen.quantize(torch.randn(64, 512, device="cuda"))
    b, sfb = jitgen.quantize(torch.randn(200, 512, device="cuda"))
    row_major = jitgen.gemm(a, b, (sfa, sfb))
    column_major = jitgen.gemm(a, b, (sfa.t().contiguous().t(), sfb.t().contiguous().t()))
    assert torch.equal(row_major, column_major)
    host = {"a": a, "b": b, "sfa": sfa, "sfb": sfb}
    problem = Gemm(200, 512, b_scale=ScaleBlock(1, 128))
    arrays = {name: to_numpy(t) for name, t in host.items()}
    expected = interpret(lower(problem, Schedule(64, 96, 3, 1)), arrays)
    assert (to_numpy(row_major).view(np.uint16) == expected.view(np.uint16)).all()
