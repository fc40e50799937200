"""What modules call again and again with operands of one kind: their own weights, and codes that
`quantize` and `quantize_both` made.

Where a compiler traces them, and on the CPU, these are the operators. On a GPU they are launches
prepared once: what of a call's signature follows from that kind is not looked at again.
"""

from __future__ import annotations

import torch

from ..api import PLAIN
from ..api_quantize import launch
from ..calls import Addresses, Call, find_call, multiply_alike
from ..layouts import KGrouped, Ragged
from .torch_arguments import SWIGLU, epilogue_of
from .torch_ops import operators


def quantize(x: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of each matrix of x [.., m, k], and their scales in blocks of rows x 128."""
    if _runs_now(x):
        codes, scales = launch(x, rows)
        return codes, scales
    flat = x.detach().reshape(-1, x.shape[-1])  # of several matrices each is whole blocks
    codes, scales = operators().quantize(flat, rows)
    return codes.view(x.shape), scales.view(*x.shape[:-2], -1, scales.shape[-1])


def quantize_both(x: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """`quantize(x, rows)`, then codes and scales of the transpose in blocks of columns x 128."""
    if not _runs_now(x):
        made: tuple[torch.Tensor, ...] = operators().quantize_both(x.detach(), rows, columns)
        return made
    codes, scales, codes_t, scales_t = launch(x, rows, columns)
    return codes, scales, codes_t, scales_t.mT if columns == 1 else scales_t


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    *,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`jitgen.gemm` plus bias, in `dtype`."""
    if not _runs_now(a):
        d: torch.Tensor = operators().gemm(a, b, sfa, sfb, bias=bias, out_dtype=dtype)
        return d
    operands = (a, b, sfa, sfb) if bias is None else (a, b, sfa, sfb, bias)
    key = dtype, None if bias is None else bias.dtype, *_key(a, b, sfb)

    def find() -> tuple[Call, Addresses]:
        return find_call(a, b, (sfa, sfb), epilogue_of(bias), None, dtype, None)

    return multiply_alike(key, operands, find)[0]


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    offsets: torch.Tensor,
    *,
    layout: str,
    out: torch.Tensor,
) -> torch.Tensor:
    """`jitgen.grouped_gemm` into `out`, which it returns; layout is "ragged" or "k_grouped"."""
    if not _runs_now(a):
        operators().grouped_gemm_out(a, b, sfa, sfb, offsets, layout=layout, out=out)
        return out
    key = layout, out.dtype, len(offsets), *_key(a, b, sfb)

    def find() -> tuple[Call, Addresses]:
        grouping = Ragged(offsets) if layout == "ragged" else KGrouped(offsets)
        return find_call(a, b, (sfa, sfb), PLAIN, out, None, None, False, grouping)

    return multiply_alike(key, (a, b, sfa, sfb, offsets), find, out)[0]


def swiglu(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of silu(gate) * up, whose rows b has; with offsets, of ragged groups."""
    if not _runs_now(a):
        if offsets is None:
            codes, scales = operators().swiglu(a, b, sfa, sfb)
        else:
            codes, scales = operators().grouped_swiglu(a, b, sfa, sfb, offsets, layout="ragged")
        return codes, scales
    key = "swiglu", *_key(a, b, sfb)

    def find() -> tuple[Call, Addresses]:
        layout = None if offsets is None else Ragged(offsets)
        dtype = torch.float8_e4m3fn
        return find_call(a, b, (sfa, sfb), SWIGLU, None, dtype, None, False, layout)

    operands = (a, b, sfa, sfb) if offsets is None else (a, b, sfa, sfb, offsets)
    codes, scales = multiply_alike(key, operands, find)
    return codes, scales


def _runs_now(x: torch.Tensor) -> bool:
    """Whether kernels may be launched on x, at its address."""
    return x.is_cuda and not torch.compiler.is_compiling()


def _key(a: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor) -> tuple[object, ...]:
    """What may differ between operands of one kind: a and its scales are new, b may be a part."""
    return a.shape, b.shape, b.stride(), sfb.stride(), a.get_device()
