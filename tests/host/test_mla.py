"""MLA decode without a GPU: rules, the split of keys, and the interpreter against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmasim.nv_ptx.sim import WGMMA
from numpy.typing import NDArray

import jitgen
from jitgen import BF16, F16, F32, MlaDecode, MlaSchedule, ProblemError, ScheduleError
from jitgen.dtypes import DType
from jitgen.interpret_mla import LOG2_E, _Machine, interpret_mla
from jitgen.ir_mla import Segment, Soften, Split, walk_mla
from jitgen.lower import lower_any
from jitgen.lower_mla import lower_mla
from jitgen.numerics_16 import wgmma_16
from jitgen.problem_mla import HEAD_DIMS, PAGES, check_mla
from jitgen.schedule_mla import (
    EVICT_ALWAYS,
    check_mla_schedule,
    num_parts,
    num_tiles,
    select_mla,
)

from .conftest import SameBits

Array = NDArray[Any]
UNUSED_SLOT = 2147480000


def make_inputs(
    problem: MlaDecode, lengths: tuple[int, ...], rng: np.random.Generator
) -> dict[str, Array]:
    """Random arrays; what must not be looked at is NaN, or no page at all."""
    p, dtype = problem, problem.dtype.numpy
    num_pages = [-(-length // p.page) for length in lengths]
    num_blocks = sum(num_pages) + 2
    cache = np.clip(rng.standard_normal((num_blocks, p.page, 1, p.head_dim_qk)) / 10, -1, 1)
    cache = cache.astype(dtype)
    free = rng.permutation(num_blocks).astype(np.int32)
    table = np.full((len(lengths), max(num_pages) + 1), UNUSED_SLOT, np.int32)
    at = 0
    for sequence, (length, count) in enumerate(zip(lengths, num_pages, strict=True)):
        table[sequence, :count] = free[at : at + count]
        at += count
        if length % p.page:
            cache[free[at - 1], length % p.page :] = np.nan
    cache[free[at:]] = np.nan
    q = rng.standard_normal((len(lengths), p.num_queries, p.num_heads, p.head_dim_qk))
    return {
        "q": q.astype(dtype),
        "kv_cache": cache,
        "block_table": table,
        "seqlens_k": np.array(lengths, np.int32),
    }


def reference(problem: MlaDecode, inputs: dict[str, Array], sequence: int) -> tuple[Array, Array]:
    """o [s_q, h_q, head_dim_v] and lse [h_q, s_q] of one sequence in float64."""
    p, length = problem, int(inputs["seqlens_k"][sequence])
    pages = inputs["block_table"][sequence, : -(-length // p.page)]
    keys = inputs["kv_cache"][pages].reshape(-1, p.head_dim_qk)[:length].astype(np.float64)
    q = inputs["q"][sequence].astype(np.float64)
    scores = np.einsum("shd,kd->hsk", q, keys) * p.head_dim_qk**-0.5
    later = np.arange(p.num_queries)[::-1] if p.causal else np.zeros(p.num_queries, int)
    scores[:, np.arange(length)[None, :] >= (length - later)[:, None]] = -np.inf
    weights = np.exp(scores)
    total = weights.sum(axis=-1)
    o = np.einsum("hsk,kd->shd", weights, keys[:, : p.head_dim_v])
    with np.errstate(divide="ignore", invalid="ignore"):
        o = np.where(total.T[..., None] == 0, 0, o / total.T[..., None])
        return o, np.where(total == 0, np.inf, np.log(total))


def check_results(
    problem: MlaDecode,
    inputs: dict[str, Array],
    o: Array,
    lse: Array,
    note: object = "",
    lse_error: float = 1e-6,
) -> None:
    """The error bounds of FlashMLA's own tests, beside `lse_error`, as a difference."""
    assert not np.isnan(o.astype(np.float64)).any(), note
    for sequence in range(len(lse)):
        want, want_lse = reference(problem, inputs, sequence)
        got, got_lse = o[sequence].astype(np.float64), lse[sequence].astype(np.float64)
        error = np.abs(got - want)
        assert np.all((error <= 8e-4) | (error <= 2.01 / 128 * np.abs(want))), (note, error.max())
        norm = (got**2 + want**2).sum()
        assert norm == 0 or 1 - 2 * (got * want).sum() / norm < 5e-6, note
        np.testing.assert_array_equal(np.isinf(got_lse), np.isinf(want_lse))
        known = np.isfinite(want_lse)
        np.testing.assert_allclose(got_lse[known], want_lse[known], rtol=8 / 65536, atol=lse_error)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, r"num_heads = 0 must be in 1\.\.128"),
        ({"num_heads": 129}, r"num_heads = 129"),
        ({"num_heads": True}, "num_heads = True"),
        ({"num_queries": 9}, r"num_queries = 9 must be in 1\.\.8"),
        ({"head_dim_v": 256}, r"\(576, 256\), must be one of \(576, 512\)"),
        ({"page": 48}, "page = 48 keys, must be one of 16, 32, 64, 128"),
        ({"dtype": F32}, "q has dtype float32, must be bfloat16 or float16"),
        ({"causal": 1}, "causal = 1"),
    ],
)
def test_check_mla_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        check_mla(replace(MlaDecode(16), **change))


@pytest.mark.parametrize(
    ("problem", "schedule", "message"),
    [
        (MlaDecode(16), MlaSchedule(num_stages=3), "num_stages = 3 must be one of 2, 4"),
        (MlaDecode(16), MlaSchedule(num_stages=4), "lower num_stages"),
        (MlaDecode(16), MlaSchedule(meet=3), "meet = 3 must be one of 1, 2"),
        (MlaDecode(16), MlaSchedule(meet=2, whole=True), "no parts meet: choose 1"),
        (
            MlaDecode(16, head_dim_qk=320, head_dim_v=256),
            MlaSchedule(num_stages=4, score_ahead=True),
            "score_ahead with num_stages = 4: nothing would keep",
        ),
        (MlaDecode(16), MlaSchedule(overhead=0), "overhead = 0"),
        (MlaDecode(16), MlaSchedule(evict_first=65), "evict_first = 65"),
        (MlaDecode(16), MlaSchedule(score_ahead=1), "score_ahead = 1"),  # type: ignore[arg-type]
        (MlaDecode(16), jitgen.Schedule(128, 128, 4), "must be an MlaSchedule"),
    ],
)
def test_check_mla_schedule_rejects(problem: MlaDecode, schedule: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_mla_schedule(problem, schedule)


def test_lower_any_rejects_another_familys_schedule() -> None:
    with pytest.raises(ScheduleError, match="a MlaDecode cannot run with a Schedule"):
        lower_any(MlaDecode(16), jitgen.Schedule(128, 128, 4))


@pytest.mark.parametrize("head_dims", HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 64, 65, 128])
def test_select_mla_is_legal_for_every_problem(heads: int, head_dims: tuple[int, int]) -> None:
    for queries in (1, 2, 3, 8):
        for page in PAGES:
            problem = MlaDecode(heads, queries, *head_dims, page)
            calls = itertools.product((None, 1, 2, 64), (None, 1024), (False, True))
            for batch, keys, whole in calls:
                options: dict[str, Any] = {"max_keys": keys, "batch_invariant": whole}
                schedule = select_mla(problem, batch=batch, **options)
                check_mla_schedule(problem, schedule)


# --- the split ------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-1, 5000), min_size=1, max_size=40),
    st.integers(1, 132),
    st.integers(1, 8),
    st.integers(1, 16),
)
def test_split_covers_every_block_once_in_parts_of_equal_cost(
    lengths: list[int], count: int, overhead: int, slack: int
) -> None:
    split = Split(64, overhead, slack)
    parts = split.parts(lengths, count)
    assert len(parts) == count
    blocks = [-(-max(length, 0) // 64) for length in lengths]
    share = -(-sum(max(n, 1) for n in blocks) // count)
    span = max(share + slack - 1, -(-sum(max(n, 1) + overhead for n in blocks) // count))
    seen = []
    for part, segments in enumerate(parts):
        assert sum(segment.end - segment.begin for segment in segments) <= span
        shared = [segment for segment in segments if segment.num_parts > 1]
        assert len(shared) <= 2
        for segment in segments:
            sharing = range(segment.first_part, segment.first_part + segment.num_parts)
            assert blocks[segment.sequence] == 0 or part in sharing
            seen += [(segment.sequence, block) for block in range(segment.begin, segment.end)]
        # A part's share of a sequence that it begins is its last, of others its first: so two
        # places for partial results suffice.
        assert [segment.begin == 0 for segment in shared] in ([], [False], [True], [False, True])
    assert seen == [(sequence, block) for sequence, n in enumerate(blocks) for block in range(n)]
    empty = [segment.sequence for segments in parts for segment in segments if not segment.end]
    assert empty == [sequence for sequence, n in enumerate(blocks) if n == 0]


@given(st.lists(st.integers(-1, 5000), min_size=1, max_size=40), st.integers(1, 132))
def test_split_apart_gives_each_part_one_segment(lengths: list[int], count: int) -> None:
    split = Split(64, 3, 8)
    if split.is_apart(lengths, count):
        assert all(len(segments) <= 1 for segments in split.parts(lengths, count))
    assert split.is_apart([5000], count)
    assert split.is_apart([640] * 4, 8)
    assert not split.is_apart([640] * 9, 8)


@given(
    st.lists(st.integers(-1, 5000), min_size=1, max_size=40),
    st.integers(1, 132),
    st.integers(1, 8),
)
def test_whole_split_gives_every_sequence_to_one_part(
    lengths: list[int], count: int, overhead: int
) -> None:
    parts = Split(64, overhead, 8, whole=True).parts(lengths, count)
    assert len(parts) == count
    segments = [segment for part in parts for segment in part]
    assert [segment.sequence for segment in segments] == list(range(len(lengths)))
    blocks = [-(-max(length, 0) // 64) for length in lengths]
    assert [(segment.begin, segment.end) for segment in segments] == [(0, n) for n in blocks]
    assert all(segment.num_parts == 1 for segment in segments)
    share = -(-sum(max(n, 1) + overhead for n in blocks) // count)
    loads = [sum(segment.end for segment in part) for part in parts]
    assert max(loads) < share + 8 + max(blocks)


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gauss", "wide", "bits"])
def test_wgmma_16_equals_mmasim(
    name: str, kind: str, rng: np.random.Generator, same_bits: SameBits
) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))

    def draw(rows: int, k: int) -> Array:
        if kind == "bits":
            bits = rng.integers(0, 2**16, (rows, k), dtype=np.uint16)
            values = bits.view(dtype)
            keep = np.abs(values.astype(np.float32)) < 1e4  # no overflow, no NaN
            return np.where(keep, values, np.zeros_like(values))
        scale = np.exp(2 * rng.standard_normal((rows, k))) if kind == "wide" else 1.0
        return np.asarray(rng.standard_normal((rows, k)) * scale).astype(dtype)

    a, b = draw(37, 48), draw(29, 48)
    c = rng.standard_normal((37, 29)).astype(np.float32)
    short = "bf16" if name == "bfloat16" else "f16"
    model = WGMMA("Hopper", f"m64n8k16.f32.{short}.{short}")
    a_t, b_t = (
        torch.from_numpy(x.view(np.int16).copy()).view(getattr(torch, name)) for x in (a, b)
    )
    want = torch.from_numpy(c)
    for k in range(0, 48, 16):
        want = model(a_t[:, k : k + 16], b_t[:, k : k + 16].T, want)
    same_bits(wgmma_16(a, b, c), want.numpy())


def test_wgmma_16_rejects_mixed_and_ragged_operands() -> None:
    a = np.zeros((4, 16), ml_dtypes.bfloat16)
    with pytest.raises(ProblemError, match="both bfloat16 or both float16"):
        wgmma_16(a, a.astype(np.float16))
    with pytest.raises(ProblemError, match="multiple of 16"):
        wgmma_16(a[:, :8], a[:, :8])


# --- the interpreter ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "lengths"),
    [
        (MlaDecode(4), (0, 1, 63, 64, 65)),
        (MlaDecode(4, 3), (0, 1, 2, 3, 63, 64, 65, 130)),
        (MlaDecode(4, 3, causal=False), (1, 66)),
        (MlaDecode(65, page=16), (1, 200)),
        (MlaDecode(2, 1, 512, 512, 128, F16), (129, 64)),
        (MlaDecode(3, 2, 320, 256, 32), (31, 300, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 3, 132])
def test_interpret_meets_float64_however_it_is_split(
    problem: MlaDecode, lengths: tuple[int, ...], parts: int, rng: np.random.Generator
) -> None:
    inputs = make_inputs(problem, lengths, rng)
    kernel = lower_mla(problem, select_mla(problem))
    scale = problem.head_dim_qk**-0.5
    for numerics in ("hopper", "exact"):
        o, lse = interpret_mla(
            kernel, inputs, softmax_scale=scale, num_parts=parts, numerics=numerics
        )
        check_results(problem, inputs, o, lse, numerics)


@pytest.mark.parametrize("steepness", [32, 128])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_interpret_meets_float64_where_maxima_grow(
    dtype: DType, steepness: int, rng: np.random.Generator
) -> None:
    problem = MlaDecode(16, 2, dtype=dtype)
    inputs = make_inputs(problem, (700, 1, 130), rng)
    inputs["q"] *= dtype.numpy.type(steepness)
    kernel = lower_mla(problem, select_mla(problem))
    for numerics in ("hopper", "exact"):
        o, lse = interpret_mla(
            kernel, inputs, softmax_scale=576**-0.5, num_parts=3, numerics=numerics
        )
        # An lse may be near 0 though scores are large: float32 has 2^-24 of those.
        check_results(problem, inputs, o, lse, numerics, lse_error=1e-6 * steepness)


def test_maxima_grow_by_more_than_the_slack_or_not_at_all() -> None:
    kernel = lower_mla(MlaDecode(3), MlaSchedule())
    soften = next(op for op in walk_mla(kernel.body.body) if isinstance(op, Soften))
    segment = Segment(0, 0, 4, 0, 1)
    machine = _Machine(kernel, {}, segment, 256, 0, 1 / LOG2_E, True, np.empty(0), np.empty(0))
    top, total = np.full(1, -np.inf), np.zeros(1)
    for highest, want_top, want_sum in (
        (-np.inf, -np.inf, 0),  # no keys so far
        (-3, -3, 1),
        (5, -3, 1 + 2.0**8),
        (6, 6, 1 + 2.0**-9 + 2.0**-1),
        (-np.inf, 6, 1 + 2.0**-9 + 2.0**-1),  # none in this block
    ):
        scores = np.array([[highest, -np.inf]])
        machine.buffers |= {soften.scores.name: scores, soften.max.name: top}
        machine.buffers[soften.sum.name] = total
        machine.soften(soften)
        top, total = machine.buffers[soften.max.name], machine.buffers[soften.sum.name]
        np.testing.assert_allclose((top[0], total[0]), (want_top, want_sum), rtol=1e-12)


def test_interpret_rows_without_keys_are_zero_with_infinite_lse(rng: np.random.Generator) -> None:
    problem = MlaDecode(2, 3)
    inputs = make_inputs(problem, (2, 0), rng)
    o, lse = jitgen.mla_decode(*inputs.values())
    assert np.all(lse[0, :, 0] == np.inf)
    assert np.all(np.isfinite(lse[0, :, 1:]))
    assert np.all(lse[1] == np.inf)
    assert not o[0, 0].any()
    assert not o[1].any()
    assert o[0, 1].any()


def test_interpret_rejects_other_arrays_than_the_kernels(rng: np.random.Generator) -> None:
    problem = MlaDecode(2)
    kernel = lower_mla(problem, select_mla(problem))
    inputs = make_inputs(problem, (5,), rng)
    with pytest.raises(ProblemError, match="q is float32"):
        interpret_mla(
            kernel, inputs | {"q": inputs["q"].astype("f")}, softmax_scale=1.0, num_parts=1
        )
    with pytest.raises(ProblemError, match="kernel takes tensors q, kv_cache"):
        interpret_mla(kernel, {"seqlens_k": inputs["seqlens_k"]}, softmax_scale=1.0, num_parts=1)


# --- the API --------------------------------------------------------------------------------------


def test_mla_decode_on_arrays_meets_float64_and_fills_out(rng: np.random.Generator) -> None:
    problem = MlaDecode(8, 2, page=16)
    inputs = make_inputs(problem, (70, 3), rng)
    out = np.full((2, 2, 8, 512), np.nan, ml_dtypes.bfloat16)
    o, lse = jitgen.mla_decode(*inputs.values(), out=out)
    assert o is out
    check_results(problem, inputs, o, lse)


def test_mla_decode_batch_invariant_does_not_see_the_batch(rng: np.random.Generator) -> None:
    inputs = make_inputs(MlaDecode(4, 2, page=16), (300, 70, 0, 900), rng)
    o, lse = jitgen.mla_decode(*inputs.values(), batch_invariant=True)
    check_results(MlaDecode(4, 2, page=16), inputs, o, lse)
    for sequence in range(4):
        alone = dict(inputs)
        for name in ("q", "block_table", "seqlens_k"):
            alone[name] = inputs[name][sequence : sequence + 1]
        o_alone, lse_alone = jitgen.mla_decode(*alone.values(), batch_invariant=True)
        np.testing.assert_array_equal(o_alone[0], o[sequence])
        np.testing.assert_array_equal(lse_alone[0], lse[sequence])
    split, _ = jitgen.mla_decode(*inputs.values())
    assert not np.array_equal(split, o)


def test_mla_decode_scale_and_causal_change_the_result(rng: np.random.Generator) -> None:
    inputs = make_inputs(MlaDecode(2, 2), (40,), rng)
    o, lse = jitgen.mla_decode(*inputs.values())
    _, sharper = jitgen.mla_decode(*inputs.values(), softmax_scale=0.5)
    whole, _ = jitgen.mla_decode(*inputs.values(), causal=False)
    assert not np.array_equal(lse, sharper)
    np.testing.assert_array_equal(o[:, 1], whole[:, 1])  # the last token sees all keys
    assert not np.array_equal(o[:, 0], whole[:, 0])


def broken(inputs: dict[str, Array], name: str, array: Array) -> list[Array]:
    return list((inputs | {name: array}).values())


def test_mla_decode_rejects_arrays_that_break_a_rule(rng: np.random.Generator) -> None:
    inputs = make_inputs(MlaDecode(2), (5, 6), rng)
    for name, array, message in (
        ("q", inputs["q"][0], r"q must be \[b, s_q, h_q, head_dim\]"),
        ("q", inputs["q"].astype(np.float16), "must have one head_dim and one dtype"),
        ("q", inputs["q"][..., :512], "must have one head_dim and one dtype"),
        ("q", np.asfortranarray(inputs["q"]), "evenly spaced"),
        ("kv_cache", inputs["kv_cache"][:, :48], "page = 48"),
        ("block_table", inputs["block_table"].astype(np.int64), "int32"),
        ("block_table", inputs["block_table"][:1], "int32"),
        ("seqlens_k", inputs["seqlens_k"][:1], "int32"),
    ):
        with pytest.raises(ProblemError, match=message):
            jitgen.mla_decode(*broken(inputs, name, array))
    with pytest.raises(ProblemError, match="softmax_scale = 0 must be positive"):
        jitgen.mla_decode(*inputs.values(), softmax_scale=0)
    with pytest.raises(ProblemError, match=r"must be one of \(576, 512\)"):
        jitgen.mla_decode(*inputs.values(), head_dim_v=256)
    with pytest.raises(ProblemError, match="out is bfloat16"):
        jitgen.mla_decode(*inputs.values(), out=np.zeros((2, 1, 2, 256), ml_dtypes.bfloat16))
    with pytest.raises(ProblemError, match="block_table is a list, q is a NumPy array"):
        jitgen.mla_decode(inputs["q"], inputs["kv_cache"], [[0]], inputs["seqlens_k"])
    with pytest.raises(ScheduleError, match=r"must be a jitgen\.MlaSchedule"):
        jitgen.mla_decode(*inputs.values(), schedule=jitgen.Schedule(128, 128, 4))


def test_mla_decode_rejects_torch_tensors_on_the_host() -> None:
    q = torch.zeros(1, 1, 16, 576, dtype=torch.bfloat16)
    cache = torch.zeros(1, 64, 1, 576, dtype=torch.bfloat16)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(jitgen.DeviceError, match="q is on cpu"):
        jitgen.mla_decode(q, cache, table, lengths)


def test_select_mla_takes_fewer_rows_where_parts_have_few_keys() -> None:
    def rows(problem: MlaDecode, batch: int, max_keys: int | None) -> int:
        return select_mla(problem, batch=batch, max_keys=max_keys).tile_rows

    assert [rows(MlaDecode(64), 1, n) for n in (32768, 65536, None)] == [32, 64, 64]
    assert [rows(MlaDecode(64), 8, n) for n in (4096, 8192)] == [32, 64]
    assert [rows(MlaDecode(128, 2), 1, n) for n in (4096, 8192)] == [32, 64]
    assert [rows(MlaDecode(128), 16, n) for n in (1024, 2048)] == [32, 64]  # pairs of parts
    assert [rows(MlaDecode(128), batch, 1024) for batch in (12, 32)] == [64, 64]
    assert rows(MlaDecode(32), 1, 64) == 64  # in one tile, with as many wgmmas
    assert rows(MlaDecode(64), 67, 64) == 64


def test_small_tiles_take_several_query_tokens() -> None:
    for problem in (MlaDecode(64), MlaDecode(64, 2), MlaDecode(5, 8)):
        check_mla_schedule(problem, MlaSchedule(tile_rows=32))


def test_select_mla_has_pairs_where_sequences_have_two_parts() -> None:
    def meet(
        problem: MlaDecode,
        batch: int | None,
        max_keys: int | None = 1024,
        batch_invariant: bool = False,
    ) -> int:
        options: dict[str, Any] = {"max_keys": max_keys, "batch_invariant": batch_invariant}
        return select_mla(problem, batch=batch, **options).meet

    assert [meet(MlaDecode(64), batch) for batch in (None, 1, 2, 66, 67)] == [1, 2, 2, 2, 2]
    assert [meet(MlaDecode(64), batch, None) for batch in (None, 2, 67)] == [1, 2, 2]
    assert meet(MlaDecode(64), 2, batch_invariant=True) == 1
    assert [meet(MlaDecode(16), batch) for batch in (1, 33, 34)] == [1, 1, 2]
    assert [meet(MlaDecode(128), 32, n) for n in (2048, 4096)] == [2, 1]
    assert [meet(MlaDecode(128, 2), 16, n) for n in (4096, 8192)] == [2, 1]
    assert [meet(MlaDecode(128, 2), batch) for batch in (16, 17)] == [2, 1]
    assert [meet(MlaDecode(128), 8, n) for n in (4096, 8192, None)] == [2, 1, 1]
    assert meet(MlaDecode(128, 6), 2) == 1  # 12 tiles: 120 blocks of 132 would run
    whole = select_mla(MlaDecode(64), batch=1, max_keys=64, batch_invariant=True)
    assert whole == select_mla(MlaDecode(64), batch_invariant=True)


def test_select_mla_scores_ahead_where_parts_have_many_keys() -> None:
    def ahead(problem: MlaDecode, batch: int | None, max_keys: int | None) -> bool:
        return select_mla(problem, batch=batch, max_keys=max_keys).score_ahead

    assert [ahead(MlaDecode(16), 128, n) for n in (960, 1024, None)] == [False, True, True]
    assert [ahead(MlaDecode(128), 128, n) for n in (1024, 4096)] == [False, True]
    assert ahead(MlaDecode(128, 2), 1, 64)
    assert ahead(MlaDecode(16), None, None)
    assert not ahead(MlaDecode(16, head_dim_qk=320, head_dim_v=256), None, None)  # four stages


def test_select_mla_evicts_keys_first_at_any_length_of_four_tiles_and_more() -> None:
    def blocks(heads: int, queries: int) -> int:
        return select_mla(MlaDecode(heads, queries)).evict_first

    assert [blocks(64, queries) for queries in (1, 2, 3)] == [16, 32, 48]
    assert [blocks(128, queries) for queries in (2, 3)] == [EVICT_ALWAYS, EVICT_ALWAYS]


def test_num_parts_is_what_runs_at_once() -> None:
    assert num_parts(1, 132) == 132
    assert num_parts(4, 132) == 33
    assert num_parts(16, 4) == 1
    assert [num_parts(tiles, 132, 2) for tiles in (1, 2, 3, 4, 16)] == [132, 66, 44, 32, 8]
    assert num_parts(16, 4, 2) == 2
    assert num_tiles(MlaDecode(100)) == 2
    assert num_tiles(MlaDecode(100), 32) == 4
    assert MlaDecode(1).dtype == BF16
