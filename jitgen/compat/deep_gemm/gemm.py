"""deep_gemm's FP8 GEMMs. Operands are pairs of float8_e4m3fn codes and float32 scales.

`compiled_dims` and `disable_ue8m0_cast` are taken and mean nothing: n and k are compiled in, m
never is, and float32 scales are read as they are.
"""

from __future__ import annotations

import functools

import torch

from ...expr import Bound, Expr, acc, matrix
from ...integrations.tensors import multiply
from ...layouts import Contiguous, KGrouped, Masked
from .utils.layout import get_mk_alignment_for_contiguous_layout

Pair = tuple[torch.Tensor, torch.Tensor]
Recipe = tuple[int, int, int]
Block = tuple[int, int]

_PER_BLOCK: Recipe = (1, 128, 128)  # rows of a, rows of b and k that share a scale
_PER_ROW: Recipe = (1, 1, 128)


def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Block | None = None,
    recipe_b: Block | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = a @ b^T, or c + a @ b^T, rounded once.

    Parameters
    ----------
    a : float8_e4m3fn [m, k] and float32 [m, ceil(k / 128)], with any strides
    b : float8_e4m3fn [n, k] and float32 [ceil(n / 128), ceil(k / 128)] or, with a recipe of one
        row, [n, ceil(k / 128)]
    d : bfloat16 or float32 [m, n]
    c : of d's dtype and shape; may be d
    recipe : None, (1, 128, 128) or (1, 1, 128)
    recipe_a, recipe_b : both None, or (1, 128) and either (128, 128) or (1, 128)

    Raises
    ------
    NotImplementedError : another recipe, FP4, or packed scales
    As `jitgen.gemm`
    """
    _check_recipe(recipe, recipe_a, recipe_b, (_PER_BLOCK, _PER_ROW))
    _check_pairs(a, b)
    if 0 in d.shape:
        return
    if a[0].shape[1] == 0:
        d.zero_() if c is None else d.copy_(c)
        return
    bound = Bound(acc, {}) if c is None else Bound(_plus_c(c.dtype), {"c": c})
    multiply(a[0], b[0], (a[1], b[1].contiguous()), epilogue=bound, out=d)


def fp8_gemm_nn(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Block | None = None,
    recipe_b: Block | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """As `fp8_gemm_nt` with b [k, n], which must lie K-major as that of `fp8_gemm_nt` does."""
    fp8_gemm_nt(a, _transposed(b), d, c, recipe, recipe_a, recipe_b)


def fp8_gemm_tn(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Block | None = None,
    recipe_b: Block | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """As `fp8_gemm_nt` with a [k, m] and b [k, n], which must lie K-major."""
    fp8_gemm_nt(_transposed(a), _transposed(b), d, c, recipe, recipe_a, recipe_b)


def fp8_gemm_tt(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Block | None = None,
    recipe_b: Block | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """As `fp8_gemm_nt` with a [k, m], which must lie K-major."""
    fp8_gemm_nt(_transposed(a), b, d, c, recipe, recipe_a, recipe_b)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Recipe | None = None,
    recipe_a: Block | None = None,
    recipe_b: Block | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """d = a @ b[g]^T for the rows of each group g, which begin at multiples of
    `get_mk_alignment_for_contiguous_layout()`.

    Parameters
    ----------
    a : float8_e4m3fn [m, k] and float32 [m, ceil(k / 128)]
    b : float8_e4m3fn [num_groups, n, k] and float32 [num_groups, ceil(n / 128), ceil(k / 128)]
    d : bfloat16 [m, n]
    grouped_layout : int32 [m], the group of each row. A block of aligned rows is all of the group
        of its first row, padding rows of -1 too; skipped if that is -1. This costs a small copy,
        which `jitgen.grouped_gemm` with `jitgen.Contiguous(grouped_layout)` does without
    use_psum_layout : grouped_layout is int32 [num_groups], where each group ends; padding rows of d
        stay as they were
    ensure_zero_padding, expected_m_for_psum_layout : mean nothing on Hopper

    Raises
    ------
    As `fp8_gemm_nt`
    """
    _check_recipe(recipe, recipe_a, recipe_b)
    _check_pairs(a, b)
    if 0 in d.shape:
        return
    unit = get_mk_alignment_for_contiguous_layout()
    if use_psum_layout:
        layout = Contiguous(group_ends=grouped_layout, alignment=unit)
    else:
        of_block = grouped_layout[::unit, None].expand(-1, unit).reshape(-1)
        layout = Contiguous(group_of_row=of_block[: len(grouped_layout)])
    multiply(a[0], b[0], (a[1], b[1].contiguous()), layout=layout, out=d)


def m_grouped_fp8_gemm_nn_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Recipe | None = None,
    recipe_a: Block | None = None,
    recipe_b: Block | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """As `m_grouped_fp8_gemm_nt_contiguous` with b [num_groups, k, n], which must lie K-major."""
    m_grouped_fp8_gemm_nt_contiguous(
        *(a, _transposed(b), d, grouped_layout, recipe, recipe_a, recipe_b),
        use_psum_layout=use_psum_layout,
    )


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: Block | None = None,
    recipe_b: Block | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d[g] = a[g] @ b[g]^T for the first masked_m[g] rows of each group g; others stay.

    Parameters
    ----------
    a : float8_e4m3fn [num_groups, max_m, k] and float32 [num_groups, max_m, ceil(k / 128)]
    b : float8_e4m3fn [num_groups, n, k] and float32 [num_groups, ceil(n / 128), ceil(k / 128)]
    d : bfloat16 [num_groups, max_m, n]
    masked_m : int32 [num_groups]
    expected_m : rows that a group has on average; guides the choice of a schedule

    Raises
    ------
    As `fp8_gemm_nt`
    """
    _check_recipe(recipe, recipe_a, recipe_b)
    _check_pairs(a, b)
    layout = Masked(masked_m, expected_m)
    multiply(a[0], b[0], (a[1], b[1].contiguous()), layout=layout, out=d)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    ks_cpu: list[int],
    grouped_layout: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe = _PER_ROW,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """d[g] = c[g] + a_g @ b_g^T, for weight gradients.

    Parameters
    ----------
    a : float8_e4m3fn [m * sum of ks]: for each group its matrix [m, k], one after the other; and
        float32 [m, sum of ks / 128], with any strides. Each call copies the codes into one matrix
        [m, sum of ks], which `jitgen.grouped_gemm` with `jitgen.KGrouped(offsets)` takes as it is
    b : the same of n
    d : float32 [num_groups, m, n]
    ks_cpu : the k of each group, multiples of 128, 0 too
    grouped_layout : int32 [num_groups], the same on the GPU
    c : float32 [num_groups, m, n]; may be d
    recipe : (1, 1, 128)

    Raises
    ------
    NotImplementedError : another recipe, or use_psum_layout
    ValueError : c or ks_cpu is missing, or they do not fit a, b and d
    As `jitgen.grouped_gemm`
    """
    if recipe != _PER_ROW or use_psum_layout:
        raise NotImplementedError(
            f"recipe {recipe}, use_psum_layout={use_psum_layout}: on Hopper (1, 1, 128) and False"
        )
    _check_pairs(a, b)
    if c is None or not ks_cpu:
        raise ValueError("k_grouped_fp8_gemm_nt_contiguous needs c and ks_cpu")
    m, n = d.shape[1:]
    total = sum(ks_cpu)
    if (a[0].numel(), b[0].numel(), len(d)) != (total * m, total * n, len(ks_cpu)):
        raise ValueError(
            f"a of {a[0].numel()} elements, b of {b[0].numel()} and d {list(d.shape)} are not those"
            f" of ks_cpu = {ks_cpu}, of {total} in all"
        )
    if c.data_ptr() != d.data_ptr():
        d.copy_(c)
    if total == 0 or 0 in d.shape:
        return
    offsets = torch.nn.functional.pad(grouped_layout.cumsum(0, dtype=torch.int32), (1, 0))
    matrices = _side_by_side(a[0], m, ks_cpu), _side_by_side(b[0], n, ks_cpu)
    multiply(*matrices, (a[1], b[1]), layout=KGrouped(offsets), out=d)


def _side_by_side(codes: torch.Tensor, rows: int, ks: list[int]) -> torch.Tensor:
    """[rows, sum of ks] of matrices [rows, k] that lie one after the other."""
    parts = codes.view(torch.uint8).split([rows * k for k in ks])
    matrices = [part.view(rows, k) for part, k in zip(parts, ks, strict=True)]
    return torch.cat(matrices, dim=1).view(codes.dtype)


@functools.cache
def _plus_c(dtype: torch.dtype) -> Expr:
    return acc + matrix("c", dtype)


def _transposed(operand: Pair) -> Pair:
    return operand[0].mT, operand[1].mT


def _check_recipe(
    recipe: Recipe | None,
    recipe_a: Block | None,
    recipe_b: Block | None,
    legal: tuple[Recipe, ...] = (_PER_BLOCK,),
) -> None:
    """A recipe in two parts counts as one in three; the scales' shape tells the kernel."""
    asked = recipe or _PER_BLOCK
    if recipe_a and recipe_b and recipe_a[1] == recipe_b[1]:
        asked = recipe_a[0], recipe_b[0], recipe_a[1]
    if asked not in legal or (recipe is not None and (recipe_a or recipe_b)):
        raise NotImplementedError(
            f"recipe {recipe}, recipe_a {recipe_a}, recipe_b {recipe_b}: on Hopper recipe is"
            f" {' or '.join(map(str, legal))}"
        )


def _check_pairs(*operands: Pair) -> None:
    for codes, scales in operands:
        if codes.dtype == torch.int8:
            raise NotImplementedError("packed FP4 operands are Blackwell's: give float8_e4m3fn")
        if scales.dtype == torch.int32:
            raise NotImplementedError("packed UE8M0 scales are Blackwell's: give float32")
