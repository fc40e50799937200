"""Merging attention results: rules, verifier, meaning against float64, source and compiling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import jitgen
from jitgen import BF16, E4M3, F16, F32, MergeSchedule, MergeStates, MlaDecode
from jitgen.build import build, prebuild
from jitgen.codegen import render
from jitgen.control import remedy
from jitgen.lower import lower_any
from jitgen.merge import lower_merge
from jitgen.runtime.store import KernelStore
from jitgen.verify import verify

from .test_mla import check_results, make_inputs


def halves(rng: np.random.Generator, dtype: Any) -> tuple[list[Any], Any, Any]:
    """Two results and, in float64, what they come to; some rows have no keys."""
    shape, rows = (3, 2, 4, 16), (3, 4, 2)
    o = [rng.standard_normal(shape).astype(dtype) for _ in range(2)]
    lse = [(8 * rng.standard_normal(rows)).astype(np.float32) for _ in range(2)]
    lse[0][0], lse[1][1] = np.inf, -np.inf
    lse[0][2, 0], lse[1][2, 0] = np.inf, np.inf
    o[0][0] = np.nan  # of no keys: not looked at
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        weight = [np.where(np.isinf(x), 0, np.exp(x.astype(np.float64))) for x in lse]
        total = weight[0] + weight[1]
        share = [np.where(total == 0, 0, w / total).transpose(0, 2, 1)[..., None] for w in weight]
        want = sum(
            np.where(s == 0, 0, s * x.astype(np.float64)) for s, x in zip(share, o, strict=True)
        )
        want_lse = np.where(total == 0, np.inf, np.log(total))
    return [o[0], lse[0], o[1], lse[1]], want, want_lse


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_merge_states_meets_float64(dtype: Any, rng: np.random.Generator) -> None:
    given, want, want_lse = halves(rng, dtype)
    o, lse = jitgen.merge_states(*given)
    assert o.dtype == dtype
    step = {2: 2**-8, 4: 1e-6}[o.dtype.itemsize]
    np.testing.assert_allclose(o.astype(np.float64), want, rtol=step, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-6)


def test_merge_states_of_halves_of_the_keys_is_the_whole(rng: np.random.Generator) -> None:
    problem = MlaDecode(4, page=16, causal=False)
    inputs = make_inputs(problem, (100, 16), rng)
    first = dict(inputs, seqlens_k=np.array([48, 0], np.int32))
    second = dict(
        inputs,
        block_table=np.stack([inputs["block_table"][0, 3:], inputs["block_table"][1, :-3]]),
        seqlens_k=np.array([52, 16], np.int32),
    )
    parts = [jitgen.mla_decode(*part.values()) for part in (first, second)]
    o, lse = jitgen.merge_states(*parts[0], *parts[1])
    check_results(problem, inputs, o, lse)


def test_merge_states_rejects_arrays_that_break_a_rule(rng: np.random.Generator) -> None:
    o_a, lse_a, o_b, lse_b = halves(rng, np.float32)[0]
    for given, message in (
        ((o_a[0], lse_a, o_b, lse_b), "must be .b, s_q, h_q, head_dim_v."),
        ((o_a, lse_a, o_b.astype("f2"), lse_b), r"o_b is float16.*must be float32\[3, 2, 4, 16\]"),
        ((o_a, lse_a.transpose(0, 2, 1), o_b, lse_b), r"lse_a .*must be float32\[3, 4, 2\]"),
        ((o_a, lse_a, o_b, lse_b.astype("f8")), "lse_b is float64"),
        ((o_a, lse_a, o_b[:, ::-1], lse_b), "o_b .*must be contiguous"),
        ((o_a[..., :9], lse_a, o_b, lse_b), "head_dim_v = 9 must be a positive multiple of 8"),
        ((o_a, lse_a, o_b, lse_b.tolist()), "lse_b is a list"),
    ):
        with pytest.raises(jitgen.ProblemError, match=message):
            jitgen.merge_states(*given)
    with pytest.raises(jitgen.DeviceError, match="o_a is on cpu"):
        jitgen.merge_states(*(torch.from_numpy(x) for x in (o_a, lse_a, o_b, lse_b)))
    with pytest.raises(jitgen.ProblemError, match="must be all torch tensors"):
        jitgen.merge_states(torch.from_numpy(o_a), lse_a, o_b, lse_b)


def test_lower_merge_rejects_what_breaks_a_rule() -> None:
    with pytest.raises(jitgen.ProblemError, match="o has dtype float8_e4m3fn"):
        lower_merge(MergeStates(512, E4M3), MergeSchedule())
    with pytest.raises(jitgen.ScheduleError, match=r"num_warps = 0 must be in 1\.\.16"):
        lower_merge(MergeStates(), MergeSchedule(0))
    with pytest.raises(jitgen.ScheduleError, match="another family's"):
        lower_any(MergeStates(), jitgen.MlaSchedule())


def test_verify_rejects_mutations() -> None:
    kernel = lower_merge(MergeStates(), MergeSchedule())
    verify(kernel)
    body, op = kernel.body, kernel.body.op
    for made, message in (
        (replace(kernel, tensors=kernel.tensors[:-1]), "takes"),
        (replace(kernel, problem=MergeStates(9)), "head_dim_v = 9"),
        (replace(kernel, body=replace(body, step=3)), "a row for each warp"),
        (replace(kernel, body=replace(body, op=replace(op, lanes=16))), "a row is a warp's"),
        (replace(kernel, body=replace(body, op=replace(op, unit=7))), "must be whole units"),
        (
            replace(kernel, body=replace(body, op=replace(op, tensors=op.tensors[::-1]))),
            "must merge the kernel's tensors",
        ),
    ):
        with pytest.raises(jitgen.VerifyError, match=message):
            verify(made)


@pytest.mark.parametrize("problem", [MergeStates(), MergeStates(256, F16), MergeStates(8, F32)])
def test_merge_states_compiles_and_is_pure(problem: MergeStates, tmp_path: Path) -> None:
    kernel = lower_merge(problem, MergeSchedule())
    source = render(kernel)
    assert source == render(lower_merge(problem, MergeSchedule()))
    assert "merge((o_a, lse_a), (o_b, lse_b))" in str(kernel)
    entry = build(kernel, KernelStore(tmp_path))
    assert entry.resources.spill_bytes == 0
    (again,) = prebuild([(problem, MergeSchedule())], root=tmp_path, num_processes=1)
    assert not again.compiled
    assert f"jitgen.MergeStates({problem.head_dim_v}, jitgen." in remedy(problem, MergeSchedule())


def test_problem_says_what_it_is() -> None:
    assert str(MergeStates(256, BF16)) == "merge of attention bf16 o[b, s_q, h_q, 256]"
