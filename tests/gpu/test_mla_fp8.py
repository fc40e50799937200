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
from jitgen.tokens_mla import decode_tokens
from tests.gpu.draws import to_numpy
from tests.gpu.mla_draws import (
    HEADS,
    MlaDraw,
    bits,
    decoded,
    draw_lengths,
    make_inputs,
    run_and_compare,
    score_error,
)
from tests.mla_bounds import check, expected

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
    (128, MlaSchedule(num_stages=3, overhead=1)),
    (128, MlaSchedule(num_stages=2, slack=1)),
    (64, MlaSchedule(tile_rows=32, num_stages=4)),
    (40, MlaSchedule(tile_rows=32, num_stages=2)),
    (40, MlaSchedule(tile_rows=16, num_stages=4)),
    (9, MlaSchedule(tile_rows=16, num_stages=3, whole=True)),
    (16, MlaSchedule(tile_rows=64, num_stages=3)),
]


@pytest.mark.parametrize(("heads", "schedule"), SCHEDULES, ids=str)
def test_schedules_meet_float64(heads: int, schedule: MlaSchedule) -> None:
    for lengths in ((5000,), (700, 0, 129, 64) * 5, (3000, 65) * 70):
        for queries in (1, 3):
            problem = MlaDecode(heads, queries, page=16, cache="fp8")
            run_and_compare(MlaDraw(problem, lengths, schedule, 5))


@pytest.mark.parametrize("kind", ["any", "falling", "rising", "zeros"])
@pytest.mark.parametrize(("heads", "tile_rows"), [(16, 16), (32, 32), (100, 64)])
def test_wide_scales_are_within_bounds(kind: str, heads: int, tile_rows: int) -> None:
    """As tests/host/test_mla_fp8.py has the interpreter: units of 2^-20 to 2^20 in a sequence."""
    rng, lengths = np.random.default_rng(heads), (1, 64, 777, 3000, 5000)
    problem = MlaDecode(heads, causal=False, cache="fp8")
    inputs = make_inputs(MlaDraw(problem, lengths, None, heads))
    pages, page = to_numpy(inputs["block_table"]), problem.page
    cache, q = to_numpy(inputs["kv_cache"]).reshape(-1, 656), to_numpy(inputs["q"]).copy()
    found = []
    for sequence, length in enumerate(lengths):
        keys = np.arange(length)
        rows = pages[sequence][keys // page] * page + keys % page
        powers = {
            "any": rng.integers(-10, 11, (length, 1)) + rng.integers(-10, 11, (length, 4)),
            "falling": 20 - 40 * keys[:, None] // length + np.zeros((1, 4), int),
            "rising": 40 * keys[:, None] // length - 20 + np.zeros((1, 4), int),
            "zeros": np.where(rng.random((length, 1)) < 0.5, -140, 0) + np.zeros((1, 4), int),
        }[kind]
        scales = np.ascontiguousarray(cache[rows, 512:528]).view(np.float32)
        cache[rows, 512:528] = np.ldexp(scales, powers).view(np.uint8)
        found.append(cache[rows])
    q[..., 512:] *= 2.0 ** (0 if kind == "zeros" else 20)
    tops = [np.abs(q[i, 0].astype("f8") @ decode_tokens(t).T).max() for i, t in enumerate(found)]
    scale = 8 / max(tops)
    schedule = MlaSchedule(tile_rows=tile_rows, num_stages=3)
    given = inputs | {
        "q": torch.from_numpy(q.view(np.int16)).view(torch.bfloat16).cuda(),
        "kv_cache": torch.from_numpy(cache.reshape(inputs["kv_cache"].shape)).cuda(),
    }
    o, lse = jitgen.mla_decode(*given.values(), softmax_scale=scale, schedule=schedule)
    got, got_lse = to_numpy(o), lse.cpu().numpy()
    for sequence, tokens in enumerate(found):
        want = expected(q[sequence, 0], tokens, scale)
        check(want, got[sequence, 0], got_lse[sequence, :, 0], (kind, lengths[sequence]))


def test_pages_that_lie_apart_meet_float64() -> None:
    problem = MlaDecode(16, page=32, cache="fp8")
    run_and_compare(MlaDraw(problem, (1000, 3, 77), None, 9), gap=48)


def check_like_interpreter(o: torch.Tensor, want: Any, keys: torch.Tensor) -> None:
    """Raise AssertionError if o differs by more than what is not modelled.

    Exponentials, sums and the order of a merge differ by a few 2^-23, so that a p may be rounded
    the other way, by 2^-10 of itself at most: 2^-10 of the largest |v| if all were; the same if
    maxima grow with another block. Then o is rounded to bfloat16, perhaps the other way.
    """
    expected = want.astype(np.float64)
    limit = 2**-10 * float(keys.abs().max()) + 2**-7 * np.abs(expected)
    error = np.abs(to_numpy(o).astype(np.float64) - expected)
    assert np.all(error <= limit), (error / limit).max()


def test_small_fp8_equals_interpreter_within_tolerance() -> None:
    problem, lengths = MlaDecode(3, 2, cache="fp8"), (0, 1, 63, 130, 321)
    inputs = make_inputs(MlaDraw(problem, lengths, None, 11))
    o, lse = jitgen.mla_decode(*inputs.values())
    want, want_lse = jitgen.mla_decode(*map(to_numpy, inputs.values()))
    keys = decoded(inputs["kv_cache"].reshape(-1, 656))
    check_like_interpreter(o, want, keys[:, :512].nan_to_num(nan=0))
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
            slack = score_error(given["q"][i, t : t + 1], keys)[0] if len(keys) else 0.0
            wrong = (lse[i, :, t] != want_lse) & (off > 8 / 65536 * want_lse.abs()) & (off > slack)
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
    keys = decoded(given["kv_cache"].view(-1, 656))
    check_like_interpreter(o, want, keys[:, :512].nan_to_num(nan=0))
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
