"""Arrays as the caller gave them, and the rules that they must keep before anything runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .dtypes import F32, I32, DType, array_dtype, dtype_of
from .errors import ProblemError
from .expr import Bound, Expr, operands
from .groups import num_values
from .layouts import GroupLayout, default_dtype
from .problem import (
    D_SCALE,
    MAX_EXTENT,
    Gemm,
    GroupedGemm,
    ScaleBlock,
    check_operand_names,
    check_problem,
    check_rows,
    check_total_k,
    is_k_grouped,
    is_masked,
    of_k_groups,
)

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

    @property
    def flat(self) -> ArrayView:
        """The matrices of all groups as one, one below the other; a matrix as it is.

        Raises
        ------
        ProblemError : the matrices do not follow one another
        """
        if len(self.shape) != 3:
            return self
        groups, rows, columns = self.shape
        stride = self.strides[1] if rows > 1 else self.strides[0]
        if groups > 1 and self.strides[0] != rows * stride and 0 not in self.shape:
            raise ProblemError(
                f"{self}: each matrix must follow the one before, {rows} rows of {stride} elements"
            )
        return replace(self, shape=(groups * rows, columns), strides=(stride, self.strides[2]))

    def __str__(self) -> str:
        return (
            f"{self.name} is {self.dtype.name}{list(self.shape)} with strides {list(self.strides)}"
        )


def numpy_view(name: str, array: np.ndarray[Any, Any]) -> ArrayView:
    """What the rules need to know of a NumPy array."""
    size = max(array.itemsize, 1)
    strides = tuple(stride // size for stride in array.strides)
    return ArrayView(name, array_dtype(array.dtype, array.itemsize), array.shape, strides)


def name_arrays(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    bound: Bound,
    out: Any,
    layout: GroupLayout | None = None,
) -> dict[str, Any]:
    """The arrays of a call by name: a, b, sfa, sfb, groups if there is a layout, operands, and last
    d if there is `out`, or d and sfd if that is a pair.

    Raises
    ------
    ProblemError : an operand has the name of another array, or the arrays are neither all NumPy's
        nor all torch's
    """
    check_operand_names(bound.tensors)
    arrays = {"a": a, "b": b, "sfa": scales[0], "sfb": scales[1]}
    if layout is not None:
        arrays["groups"] = layout.tensor
    arrays |= bound.tensors
    if out is not None:
        arrays |= zip(("d", "sfd"), out if isinstance(out, tuple) else (out,), strict=False)
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


def check_gemm(
    views: Mapping[str, ArrayView],
    out_dtype: object,
    bound: Bound,
    layout: GroupLayout | None = None,
    ue8m0: bool = False,
) -> tuple[Gemm, int]:
    """The problem that named arrays pose, and its m: rows of A, or of A[g] if A has 3 dimensions.

    Raises
    ------
    ProblemError : a dtype, shape, stride or address breaks a rule; every rule is checked here
    """
    d = default_dtype(layout)
    if out_dtype is not None:
        d = dtype_of(out_dtype)
    elif "d" in views:
        d = views["d"].dtype
    problem, m = gemm_problem(views, d, bound.expr, layout, ue8m0)
    if "d" in views:
        check_output(views["d"], problem, m)
        if problem.is_quantized != ("sfd" in views):
            must = "(d, sfd)" if problem.is_quantized else "one array"
            raise ProblemError(f"out of D in {problem.d_dtype.name} must be {must}")
    if "sfd" in views:
        _check_output_scales(views["sfd"], problem, m)
    check_operands({name: views[name] for name in bound.tensors}, problem, m)
    return problem, m


def gemm_problem(
    views: Mapping[str, ArrayView],
    d_dtype: DType,
    epilogue: Expr,
    layout: GroupLayout | None,
    ue8m0: bool = False,
) -> tuple[Gemm, int]:
    """The problem that the arrays pose, and its m.

    Raises
    ------
    ProblemError : a dtype, shape or stride breaks a rule; says what was expected and what was got
    """
    a, b, sfa, sfb = (views[name] for name in ("a", "b", "sfa", "sfb"))
    kind = layout.kind if layout is not None else None
    masked, by_k = kind == "masked", kind == "k_grouped"
    for view, rank in ((a, 2 + masked), (b, 2 + (layout is not None and not by_k))):
        if len(view.shape) != rank:
            what = "a matrix" if rank == 2 else "a matrix for each group"
            raise ProblemError(f"{view}: must be {what}")
    if a.shape[-1] != b.shape[-1]:
        raise ProblemError(f"{a}; {b}: must agree in k, the last dimension of both")
    m, (n, k) = a.shape[-2], b.shape[-2:]
    problem = Gemm(n, k, d_dtype, epilogue, a.dtype, b.dtype, ue8m0=ue8m0)
    by_row = ScaleBlock(1, problem.b_scale.k)
    if layout is None and sfb.shape[:1] == (n,):
        problem = replace(problem, b_scale=by_row)
    elif by_k:
        b_scale = problem.b_scale if sfb.shape[:1] == (-(-n // problem.b_scale.rows),) else by_row
        problem = replace(
            of_k_groups(n, math.prod(views["groups"].shape) - 1, d_dtype, b_scale),
            epilogue=epilogue,
            a_dtype=a.dtype,
            b_dtype=b.dtype,
            ue8m0=ue8m0,
        )
        check_total_k(k)
    elif layout is not None:
        problem = GroupedGemm(
            *(n, k, d_dtype, epilogue, a.dtype, b.dtype),
            ue8m0=ue8m0,
            num_groups=b.shape[0],
            layout=layout.kind,
            alignment=layout.alignment,
        )
    if masked and a.shape[0] != b.shape[0]:
        raise ProblemError(f"{a}; {b}: must agree in the number of groups, their first dimension")
    check_problem(problem)
    check_rows(m * a.shape[0] if masked else m)
    for view in (a, b):
        check_tma_matrix(view.flat)
    k_blocks = -(-k // problem.a_scale.k)
    _check_scales(sfa, problem.a_scale, (*a.shape[:-2], -(-m // problem.a_scale.rows), k_blocks))
    _check_scales(sfb, problem.b_scale, (*b.shape[:-2], -(-n // problem.b_scale.rows), k_blocks))
    if problem.b_scale.rows > 1:
        _check_contiguous(sfb)
    if isinstance(problem, GroupedGemm):
        _check_groups(views["groups"], problem, m)
    return problem, m


def _check_contiguous(view: ArrayView) -> None:
    rows = view.flat
    if 0 in rows.shape:
        return
    if rows.row_stride != rows.shape[1] or (rows.shape[1] > 1 and rows.strides[1] != 1):
        raise ProblemError(f"{view}: must be contiguous, row-major")


def output_shape(problem: Gemm, m: int) -> tuple[int, ...]:
    """The shape of D."""
    if isinstance(problem, GroupedGemm) and (is_masked(problem) or is_k_grouped(problem)):
        return problem.num_groups, m, problem.columns
    return m, problem.columns


def output_scale_shape(problem: Gemm, m: int) -> tuple[int, ...]:
    """The shape of the scales of D, if it has them."""
    *rows, columns = output_shape(problem, m)
    return *rows, columns // D_SCALE.k


def _check_output_scales(view: ArrayView, problem: Gemm, m: int) -> None:
    shape = output_scale_shape(problem, m)
    if view.shape != shape or view.dtype != F32:
        raise ProblemError(f"{view}: must be {F32.name}{list(shape)}")
    _check_contiguous(view)
    if view.address % 4:
        raise ProblemError(f"{view}: starts at an address that is not a multiple of 4 B")


def _check_groups(view: ArrayView, problem: GroupedGemm, m: int) -> None:
    shape = (num_values(problem, m),)
    if view.dtype != I32 or view.shape != shape:
        raise ProblemError(f"{view}: layout {problem.layout} takes {I32.name}{list(shape)}")
    if (shape[0] > 1 and view.strides != (1,)) or view.address % 4:
        raise ProblemError(f"{view}: must be contiguous, at an address that is a multiple of 4 B")


def check_output(out: ArrayView, problem: Gemm, m: int) -> None:
    """Raise ProblemError unless `out` can hold D."""
    shape = output_shape(problem, m)
    if out.shape != shape or out.dtype != problem.d_dtype:
        raise ProblemError(f"{out}: must be {problem.d_dtype.name}{list(shape)}")
    check_tma_matrix(out.flat)


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
    n = problem.columns
    extents = {"m": m, "n": n}
    for name, operand in declared.items():
        view = views[name]
        shape = tuple(extents[axis] for axis in operand.axes)
        of_group = operand.axes == ("n",) or (bool(shape) and is_masked(problem))
        if isinstance(problem, GroupedGemm) and of_group:
            shape = (problem.num_groups, *shape)
        one = not shape and view.shape in ((), (1,))
        if view.dtype != operand.dtype or (view.shape != shape and not one):
            raise ProblemError(f"{view}: the epilogue declares {operand.dtype.name}{list(shape)}")
        if len(shape) > 2:
            view, shape = view.flat, view.flat.shape
        if 0 in shape:
            continue
        if shape and view.strides[-1] != 1 and view.shape[-1] > 1:
            raise ProblemError(f"{view}: its last stride must be 1")
        # The epilogue reads pairs of adjacent columns.
        pairs = "n" in operand.axes
        if view.address % (2 * view.dtype.size_bytes if pairs else view.dtype.size_bytes):
            raise ProblemError(
                f"{view}: starts at an address that is not a multiple of two elements"
            )
        if operand.axes == ("m",):
            if len(shape) == 2 and view.row_stride != m:
                raise ProblemError(f"{view}: must be contiguous")
            continue
        if len(shape) == 2 and view.row_stride % 2:
            raise ProblemError(f"{view}: its row stride must be even")
        if operand.axes == ("n",) and len(shape) == 2 and view.row_stride != n:
            raise ProblemError(f"{view}: must be contiguous, a row for each group")
        if len(shape) == 2 and not n <= view.row_stride <= MAX_EXTENT:
            raise ProblemError(f"{view}: rows must not overlap, nor be {MAX_EXTENT + 1} apart")


def _check_scales(view: ArrayView, block: Any, shape: tuple[int, ...]) -> None:
    if view.dtype != F32 or view.shape != shape:
        raise ProblemError(f"{view}: one scale a {block} block makes {F32.name}{list(shape)}")
    used = [stride for stride, extent in zip(view.strides, shape, strict=True) if extent > 1]
    if not all(0 <= stride <= MAX_EXTENT for stride in used) or view.address % 4:
        raise ProblemError(
            f"{view}: strides must be in 0..{MAX_EXTENT}, and the address a multiple of 4 B"
        )
