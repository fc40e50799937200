"""MLA decode over an FP8 cache, dense and sparse, without a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import jitgen
from jitgen import BF16, F16, MlaDecode, MlaSchedule, ProblemError, ScheduleError, VerifyError
from jitgen.build import build
from jitgen.codegen import render
from jitgen.interpret_mla import interpret_mla
from jitgen.ir_mla import LoadKeys, LoadTokens, Mask, MaskTokens, MlaKernel, StoreOutput
from jitgen.lower_mla import lower_mla, mla_tensors
from jitgen.problem_mla import check_mla
from jitgen.runtime.store import KernelStore
from jitgen.schedule_mla import check_mla_schedule, mla_smem_plan, select_mla, stages_tokens
from jitgen.tokens_mla import decode_tokens
from jitgen.verify import verify

from .test_mla import check_results, make_inputs
from .test_mla_kernels import Change, changed

Array = NDArray[Any]
DENSE = MlaDecode(4, 2, page=16, cache="fp8")
SPARSE = MlaDecode(4, 2, page=16, causal=False, cache="fp8", sparse=True)


def fp8_inputs(
    problem: MlaDecode, lengths: tuple[int, ...], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs over an FP8 cache, and the same with its keys decoded; unused bytes are NaN."""
    plain = make_inputs(replace(problem, cache="plain", sparse=False, sink=False), lengths, rng)
    keys = plain["kv_cache"]
    unused = np.isnan(keys.astype(np.float32)).any(axis=-1)
    finite = np.where(unused[..., None], np.zeros_like(keys), keys)
    # Blocks of columns of different size, so that scales matter.
    finite[..., :512] *= np.repeat(2.0 ** rng.integers(-3, 1, 4), 128).astype(keys.dtype)
    cache = jitgen.quantize_mla_cache(finite)
    decoded = decode_tokens(cache.reshape(-1, 656)).reshape(*cache.shape[:-1], 576)
    cache[unused] = 0xFF
    return plain | {"kv_cache": cache}, plain | {"kv_cache": decoded}


# --- the cache ------------------------------------------------------------------------------------


def test_quantize_mla_cache_is_the_same_from_numpy_and_torch(rng: np.random.Generator) -> None:
    keys = (rng.standard_normal((3, 16, 1, 576)) * 4).astype(ml_dtypes.bfloat16)
    keys[0, 0, 0, :128] = 0
    tokens = jitgen.quantize_mla_cache(keys)
    assert tokens.dtype == np.uint8
    assert tokens.shape == (3, 16, 1, 656)
    as_torch = torch.from_numpy(keys.view(np.int16).copy()).view(torch.bfloat16)
    np.testing.assert_array_equal(jitgen.quantize_mla_cache(as_torch).numpy(), tokens)
    back = decode_tokens(tokens.reshape(-1, 656), exact=True)
    want = keys.reshape(-1, 576).astype(np.float64)
    np.testing.assert_array_equal(back[:, 512:], want[:, 512:])
    top = np.abs(want[:, :512].reshape(-1, 4, 128)).max(axis=2).repeat(128, axis=1)
    assert np.all(
        np.abs(back - want)[:, :512] <= np.maximum(np.abs(want[:, :512]) / 16, top / 2**15)
    )


def test_decode_tokens_rounds_once_but_for_the_last_bits(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 256, (40, 656), dtype=np.uint8)
    scales = np.exp2(rng.uniform(-20, 6, (40, 4))).astype(np.float32)
    scales[:20] = np.exp2(np.round(np.log2(scales[:20])))
    tokens[:, 512:528] = scales.view(np.uint8)
    tokens[:, 528:] = 0
    exact, decoded = decode_tokens(tokens, exact=True), decode_tokens(tokens)
    assert decoded.dtype == ml_dtypes.bfloat16
    got = decoded.astype(np.float64)
    np.testing.assert_array_equal(got[:20], exact[:20])  # scales that are powers of two
    assert np.all(np.abs(got - exact) <= np.abs(exact) * 2**-8 * (1 + 2**-7))
    nearest = exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.mean(nearest == got) > 0.97


def test_quantize_mla_cache_rejects_other_arrays(rng: np.random.Generator) -> None:
    keys = np.zeros((2, 576), ml_dtypes.bfloat16)
    for given, message in (
        (keys.astype(np.float32), "float32.*must be bfloat16"),
        (keys[:, :512], "576"),
        (torch.zeros(2, 576), "float32.*must be bfloat16"),
        ([1], "keys are a list"),
    ):
        with pytest.raises(ProblemError, match=message):
            jitgen.quantize_mla_cache(given)
    keys[0, 3] = np.inf
    with pytest.raises(ProblemError, match="must be finite"):
        jitgen.quantize_mla_cache(keys)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (replace(DENSE, dtype=F16), r"an FP8 cache has head dims .* got .* and float16"),
        (replace(DENSE, head_dim_qk=512), "an FP8 cache has head dims"),
        (replace(DENSE, cache="fp4"), "cache = 'fp4' must be one of plain, fp8"),
        (replace(DENSE, sparse=True), "no causal mask, got cache = 'fp8', causal = True"),
        (replace(SPARSE, cache="plain"), "sparse decode takes an FP8 cache"),
        (replace(SPARSE, sparse=1), "sparse = 1 must be True or False"),
        (replace(DENSE, sink=True), "sink = True is of sparse decode"),
    ],
)
def test_check_mla_rejects(problem: MlaDecode, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        check_mla(problem)


def test_check_mla_schedule_rejects_what_an_fp8_cache_cannot() -> None:
    for schedule in (
        MlaSchedule(),
        MlaSchedule(prefetch=1, evict_first=1),
        MlaSchedule(prefetch=2),
        MlaSchedule(tile_rows=32, prefetch=1),
    ):
        with pytest.raises(ScheduleError, match="tokens of an FP8 cache wait in shared"):
            check_mla_schedule(replace(DENSE, num_heads=128, num_queries=1), schedule)
    with pytest.raises(ScheduleError, match="score_ahead = True"):
        check_mla_schedule(DENSE, MlaSchedule(prefetch=1, score_ahead=True))
    for schedule in (MlaSchedule(cluster=2, prefetch=1), MlaSchedule(tile_rows=32, cluster=2)):
        check_mla_schedule(replace(DENSE, num_heads=128, num_queries=1), schedule)


def test_problem_says_what_it_is() -> None:
    assert "kv[blocks, 16, 1, 656 bytes]" in str(DENSE)
    assert str(replace(SPARSE, sink=True)).endswith(", sparse, sink")
    assert (SPARSE.num_tokens, SPARSE.num_rows, DENSE.num_tokens, DENSE.num_rows) == (2, 4, 1, 8)


# --- the interpreter ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 132])
def test_interpret_dense_meets_float64(parts: int, rng: np.random.Generator) -> None:
    inputs, decoded = fp8_inputs(DENSE, (0, 1, 63, 65, 130), rng)
    kernel = lower_mla(DENSE, select_mla(DENSE))
    o, lse = interpret_mla(kernel, inputs, softmax_scale=576**-0.5, num_parts=parts)
    check_results(DENSE, decoded, o, lse)
    exact = inputs["kv_cache"].reshape(-1, 656)
    with np.errstate(invalid="ignore"):
        exact = decode_tokens(exact, exact=True).reshape(*inputs["kv_cache"].shape[:-1], 576)
    o, lse = interpret_mla(
        kernel, inputs, softmax_scale=576**-0.5, num_parts=parts, numerics="exact"
    )
    check_results(DENSE, inputs | {"kv_cache": exact}, o, lse)


def sparse_lists(
    problem: MlaDecode, inputs: dict[str, Array], topk: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """indices and topk_length: tokens of the first sequence, some twice, among some that are none;
    those beyond a length are poison."""
    length, page = int(inputs["seqlens_k"][0]), problem.page
    batch = len(inputs["q"])
    keys = rng.integers(0, length, (batch, problem.num_queries, topk))
    indices = inputs["block_table"][0][keys // page] * page + keys % page
    none = rng.random(indices.shape)
    indices[none < 0.1] = -1
    indices[(none > 0.1) & (none < 0.2)] = len(inputs["kv_cache"]) * page + 5
    lengths = rng.integers(0, topk + 1, batch).astype(np.int32)
    lengths[0], lengths[-1] = 0, topk
    for sequence, count in enumerate(lengths):
        indices[sequence, :, count:] = 2  # some page's; made NaN or not, it does not count
    return indices.astype(np.int32), lengths


def sparse_reference(
    q: Array, keys: Array, indices: Array, lengths: Array, sink: Array | None
) -> tuple[Array, Array]:
    """o [b, s_q, h_q, 512] and lse [b, h_q, s_q] in float64; keys [tokens, 576]."""
    batch, queries, heads = q.shape[:3]
    o, lse = np.zeros((batch, queries, heads, 512)), np.full((batch, heads, queries), np.inf)
    for i in range(batch):
        for t in range(queries):
            listed = indices[i, t, : lengths[i]]
            found = keys[listed[(listed >= 0) & (listed < len(keys))]]
            if len(found):
                scores = q[i, t].astype(np.float64) @ found.T * 576**-0.5
                lse[i, :, t] = np.log(np.exp(scores).sum(axis=1))
                more = 0 if sink is None else np.exp(sink.astype(np.float64))
                total = np.exp(lse[i, :, t]) + more
                o[i, t] = np.exp(scores) @ found[:, :512] / total[:, None]
    return o, lse


@pytest.mark.parametrize("has_sink", [False, True])
def test_interpret_sparse_meets_float64(has_sink: bool, rng: np.random.Generator) -> None:
    inputs, decoded = fp8_inputs(SPARSE, (150, 3, 9, 20), rng)
    indices, lengths = sparse_lists(SPARSE, inputs, 100, rng)
    sink = np.array([-math.inf, 0.5, 3, math.inf], np.float32) if has_sink else None
    o, lse = jitgen.mla_decode_sparse(
        inputs["q"], inputs["kv_cache"], indices, topk_length=lengths, attention_sink=sink
    )
    keys = decoded["kv_cache"].reshape(-1, 576).astype(np.float64)
    want, want_lse = sparse_reference(inputs["q"], keys, indices, lengths, sink)
    error = np.abs(o.astype(np.float64) - want)
    assert np.all((error <= 8e-4) | (error <= 2.01 / 128 * np.abs(want))), error.max()
    np.testing.assert_allclose(lse, want_lse, rtol=8 / 65536, atol=1e-6)
    assert np.isinf(lse[0]).all()
    whole, _ = jitgen.mla_decode_sparse(inputs["q"][-1:], inputs["kv_cache"], indices[-1:])
    if not has_sink:
        np.testing.assert_array_equal(whole[0], o[-1])


def test_sparse_over_all_tokens_is_dense(rng: np.random.Generator) -> None:
    inputs, _ = fp8_inputs(DENSE, (70,), rng)
    keys = np.arange(70)
    tokens = inputs["block_table"][0][keys // 16] * 16 + keys % 16
    indices = np.broadcast_to(tokens.astype(np.int32), (1, 2, 70)).copy()
    o, lse = jitgen.mla_decode_sparse(inputs["q"], inputs["kv_cache"], indices)
    want, want_lse = jitgen.mla_decode(*inputs.values(), causal=False)
    np.testing.assert_allclose(o.astype("f4"), want.astype("f4"), rtol=0.02, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


def test_calls_reject_arrays_that_break_a_rule(rng: np.random.Generator) -> None:
    inputs, _ = fp8_inputs(DENSE, (70, 2), rng)
    q, cache = inputs["q"], inputs["kv_cache"]
    indices = np.zeros((2, 2, 8), np.int32)

    def sparse(**changed: Any) -> None:
        given = {"q": q, "kv_cache": cache, "indices": indices} | changed
        jitgen.mla_decode_sparse(**given)

    with pytest.raises(ProblemError, match="an FP8 cache has 656 bytes a token"):
        jitgen.mla_decode(*(inputs | {"kv_cache": cache[..., :640]}).values())
    wide = np.zeros((*cache.shape[:3], 672), np.uint8)[..., :656]
    with pytest.raises(ProblemError, match="must follow one another"):
        jitgen.mla_decode(*(inputs | {"kv_cache": wide}).values())
    with pytest.raises(ProblemError, match=r"queries of bfloat16, got .* and float16"):
        jitgen.mla_decode(*(inputs | {"q": q.astype(np.float16)}).values())
    for change, message in (
        ({"kv_cache": q}, "must be .b, s_q"),
        ({"kv_cache": np.zeros((2, 16, 1, 576), BF16.numpy)}, "sparse decode takes an FP8 cache"),
        ({"indices": indices[:1]}, r"indices .* must be int32 \[2, 2, topk\]"),
        ({"indices": indices.astype("i8")}, "indices is int64"),
        ({"topk_length": indices[:, :, 0]}, r"topk_length .* must be int32 \[2\]"),
        ({"attention_sink": np.zeros(3, "f4")}, r"sink .* must be float32 \[4\]"),
        ({"indices": indices[:, :, ::2]}, "its last dimension must be contiguous"),
    ):
        with pytest.raises(ProblemError, match=message):
            sparse(**change)


# --- kernels --------------------------------------------------------------------------------------


def kernel_of(problem: MlaDecode) -> MlaKernel:
    return lower_mla(problem, select_mla(problem))


@pytest.mark.parametrize(
    ("problem", "kind", "change", "message"),
    [
        (DENSE, LoadTokens, lambda op: replace(op, num_warps=1), "the producer has 4 warps"),
        (DENSE, LoadTokens, lambda op: None, "must hold keys, holds nothing"),
        (DENSE, LoadTokens, lambda op: replace(op, multicast=2), "must be shared by the cluster"),
        (DENSE, LoadTokens, lambda op: replace(op, waiting=8), "must have 0 tokens waiting"),
        (SPARSE, LoadTokens, lambda op: replace(op, waiting=0), "must have 64 tokens waiting"),
        (
            SPARSE,
            LoadTokens,
            lambda op: replace(op, where=mla_tensors(DENSE)["block_table"]),
            "must look up indices",
        ),
        (SPARSE, MaskTokens, lambda op: replace(op, indices=op.scores), "mask by the lists"),
        (
            SPARSE,
            MaskTokens,
            lambda op: Mask(op.scores, mla_tensors(DENSE)["seqlens_k"], False),
            "is not the problem's mask",
        ),
        (
            DENSE,
            LoadTokens,
            lambda op: LoadKeys(op.dst, op.src, op.where, (16, 64), 1),
            "cannot load an FP8 cache",
        ),
        (
            replace(SPARSE, sink=True),
            StoreOutput,
            lambda op: replace(op, sink=None),
            "must have the problem's sink",
        ),
    ],
)
def test_verify_rejects(problem: MlaDecode, kind: type, change: Change, message: str) -> None:
    verify(kernel_of(problem))
    with pytest.raises(VerifyError, match=message):
        verify(changed(kernel_of(problem), kind, change))


def test_verify_rejects_tokens_of_a_plain_cache() -> None:
    kernel = kernel_of(MlaDecode(4))
    made = changed(kernel, LoadKeys, lambda op: LoadTokens(op.dst, op.src, op.table, 4, 1, 0))
    with pytest.raises(VerifyError, match="decodes a cache that is not FP8"):
        verify(made)


@pytest.mark.parametrize(
    ("rows", "outputs", "tokens"), [(16, True, True), (32, False, True), (64, True, False)]
)
def test_smem_plan_has_tokens_wait_where_there_is_room(
    rows: int, outputs: bool, tokens: bool
) -> None:
    problem = MlaDecode(16, cache="fp8")
    schedule = MlaSchedule(tile_rows=rows, prefetch=0 if tokens else 1)
    plan = mla_smem_plan(problem, schedule)
    assert plan.keys == rows * 576 * 2
    assert (plan.p > plan.keys) == outputs  # else over the queries
    assert stages_tokens(problem, schedule) == tokens
    assert plan.states - plan.tokens == tokens * 64 * 656
    verify(lower_mla(problem, schedule))


def test_select_mla_fits_tiles_and_clusters_to_the_rows_of_an_fp8_cache() -> None:
    for heads, queries, sparse, expected in (
        (16, 1, False, (16, 1, 0)),
        (17, 1, False, (32, 1, 0)),
        (8, 2, False, (64, 1, 1)),  # a mask by rows
        (16, 2, True, (16, 1, 0)),
        (64, 2, True, (64, 1, 1)),
        (128, 1, False, (64, 2, 1)),
        (100, 3, False, (64, 1, 1)),  # five tiles
    ):
        problem = MlaDecode(heads, queries, causal=False, cache="fp8", sparse=sparse)
        schedule = select_mla(problem)
        assert (schedule.tile_rows, schedule.cluster, schedule.prefetch) == expected


@pytest.mark.parametrize(
    "problem",
    [
        MlaDecode(16, causal=False, cache="fp8"),
        MlaDecode(32, page=7, cache="fp8"),
        MlaDecode(64, causal=False, cache="fp8"),
        MlaDecode(128, 2, page=128, cache="fp8"),
        MlaDecode(128, 2, causal=False, cache="fp8", sparse=True),
        MlaDecode(64, 3, page=61, causal=False, cache="fp8", sparse=True, sink=True),
        MlaDecode(64, page=576, causal=False, cache="fp8", sparse=True, sink=True),
        MlaDecode(5, 3, page=16, causal=False, cache="fp8", sparse=True, sink=True),
    ],
    ids=str,
)
def test_nvrtc_compiles_without_spills_or_advisories(problem: MlaDecode, tmp_path: Path) -> None:
    kernel = kernel_of(problem)
    source = render(kernel)
    assert ("mask(scores, valid, lane)" in source) == problem.sparse
    entry = build(kernel, KernelStore(tmp_path))
    assert entry.resources.spill_bytes == 0
