"""deep_gemm.utils.layout: where scales lie. jitgen reads any, so no call of it needs these."""

from __future__ import annotations

import torch

from .math import align, ceil_div

_TMA_UNIT = 16  # bytes
_ALIGNMENTS = (64, 128)

_alignment = 128


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """The rows that the groups of contiguous layouts begin at multiples of, in this process."""
    global _alignment
    if new_value not in _ALIGNMENTS:
        raise NotImplementedError(f"an alignment of {new_value} rows: on Hopper it is 64 or 128")
    _alignment = new_value


def get_mk_alignment_for_contiguous_layout() -> int:
    """What `set_mk_alignment_for_contiguous_layout` was given; 128 at first."""
    return _alignment


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """128, whatever m is."""
    return 128


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """The first count of elements from x on that fills whole 16-byte units."""
    return align(x, _TMA_UNIT // element_size)


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor) -> torch.Tensor:
    """The scales, float32 [mn, k] or [groups, mn, k], with columns that are contiguous and padded
    to 16 bytes; as they are if they lie so already."""
    *groups, mn, k = sf.shape
    pitch = get_tma_aligned_size(mn, sf.element_size())
    strides = (*[k * pitch] * len(groups), 1, pitch)
    if sf.stride() == strides:
        return sf
    moved = sf.new_empty(*groups, k, pitch).mT[..., :mn, :]
    return moved.copy_(sf)


def transform_sf_into_required_layout(
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: tuple[int, ...],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales as DeepGEMM's kernels want them on Hopper; those of 128 rows stay where they are.

    recipe : (rows, k) of a block, or (rows of a's, rows of b's, k), of which is_sfa says which
    """
    rows, columns = recipe[-2:] if not is_sfa else (recipe[0], recipe[-1])
    if sf.dtype != torch.float32 or columns != 128 or rows not in (1, 128):
        raise NotImplementedError(
            f"scales of {sf.dtype} for blocks of {rows}x{columns}: on Hopper they are float32, for"
            " 1x128 or 128x128"
        )
    groups = () if num_groups is None else (num_groups,)
    shape = (*groups, ceil_div(mn, rows), ceil_div(k, columns))
    if sf.shape != shape:
        raise ValueError(f"sf is {list(sf.shape)}, must be {list(shape)} for blocks of {rows}x128")
    return get_mn_major_tma_aligned_tensor(sf) if rows == 1 else sf
