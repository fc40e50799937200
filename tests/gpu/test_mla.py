"""MLA decode on the GPU, against float64, the interpreter, and itself: repeated, and in graphs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import jitgen
from jitgen import BF16, F16, MlaDecode, MlaPlan, MlaSchedule
from jitgen.errors import CaptureError
from jitgen.interpret_mla import interpret_mla
from jitgen.lower_mla import lower_mla
from jitgen.schedule_mla import EVICT_ALWAYS, num_parts, select_mla
from tests.gpu.draws import to_numpy
from tests.gpu.mla_draws import (
    MlaDraw,
    bits,
    draw_lengths,
    draw_problems,
    make_inputs,
    run_and_compare,
)

NUM_CASES = 1024
PROBLEMS = draw_problems(random.Random(7), 64)
CASES_EACH = NUM_CASES // len(PROBLEMS)

MAIN = [MlaDecode(heads, queries) for heads in (16, 64, 128) for queries in (1, 2)]


@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=lambda i: f"{i}-{PROBLEMS[i]}")
def test_random_calls_meet_float64(index: int) -> None:
    rng = random.Random(index)
    for case in range(CASES_EACH):
        lengths = draw_lengths(rng, index + case)
        run_and_compare(MlaDraw(PROBLEMS[index], lengths, None, rng.getrandbits(31)))


@pytest.mark.parametrize("problem", MAIN, ids=str)
def test_edge_lengths_meet_float64(problem: MlaDecode) -> None:
    single = ((0,), (1,), (63,), (64,), (65,))
    for lengths in (*single, (0, 0, 0), (0, 1, 63, 64, 65, 0), (128,) * 300):
        run_and_compare(MlaDraw(problem, lengths, None, 3))


@pytest.mark.parametrize(
    "schedule",
    [
        MlaSchedule(),
        MlaSchedule(overhead=1, evict_first=EVICT_ALWAYS),
        MlaSchedule(overhead=17),
        MlaSchedule(score_ahead=True),
        MlaSchedule(tile_rows=32, evict_first=8),
        MlaSchedule(tile_rows=32, slack=1),
        MlaSchedule(meet=2, score_ahead=True),
        MlaSchedule(meet=2, evict_first=32),
        MlaSchedule(tile_rows=32, meet=2),
    ],
    ids=str,
)
def test_schedules_meet_float64(schedule: MlaSchedule) -> None:
    batches = [(5000,), (150,), (700, 0, 129, 64) * 5, (1000,) * 33, (900, 1000, 330) * 4]
    if schedule.meet > 1:  # sequences that share parts
        batches += [(700, 0, 129, 64) * 40, (1000,) * 150, (130, 3000, 1) * 50]
    for problem in (MlaDecode(128, page=16), MlaDecode(128), MlaDecode(64, 2)):
        for lengths in batches:
            run_and_compare(MlaDraw(problem, lengths, schedule, 5))


@pytest.mark.parametrize(
    "problem",
    [MlaDecode(16), MlaDecode(128, 2), MlaDecode(16, 2, cache="fp8"), MlaDecode(128, cache="fp8")],
    ids=str,
)
def test_batch_invariant_calls_do_not_see_the_batch(problem: MlaDecode) -> None:
    lengths = (0, 1, 63, 64, 65, 5000, 700, 129) + (300,) * 150
    whole = select_mla(problem, batch_invariant=True)
    run_and_compare(MlaDraw(problem, lengths, whole, 8))
    inputs = make_inputs(MlaDraw(problem, lengths, None, 8))
    arguments = {"causal": problem.causal, "batch_invariant": True}
    o, lse = jitgen.mla_decode(*inputs.values(), **arguments)
    for some in ([5], [6, 7], [157, 5, 0], list(range(20))):
        few = {name: t if name == "kv_cache" else t[some] for name, t in inputs.items()}
        o_few, lse_few = jitgen.mla_decode(*few.values(), **arguments)
        assert torch.equal(bits(o_few), bits(o[some]))
        assert torch.equal(bits(lse_few), bits(lse[some]))


@pytest.mark.parametrize("steepness", [32, 128])
@pytest.mark.parametrize("problem", [*MAIN, MlaDecode(128, 2, page=16, dtype=F16)], ids=str)
def test_steep_scores_meet_float64(problem: MlaDecode, steepness: int) -> None:
    for lengths in ((5000, 0, 1, 129), (700, 64, 1000) * 40):
        run_and_compare(MlaDraw(problem, lengths, None, 13, steepness))


def test_pages_that_lie_apart_meet_float64() -> None:
    run_and_compare(MlaDraw(MlaDecode(16, page=32), (1000, 3, 77), None, 9), gap=48)


@pytest.mark.parametrize(
    ("problem", "schedule"),
    [
        (MlaDecode(3, 2), None),
        (MlaDecode(128, dtype=F16), None),
        (MlaDecode(40, 2), MlaSchedule(tile_rows=32, meet=2)),
    ],
    ids=str,
)
def test_small_equals_interpreter_within_tolerance(
    problem: MlaDecode, schedule: MlaSchedule | None
) -> None:
    """See jitgen/interpret_mla.py: 2^-7 of the largest |v| / sqrt(n)."""
    lengths = (0, 1, 63, 130, 321)
    inputs = make_inputs(MlaDraw(problem, lengths, None, 11))
    schedule = schedule or select_mla(problem, batch=len(lengths))
    o, lse = jitgen.mla_decode(*inputs.values(), causal=problem.causal, schedule=schedule)
    kernel = lower_mla(problem, schedule)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    host = {name: to_numpy(t) for name, t in inputs.items()}
    expected, expected_lse = interpret_mla(
        kernel,
        host,
        softmax_scale=problem.head_dim_qk**-0.5,
        num_parts=num_parts(kernel.body.tiles, sms, kernel.schedule.meet),
    )
    got = to_numpy(o).astype(np.float64)
    for sequence, length in enumerate(lengths):
        error = np.abs(got[sequence] - expected[sequence].astype(np.float64)).max()
        assert error <= 2**-7 / max(length, 1) ** 0.5, (length, error)
    np.testing.assert_allclose(lse.cpu().numpy(), expected_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("has_plan", [False, True])
@pytest.mark.parametrize("problem", [MlaDecode(16), MlaDecode(128, 2)], ids=str)
def test_graph_replay_with_other_lengths_equals_eager(problem: MlaDecode, has_plan: bool) -> None:
    d = MlaDraw(problem, (3000, 100, 1500, 0, 64), None, 21)
    inputs, plan = make_inputs(d), MlaPlan() if has_plan else None
    out = torch.empty(
        5, problem.num_queries, problem.num_heads, 512, dtype=torch.bfloat16, device="cuda"
    )
    jitgen.mla_decode(*inputs.values(), plan=plan, out=out)  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = jitgen.mla_decode(*inputs.values(), plan=plan, out=out)
        again, _ = jitgen.mla_decode(*inputs.values(), plan=plan)
    for lengths in ((3000, 100, 1500, 0, 64), (1, 99, 1499, 0, 0), (2999, 65, 1, 0, 3)):
        inputs["seqlens_k"].copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        o, eager_lse = jitgen.mla_decode(*inputs.values(), plan=MlaPlan())
        assert torch.equal(bits(out), bits(o))
        assert torch.equal(bits(again), bits(o))
        assert torch.equal(bits(lse), bits(eager_lse))


def test_cold_kernel_during_capture_is_refused() -> None:
    inputs = make_inputs(MlaDraw(MlaDecode(16), (100,), None, 1))
    graph = torch.cuda.CUDAGraph()
    cold = MlaSchedule(overhead=13)
    with torch.cuda.graph(graph):
        with pytest.raises(CaptureError, match="make the call once before"):
            jitgen.mla_decode(*inputs.values(), schedule=cold)
        torch.zeros(1, device="cuda")


def test_rejects_tensors_on_the_host() -> None:
    inputs = make_inputs(MlaDraw(MlaDecode(16, dtype=BF16), (100,), None, 1))
    with pytest.raises(jitgen.DeviceError, match="seqlens_k is on cpu"):
        jitgen.mla_decode(*list(inputs.values())[:3], inputs["seqlens_k"].cpu())


def test_empty_batch_gives_empty_results() -> None:
    q = torch.zeros(0, 1, 16, 576, dtype=torch.bfloat16, device="cuda")
    kv = torch.zeros(2, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    table = torch.zeros(0, 4, dtype=torch.int32, device="cuda")
    lengths = torch.zeros(0, dtype=torch.int32, device="cuda")
    o, lse = jitgen.mla_decode(q, kv, table, lengths)
    assert o.shape == (0, 1, 16, 512)
    assert lse.shape == (0, 16, 1)
