"""Epilogue expressions: how they are built, walked and refused."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgen import acc, cast, gelu, matrix, maximum, relu, scalar, silu, vector
from jitgen.dtypes import BF16, E4M3, F32
from jitgen.errors import ProblemError
from jitgen.expr import (
    OPERATIONS,
    Accumulator,
    Apply,
    Bound,
    Cast,
    Constant,
    Expr,
    Operand,
    as_expr,
    check_expr,
    is_exact,
    operands,
    walk,
)

# A number that is out of range must be refused, not announced by a NumPy warning first.
pytestmark = pytest.mark.filterwarnings("error")

BIAS, RESIDUAL, SCALE = vector("bias"), matrix("residual"), scalar("scale")


def apply(op: str, *args: Any) -> Apply:
    return Apply(op, args)


# --- construction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "want"),
    [
        (acc + BIAS, apply("add", acc, BIAS)),
        (acc + 2, apply("add", acc, Constant(2.0))),
        (2 + acc, apply("add", Constant(2.0), acc)),
        (acc - BIAS, apply("sub", acc, BIAS)),
        (acc - 2, apply("sub", acc, Constant(2.0))),
        (2 - acc, apply("sub", Constant(2.0), acc)),
        (acc * SCALE, apply("mul", acc, SCALE)),
        (acc * 0.5, apply("mul", acc, Constant(0.5))),
        (0.5 * acc, apply("mul", Constant(0.5), acc)),
        (np.float32(0.5) * acc, apply("mul", Constant(0.5), acc)),
        (acc + np.float64(0.5), apply("add", acc, Constant(0.5))),
        (relu(acc), apply("relu", acc)),
        (silu(acc), apply("silu", acc)),
        (gelu(acc), apply("gelu", acc)),
        (maximum(acc, 0), apply("maximum", acc, Constant(0.0))),
        (maximum(0, acc), apply("maximum", Constant(0.0), acc)),  # type: ignore[arg-type]
        (cast(acc, BF16), Cast(BF16, acc)),
        (acc + BIAS * 2, apply("add", acc, apply("mul", BIAS, Constant(2.0)))),
    ],
    ids=str,
)
def test_expr_operators_keep_the_order_of_their_arguments(expr: Expr, want: Expr) -> None:
    assert expr == want
    check_expr(expr)


@pytest.mark.parametrize(
    ("operand", "dtype", "axes"),
    [
        (vector("x"), BF16, ("n",)),
        (vector("x", "float32"), F32, ("n",)),
        (vector("x", np.float32), F32, ("n",)),
        (matrix("x"), BF16, ("m", "n")),
        (matrix("x", "f32"), F32, ("m", "n")),
        (matrix("x", ml_dtypes.bfloat16), BF16, ("m", "n")),
        (scalar("x"), F32, ()),
    ],
    ids=str,
)
def test_operand_declares_dtype_and_axes(operand: Expr, dtype: Any, axes: tuple[str, ...]) -> None:
    assert operand == Operand("x", dtype, axes)
    check_expr(operand)


@pytest.mark.parametrize("make", [vector, matrix], ids=["vector", "matrix"])
def test_operand_takes_torch_dtypes(make: Any) -> None:
    torch = pytest.importorskip("torch")
    assert make("x", torch.bfloat16) == make("x", BF16)
    assert make("x", torch.float32) == make("x", F32)


def test_cast_takes_every_spelling_of_a_dtype() -> None:
    torch = pytest.importorskip("torch")
    spellings = [BF16, "bf16", "bfloat16", ml_dtypes.bfloat16, torch.bfloat16]
    assert {cast(acc, spelling) for spelling in spellings} == {Cast(BF16, acc)}


@pytest.mark.parametrize("make", [vector, matrix], ids=["vector", "matrix"])
def test_operand_rejects_unknown_dtype(make: Any) -> None:
    with pytest.raises(ProblemError, match=r"int8.*bfloat16"):
        make("x", "int8")


@given(st.floats(width=64, allow_nan=False, allow_infinity=False))
def test_constant_is_rounded_to_float32(value: float) -> None:
    with np.errstate(over="ignore"):
        rounded = np.float64(value).astype(np.float32)
    if np.isfinite(rounded):
        got = as_expr(value)
        assert isinstance(got, Constant)
        assert got.value == rounded
        assert np.signbit(got.value) == np.signbit(rounded)
    else:
        with pytest.raises(ProblemError, match="finite float32"):
            as_expr(value)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 1e39, -1e39, 10**400, "1", None, [1.0], 1j],
    ids=["nan", "inf", "-inf", "1e39", "-1e39", "10**400", "str", "none", "list", "complex"],
)
def test_as_expr_rejects_what_is_no_finite_float32(value: Any) -> None:
    with pytest.raises(ProblemError, match="finite float32 numbers"):
        as_expr(value)
    with pytest.raises(ProblemError, match="finite float32 numbers"):
        acc + value
    with pytest.raises(ProblemError, match="finite float32 numbers"):
        maximum(acc, value)


def test_expr_is_frozen_and_hashable() -> None:
    expr = gelu(acc + BIAS) * SCALE
    assert hash(expr) == hash(gelu(acc + vector("bias")) * scalar("scale"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        expr.op = "add"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (acc, acc * 1.0),
        (acc + BIAS, BIAS + acc),
        (vector("x"), vector("y")),
        (vector("x"), vector("x", F32)),
        (vector("x"), matrix("x")),
        (cast(acc, BF16), cast(acc, F32)),
        (acc * 2.0, acc * 2.5),
        (
            acc * 0.0,
            acc * -0.0,
        ),  # +0 and -0 give other bits, so a cache must not take one for the other
        (relu(acc), silu(acc)),
    ],
    ids=lambda expr: str(expr),
)
def test_expr_of_other_meaning_is_not_equal(one: Expr, other: Expr) -> None:
    assert one != other


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (acc, "acc"),
        (acc * 0.5, "mul(acc, 0.5)"),
        (silu(acc + BIAS), "silu(add(acc, bias[n]))"),
        (cast(acc, BF16) + RESIDUAL, "add(cast(acc, bf16), residual[m, n])"),
        (maximum(acc, SCALE), "maximum(acc, scale[])"),
    ],
    ids=lambda value: str(value),
)
def test_expr_prints_as_a_formula(expr: Expr, text: str) -> None:
    assert str(expr) == text
    ast.parse(str(expr).replace("[]", ""))


# --- binding ------------------------------------------------------------------------------------


def test_bind_keeps_expression_and_tensors() -> None:
    expr = acc + BIAS
    tensor = np.zeros(8, np.float32)
    bound = expr.bind(bias=tensor)
    assert isinstance(bound, Bound)
    assert bound.expr is expr
    assert dict(bound.tensors) == {"bias": tensor}


@pytest.mark.parametrize("name", ["self", "tensors", "expr", "x"])
def test_bind_takes_every_legal_operand_name(name: str) -> None:
    expr = acc + scalar(name)
    check_expr(expr)
    assert set(expr.bind(**{name: 1.0}).tensors) == {name}


# --- walking ------------------------------------------------------------------------------------

leaves = st.sampled_from(
    [acc, BIAS, RESIDUAL, SCALE, vector("other", F32), Constant(1.5), Constant(-3.0)]
)
exprs = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda op, x, y: apply(op, x, y),
            st.sampled_from(["add", "sub", "mul", "maximum"]),
            inner,
            inner,
        ),
        st.builds(lambda op, x: apply(op, x), st.sampled_from(["relu", "silu", "gelu"]), inner),
        st.builds(Cast, st.sampled_from([BF16, F32]), inner),
    ),
    max_leaves=12,
)


def children(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Apply):
        return expr.args
    return (expr.arg,) if isinstance(expr, Cast) else ()


def num_nodes(expr: Expr) -> int:
    return 1 + sum(map(num_nodes, children(expr)))


@given(exprs)
def test_walk_visits_every_node_after_its_arguments(expr: Expr) -> None:
    nodes = list(walk(expr))
    assert len(nodes) == num_nodes(expr)
    assert nodes[-1] == expr
    for position, node in enumerate(nodes):
        assert all(child in nodes[:position] for child in children(node))


@given(exprs)
def test_operands_are_listed_once_in_order_of_first_use(expr: Expr) -> None:
    found = operands(expr)
    assert len(set(found)) == len(found)
    uses = [node for node in walk(expr) if isinstance(node, Operand)]
    assert set(found) == set(uses)
    assert sorted(found, key=uses.index) == list(found)


@given(exprs)
def test_check_expr_accepts_every_expression_of_the_public_functions(expr: Expr) -> None:
    check_expr(expr)
    assert str(expr)
    assert hash(expr) == hash(dataclasses.replace(expr))


@given(exprs)
def test_is_exact_unless_an_operation_has_a_bound(expr: Expr) -> None:
    inexact = {op for op, (_, ulps) in OPERATIONS.items() if ulps}
    assert is_exact(expr) == (not any(op in f"{expr}" for op in inexact))


def test_operations_without_a_bound_are_those_of_ieee() -> None:
    exact = {op for op, (_, ulps) in OPERATIONS.items() if ulps == 0}
    assert exact == {"add", "sub", "mul", "maximum", "relu"}
    assert all(ulps >= 0 for _, ulps in OPERATIONS.values())


# --- rejections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("expr", [None, 1.0, "acc", (acc + BIAS).bind(bias=0)], ids=repr)
def test_check_expr_rejects_what_is_no_expression(expr: Any) -> None:
    with pytest.raises(ProblemError, match=rf"expression of jitgen\.acc.*{type(expr).__name__}"):
        check_expr(expr)


@pytest.mark.parametrize(
    "expr",
    [
        apply("tanh", acc),
        apply("add", acc),
        apply("relu", acc, acc),
        apply("mul", acc, acc, acc),
        acc + apply("tanh", acc),
        cast(apply("tanh", acc), BF16),
    ],
    ids=str,
)
def test_check_expr_rejects_unknown_operation_or_arity(expr: Expr) -> None:
    with pytest.raises(
        ProblemError, match=r"operation \w+ with \d arguments is unknown.*add.*gelu"
    ):
        check_expr(expr)


@pytest.mark.parametrize(
    "expr",
    [
        Expr(),
        acc + Expr(),
        Apply("add", (acc, 3.0)),  # type: ignore[arg-type]
        Apply("relu", (None,)),  # type: ignore[arg-type]
        Cast(BF16, 3.0),  # type: ignore[arg-type]
        Constant(float("nan")),
        Constant(1e300),
    ],
    ids=["bare", "bare argument", "number", "none", "cast of a number", "nan", "beyond float32"],
)
def test_check_expr_rejects_malformed_nodes(expr: Expr) -> None:
    with pytest.raises(ProblemError):
        check_expr(expr)


@pytest.mark.parametrize("name", ["", "1x", "a b", "a-b", "_x", "__x", "é", "x;", "x\n"], ids=repr)
def test_check_expr_rejects_operand_name(name: str) -> None:
    with pytest.raises(ProblemError, match="plain identifier"):
        check_expr(acc + vector(name))


@pytest.mark.parametrize("make", [vector, matrix], ids=["vector", "matrix"])
def test_check_expr_rejects_operand_dtype(make: Any) -> None:
    with pytest.raises(ProblemError, match=r"operand x.*float8_e4m3fn.*bfloat16.*float32"):
        check_expr(acc + make("x", E4M3))


@pytest.mark.parametrize(
    "axes", [("n", "m"), ("k",), ("m", "k"), ("n", "n"), ("m", "n", "k")], ids=str
)
def test_check_expr_rejects_operand_axes(axes: tuple[str, ...]) -> None:
    with pytest.raises(ProblemError, match="x"):
        check_expr(acc + Operand("x", BF16, axes))


@pytest.mark.parametrize(
    "other",
    [matrix("x"), vector("x", F32), scalar("x")],
    ids=["axes", "dtype", "both"],
)
def test_check_expr_rejects_operand_declared_twice(other: Expr) -> None:
    check_expr(vector("x") + vector("x"))
    with pytest.raises(ProblemError, match="operand x is declared twice"):
        check_expr(vector("x") + other)


def test_check_expr_rejects_cast_to_fp8() -> None:
    with pytest.raises(ProblemError, match=r"bfloat16 or float32.*float8_e4m3fn"):
        check_expr(cast(acc, E4M3))


def test_accumulator_is_one_value() -> None:
    assert Accumulator() == acc
    assert operands(acc) == ()
    assert is_exact(acc)
