"""Problems: every rule of check_problem, and what `supports` answers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgen import (
    BF16,
    E4M3,
    F16,
    F32,
    Gemm,
    ScaleBlock,
    acc,
    cast,
    matrix,
    scalar,
    supports,
    vector,
)
from jitgen.dtypes import I32, dtype_of
from jitgen.errors import ProblemError
from jitgen.expr import Apply, Operand
from jitgen.problem import MAX_EXTENT, check_problem

LEGAL = Gemm(n=2112, k=7168)
MULTIPLE = {"n": 8, "k": 16}

extents = st.integers(-(2**33), 2**33) | st.integers(-40, 40) | st.integers(2**31 - 40, 2**31 + 40)


def with_extent(name: str, value: Any) -> Gemm:
    return dataclasses.replace(LEGAL, **{name: value})


# --- legal problems -----------------------------------------------------------------------------


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("k", [16, 128, 144, 576, 7168, 16384])
@pytest.mark.parametrize("n", [8, 72, 576, 2112, 2**31 - 8])
def test_check_problem_accepts_every_legal_extent(n: int, k: int, d_dtype: Any) -> None:
    problem = Gemm(n, k, d_dtype)
    check_problem(problem)
    assert supports(problem)
    assert supports(problem).reason == ""


@pytest.mark.parametrize(
    "epilogue",
    [
        acc,
        acc + vector("bias"),
        acc + matrix("residual", F32),
        acc * scalar("alpha"),
        cast(acc, BF16) * 2.0,
    ],
    ids=str,
)
def test_check_problem_accepts_every_epilogue_operand(epilogue: Any) -> None:
    assert supports(dataclasses.replace(LEGAL, epilogue=epilogue))


def test_gemm_defaults_are_the_blockwise_recipe() -> None:
    assert Gemm(2112, 7168) == Gemm(
        n=2112,
        k=7168,
        d_dtype=BF16,
        epilogue=acc,
        a_dtype=E4M3,
        b_dtype=E4M3,
        a_scale=ScaleBlock(rows=1, k=128),
        b_scale=ScaleBlock(rows=128, k=128),
    )


def test_gemm_is_frozen_and_hashable() -> None:
    assert hash(LEGAL) == hash(Gemm(2112, 7168))
    with pytest.raises(dataclasses.FrozenInstanceError):
        LEGAL.n = 8  # type: ignore[misc]


def test_gemm_prints_what_it_computes() -> None:
    text = str(Gemm(72, 144, F32, acc + vector("bias")))
    for part in ("e4m3", "72", "144", "1x128", "128x128", "f32", "bias"):
        assert part in text
    assert "bias" not in str(Gemm(72, 144, F32))


# --- extents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n", "k"])
@given(value=extents)
def test_check_problem_rejects_illegal_extents_and_names_the_nearest(name: str, value: int) -> None:
    multiple = MULTIPLE[name]
    problem = with_extent(name, value)
    if 0 < value <= MAX_EXTENT and value % multiple == 0:
        check_problem(problem)
        return
    with pytest.raises(ProblemError) as caught:
        check_problem(problem)
    message = str(caught.value)
    assert message.startswith(f"{name} = {value} must be a positive multiple of {multiple}")
    nearest = int(re.findall(r"nearest is (-?\d+)", message)[0])
    check_problem(with_extent(name, nearest))
    # Nothing legal lies between, save below: padding upwards loses no data.
    largest = MAX_EXTENT // multiple * multiple
    assert nearest == min(max(-(-value // multiple) * multiple, multiple), largest)


@pytest.mark.parametrize("value", [True, 8.0, "8", None, (8,)], ids=repr)
@pytest.mark.parametrize("name", ["n", "k"])
def test_check_problem_rejects_extent_that_is_no_int(name: str, value: Any) -> None:
    problem = with_extent(name, value)
    with pytest.raises(ProblemError, match=rf"^{name} must be an int, got "):
        check_problem(problem)
    assert not supports(problem)


# --- dtypes, scales, epilogue -------------------------------------------------------------------

BROKEN = {
    "a_dtype": (dataclasses.replace(LEGAL, a_dtype=BF16), r"\ba\b.*bfloat16.*float8_e4m3fn"),
    "b_dtype": (dataclasses.replace(LEGAL, b_dtype=F32), r"\bb\b.*float32.*float8_e4m3fn"),
    "d_dtype": (
        dataclasses.replace(LEGAL, d_dtype=I32),
        r"\bd\b.*int32.*bfloat16, float32 or float8_e4m3fn",
    ),
    "a_scale rows": (
        dataclasses.replace(LEGAL, a_scale=ScaleBlock(128, 128)),
        r"a_scale.*128x128.*1x128",
    ),
    "a_scale k": (dataclasses.replace(LEGAL, a_scale=ScaleBlock(1, 64)), r"a_scale.*1x64.*1x128"),
    "b_scale rows": (
        dataclasses.replace(LEGAL, b_scale=ScaleBlock(64, 128)),
        r"b_scale.*64x128.*128x128 or 1x128",
    ),
    "b_scale k": (
        dataclasses.replace(LEGAL, b_scale=ScaleBlock(128, 32)),
        r"b_scale.*128x32.*128x128",
    ),
}


@pytest.mark.parametrize(("problem", "match"), BROKEN.values(), ids=BROKEN)
def test_check_problem_rejects_and_names_the_legal_value(problem: Gemm, match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        check_problem(problem)


@pytest.mark.parametrize(("problem", "match"), BROKEN.values(), ids=BROKEN)
def test_supports_offers_the_nearest_legal_problem(problem: Gemm, match: str) -> None:
    answer = supports(problem)
    assert not answer
    assert re.search(match, answer.reason)
    assert answer.nearest == LEGAL


WRONG_KIND = [
    ("a_dtype", "e4m3", "a"),
    ("b_dtype", None, "b"),
    ("d_dtype", "bf16", "d"),
    ("d_dtype", None, "d"),
    ("a_scale", (1, 128), "a_scale"),
    ("b_scale", None, "b_scale"),
    ("epilogue", None, "epilogue"),
    ("epilogue", "relu", "epilogue"),
    ("epilogue", (acc + vector("x")).bind(x=0), "epilogue"),
]


@pytest.mark.parametrize(
    ("field", "value", "named"), WRONG_KIND, ids=[f"{f}={v!r:.8}" for f, v, _ in WRONG_KIND]
)
def test_check_problem_rejects_fields_of_another_type(field: str, value: Any, named: str) -> None:
    problem = dataclasses.replace(LEGAL, **{field: value})
    with pytest.raises(ProblemError, match=rf"\b{named}\b"):
        check_problem(problem)
    assert not supports(problem)


@pytest.mark.parametrize(
    "epilogue",
    [
        Apply("tanh", (acc,)),
        vector("_x"),
        vector("x") + matrix("x"),
        vector("x", E4M3),
        cast(acc, E4M3),
        acc + Operand("x", BF16, ("k",)),
    ],
    ids=str,
)
def test_check_problem_rejects_malformed_epilogue(epilogue: Any) -> None:
    problem = dataclasses.replace(LEGAL, epilogue=epilogue)
    with pytest.raises(ProblemError, match="epilogue"):
        check_problem(problem)
    assert not supports(problem)
    assert supports(problem).nearest is None


@pytest.mark.parametrize("name", ["a", "b", "sfa", "sfb", "d"])
def test_check_problem_rejects_operand_named_like_a_tensor_of_the_gemm(name: str) -> None:
    problem = dataclasses.replace(LEGAL, epilogue=acc + vector(name))
    with pytest.raises(ProblemError, match=rf"operand.*\b{name}\b"):
        check_problem(problem)


@pytest.mark.parametrize("problem", [None, (2112, 7168), "gemm"], ids=repr)
def test_check_problem_rejects_what_is_no_problem(problem: Any) -> None:
    with pytest.raises(ProblemError, match=rf"Gemm.*{type(problem).__name__}"):
        check_problem(problem)
    answer = supports(problem)
    assert not answer
    assert answer.nearest is None


# --- supports -----------------------------------------------------------------------------------


@given(n=extents, k=extents, d_dtype=st.sampled_from([BF16, F32, E4M3]))
def test_supports_agrees_with_check_problem(n: int, k: int, d_dtype: Any) -> None:
    problem = Gemm(n, k, d_dtype, acc + vector("bias"))
    answer = supports(problem)
    unit = 128 if d_dtype == E4M3 else 8
    multiples = ((n, unit), (k, 16))
    if all(0 < value <= MAX_EXTENT and value % multiple == 0 for value, multiple in multiples):
        check_problem(problem)
        assert answer
        assert answer.nearest is None
        return
    with pytest.raises(ProblemError) as caught:
        check_problem(problem)
    assert answer.reason == str(caught.value)
    assert answer.nearest is not None
    check_problem(answer.nearest)
    assert answer.nearest.epilogue == problem.epilogue
    assert answer.nearest.n >= min(n, MAX_EXTENT // unit * unit)
    assert answer.nearest.k >= min(k, MAX_EXTENT // 16 * 16)


def test_supports_keeps_what_is_legal_in_the_nearest_problem() -> None:
    problem = Gemm(2111, 7168, F32, acc * scalar("alpha"))
    assert supports(problem).nearest == dataclasses.replace(problem, n=2112)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, BF16, F16, F32], ids=str)
def test_dtype_of_takes_every_spelling(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    spellings = (dtype, dtype.name, dtype.short, dtype.numpy, getattr(torch, dtype.name))
    assert {dtype_of(spelling) for spelling in spellings} == {dtype}
    assert dtype.numpy.itemsize == dtype.size_bytes


@pytest.mark.parametrize("spec", ["float64", "int8", None, 3, "", float, "torch.int8"], ids=repr)
def test_dtype_of_rejects_other_types(spec: Any) -> None:
    with pytest.raises(
        ProblemError, match=r"not supported.*float8_e4m3fn, bfloat16, float16, float32"
    ):
        dtype_of(spec)
