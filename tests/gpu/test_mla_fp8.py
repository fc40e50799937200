"""MLA decode over an FP8 cache on the GPU: against float64, the interpreter, and itself."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import jitgen
from jitgen import MlaDecode, MlaPlan, MlaSchedule
from jitgen.problem_mla import PAGES
from tests.gpu.draws import to_numpy
from tests.gpu.mla_draws import (
    HEADS,
    MlaDraw,
    bits,
    decoded,
    draw_lengths,
    make_inputs,
    run_and_compare,
)

NUM_PROBLEMS, CASES_EACH = 16, 16
PROBLEMS = [
    MlaDecode(
        HEADS[i % len(HEADS)],
        queries := (1, 2, 1, 3, 8)[i % 5],
        page=PAGES[i % 4],
        causal=queries > 1 and i % 3 > 0,
        cache="fp8",
    )
    for i in range(NUM_PROBLEMS)
]
SPARSE_PROBLEMS = [
    replace(problem, causal=False, sparse=True, sink=i % 3 == 0)
    for i, problem in enumerate(PROBLEMS)
]


def test_quantize_mla_cache_on_the_gpu_equals_numpy() -> None:
    keys = (torch.randn(40, 64, 1, 576, device="cuda") * 3).bfloat16()
    tokens = jitgen.quantize_mla_cache(keys)
    np.testing.assert_array_equal(to_numpy(tokens), jitgen.quantize_mla_cache(to_numpy(keys)))


# --- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(NUM_PROBLEMS), ids=lambda i: f"{i}-{PROBLEMS[i]}")
def test_random_dense_calls_meet_float64(index: int) -> None:
    rng = random.Random(index)
    for case in range(CASES_EACH):
        lengths = draw_lengths(rng, index + case)
        run_and_compare(MlaDraw(PROBLEMS[index], lengths, None, rng.getrandbits(31)))


SCHEDULES = [
    (128, MlaSchedule(prefetch=1, overhead=1)),
    (128, MlaSchedule(cluster=2, prefetch=1)),
    (64, MlaSchedule(tile_rows=32, cluster=2)),
    (40, MlaSchedule(tile_rows=16)),
]


@pytest.mark.parametrize(("heads", "schedule"), SCHEDULES, ids=str)
def test_schedules_meet_float64(heads: int, schedule: MlaSchedule) -> None:
    for lengths in ((5000,), (700, 0, 129, 64) * 5, (3000, 65) * 70):
        run_and_compare(MlaDraw(MlaDecode(heads, page=16, cache="fp8"), lengths, schedule, 5))


@pytest.mark.parametrize(
    ("problem", "schedule"),
    [
        (MlaDecode(16, cache="fp8"), MlaSchedule(tile_rows=16)),
        (MlaDecode(128, cache="fp8"), MlaSchedule(cluster=2, prefetch=1)),
    ],
    ids=str,
)
def test_small_results_do_not_depend_on_who_decodes(
    problem: MlaDecode, schedule: MlaSchedule
) -> None:
    inputs = make_inputs(MlaDraw(problem, (1000, 3, 77, 0, 640), None, 31)).values()
    first = jitgen.mla_decode(*inputs, schedule=schedule)
    second = jitgen.mla_decode(*inputs, schedule=MlaSchedule(prefetch=1))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_pages_that_lie_apart_meet_float64() -> None:
    problem = MlaDecode(16, page=32, cache="fp8")
    run_and_compare(MlaDraw(problem, (1000, 3, 77), None, 9), gap=48)


def test_small_fp8_equals_interpreter_within_tolerance() -> None:
    problem, lengths = MlaDecode(3, 2, cache="fp8"), (0, 1, 63, 130, 321)
    inputs = make_inputs(MlaDraw(problem, lengths, None, 11))
    o, lse = jitgen.mla_decode(*inputs.values())
    want, want_lse = jitgen.mla_decode(*map(to_numpy, inputs.values()))
    error = np.abs(to_numpy(o).astype(np.float64) - want.astype(np.float64)).max(axis=(1, 2, 3))
    assert np.all(error <= 4 * 2**-7 / np.maximum(lengths, 1) ** 0.5), error
    np.testing.assert_allclose(lse.cpu().numpy(), want_lse, rtol=2e-6, atol=2e-6)


# --- sparse ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseDraw:
    problem: MlaDecode
    batch: int
    topk: int
    seed: int


def sparse_inputs(d: SparseDraw) -> dict[str, Any]:
    """Lists of tokens of a cache that is poison but for them, among entries that are no token."""
    p = d.problem
    generator = torch.Generator("cuda").manual_seed(d.seed)
    num_blocks = 3 + 2 * d.topk // p.page
    size = num_blocks * p.page
    cache = torch.full((num_blocks, p.page, 1, 656), 0xFF, device="cuda", dtype=torch.uint8)
    used = torch.randperm(size, device="cuda", generator=generator)[: max(size // 2, 1)]
    keys = torch.randn(len(used), 576, device="cuda", generator=generator)
    cache.view(-1, 656)[used] = jitgen.quantize_mla_cache((keys / 10).bfloat16())
    shape = (d.batch, p.num_queries, d.topk)
    pick = torch.randint(len(used), shape, device="cuda", generator=generator)
    indices = used[pick].to(torch.int32)
    kind = torch.rand(shape, device="cuda", generator=generator)
    indices[kind < 0.05] = -1
    indices[(kind > 0.05) & (kind < 0.1)] = size
    indices[(kind > 0.1) & (kind < 0.12)] = -(2**31)
    lengths = torch.randint(-1, d.topk + 9, (d.batch,), device="cuda", generator=generator)
    q = torch.randn(d.batch, p.num_queries, p.num_heads, 576, device="cuda", generator=generator)
    sink = torch.randn(p.num_heads, device="cuda", generator=generator) * 4
    sink[0] = -math.inf
    return {
        "q": q.bfloat16(),
        "kv_cache": cache,
        "indices": indices,
        "topk_length": lengths.to(torch.int32) if d.seed % 3 else None,
        "attention_sink": sink if p.sink else None,
    }


def check_sparse(d: SparseDraw, given: dict[str, Any], o: torch.Tensor, lse: torch.Tensor) -> None:
    """Every query token of a few sequences against float64."""
    cache, lengths = given["kv_cache"].view(-1, 656), given["topk_length"]
    assert not torch.isnan(o).any(), f"o has NaN: {d}"
    for i in random.Random(d.seed).sample(range(d.batch), min(d.batch, 4)):
        for t in range(d.problem.num_queries):
            count = d.topk if lengths is None else min(max(int(lengths[i]), 0), d.topk)
            listed = given["indices"][i, t, :count].long()
            keys = decoded(cache[listed[(listed >= 0) & (listed < len(cache))]])
            scores = given["q"][i, t].double() @ keys.T * 576**-0.5
            want_lse = torch.logsumexp(scores, -1)
            want_lse[want_lse == -math.inf] = math.inf
            total = want_lse.clone()
            if given["attention_sink"] is not None:
                total = torch.logaddexp(total, given["attention_sink"].double())
            want = torch.exp(scores - total[:, None]) @ keys[:, :512]
            error = (o[i, t].double() - want).abs()
            bad = (error > 8e-4) & (error > 2.01 / 128 * want.abs())
            assert not bad.any(), f"[{i}, {t}] is off by {float(error.max()):.2e}: {d}"
            off = (lse[i, :, t].double() - want_lse).abs()
            wrong = (lse[i, :, t] != want_lse) & (off > 8 / 65536 * want_lse.abs()) & (off > 1e-6)
            assert not wrong.any(), f"lse of [{i}, {t}] is off by {float(off.max()):.2e}: {d}"


@pytest.mark.parametrize("index", range(NUM_PROBLEMS), ids=lambda i: f"{i}-{SPARSE_PROBLEMS[i]}")
def test_random_sparse_calls_meet_float64(index: int) -> None:
    rng, problem = random.Random(index), SPARSE_PROBLEMS[index]
    for case in range(CASES_EACH):
        topk = rng.choice((1, 63, 64, 65, 128, 500, 2048, 16384 if case % 8 == 0 else 300))
        batch = rng.choice((1, 2, 3, 20, 70 if topk < 600 else 4))
        d = SparseDraw(problem, batch, topk, rng.getrandbits(31))
        given, plan = sparse_inputs(d), MlaPlan()
        plan.partial_out.fill_(math.nan)
        plan.partial_states.fill_(math.nan)
        size = batch * problem.num_queries * problem.num_heads * 512
        memory = torch.full((size + 128,), -3.0, dtype=torch.bfloat16, device="cuda")
        out = memory[64:-64].view(batch, problem.num_queries, problem.num_heads, 512)
        first: tuple[torch.Tensor, torch.Tensor] | None = None
        for _ in range(3):
            out.fill_(math.nan)
            o, lse = jitgen.mla_decode_sparse(**given, plan=plan, out=out)
            first = first or (o.clone(), lse)
            assert torch.equal(bits(o), bits(first[0])), d
            assert torch.equal(bits(lse), bits(first[1])), d
        check_sparse(d, given, *first)
        assert not plan.counters.any(), f"counters are left behind: {d}"
        assert torch.all(torch.cat((memory[:64], memory[-64:])) == -3.0), f"canaries lost: {d}"


@pytest.mark.parametrize("problem", [SPARSE_PROBLEMS[0]], ids=str)
def test_small_sparse_equals_interpreter_within_tolerance(problem: MlaDecode) -> None:
    given = sparse_inputs(SparseDraw(problem, 3, 150, 4))
    o, lse = jitgen.mla_decode_sparse(**given)
    host = {name: t if t is None else to_numpy(t) for name, t in given.items()}
    want, want_lse = jitgen.mla_decode_sparse(**host)
    np.testing.assert_allclose(to_numpy(o).astype("f4"), want.astype("f4"), atol=2e-3, rtol=0.02)
    np.testing.assert_allclose(lse.cpu().numpy(), want_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("problem", [PROBLEMS[1], SPARSE_PROBLEMS[3]], ids=str)
def test_graph_replay_with_other_lengths_equals_eager(problem: MlaDecode) -> None:
    plan, run, inputs, name = MlaPlan(), jitgen.mla_decode, {}, "seqlens_k"
    if problem.sparse:
        inputs = sparse_inputs(SparseDraw(problem, 3, 3000, 4))
        run, name = jitgen.mla_decode_sparse, "topk_length"
        inputs[name] = torch.tensor((3000, 0, 700), device="cuda", dtype=torch.int32)
    else:
        names = ("q", "kv_cache", "block_table", "seqlens_k")
        drawn = make_inputs(MlaDraw(problem, (3000, 100, 1500), None, 21))
        inputs = dict(zip(names, drawn.values(), strict=True)) | {"causal": problem.causal}
    run(**inputs, plan=plan)  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = run(**inputs, plan=plan)
    for lengths in ((3000, 0, 700), (1, 99, 1500), (2999, 64, 0)):
        inputs[name].copy_(torch.tensor(lengths))
        graph.replay()
        want, want_lse = run(**inputs, plan=MlaPlan())
        assert torch.equal(bits(o), bits(want))
        assert torch.equal(bits(lse), bits(want_lse))
