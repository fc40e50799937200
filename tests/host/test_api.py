"""jitgen.gemm and jitgen.quantize without a GPU: results on NumPy arrays, and every rejection."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import jitgen
from jitgen import (
    BF16,
    F32,
    Gemm,
    Schedule,
    acc,
    api,
    gelu,
    matrix,
    relu,
    scalar,
    vector,
)
from jitgen.arrays import ArrayView, gemm_problem
from jitgen.calls import _argument
from jitgen.dtypes import E4M3
from jitgen.errors import DeviceError, JitgenError, ProblemError, ScheduleError
from jitgen.interpret import interpret
from jitgen.kernel import TensorMapParameter
from jitgen.lower import lower
from jitgen.runtime.launch import TensorMap
from jitgen.tuning.select import select

torch = pytest.importorskip("torch")

Array = NDArray[Any]
SameBits = Callable[..., None]

ROOT = Path(__file__).parents[2]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT = np.dtype(ml_dtypes.bfloat16)
M, N, K = 7, 72, 144


def make(rng: np.random.Generator, m: int = M, n: int = N, k: int = K) -> dict[str, Any]:
    """Arguments of a GEMM by name: a, b, sfa, sfb."""
    return {
        "a": rng.standard_normal((m, k)).astype(FP8),
        "b": rng.standard_normal((n, k)).astype(FP8),
        "sfa": rng.uniform(0.5, 2, (m, -(-k // 128))).astype(np.float32),
        "sfb": rng.uniform(0.5, 2, (-(-n // 128), -(-k // 128))).astype(np.float32),
    }


def call(arguments: dict[str, Any], **options: Any) -> Any:
    a, b, sfa, sfb = (arguments[name] for name in ("a", "b", "sfa", "sfb"))
    return jitgen.gemm(a, b, (sfa, sfb), **options)


def interpreted(problem: Gemm, tensors: dict[str, Any], schedule: Schedule | None = None) -> Array:
    m = tensors["a"].shape[0]
    return interpret(lower(problem, schedule or select(problem, m)), tensors)


# --- gemm on NumPy arrays -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (7, 72, 144), (129, 576, 128)], ids=["m1", "m7", "m129"]
)
@pytest.mark.parametrize("schedule", [None, Schedule(64, 48, 3, 1)], ids=["chosen", "pinned"])
def test_gemm_numpy_equals_the_interpreter(
    rng: np.random.Generator, same_bits: SameBits, schedule: Schedule | None, m: int, n: int, k: int
) -> None:
    arguments = make(rng, m, n, k)
    same_bits(call(arguments, schedule=schedule), interpreted(Gemm(n, k), arguments, schedule))


def test_gemm_numpy_runs_a_split_and_says_which_one_the_k_allows(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    arguments, schedule = make(rng, k=576), Schedule(64, 48, 3, 1, split_k=3)
    same_bits(call(arguments, schedule=schedule), interpreted(Gemm(N, 576), arguments, schedule))
    with pytest.raises(ScheduleError, match=r"any of the 2 K blocks: choose 2"):
        call(make(rng), schedule=schedule)


def test_gemm_numpy_approximates_the_float64_product(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((33, 576)), rng.standard_normal((72, 576))
    a, sfa = jitgen.quantize(x.astype(np.float32), (1, 128))
    b, sfb = jitgen.quantize(w.astype(np.float32), (128, 128))
    d = np.asarray(jitgen.gemm(a, b, (sfa, sfb)), np.float64)
    # Each factor is off by at most 2^-4 of itself; errors of 576 terms average out.
    assert np.linalg.norm(d - x @ w.T) < 0.06 * np.linalg.norm(x @ w.T)


@pytest.mark.parametrize(
    "out_dtype",
    ["float32", "f32", np.float32, np.dtype("float32"), F32, torch.float32],
    ids=["name", "short", "type", "dtype", "jitgen", "torch"],
)
def test_gemm_numpy_takes_every_spelling_of_out_dtype(
    rng: np.random.Generator, same_bits: SameBits, out_dtype: Any
) -> None:
    arguments = make(rng)
    same_bits(call(arguments, out_dtype=out_dtype), interpreted(Gemm(N, K, F32), arguments))


def test_gemm_numpy_gives_bfloat16_by_default(rng: np.random.Generator) -> None:
    d = call(make(rng))
    assert d.dtype == BFLOAT
    assert d.shape == (M, N)


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_gemm_numpy_writes_out_and_returns_it(
    rng: np.random.Generator, same_bits: SameBits, d_dtype: Any
) -> None:
    arguments = make(rng)
    want = interpreted(Gemm(N, K, d_dtype), arguments)
    for options in ({}, {"out_dtype": d_dtype}):
        out = np.full((M, N), np.nan, d_dtype.numpy)
        assert call(arguments, out=out, **options) is out
        same_bits(out, want)


def test_gemm_numpy_writes_out_in_a_wider_buffer_and_nothing_else(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    arguments = make(rng)
    buffer = np.full((M + 2, N + 16), 7.0, BFLOAT)
    out = buffer[1:-1, 8:-8]
    assert call(arguments, out=out) is out
    same_bits(np.ascontiguousarray(out), interpreted(Gemm(N, K), arguments))
    canary = np.ones(buffer.shape, bool)
    canary[1:-1, 8:-8] = False
    assert np.all(buffer[canary] == 7.0)


def test_gemm_numpy_leaves_its_inputs_alone(rng: np.random.Generator, same_bits: SameBits) -> None:
    arguments = make(rng)
    copies = {name: array.copy() for name, array in arguments.items()}
    call(arguments)
    for name, array in arguments.items():
        same_bits(array, copies[name], name)


def test_gemm_numpy_takes_padded_rows_and_any_sfa(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    arguments = make(rng)
    want = call(arguments)
    wide = np.zeros((M, K + 48), FP8)
    wide[:, :K] = arguments["a"]
    twice = np.repeat(arguments["b"], 2, axis=0)
    layouts = {
        "a": [wide[:, :K]],
        "b": [twice[::2]],
        "sfa": [
            np.asfortranarray(arguments["sfa"]),
            np.repeat(np.repeat(arguments["sfa"], 2, axis=0), 3, axis=1)[::2, ::3],
        ],
    }
    for name, arrays in layouts.items():
        for array in arrays:
            same_bits(call(arguments | {name: array}), want, f"{name} with strides {array.strides}")


def test_gemm_numpy_takes_one_row_with_any_stride(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    arguments = make(rng, m=1)
    want = call(arguments)
    odd = np.zeros((1, K + 5), FP8)[:, :K]
    odd[...] = arguments["a"]
    same_bits(call(arguments | {"a": odd}), want)


def test_gemm_takes_scales_as_a_list(rng: np.random.Generator, same_bits: SameBits) -> None:
    t = make(rng)
    same_bits(jitgen.gemm(t["a"], t["b"], [t["sfa"], t["sfb"]]), call(t))  # type: ignore[arg-type]


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_gemm_of_no_rows_is_empty(rng: np.random.Generator, d_dtype: Any) -> None:
    arguments = make(rng, m=0)
    d = call(arguments, out_dtype=d_dtype)
    assert (d.shape, d.dtype) == ((0, N), d_dtype.numpy)
    out = np.empty((0, N), d_dtype.numpy)
    assert call(arguments, out=out) is out
    bound = (acc + vector("bias") + matrix("residual")).bind(
        bias=np.zeros(N, BFLOAT), residual=np.zeros((0, N), BFLOAT)
    )
    assert call(arguments, epilogue=bound).shape == (0, N)


def test_gemm_batch_invariant_gives_each_row_the_same_bits_at_every_m(
    rng: np.random.Generator, same_bits: SameBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make(rng, m=130)
    asked: list[bool] = []

    def select_noted(problem: Gemm, m: int, *, batch_invariant: bool) -> Schedule:
        asked.append(batch_invariant)
        return select(problem, m, batch_invariant=batch_invariant)

    monkeypatch.setattr(api, "select", select_noted)
    whole = call(arguments, batch_invariant=True)
    for m in (1, 65):
        part = arguments | {"a": arguments["a"][:m], "sfa": arguments["sfa"][:m]}
        same_bits(call(part, batch_invariant=True), whole[:m])
    call(arguments)
    assert asked == [True, True, True, False]


# --- epilogues ----------------------------------------------------------------------------------


def operands(rng: np.random.Generator) -> dict[str, Array]:
    return {
        "bias": rng.standard_normal(N).astype(BFLOAT),
        "residual": rng.standard_normal((M, N)).astype(np.float32),
        "alpha": np.asarray(rng.standard_normal(), np.float32),
    }


EPILOGUE = gelu(acc * scalar("alpha") + vector("bias")) + matrix("residual", F32)


def test_gemm_binds_operands_by_name(rng: np.random.Generator, same_bits: SameBits) -> None:
    arguments, extra = make(rng), operands(rng)
    want = interpreted(Gemm(N, K, BF16, EPILOGUE), arguments | extra)
    same_bits(call(arguments, epilogue=EPILOGUE.bind(**extra)), want)
    same_bits(call(arguments, epilogue=EPILOGUE.bind(**dict(reversed(extra.items())))), want)


def test_gemm_takes_an_expression_without_operands(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    arguments = make(rng)
    want = interpreted(Gemm(N, K, BF16, relu(acc)), arguments)
    same_bits(call(arguments, epilogue=relu(acc)), want)
    same_bits(call(arguments, epilogue=relu(acc).bind()), want)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_gemm_takes_a_scalar_of_one_element(
    rng: np.random.Generator, same_bits: SameBits, shape: tuple[int, ...]
) -> None:
    arguments = make(rng)
    d = call(
        arguments, epilogue=(acc * scalar("alpha")).bind(alpha=np.full(shape, 0.5, np.float32))
    )
    same_bits(d, call(arguments, epilogue=acc * 0.5))


def test_gemm_adds_a_residual_in_place(rng: np.random.Generator, same_bits: SameBits) -> None:
    arguments = make(rng)
    out = rng.standard_normal((M, N)).astype(BFLOAT)
    expr = acc + matrix("residual")
    want = call(arguments, epilogue=expr.bind(residual=out.copy()))
    assert call(arguments, epilogue=expr.bind(residual=out), out=out) is out
    same_bits(out, want)


BAD_BINDINGS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "missing": (acc + vector("bias"), {}, r"needs operands \[bias\], got \[\].*bind"),
    "another name": (
        acc + vector("bias"),
        {"bais": np.zeros(N, BFLOAT)},
        r"needs operands \[bias\], got \[bais\].*bind",
    ),
    "too many": (relu(acc), {"bias": np.zeros(N, BFLOAT)}, r"needs operands \[\], got \[bias\]"),
    "dtype": (
        acc + vector("bias"),
        {"bias": np.zeros(N, np.float32)},
        r"bias is float32.*bfloat16\[72\]",
    ),
    "unknown dtype": (acc + vector("bias"), {"bias": np.zeros(N, np.int8)}, r"\bbias\b"),
    "vector length": (
        acc + vector("bias"),
        {"bias": np.zeros(N - 8, BFLOAT)},
        r"bias is.*\[64\].*\[72\]",
    ),
    "vector as a row": (
        acc + vector("bias"),
        {"bias": np.zeros((1, N), BFLOAT)},
        r"bias is.*\[72\]",
    ),
    "matrix shape": (acc + matrix("r"), {"r": np.zeros((N, M), BFLOAT)}, r"r is.*\[7, 72\]"),
    "matrix broadcast": (acc + matrix("r"), {"r": np.zeros((1, N), BFLOAT)}, r"r is.*\[7, 72\]"),
    "matrix columns first": (
        acc + matrix("r"),
        {"r": np.zeros((N, M), BFLOAT).T},
        r"r is.*stride must be 1",
    ),
    "vector strided": (
        acc + vector("v"),
        {"v": np.zeros(2 * N, BFLOAT)[::2]},
        r"v is.*stride must be 1",
    ),
    "odd row stride": (
        acc + matrix("r"),
        {"r": np.zeros((M, N + 1), BFLOAT)[:, :N]},
        r"r is.*row stride must be even",
    ),
    "rows overlap": (
        acc + matrix("r"),
        {"r": np.broadcast_to(np.zeros((1, N), BFLOAT), (M, N))},
        r"r is.*must not overlap",
    ),
    "scalar of two": (acc * scalar("s"), {"s": np.zeros(2, np.float32)}, r"s is.*\[2\]"),
    "scalar float64": (acc * scalar("s"), {"s": np.zeros((), np.float64)}, r"\bs\b"),
    "scalar number": (acc * scalar("s"), {"s": 2.0}, r"s is a float"),
    **{
        f"named {name}": (acc + vector(name), {name: np.zeros(N, BFLOAT)}, rf"operand.*\b{name}\b")
        for name in ("a", "b", "sfa", "sfb", "d")
    },
    "matrix named d": (acc + matrix("d"), {"d": np.zeros((M, N), BFLOAT)}, r"operand.*\bd\b"),
}


@pytest.mark.parametrize(("expr", "tensors", "match"), BAD_BINDINGS.values(), ids=BAD_BINDINGS)
def test_gemm_rejects_binding(
    rng: np.random.Generator, expr: Any, tensors: dict[str, Any], match: str
) -> None:
    with pytest.raises(ProblemError, match=match):
        call(make(rng), epilogue=expr.bind(**tensors))


@pytest.mark.parametrize(
    "epilogue", ["relu", None, relu, [acc]], ids=["str", "none", "function", "list"]
)
def test_gemm_rejects_epilogue_that_is_no_expression(
    rng: np.random.Generator, epilogue: Any
) -> None:
    with pytest.raises(ProblemError, match="epilogue"):
        call(make(rng), epilogue=epilogue)


# --- rejections of arrays -----------------------------------------------------------------------

Change = Callable[[dict[str, Any]], dict[str, Any]]


def one(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda t: t | {name: change(t[name])}


def pitched(array: Array, columns: int) -> Array:
    """The same matrix with rows `columns` elements apart."""
    wide = np.zeros((array.shape[0], columns), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide[:, : array.shape[1]]


BAD_ARRAYS: dict[str, tuple[Change, str]] = {
    "a bf16": (one("a", lambda x: x.astype(BFLOAT)), r"\ba\b.*bfloat16.*float8_e4m3fn"),
    "b float32": (one("b", lambda x: x.astype(np.float32)), r"\bb\b.*float32.*float8_e4m3fn"),
    "a codes": (one("a", lambda x: x.view(np.uint8)), r"\ba\b.*uint8.*float8_e4m3fn"),
    "a float64": (one("a", lambda x: x.astype(np.float64)), r"\ba\b.*float64.*float8_e4m3fn"),
    "b e5m2": (one("b", lambda x: x.astype(ml_dtypes.float8_e5m2)), r"\bb\b.*e5m2.*float8_e4m3fn"),
    "a vector": (one("a", lambda x: x[0]), r"^a is.*matrix"),
    "b cube": (one("b", lambda x: x[None]), r"^b is.*matrix"),
    "k differs": (
        one("a", lambda x: x[:, :128].copy()),
        r"a is.*\[7, 128\].*b is.*\[72, 144\].*agree in k",
    ),
    "b transposed": (one("b", lambda x: x.T), r"agree in k"),
    "a column-major": (one("a", np.asfortranarray), r"^a is.*row-major"),
    "b column-major": (one("b", np.asfortranarray), r"^b is.*row-major"),
    "a pitch": (one("a", lambda x: pitched(x, K + 8)), r"^a is.*pitch of 152 B.*16"),
    "b pitch": (one("b", lambda x: pitched(x, K + 1)), r"^b is.*pitch of 145 B.*16"),
    "a rows overlap": (
        one("a", lambda x: np.broadcast_to(x[:1], x.shape)),
        r"^a is.*must not overlap",
    ),
    "a upside down": (one("a", lambda x: x[::-1]), r"^a is"),
    "sfa float64": (one("sfa", lambda x: x.astype(np.float64)), r"\bsfa\b.*float64.*float32"),
    "sfa bf16": (one("sfa", lambda x: x.astype(BFLOAT)), r"\bsfa\b.*bfloat16.*float32\[7, 2\]"),
    "sfa rows": (one("sfa", lambda x: x[:-1]), r"^sfa is.*\[6, 2\].*1x128.*float32\[7, 2\]"),
    "sfa per row": (one("sfa", lambda x: x[:, :1]), r"^sfa is.*\[7, 1\].*float32\[7, 2\]"),
    "sfa vector": (one("sfa", lambda x: x[:, 0]), r"^sfa is.*\[7\].*float32\[7, 2\]"),
    "sfa transposed": (one("sfa", lambda x: x.T), r"^sfa is.*\[2, 7\].*float32\[7, 2\]"),
    "sfa upside down": (one("sfa", lambda x: x[::-1]), r"^sfa is.*strides must"),
    "sfb two scales a row": (
        one("sfb", lambda x: np.repeat(x, 2 * N, axis=0)),
        r"^sfb is.*\[144, 2\].*128x128.*float32\[1, 2\]",
    ),
    "sfb float16": (one("sfb", lambda x: x.astype(np.float16)), r"\bsfb\b.*float16"),
    "sfb strided": (one("sfb", lambda x: np.repeat(x, 2, axis=1)[:, ::2]), r"^sfb is.*contiguous"),
    "a list": (one("a", lambda x: x.tolist()), r"a is a list.*torch CUDA tensors.*NumPy arrays"),
    "sfb none": (
        one("sfb", lambda x: None),
        r"sfb is a NoneType.*torch CUDA tensors.*NumPy arrays",
    ),
    "sfa number": (one("sfa", lambda x: 1.0), r"sfa is a float.*torch CUDA tensors.*NumPy arrays"),
    "a torch": (
        one("a", lambda x: torch.zeros(M, K).to(torch.float8_e4m3fn)),
        r"(b|sfa) is a ndarray.*torch CUDA tensors only.*NumPy arrays only",
    ),
    "sfa torch": (
        one("sfa", lambda x: torch.ones(M, 2)),
        r"(a|b) is a ndarray.*torch CUDA tensors only.*NumPy arrays only",
    ),
}


@pytest.mark.parametrize(("change", "match"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_gemm_rejects_array(rng: np.random.Generator, change: Change, match: str) -> None:
    arguments = make(rng)
    assert call(arguments).shape == (M, N)
    with pytest.raises(ProblemError, match=match):
        call(change(arguments))


def test_gemm_rejects_column_major_sfb(rng: np.random.Generator) -> None:
    arguments = make(rng, n=264)
    with pytest.raises(ProblemError, match=r"^sfb is.*contiguous, row-major"):
        call(arguments | {"sfb": np.asfortranarray(arguments["sfb"])})


@pytest.mark.parametrize(("n", "k", "match"), [(70, 144, "n = 70.*72"), (72, 136, "k = 136.*144")])
def test_gemm_rejects_extent_and_names_the_nearest(
    rng: np.random.Generator, n: int, k: int, match: str
) -> None:
    with pytest.raises(ProblemError, match=match):
        call(make(rng, n=n, k=k))


def test_gemm_rejects_no_columns(rng: np.random.Generator) -> None:
    with pytest.raises(ProblemError, match=r"n = 0.*nearest is 8"):
        call(make(rng, n=0))
    with pytest.raises(ProblemError, match=r"k = 0.*nearest is 16"):
        call(make(rng, k=0))


@pytest.mark.parametrize(
    "scales",
    [None, np.ones((M, 2), np.float32), (np.ones((M, 2), np.float32),), (1, 2, 3), "ab"],
    ids=["none", "array", "one", "three", "str"],
)
def test_gemm_rejects_scales_that_are_no_pair(rng: np.random.Generator, scales: Any) -> None:
    t = make(rng)
    with pytest.raises(ProblemError, match=r"scales must be the pair \(sfa, sfb\)"):
        jitgen.gemm(t["a"], t["b"], scales)


BAD_OUTS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "shape": (lambda: np.zeros((M, N + 8), BFLOAT), None, r"^d is.*\[7, 80\].*bfloat16\[7, 72\]"),
    "transposed": (lambda: np.zeros((N, M), BFLOAT), None, r"^d is.*\[72, 7\].*\[7, 72\]"),
    "dtype of out": (lambda: np.zeros((M, N), np.float16), None, r"\b(d|out)\b.*float16"),
    "out_dtype": (lambda: np.zeros((M, N), np.float32), BF16, r"^d is float32.*bfloat16\[7, 72\]"),
    "column-major": (lambda: np.zeros((N, M), BFLOAT).T, None, r"^d is.*row-major"),
    "pitch": (lambda: np.zeros((M, N + 4), BFLOAT)[:, :N], None, r"^d is.*pitch of 152 B.*16"),
    "rows overlap": (
        lambda: np.lib.stride_tricks.as_strided(np.zeros(M * N, BFLOAT), (M, N), (64 * 2, 2)),
        None,
        r"^d is.*must not overlap",
    ),
    "list": (lambda: [[0.0]], None, r"d is a list|out is a list"),
    "torch": (lambda: torch.zeros(M, N), None, r"torch CUDA tensors only.*NumPy arrays only"),
}


@pytest.mark.parametrize(("make_out", "out_dtype", "match"), BAD_OUTS.values(), ids=BAD_OUTS)
def test_gemm_rejects_out(
    rng: np.random.Generator, make_out: Callable[[], Any], out_dtype: Any, match: str
) -> None:
    with pytest.raises(ProblemError, match=match):
        call(make(rng), out=make_out(), out_dtype=out_dtype)


@pytest.mark.parametrize("out_dtype", ["float16", np.int8, 3], ids=str)
def test_gemm_rejects_out_dtype(rng: np.random.Generator, out_dtype: Any) -> None:
    with pytest.raises(ProblemError, match=r"bfloat16.*float32"):
        call(make(rng), out_dtype=out_dtype)


def test_gemm_rejects_schedule_that_cannot_run(rng: np.random.Generator) -> None:
    with pytest.raises(ScheduleError, match="block_m = 100"):
        call(make(rng), schedule=Schedule(100, 64, 4, 1))
    with pytest.raises(ScheduleError, match="shared memory"):
        call(make(rng), schedule=Schedule(128, 128, 12, 2))


@pytest.mark.parametrize(
    "schedule", [(128, 128, 4), "fast", {"block_m": 128}], ids=["tuple", "str", "dict"]
)
def test_gemm_rejects_schedule_of_another_type(rng: np.random.Generator, schedule: Any) -> None:
    with pytest.raises(JitgenError, match=f"(?i)schedule.*{type(schedule).__name__}"):
        call(make(rng), schedule=schedule)


def test_gemm_problem_rejects_rows_beyond_tma_coordinates() -> None:
    """Coordinates of a TMA box are int32 (jitgen.problem.MAX_EXTENT), for m as for n and k."""
    m = 2**31
    views = (
        ArrayView("a", E4M3, (m, 16), (16, 1)),
        ArrayView("b", E4M3, (8, 16), (16, 1)),
        ArrayView("sfa", F32, (m, 1), (1, 1)),
        ArrayView("sfb", F32, (1, 1), (1, 1)),
    )
    with pytest.raises(ProblemError, match=rf"\bm\b.*{m}"):
        gemm_problem({view.name: view for view in views}, BF16, acc, None)


# --- arguments of a launch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(64, 64, 4, 1),
        Schedule(128, 64, 2, 1),  # both waves of a warpgroup in one box of D
        Schedule(192, 96, 3, 3),
        Schedule(128, 64, 2, 2, 1, 2),  # A in two shares of 64 rows
        Schedule(128, 96, 2, 2, 2, 1),
        Schedule(64, 64, 4, 1, split_k=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 7, 63, 64, 65, 100, 128, 191, 1000])
def test_argument_cuts_the_boxes_of_a_and_d_to_m_rows(m: int, schedule: Schedule) -> None:
    kernel = lower(Gemm(N, K), schedule)
    views = {
        "a": ArrayView("a", E4M3, (m, K), (K + 16, 1), 0x1000),
        "b": ArrayView("b", E4M3, (N, K), (K, 1), 0x2000),
        "d": ArrayView("d", BF16, (m, N), (N, 1), 0x3000),
    }
    maps = {p.tensor.name: p for p in kernel.parameters if isinstance(p, TensorMapParameter)}
    assert set(maps) == set(views)
    for name, parameter in maps.items():
        argument = _argument(parameter, views, m)
        assert isinstance(argument, TensorMap)
        assert list(views)[argument.tensor] == name
        spec, view = argument.spec, views[name]
        assert (spec.rows, spec.columns) == view.shape
        assert spec.pitch_bytes == view.row_stride * spec.element_bytes
        assert spec.swizzle_bytes == parameter.swizzle_bytes
        # n and k are known when the kernel is built: its boxes of B stay as they are.
        rows, columns = parameter.box
        assert (spec.box_rows, spec.box_columns) == (rows if name == "b" else min(rows, m), columns)
        if name == "a":
            assert spec.box_rows == min(schedule.block_m // schedule.cluster_n, m)


# --- torch without CUDA -------------------------------------------------------------------------


def on_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn)
        if x.dtype == FP8
        else torch.from_numpy(x)
        for name, x in arguments.items()
    }


def test_gemm_rejects_torch_cpu_tensors_and_says_what_to_do(rng: np.random.Generator) -> None:
    with pytest.raises(DeviceError, match=r"a is on cpu.*\.cuda\(\).*NumPy.*interpreter"):
        call(on_torch(make(rng)))


@pytest.mark.parametrize(
    "options", [{"out": None}, {"out_dtype": torch.float32}, {"m": 0}], ids=str
)
def test_gemm_rejects_torch_cpu_tensors_whatever_the_options(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    arguments = on_torch(make(rng, m=options.pop("m", M)))
    if "out" in options:
        options["out"] = torch.zeros(M, N, dtype=torch.bfloat16)
    with pytest.raises(DeviceError, match=r"is on cpu.*\.cuda\(\)"):
        call(arguments, **options)


def test_gemm_rejects_torch_cpu_operands(rng: np.random.Generator) -> None:
    bound = (acc + vector("bias")).bind(bias=torch.zeros(N, dtype=torch.bfloat16))
    with pytest.raises(DeviceError, match=r"is on cpu.*\.cuda\(\)"):
        call(on_torch(make(rng)), epilogue=bound)


def test_gemm_rejects_torch_meta_tensors(rng: np.random.Generator) -> None:
    arguments = {name: tensor.to("meta") for name, tensor in on_torch(make(rng)).items()}
    with pytest.raises(DeviceError, match=r"a is on meta"):
        call(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_gemm_gives_one_clear_error_where_torch_has_no_cuda() -> None:
    """A tensor that says it is on CUDA, in a torch without it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        arguments = {
            "a": torch.empty(M, K, dtype=torch.float8_e4m3fn, device="cuda"),
            "b": torch.empty(N, K, dtype=torch.float8_e4m3fn, device="cuda"),
            "sfa": torch.empty(M, 2, device="cuda"),
            "sfb": torch.empty(1, 2, device="cuda"),
        }
        with pytest.raises(DeviceError, match=r"driver|GPU|CUDA"):
            call(arguments)


def test_gemm_on_numpy_never_imports_torch(tmp_path: Path) -> None:
    code = """
import sys
import numpy as np, jitgen
a, sfa = jitgen.quantize(np.ones((3, 16), np.float32))
d = jitgen.gemm(a, a[:1].repeat(8, 0), (sfa, sfa[:1]))
assert d.shape == (3, 8) and float(d[0, 0]) == 16.0, d
try:
    jitgen.gemm([1], [2], (3, 4))
except jitgen.ProblemError as error:
    print(error)
print([name for name in ("torch", "cuda") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    message, modules = done.stdout.splitlines()
    assert "a is a list" in message
    assert modules == "[]"


# --- quantize -----------------------------------------------------------------------------------

SHAPES = [(1, 128), (7, 144), (129, 576), (256, 256), (3, 40), (130, 1)]
BLOCKS = [(1, 128), (128, 128), (1, 16), (5, 7)]


def sample(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> Array:
    x = {
        "gauss": lambda: rng.standard_normal(shape),
        "wide": lambda: rng.standard_normal(shape) * np.exp2(rng.integers(-120, 120, shape)),
        "zeros": lambda: np.zeros(shape) * rng.choice([-1, 1], shape),
        "mostly zero": lambda: rng.standard_normal(shape) * (rng.random(shape) < 0.01),
        "subnormal": lambda: rng.standard_normal(shape) * 2.0**-135,
        "small": lambda: rng.standard_normal(shape) * np.exp2(rng.integers(-80, -40, shape)),
        "huge": lambda: rng.uniform(-1, 1, shape) * float(np.finfo(np.float32).max),
        "halves": lambda: rng.integers(-896, 897, shape) / 2,
    }[kind]()
    return x.astype(np.float32)


KINDS = ["gauss", "wide", "zeros", "mostly zero", "subnormal", "small", "huge", "halves"]


def same_as_torch(
    x: Array, tensor: Any, block: tuple[int, int], same_bits: SameBits, note: str
) -> None:
    q, scale = jitgen.quantize(x, block)
    q_t, scale_t = jitgen.quantize(tensor, block)
    assert (q_t.dtype, scale_t.dtype) == (torch.float8_e4m3fn, torch.float32)
    same_bits(scale, scale_t.numpy(), f"scale, {note}")
    same_bits(q.view(np.uint8), q_t.contiguous().view(torch.uint8).numpy(), f"values, {note}")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_numpy_equals_torch(
    rng: np.random.Generator, same_bits: SameBits, kind: str, block: tuple[int, int]
) -> None:
    for shape in SHAPES:
        x = sample(rng, kind, shape)
        same_as_torch(x, torch.from_numpy(x), block, same_bits, f"{kind} {shape} {block}")


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_numpy_equals_torch_for_bfloat16(
    rng: np.random.Generator, same_bits: SameBits, kind: str
) -> None:
    with np.errstate(over="ignore"):
        x = np.clip(sample(rng, kind, (129, 200)), -3.3e38, 3.3e38).astype(BFLOAT)
    tensor = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    same_as_torch(x, tensor, (1, 128), same_bits, kind)
    same_as_torch(x, tensor, (128, 128), same_bits, kind)


def test_quantize_takes_views(rng: np.random.Generator, same_bits: SameBits) -> None:
    x = sample(rng, "gauss", (200, 300))
    want = jitgen.quantize(np.ascontiguousarray(x.T[::2]), (1, 128))
    for got in (
        jitgen.quantize(x.T[::2], (1, 128)),
        jitgen.quantize(torch.from_numpy(x).T[::2], (1, 128)),
    ):
        same_bits(np.asarray(got[1]), want[1])
        q = (
            got[0]
            if isinstance(got[0], np.ndarray)
            else got[0].contiguous().view(torch.uint8).numpy()
        )
        same_bits(np.ascontiguousarray(q).view(np.uint8), want[0].view(np.uint8))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_follows_its_formula(rng: np.random.Generator, kind: str, library: str) -> None:
    rows, k, block = 130, 200, (128, 128)
    x = sample(rng, kind, (rows, k))
    q, scale = jitgen.quantize(x if library == "numpy" else torch.from_numpy(x), block)
    if library == "torch":
        q, scale = q.contiguous().view(torch.uint8).numpy().view(FP8), scale.numpy()
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == ((rows, k), FP8, (2, 2), np.float32)
    for i in range(2):
        for j in range(2):
            part = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            amax = np.abs(x[part]).max()
            want = np.maximum(amax, np.float32(448 * 2.0**-63)) / np.float32(448)
            assert scale[i, j] == want
            assert want >= 2.0**-63
            values = np.asarray(q[part], np.float64)
            assert np.abs(values).max() <= 448
            # Nearest: within half a step of x / scale (2^-3 of its binade, 2^-9 at least), and the
            # division rounds too.
            exact = x[part].astype(np.float64) / want
            step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 1e-300))), -6) - 3)
            assert np.all(np.abs(values - exact) <= 0.5 * step * (1 + 2.0**-20))


def test_quantize_gives_blocks_by_default(rng: np.random.Generator) -> None:
    q, scale = jitgen.quantize(sample(rng, "gauss", (7, 300)))
    assert q.shape == (7, 300)
    assert scale.shape == (7, 3)


@pytest.mark.parametrize("shape", [(0, 128), (0, 40)], ids=str)
def test_quantize_of_no_rows_is_empty(shape: tuple[int, int]) -> None:
    for x in (np.zeros(shape, np.float32), torch.zeros(shape)):
        q, scale = jitgen.quantize(x, (1, 128))
        assert tuple(q.shape) == shape
        assert tuple(scale.shape) == (0, 1)


def test_quantize_leaves_its_input_alone(rng: np.random.Generator) -> None:
    x = sample(rng, "gauss", (7, 300))
    copy, tensor = x.copy(), torch.from_numpy(x.copy())
    jitgen.quantize(x)
    jitgen.quantize(tensor)
    assert np.array_equal(x, copy)
    assert np.array_equal(tensor.numpy(), copy)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_quantize_numpy_rejects_what_is_not_finite(rng: np.random.Generator, bad: float) -> None:
    x = sample(rng, "gauss", (7, 300))
    x[5, 299] = bad
    with pytest.raises(ProblemError, match=r"finite.*\[5, 299\]"):
        jitgen.quantize(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_quantize_torch_marks_the_block_that_is_not_finite(
    rng: np.random.Generator, bad: float
) -> None:
    x = torch.from_numpy(sample(rng, "gauss", (7, 300)))
    clean = jitgen.quantize(x)[1]
    x[5, 299] = bad
    scale = jitgen.quantize(x)[1]
    marked = torch.zeros(7, 3, dtype=torch.bool)
    marked[5, 2] = True
    assert np.array_equal(scale[5, 2].item(), bad, equal_nan=True)
    assert torch.equal(scale[~marked], clean[~marked])


BAD_INPUTS: dict[str, Any] = {
    "vector": np.zeros(128, np.float32),
    "cube": np.zeros((1, 1, 128), np.float32),
    "float64": np.zeros((1, 128)),
    "float16": np.zeros((1, 128), np.float16),
    "int": np.zeros((1, 128), np.int32),
    "e4m3": np.zeros((1, 128), FP8),
    "torch vector": torch.zeros(128),
    "torch float64": torch.zeros(1, 128, dtype=torch.float64),
    "torch float16": torch.zeros(1, 128, dtype=torch.float16),
    "torch int": torch.zeros(1, 128, dtype=torch.int32),
    "list": [[1.0]],
    "none": None,
}


@pytest.mark.parametrize("x", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_quantize_rejects_input(x: Any) -> None:
    with pytest.raises(ProblemError, match=r"^x "):
        jitgen.quantize(x)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    "block", [(0, 128), (1, 0), (-1, 128), (1,), (1, 128, 1), (1.5, 128), 128, None], ids=str
)
def test_quantize_rejects_block(block: Any, library: str) -> None:
    x = np.zeros((4, 256), np.float32) if library == "numpy" else torch.zeros(4, 256)
    with pytest.raises(ProblemError, match="block"):
        jitgen.quantize(x, block)
