"""Arrays as the caller gave them, and the rules that they must keep before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dtypes import BF16, F32, DType, dtype_of
from .errors import ProblemError
from .expr import Bound, Expr, operands
from .problem import MAX_EXTENT, Gemm, check_operand_names, check_problem, check_rows

ADDRESS_UNIT = 16  # bytes; the rules look at addresses modulo this only


@dataclass(frozen=True)
class ArrayView:
    """What the rules need to know of an array.

    Strides are in elements; the address is 0 on the interpreter.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int = 0

    @property
    def row_stride(self) -> int:
        """Elements from one row of a matrix to the next; its width if there is one row only."""
        return self.strides[0] if self.shape[0] > 1 else self.shape[1]

    def __str__(self) -> str:
        return (
            f"{self.name} is {self.dtype.name}{list(self.shape)} with strides {list(self.strides)}"
        )


def name_arrays(a: Any, b: Any, scales: tuple[Any, Any], bound: Bound, out: Any) -> dict[str, Any]:
    """The arrays of a call by name: a, b, sfa, sfb, operands, and d last if there is `out`.

    Raises
    ------
    ProblemError : an operand has the name of another array, or the arrays are neither all NumPy's
        nor all torch's
    """
    check_operand_names(bound.tensors)
    arrays = {"a": a, "b": b, "sfa": scales[0], "sfb": scales[1], **bound.tensors}
    if out is not None:
        arrays["d"] = out
    torch = sys.modules.get("torch")
    in_numpy = [name for name, array in arrays.items() if isinstance(array, np.ndarray)]
    in_torch = [name for name, array in arrays.items() if torch and isinstance(array, torch.Tensor)]
    unknown = [name for name in arrays if name not in (*in_numpy, *in_torch)]
    if unknown or (in_numpy and in_torch):
        name = (*unknown, *in_numpy)[0]
        raise ProblemError(
            f"{name} is a {type(arrays[name]).__name__}: give torch CUDA tensors only, NumPy arrays"
            " only, or arrays of one other library that speaks DLPack"
        )
    return arrays


def check_gemm(views: Mapping[str, ArrayView], out_dtype: object, bound: Bound) -> tuple[Gemm, int]:
    """The problem that named arrays pose, and its m.

    Raises
    ------
    ProblemError : a dtype, shape, stride or address breaks a rule; every rule is checked here
    """
    d: DType = BF16
    if out_dtype is not None:
        d = dtype_of(out_dtype)
    elif "d" in views:
        d = views["d"].dtype
    problem, m = gemm_problem(views["a"], views["b"], views["sfa"], views["sfb"], d, bound.expr)
    if "d" in views:
        check_output(views["d"], problem, m)
    check_operands({name: views[name] for name in bound.tensors}, problem, m)
    return problem, m


def gemm_problem(
    a: ArrayView, b: ArrayView, sfa: ArrayView, sfb: ArrayView, d_dtype: DType, epilogue: Expr
) -> tuple[Gemm, int]:
    """The problem that the arrays pose, and its m.

    Raises
    ------
    ProblemError : a dtype, shape or stride breaks a rule; says what was expected and what was got
    """
    for view in (a, b):
        if len(view.shape) != 2:
            raise ProblemError(f"{view}: must be a matrix")
    if a.shape[1] != b.shape[1]:
        raise ProblemError(f"{a}; {b}: must agree in k, the second dimension of both")
    (m, k), n = a.shape, b.shape[0]
    problem = Gemm(n, k, d_dtype, epilogue, a.dtype, b.dtype)
    check_problem(problem)
    check_rows(m)
    for view in (a, b):
        check_tma_matrix(view)
    _check_scales(sfa, problem.a_scale, (-(-m // problem.a_scale.rows), -(-k // problem.a_scale.k)))
    _check_scales(sfb, problem.b_scale, (-(-n // problem.b_scale.rows), -(-k // problem.b_scale.k)))
    if sfb.row_stride != sfb.shape[1] or (sfb.shape[1] > 1 and sfb.strides[1] != 1):
        raise ProblemError(f"{sfb}: must be contiguous, row-major")
    return problem, m


def check_output(out: ArrayView, problem: Gemm, m: int) -> None:
    """Raise ProblemError unless `out` can hold D."""
    if out.shape != (m, problem.n) or out.dtype != problem.d_dtype:
        raise ProblemError(f"{out}: must be {problem.d_dtype.name}[{m}, {problem.n}]")
    check_tma_matrix(out)


def check_tma_matrix(view: ArrayView) -> None:
    """Raise ProblemError unless TMA can move `view`: rows contiguous, 16-byte units."""
    if 0 in view.shape:
        return
    if view.shape[1] > 1 and view.strides[1] != 1:
        raise ProblemError(f"{view}: must be row-major (K-major for a and b), its last stride 1")
    pitch = view.row_stride * view.dtype.size_bytes
    if view.shape[0] > 1 and (view.row_stride < view.shape[1] or pitch % 16):
        raise ProblemError(
            f"{view}: rows must not overlap and their pitch of {pitch} B be a multiple of 16"
        )
    if view.address % ADDRESS_UNIT:
        raise ProblemError(f"{view}: starts at an address that is not a multiple of 16 B")


def check_operands(views: Mapping[str, ArrayView], problem: Gemm, m: int) -> None:
    """Raise ProblemError unless `views` are the operands of the problem's epilogue, by name."""
    declared = {operand.name: operand for operand in operands(problem.epilogue)}
    if set(views) != set(declared):
        raise ProblemError(
            f"the epilogue {problem.epilogue} needs operands [{', '.join(declared)}], got"
            f" [{', '.join(views)}]: give them with epilogue.bind(name=tensor)"
        )
    n = problem.n
    extents = {"m": m, "n": n}
    for name, operand in declared.items():
        view = views[name]
        shape = tuple(extents[axis] for axis in operand.axes)
        one = not shape and view.shape in ((), (1,))
        if view.dtype != operand.dtype or (view.shape != shape and not one):
            raise ProblemError(f"{view}: the epilogue declares {operand.dtype.name}{list(shape)}")
        if 0 in shape:
            continue
        if shape and view.strides[-1] != 1 and view.shape[-1] > 1:
            raise ProblemError(f"{view}: its last stride must be 1")
        # The epilogue reads pairs of adjacent columns.
        if view.address % (2 * view.dtype.size_bytes if shape else view.dtype.size_bytes):
            raise ProblemError(
                f"{view}: starts at an address that is not a multiple of two elements"
            )
        if len(shape) == 2 and view.row_stride % 2:
            raise ProblemError(f"{view}: its row stride must be even")
        if len(shape) == 2 and not n <= view.row_stride <= MAX_EXTENT:
            raise ProblemError(f"{view}: rows must not overlap, nor be {MAX_EXTENT + 1} apart")


def _check_scales(view: ArrayView, block: Any, shape: tuple[int, int]) -> None:
    if view.dtype != F32 or view.shape != shape:
        raise ProblemError(f"{view}: one scale a {block} block makes {F32.name}{list(shape)}")
    used = [stride for stride, extent in zip(view.strides, shape, strict=True) if extent > 1]
    if not all(0 <= stride <= MAX_EXTENT for stride in used) or view.address % 4:
        raise ProblemError(
            f"{view}: strides must be in 0..{MAX_EXTENT}, and the address a multiple of 4 B"
        )
