"""MLA decode over an FP8 cache, dense and sparse, without a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import jitgen
from jitgen import (
    BF16,
    F16,
    MlaDecode,
    MlaSchedule,
    ProblemError,
    ScheduleError,
    VerifyError,
    tokens_mla,
)
from jitgen.build import build
from jitgen.codegen import headers
from jitgen.interpret_mla import interpret_mla
from jitgen.ir_mla import (
    MAX_SLACK,
    Fill,
    LoadKeys,
    Mask,
    MaskTokens,
    MlaKernel,
    StoreOutput,
    walk_mla,
)
from jitgen.ir_mla_fp8 import (
    AttendTokens,
    LoadTokens,
    ScaleQueries,
    ScoreTokens,
    Settle,
    SoftenTokens,
    WeighTokens,
)
from jitgen.lower_mla import lower_mla, mla_tensors
from jitgen.problem_mla import check_mla
from jitgen.runtime.store import KernelStore
from jitgen.schedule_mla import (
    check_mla_schedule,
    key_limits,
    mla_smem_plan,
    registers,
    select_mla,
)
from jitgen.tokens_mla import decode_tokens, split_tokens
from jitgen.verify import verify
from tests.mla_bounds import check, expected

from .test_mla import check_results, make_inputs
from .test_mla_kernels import Change, changed

Array = NDArray[Any]
DENSE = MlaDecode(4, 2, page=16, cache="fp8")
SPARSE = MlaDecode(4, 2, page=16, causal=False, cache="fp8", sparse=True)


def fp8_inputs(
    problem: MlaDecode, lengths: tuple[int, ...], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs over an FP8 cache, and the same with its exact keys; unused codes are NaN."""
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
    back = decode_tokens(tokens.reshape(-1, 656))
    want = keys.reshape(-1, 576).astype(np.float64)
    np.testing.assert_array_equal(back[:, 512:], want[:, 512:])
    top = np.abs(want[:, :512].reshape(-1, 4, 128)).max(axis=2).repeat(128, axis=1)
    assert np.all(
        np.abs(back - want)[:, :512] <= np.maximum(np.abs(want[:, :512]) / 16, top / 2**15)
    )


def test_decode_tokens_is_exact(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 256, (40, 656), dtype=np.uint8)
    scales = np.exp2(rng.uniform(-20, 6, (40, 4))).astype(np.float32)
    tokens[:, 512:528] = scales.view(np.uint8)
    tokens[:, 528:] = rng.standard_normal((40, 64)).astype(ml_dtypes.bfloat16).view(np.uint8)
    codes, found, tail = split_tokens(tokens)
    np.testing.assert_array_equal(found, scales)
    values = decode_tokens(tokens)
    assert values.dtype == np.float64
    is_nan = np.isin(tokens[:, :512], (0x7F, 0xFF))
    np.testing.assert_array_equal(np.isnan(values[:, :512]), is_nan)
    want = codes.astype(np.float64)[:, 300] * scales[:, 2].astype(np.float64)
    np.testing.assert_array_equal(values[:, 300], want)
    np.testing.assert_array_equal(values[:, 512:], tail.astype(np.float64))


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
    wide = replace(DENSE, num_heads=128, num_queries=1)
    for schedule, message in (
        (MlaSchedule(meet=2), "meet = 2 must be one of 1 over an FP8 cache"),
        (MlaSchedule(evict_first=1), "evict_first = 1 must be one of 0 over an FP8 cache"),
        (MlaSchedule(score_ahead=True), "score_ahead = True must be one of False over an FP8"),
        (MlaSchedule(tile_rows=48), "tile_rows = 48 must be one of 16, 32, 64 over an FP8 cache"),
        (MlaSchedule(num_stages=5), "num_stages = 5 must be one of 2, 3, 4 over an FP8 cache"),
        (MlaSchedule(num_stages=4), r"lower num_stages \(4\) to 3"),
    ):
        with pytest.raises(ScheduleError, match=message):
            check_mla_schedule(wide, schedule)
    for rows, stages in ((16, 4), (32, 4), (64, 3)):
        check_mla_schedule(DENSE, MlaSchedule(tile_rows=rows, num_stages=stages))


def test_problem_says_what_it_is() -> None:
    assert "kv[blocks, 16, 1, 656 bytes]" in str(DENSE)
    assert str(replace(SPARSE, sink=True)).endswith(", sparse, sink")
    assert (SPARSE.num_tokens, SPARSE.num_rows, DENSE.num_tokens, DENSE.num_rows) == (2, 4, 1, 8)


# --- the interpreter ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 132])
def test_interpret_dense_meets_float64(parts: int, rng: np.random.Generator) -> None:
    inputs, decoded = fp8_inputs(DENSE, (0, 1, 63, 65, 130), rng)
    kernel = lower_mla(DENSE, select_mla(DENSE))
    for numerics in ("hopper", "exact"):
        o, lse = interpret_mla(
            kernel, inputs, softmax_scale=576**-0.5, num_parts=parts, numerics=numerics
        )
        slack = score_error(inputs["q"], decoded["kv_cache"]) if numerics == "hopper" else 1e-6
        check_results(DENSE, decoded, o, lse, numerics, lse_error=slack)


def score_error(q: Array, keys: Array) -> float:
    """How far off scores may be in the worst case, by codes that are off by 2^-10."""
    largest = np.nan_to_num(np.abs(keys.reshape(-1, 576))).max(axis=0)
    return float(np.abs(q.astype(np.float64)).reshape(-1, 576).max(axis=0) @ largest) * 2**-10 / 24


def spread_scales(tokens: Array, powers: Array) -> None:
    """Multiplies the scales of tokens [n, 656] by 2^powers [n, 4]."""
    scales = np.ascontiguousarray(tokens[:, 512:528]).view(np.float32)
    tokens[:, 512:528] = np.ldexp(scales, powers).view(np.uint8)


def attend(q: Array, tokens: Array, scale: float, schedule: MlaSchedule) -> tuple[Array, Array]:
    """o [rows, 512] and lse [rows] of q [rows, 576] over tokens [n, 656], in one part."""
    problem = MlaDecode(len(q), causal=False, cache="fp8")
    cache = np.full((-(-len(tokens) // 64), 64, 1, 656), 0xFF, np.uint8)
    cache.reshape(-1, 656)[: len(tokens)] = tokens
    inputs = {
        "q": q[None, None],
        "kv_cache": cache,
        "block_table": np.arange(len(cache), dtype=np.int32)[None],
        "seqlens_k": np.array([len(tokens)], np.int32),
    }
    kernel = lower_mla(problem, schedule)
    o, lse = interpret_mla(kernel, inputs, softmax_scale=scale, num_parts=1)
    return o[0, 0], lse[0, :, 0]


def make_tokens(count: int, rng: np.random.Generator) -> Array:
    keys = rng.standard_normal((count, 576)).astype(ml_dtypes.bfloat16)
    return jitgen.quantize_mla_cache(keys)


@pytest.mark.parametrize("kind", ["any", "falling", "rising", "within tokens", "tiny", "zeros"])
def test_interpret_is_within_bounds_whatever_the_scales(
    kind: str, rng: np.random.Generator
) -> None:
    """Units of a segment grow and shrink by up to 2^40; scores stay where all tokens count."""
    count = 300
    tokens, each = make_tokens(count, rng), np.arange(count)[:, None]
    powers = {
        "any": rng.integers(-20, 21, (count, 1)) + rng.integers(-20, 21, (count, 4)),
        "falling": 20 - 40 * each // count + np.zeros((1, 4), int),
        "rising": 40 * each // count - 20 + np.zeros((1, 4), int),
        "within tokens": np.array([[0, -22, 5, -40]]) + np.zeros((count, 1), int),
        "tiny": rng.integers(-70, -50, (count, 4)),
        "zeros": np.zeros((count, 4), int),
    }[kind]
    spread_scales(tokens, powers)
    if kind == "zeros":
        tokens[rng.random(count) < 0.5, 512:528] = 0
        tokens[:130, 512:528] = 0  # two blocks without a code that counts
    q = rng.standard_normal((20, 576)).astype(ml_dtypes.bfloat16)
    q[:, 512:] *= 2.0 ** min(float(powers.max()), 20)  # what is not in codes counts as much
    scale = 8 / np.abs(q.astype(np.float64) @ decode_tokens(tokens).T).max()
    for rows in (16, 64):
        o, lse = attend(q, tokens, scale, MlaSchedule(tile_rows=rows))
        check(expected(q, tokens, scale), o, lse, kind)


@pytest.mark.parametrize("step", [0.5, 7.9, 8.1, 30])
def test_interpret_is_within_bounds_while_maxima_grow(
    step: float, rng: np.random.Generator
) -> None:
    """By so many powers of two a block of 64 tokens: less than the slack of p's exponent, more."""
    tokens = make_tokens(64 * 6, rng)
    keys = decode_tokens(tokens)
    q = np.repeat(rng.standard_normal((1, 576)), 5, axis=0).astype(ml_dtypes.bfloat16)
    q[1:] *= np.array([[1], [0.5], [0.25], [0]], ml_dtypes.bfloat16)
    # Tails set the scores: 2^(step * block) by the first row, less by the others.
    q[:, 512] = q[:, 512] * 0 + np.array([1, 0.75, 0.5, 0.25, 0], ml_dtypes.bfloat16)
    last = keys[:, 512:].astype(ml_dtypes.bfloat16)
    last[:, 0] = np.arange(len(tokens)) // 64 * step * math.log(2) / 576**-0.5
    tokens[:, 528:] = last.view(np.uint8)
    o, lse = attend(q, tokens, 576**-0.5, MlaSchedule(tile_rows=16))
    check(expected(q, tokens, 576**-0.5), o, lse, step)


def test_weighted_p_and_decoded_codes_stay_within_float16(rng: np.random.Generator) -> None:
    """The largest codes, units just below where the exponent grows, p of 2^8."""
    tokens = make_tokens(192, rng)
    tokens[:, :512] = 0x7E  # 448
    units = np.ones((192, 4), np.float32)
    units[64:] = np.nextafter(np.float32(16), np.float32(0))  # 2^(exponent + 3) at most
    tokens[:, 512:528] = units.view(np.uint8)
    tail = np.zeros((192, 64), ml_dtypes.bfloat16)
    tail[64:, 0] = 7.9 * math.log(2)
    tokens[:, 528:] = tail.view(np.uint8)
    q = np.zeros((3, 576), ml_dtypes.bfloat16)
    q[:, 512] = 1
    o, lse = attend(q, tokens, 1.0, MlaSchedule(tile_rows=16))
    check(expected(q, tokens, 1.0), o, lse)


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
    indices, lengths = sparse_lists(SPARSE, inputs, 200, rng)
    indices[-1, :, :70] = -1  # a block without tokens, first and last
    indices[-1, 1, 128:] = -1
    indices[1, 1] = -1
    sink = np.array([-math.inf, 0.5, 3, math.inf], np.float32) if has_sink else None
    o, lse = jitgen.mla_decode_sparse(
        inputs["q"], inputs["kv_cache"], indices, topk_length=lengths, attention_sink=sink
    )
    keys = decoded["kv_cache"].reshape(-1, 576).astype(np.float64)
    want, want_lse = sparse_reference(inputs["q"], keys, indices, lengths, sink)
    error = np.abs(o.astype(np.float64) - want)
    assert np.all((error <= 8e-4) | (error <= 2.01 / 128 * np.abs(want))), error.max()
    np.testing.assert_allclose(lse, want_lse, rtol=8 / 65536, atol=score_error(inputs["q"], keys))
    assert np.isinf(lse[0]).all()
    assert np.isinf(lse[1, :, 1]).all()
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
    of_one = cache.reshape(-1, 1, 1, 656)
    apart = np.zeros((len(of_one), 1, 1, 704), np.uint8)[..., :656]  # of 656 and 48 more each
    with pytest.raises(ProblemError, match="pages must be whole multiples"):
        jitgen.mla_decode(*(inputs | {"kv_cache": apart}).values())
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


OTHER_TABLE = mla_tensors(DENSE)["block_table"]


@pytest.mark.parametrize(
    ("problem", "kind", "change", "message"),
    [
        (DENSE, LoadTokens, lambda op: None, "must hold codes, holds nothing"),
        (SPARSE, LoadTokens, lambda op: replace(op, where=OTHER_TABLE), "must look up indices"),
        (DENSE, ScaleQueries, lambda op: None, "must hold queries, holds nothing"),
        (DENSE, ScaleQueries, lambda op: replace(op, src=OTHER_TABLE), "must load the queries"),
        (DENSE, ScoreTokens, lambda op: replace(op, queries=op.query_tail), "must hold queries"),
        (DENSE, ScoreTokens, lambda op: None, "must hold scores, holds nothing"),
        (DENSE, WeighTokens, lambda op: None, "must hold weights, holds nothing"),
        (DENSE, WeighTokens, lambda op: replace(op, weights=op.growth), "must be"),
        (DENSE, SoftenTokens, lambda op: replace(op, weights=op.max), "must hold weights"),
        (DENSE, SoftenTokens, lambda op: replace(op, p=replace(op.p, dtype=BF16)), "must be"),
        (DENSE, AttendTokens, lambda op: None, "leaves factor, p, smem_codes.* unread"),
        (DENSE, Settle, lambda op: None, "must hold settled out, holds out"),
        (DENSE, Settle, lambda op: replace(op, exponent=op.sum), "must hold exponent, holds sum"),
        (DENSE, Fill, lambda op: replace(op, value=-math.inf), "begins? at 0"),
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
            lambda op: LoadKeys(op.tokens.codes, op.src, op.where, (16, 64)),
            "cannot load for an FP8 cache",
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
    loads = [op for op in walk_mla(kernel_of(DENSE).body.body) if isinstance(op, LoadTokens)]
    made = changed(kernel, LoadKeys, lambda op: replace(loads[0], src=op.src, where=op.table))
    with pytest.raises(VerifyError, match="loads tokens of a cache that is not FP8"):
        verify(made)


@pytest.mark.parametrize(("rows", "stages"), [(16, 4), (32, 4), (64, 3), (64, 2)])
def test_smem_plan_has_room_for_tokens_as_they_are(rows: int, stages: int) -> None:
    problem = MlaDecode(16, cache="fp8")
    schedule = MlaSchedule(tile_rows=rows, num_stages=stages)
    plan = mla_smem_plan(problem, schedule)
    assert plan.offsets["p"] == rows * 576 * 2
    assert dict(plan.sizes)["tokens"] == stages * 64 * 656
    verify(lower_mla(problem, schedule))


def test_kernels_have_four_warpgroups_and_all_registers() -> None:
    kernel = kernel_of(DENSE)
    assert (kernel.family, kernel.num_threads) == ("mla_decode_fp8", 512)
    assert sum(registers(DENSE)) == 512  # 128 of each of 4 * 128 threads
    assert kernel_of(MlaDecode(4)).num_threads == 384


def test_constants_are_the_headers() -> None:
    text = headers()["jitgen/mla_codes.cuh"] + headers()["jitgen/mla_softmax.cuh"]
    for name, value in (
        ("kLeastUnit", tokens_mla.LEAST_UNIT),
        ("kRatio", tokens_mla.CODE_UNITS),
        ("kWeightExponent", tokens_mla.WEIGHT_EXPONENT),
        ("kUnitSlack", tokens_mla.UNIT_SLACK),
        ("kMaxSlack", MAX_SLACK),
    ):
        (found,) = re.findall(rf"constexpr \w+ {name} = ([^;f]+)f?;", text)
        assert (float.fromhex if "x" in found else float)(found) == value


def test_str_reads_as_a_program() -> None:
    text = str(kernel_of(SPARSE))
    assert "= load kv_cache[indices[token, key]] for key:+64 via bulk copies" in text
    assert "out = out * factor + mma(p, (smem_codes * smem_ratios)^T)" in text


def test_select_mla_fits_tiles_to_the_rows_of_an_fp8_cache() -> None:
    for heads, queries, sparse, expected_tile in (
        (16, 1, False, (16, 4)),
        (17, 1, False, (32, 4)),
        (8, 2, False, (16, 4)),
        (16, 2, False, (32, 4)),
        (16, 2, True, (16, 4)),
        (64, 2, True, (64, 3)),
        (100, 3, False, (64, 3)),
    ):
        problem = MlaDecode(heads, queries, causal=False, cache="fp8", sparse=sparse)
        schedule = select_mla(problem)
        assert (schedule.tile_rows, schedule.num_stages) == expected_tile


def test_select_mla_takes_fewer_rows_of_an_fp8_cache_where_sequences_are_few() -> None:
    def rows(problem: MlaDecode, batch: int | None, **options: Any) -> int:
        return select_mla(problem, batch=batch, **options).tile_rows

    dense = MlaDecode(128, cache="fp8")
    keys = (64, 4096, 8192, 16384, 32768)
    assert [rows(dense, 1, max_keys=n) for n in keys] == [16, 16, 32, 32, 64]
    assert [rows(dense, n, max_keys=4096) for n in (1, 2, 4, 8)] == [16, 32, 32, 64]
    assert rows(MlaDecode(128, 2, causal=False, cache="fp8", sparse=True), 2, max_keys=2048) == 32
    assert rows(MlaDecode(32, cache="fp8"), 64, max_keys=16384) == 32
    assert rows(dense, 1) == rows(dense, None, max_keys=64) == 64
    assert rows(dense, 1, max_keys=64, batch_invariant=True) == 64


@pytest.mark.parametrize(
    "problem",
    [DENSE, SPARSE, MlaDecode(128, cache="fp8")]
    + [MlaDecode(heads, queries) for heads in (16, 64, 128) for queries in (1, 2, 3)],
)
def test_key_limits_name_every_schedule_that_is_chosen(problem: MlaDecode) -> None:
    for batch in (1, 2, 8, 16, 24, 32, 64, 128, 256):
        named = {select_mla(problem, batch=batch, max_keys=n) for n in key_limits()}
        assert {select_mla(problem, batch=batch, max_keys=64 * n) for n in range(2000)} <= named


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
    entry = build(kernel, KernelStore(tmp_path))
    assert entry.resources.spill_bytes == 0
