"""Epilogues of gate and up, row weights, and D in E4M3 with scales: dense and grouped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import jitgen
from jitgen import (
    BF16,
    F32,
    Contiguous,
    Gemm,
    GroupedGemm,
    Masked,
    ProblemError,
    Ragged,
    Schedule,
    ScheduleError,
    VerifyError,
    acc,
    gate,
    per_row,
    relu,
    silu,
    up,
    vector,
)
from jitgen.build import build
from jitgen.dtypes import E4M3
from jitgen.expr import Expr
from jitgen.ir import Quantize
from jitgen.lower import lower
from jitgen.numerics import AMAX_FLOOR, quantize_rows, round_to
from jitgen.runtime.store import KernelStore
from jitgen.tuning.select import select
from jitgen.tuning.space import candidates
from jitgen.verify import verify

Array = NDArray[Any]
SameBits = Callable[..., None]

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SWIGLU = silu(gate) * up
M, N, K = 70, 512, 272


def make(rng: np.random.Generator, groups: int = 1) -> tuple[Array, Array, Array, Array]:
    """a [M, K], b [groups, N, K], sfa and sfb."""
    a, sfa = jitgen.quantize(rng.standard_normal((M, K)).astype(np.float32))
    weights = rng.standard_normal((groups, N, K)).astype(np.float32)
    b, sfb = zip(*(jitgen.quantize(weight, (128, 128)) for weight in weights), strict=True)
    return a, np.stack(b), sfa, np.stack(sfb)


def halves(a: Array, b: Array, sfa: Array, sfb: Array) -> tuple[Array, Array]:
    """The float32 GEMM of each half of B's rows."""
    d = jitgen.gemm(a, b, (sfa, sfb), out_dtype=F32)
    return d[:, : N // 2], d[:, N // 2 :]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_n", [32, 64, 128, 256])
@pytest.mark.parametrize("cluster", [(1, 1), (2, 1), (1, 2), (4, 1)], ids=str)
def test_gated_gemm_combines_both_halves_of_b(
    rng: np.random.Generator, same_bits: SameBits, block_n: int, cluster: tuple[int, int]
) -> None:
    a, (b,), sfa, (sfb,) = make(rng)
    first, second = halves(a, b, sfa, sfb)
    schedule = Schedule(64, block_n, 2, 1, *cluster, promotion="serial")
    dtype = BF16 if block_n == 256 else F32  # whose stores leave no registers for as many sums
    d = jitgen.gemm(
        a, b, (sfa, sfb), epilogue=relu(gate) * up - gate, out_dtype=dtype, schedule=schedule
    )
    same_bits(d, round_to(np.maximum(first, 0) * second - first, dtype))


def test_swiglu_is_close_to_float64(rng: np.random.Generator) -> None:
    a, (b,), sfa, (sfb,) = make(rng)
    first, second = (half.astype(np.float64) for half in halves(a, b, sfa, sfb))
    want = first / (1 + np.exp(-first)) * second
    d = jitgen.gemm(a, b, (sfa, sfb), epilogue=SWIGLU, out_dtype=F32)
    assert (np.abs(d - want) <= 2.0**-19 * np.abs(want)).all()
    rounded = jitgen.gemm(a, b, (sfa, sfb), epilogue=SWIGLU)
    assert (np.abs(rounded.astype(np.float64) - want) <= 2.0**-8 * np.abs(want)).all()


@pytest.mark.parametrize("ue8m0", [False, True], ids=["f32", "ue8m0"])
@pytest.mark.parametrize("epilogue", [relu(gate) * up, acc, acc - 0.5], ids=str)
def test_gemm_quantizes_its_result(
    rng: np.random.Generator, same_bits: SameBits, ue8m0: bool, epilogue: Expr
) -> None:
    a, (b,), sfa, (sfb,) = make(rng)
    value = jitgen.gemm(a, b, (sfa, sfb), epilogue=epilogue, out_dtype=F32)
    d, sfd = jitgen.gemm(
        a, b, (sfa, sfb), epilogue=epilogue, out_dtype="float8_e4m3fn", ue8m0=ue8m0
    )
    blocks = value.reshape(M, -1, 128)
    want, scales = quantize_rows(blocks, ue8m0)
    same_bits(d, want.reshape(value.shape))
    same_bits(sfd, scales)
    amax = np.abs(blocks).max(-1)
    error = np.abs(d.astype(np.float64).reshape(blocks.shape) * sfd[..., None] - blocks)
    # Half a step of E4M3's largest binade, of a scale that a power of two may double.
    assert (error <= (2 if ue8m0 else 1) * (amax * 16 / 448 * (1 + 2.0**-20))[..., None]).all()


def test_gemm_writes_the_pair_that_it_is_given(rng: np.random.Generator) -> None:
    a, (b,), sfa, (sfb,) = make(rng)
    out = np.zeros((M, N // 2), FP8), np.zeros((M, N // 256), np.float32)
    result = jitgen.gemm(a, b, (sfa, sfb), epilogue=SWIGLU, out=out)
    assert result[0] is out[0]
    assert result[1] is out[1]
    assert (out[1] > 0).all()
    bound = jitgen.bind(a, b, (sfa, sfb), epilogue=SWIGLU, out=out)
    out[1][...] = 0
    assert bound() is not None
    assert (out[1] > 0).all()


@pytest.mark.parametrize("layout", ["ragged", "group_of_row", "masked"])
@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_grouped_swiglu_with_row_weights_equals_the_dense_one_of_each_group(
    rng: np.random.Generator, same_bits: SameBits, layout: str, dtype: Any
) -> None:
    a, b, sfa, sfb = make(rng, 3)
    weights = rng.random(M).astype(np.float32)
    epilogue = SWIGLU * per_row("weight")
    ends = [0, 5, 5, 66]
    chosen: Any = Ragged(np.array(ends, np.int32))
    rows: list[Any] = [slice(i, j) for i, j in itertools.pairwise(ends)]
    where: list[Any] = rows
    if layout == "group_of_row":
        of_row = np.full(M, -1, np.int32)
        of_row[0:4], of_row[6:60:2] = 0, 2
        rows = [of_row == group for group in range(3)]
        chosen, where = Contiguous(group_of_row=of_row), rows
    if layout == "masked":
        a, sfa, weights = (np.stack([x, x[::-1], x[::-1]]) for x in (a, sfa, weights))
        chosen = Masked(np.array([5, 0, 61], np.int32))
        where = [(g, slice(0, count)) for g, count in enumerate((5, 0, 61))]
    got = jitgen.grouped_gemm(
        *(a, b, (sfa, sfb)),
        layout=chosen,
        out_dtype=dtype,
        epilogue=epilogue.bind(weight=weights),
    )
    for group, part in enumerate(where):
        if len(a[part]):
            want = jitgen.gemm(
                *(a[part], b[group], (sfa[part], sfb[group])),
                out_dtype=dtype,
                epilogue=epilogue.bind(weight=weights[part]),
            )
            pairs = zip(got, want, strict=True) if dtype == E4M3 else ((got, want),)
            for one, other in pairs:
                same_bits(one[part], other)


def test_row_weights_scale_rows(rng: np.random.Generator, same_bits: SameBits) -> None:
    a, (b,), sfa, (sfb,) = make(rng)
    weight = rng.standard_normal(M).astype(ml_dtypes.bfloat16)
    plain = jitgen.gemm(a, b, (sfa, sfb), out_dtype=F32)
    epilogue = (acc * per_row("w", BF16)).bind(w=weight)
    got = jitgen.gemm(a, b, (sfa, sfb), epilogue=epilogue, out_dtype=F32)
    same_bits(got, plain * weight.astype(np.float32)[:, None])


def test_row_weights_of_as_many_rows_as_columns(rng: np.random.Generator) -> None:
    n = 72
    a, sfa = jitgen.quantize(rng.standard_normal((n, K)).astype(np.float32))
    b, sfb = jitgen.quantize(rng.standard_normal((n, K)).astype(np.float32), (128, 128))
    epilogue = (acc * per_row("w")).bind(w=np.zeros(n, np.float32))
    layout = Ragged(np.array([0, n], np.int32))
    d = jitgen.grouped_gemm(a, b[None], (sfa, sfb[None]), layout=layout, epilogue=epilogue)
    assert (d == 0).all()


# --- quantize_rows --------------------------------------------------------------------------------


def test_quantize_rows_of_special_values() -> None:
    x = np.zeros((4, 128), np.float32)
    x[1, 3], x[2, 3], x[3, 3] = np.nan, np.inf, -1.0
    q, scale = quantize_rows(x)
    assert scale[0] == np.float32(AMAX_FLOOR) / np.float32(448)
    assert (q[0].astype(np.float32) == 0).all()
    assert np.isnan(scale[1])
    assert np.isnan(q[1].astype(np.float32)).all()
    assert np.isinf(scale[2])
    assert q[3].astype(np.float32)[3] == -448
    assert np.isinf(quantize_rows(x, power_of_two=True)[1][2])


def test_quantize_rows_rounds_scales_up_to_powers_of_two(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((500, 128)) * np.exp(rng.uniform(-30, 30, (500, 1)))).astype("f")
    x[0] = 448.0
    q, scale = quantize_rows(x, power_of_two=True)
    assert (np.frexp(scale)[0] == 0.5).all()
    exact = np.abs(x).max(-1) / np.float32(448)
    assert (scale >= exact).all()
    assert (scale < 2 * exact).all()
    assert scale[0] == 1
    assert (q.view(np.uint8) == round_to(x / scale[:, None], E4M3).view(np.uint8)).all()


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "rule"),
    [
        (Gemm(384, 128, epilogue=SWIGLU), "n = 384 must be a positive multiple of 256"),
        (Gemm(72, 128, E4M3), "n = 72 must be a positive multiple of 128"),
        (Gemm(384, 128, E4M3, SWIGLU), "n = 384 must be a positive multiple of 256"),
        (Gemm(256, 128, ue8m0=True), "ue8m0 is of the scales of D, which bfloat16 has not"),
        (Gemm(256, 128, epilogue=acc + gate), "takes either acc, or gate and up"),
    ],
    ids=str,
)
def test_supports_names_the_rule(problem: Gemm, rule: str) -> None:
    support = jitgen.supports(problem)
    assert not support
    assert rule in support.reason


@pytest.mark.parametrize(
    ("problem", "schedule", "rule"),
    [
        (Gemm(512, 1024, epilogue=SWIGLU), Schedule(64, 96, 3, 1), "half gate, half up"),
        (Gemm(512, 1024, epilogue=SWIGLU), Schedule(64, 64, 3, 1, split_k=2), "different blocks"),
        (Gemm(512, 1024, E4M3, SWIGLU), Schedule(64, 128, 3, 1), "a tile of 64 columns"),
        (Gemm(512, 1024, E4M3), Schedule(64, 96, 3, 1), "a tile of 96 columns"),
    ],
    ids=str,
)
def test_schedule_rejects(problem: Gemm, schedule: Schedule, rule: str) -> None:
    with pytest.raises(ScheduleError, match=rule):
        lower(problem, schedule)


def test_gemm_rejects_an_output_that_is_no_pair(rng: np.random.Generator) -> None:
    a, (b,), sfa, (sfb,) = make(rng)
    d, sfd = np.zeros((M, N), FP8), np.zeros((M, N // 128), np.float32)
    with pytest.raises(ProblemError, match=r"must be \(d, sfd\)"):
        jitgen.gemm(a, b, (sfa, sfb), out=d)
    with pytest.raises(ProblemError, match="must be one array"):
        jitgen.gemm(a, b, (sfa, sfb), out=(d.astype(np.float32), sfd))
    with pytest.raises(ProblemError, match=r"sfd is .*must be float32\[70, 4\]"):
        jitgen.gemm(a, b, (sfa, sfb), out=(d, sfd[:, :2]))
    with pytest.raises(ProblemError, match="contiguous"):
        jitgen.gemm(a, b, (sfa, sfb), out=(d, np.asfortranarray(sfd)))
    wrong = (acc * per_row("w")).bind(w=np.ones(M + 1, np.float32))
    with pytest.raises(ProblemError, match=r"w is .*the epilogue declares float32\[70\]"):
        jitgen.gemm(a, b, (sfa, sfb), epilogue=wrong)


def test_a_schedule_is_chosen_for_every_kind_of_result() -> None:
    for dtype in (BF16, F32, E4M3):
        for expr in (SWIGLU, acc + vector("bias")):
            for problem in (
                Gemm(4096, 7168, dtype, expr),
                GroupedGemm(4096, 7168, dtype, expr, num_groups=32),
            ):
                for m in (1, 64, 4096):
                    verify(lower(problem, select(problem, m)))


def test_verify_rejects_a_quantization_that_is_not_the_problems() -> None:
    kernel = lower(Gemm(512, 1024, E4M3, SWIGLU), Schedule(64, 256, 3, 1))
    verify(kernel)
    *before, op, store = kernel.body.body
    assert isinstance(op, Quantize)
    for changed, rule in (
        (replace(op, power_of_two=True), "rounds scales otherwise"),
        (replace(op, windows=op.windows[::-1]), "the tile is"),
        (replace(op, src=replace(op.src, name="acc")), "must hold values"),
    ):
        body = replace(kernel.body, body=(*before, changed, store))
        with pytest.raises(VerifyError, match=rule):
            verify(replace(kernel, body=body))


# --- source ---------------------------------------------------------------------------------------


def of_compile() -> list[tuple[Gemm, Schedule]]:
    """A spread of the candidates of every kind of result, dense and grouped."""
    samples: list[tuple[Gemm, Schedule]] = []
    kinds = [
        (BF16, SWIGLU * per_row("w"), False),
        (F32, SWIGLU, False),
        (E4M3, SWIGLU * per_row("w"), False),
        (E4M3, SWIGLU, True),
        (E4M3, acc + vector("bias"), False),
    ]
    for i, (dtype, expr, ue8m0) in enumerate(kinds):
        dense = Gemm(2048, 7168, dtype, expr, ue8m0=ue8m0)
        grouped = GroupedGemm(
            *(2048, 7168, dtype, expr),
            ue8m0=ue8m0,
            num_groups=32,
            layout=("ragged", "group_of_row", "masked")[i % 3],  # type: ignore[arg-type]
        )
        for problem in (dense, grouped):
            found = list(candidates(problem))
            samples += [(problem, schedule) for schedule in found[i % 3 :: max(len(found) // 6, 1)]]
    return samples


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return KernelStore(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("sample", of_compile(), ids=lambda pair: f"{pair[0].d_dtype}-{pair[1]}")
def test_build_compiles_gated_and_quantized(
    sample: tuple[Gemm, Schedule], store: KernelStore
) -> None:
    resources = build(lower(*sample), store).resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)
