"""torch operators, `torch.ops.jitgen`: importing this module registers them.

    gemm(a, b, sfa, sfb, *, bias=None, residual=None, activation="none", out_dtype=None,
         batch_invariant=False) -> Tensor
    grouped_gemm(a, b, sfa, sfb, groups, *, layout, alignment=128, expected_rows=None, bias=None,
                 residual=None, activation="none", out_dtype=None, batch_invariant=False) -> Tensor
    grouped_swiglu(a, b, sfa, sfb, groups, *, layout, alignment=128,
                   expected_rows=None) -> (Tensor, Tensor)
    swiglu(a, b, sfa, sfb) -> (Tensor, Tensor)
    mla_decode(q, kv_cache, block_table, seqlens_k, *, head_dim_v=512, softmax_scale=None,
               causal=True) -> (Tensor, Tensor)
    mla_decode_sparse(q, kv_cache, indices, *, topk_length=None, attention_sink=None,
                      softmax_scale=None) -> (Tensor, Tensor)
    gemm_out, grouped_gemm_out, mla_decode_out(..., *, out, ...), the same into `out`
    quantize(x, rows=1) -> (Tensor, Tensor)
    quantize_both(x, rows=1, columns=1) -> (Tensor, Tensor, Tensor, Tensor)

torch.compile and torch.export trace through them, with dynamic m. CUDA tensors run on the GPU, CPU
tensors on the interpreter, which gives the bits of an H100.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from .. import api_quantize
from . import torch_fakes
from .tensors import attend, attend_sparse, multiply, multiply_quantized
from .torch_arguments import SWIGLU, epilogue_of, layout_of

_LIBRARY = torch.library.Library("jitgen", "FRAGMENT")  # kept: what it registers goes with it
_OPERANDS = "Tensor a, Tensor b, Tensor sfa, Tensor sfb"
_EPILOGUE = "Tensor? bias=None, Tensor? residual=None, str activation='none'"
_GROUPS = "Tensor groups, *, str layout, int alignment=128, int? expected_rows=None"
_CACHE = "Tensor q, Tensor kv_cache, Tensor block_table, Tensor seqlens_k"
_ATTENTION = "int head_dim_v=512, float? softmax_scale=None, bool causal=True"


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """activation((A * sfa) @ (B * sfb)^T + bias) + residual.

    Parameters
    ----------
    a, b, sfa, sfb, out_dtype, batch_invariant : as for `jitgen.gemm`
    bias : bfloat16 or float32 [n]
    residual : bfloat16 or float32 [m, n]
    activation : "none", "relu", "gelu" or "silu"

    Returns
    -------
    bfloat16 or float32 [m, n]

    Raises
    ------
    As `jitgen.gemm`; ProblemError if the activation is none of these
    """
    epilogue = epilogue_of(bias, residual, activation)
    return multiply(
        *(a, b, (sfa, sfb)),
        epilogue=epilogue,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
    )


def gemm_out(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    *,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    batch_invariant: bool = False,
) -> None:
    """`gemm` into `out`, bfloat16 or float32 [m, n]."""
    epilogue = epilogue_of(bias, residual, activation)
    multiply(
        *(a, b, (sfa, sfb)),
        epilogue=epilogue,
        out=out,
        batch_invariant=batch_invariant,
    )


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    groups: torch.Tensor,
    *,
    layout: str,
    alignment: int = 128,
    expected_rows: int | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """For the rows of each group g: activation((A * sfa) @ (B[g] * sfb[g])^T + bias[g]) + residual.

    Parameters
    ----------
    a, b, sfa, sfb, out_dtype, batch_invariant : as for `jitgen.grouped_gemm`
    groups : the layout's int32 tensor
    layout : what that holds: "ragged" the offsets of `jitgen.Ragged`; "group_of_row" or
        "group_ends" that of `jitgen.Contiguous`; "masked" the rows of `jitgen.Masked`; "k_grouped"
        the offsets of `jitgen.KGrouped`
    alignment : of group_ends: 1, 64 or 128
    expected_rows : of masked: how many rows a group has on average
    bias : bfloat16 or float32 [num_groups, n]
    residual : bfloat16 or float32, of the shape of the result
    activation : "none", "relu", "gelu" or "silu"

    Returns
    -------
    bfloat16 or float32 [m, n] or, if masked, [num_groups, max_m, n]; rows of no group hold
    anything. Of k_grouped float32 [num_groups, m, n]

    Raises
    ------
    As `jitgen.grouped_gemm`; ProblemError if layout or activation is none of these
    """
    epilogue = epilogue_of(bias, residual, activation)
    grouping = layout_of(layout, groups, alignment, expected_rows)
    return multiply(
        *(a, b, (sfa, sfb)),
        epilogue=epilogue,
        layout=grouping,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
    )


def grouped_gemm_out(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    groups: torch.Tensor,
    *,
    layout: str,
    out: torch.Tensor,
    alignment: int = 128,
    expected_rows: int | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    batch_invariant: bool = False,
) -> None:
    """`grouped_gemm` into `out`, bfloat16 or float32; rows of no group stay as they were.

    With a k_grouped layout, what it makes is added to `out`.
    """
    epilogue = epilogue_of(bias, residual, activation)
    grouping = layout_of(layout, groups, alignment, expected_rows)
    multiply(
        *(a, b, (sfa, sfb)),
        epilogue=epilogue,
        layout=grouping,
        out=out,
        batch_invariant=batch_invariant,
    )


def swiglu(
    a: torch.Tensor, b: torch.Tensor, sfa: torch.Tensor, sfb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, quantized: an operand of `gemm`.

    Parameters
    ----------
    a, sfa, sfb : as for `gemm`
    b : float8_e4m3fn [n, k], the rows of gate, then those of up; n % 256 == 0

    Returns
    -------
    (float8_e4m3fn [m, n / 2], float32 [m, n / 256])

    Raises
    ------
    As `jitgen.gemm`
    """
    return multiply_quantized(a, b, (sfa, sfb), epilogue=SWIGLU)


def grouped_swiglu(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    groups: torch.Tensor,
    *,
    layout: str,
    alignment: int = 128,
    expected_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`swiglu` for the rows of each group: an operand of `grouped_gemm`.

    Parameters
    ----------
    a, sfa, sfb, groups, layout, alignment, expected_rows : as for `grouped_gemm`
    b : float8_e4m3fn [num_groups, n, k], each as of `swiglu`

    Returns
    -------
    (float8_e4m3fn [.., m, n / 2], float32 [.., m, n / 256]); rows of no group hold anything

    Raises
    ------
    As `grouped_gemm`
    """
    return multiply_quantized(
        *(a, b, (sfa, sfb)),
        epilogue=SWIGLU,
        layout=layout_of(layout, groups, alignment, expected_rows),
    )


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): `jitgen.mla_decode`, with the workspace of the current stream or CUDA graph."""
    return attend(
        *(q, kv_cache, block_table, seqlens_k),
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
    )


def mla_decode_out(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    out: torch.Tensor,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """lse; o goes to `out`, of q's dtype [b, s_q, h_q, head_dim_v], contiguous."""
    return attend(
        *(q, kv_cache, block_table, seqlens_k),
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        out=out,
    )[1]


def mla_decode_sparse(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    attention_sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): `jitgen.mla_decode_sparse`, with the workspace as of `mla_decode`."""
    return attend_sparse(
        *(q, kv_cache, indices),
        topk_length=topk_length,
        attention_sink=attention_sink,
        softmax_scale=softmax_scale,
    )


def quantize(x: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """`jitgen.quantize` in blocks of `rows` x 128; rows is 1 or 128."""
    return api_quantize.quantize(x, (rows, 128))


def quantize_both(
    x: torch.Tensor, rows: int = 1, columns: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`jitgen.quantize_both` in blocks of `rows` x 128, its transpose in `columns` x 128."""
    of_x, of_transpose = api_quantize.quantize_both(x, (rows, 128), (columns, 128))
    return *of_x, *of_transpose


def operators() -> Any:
    """What modules call: `torch.ops.jitgen` where a compiler traces them, or else these functions,
    which spares the dispatcher's share of a call's host time, about half."""
    return torch.ops.jitgen if torch.compiler.is_compiling() else sys.modules[__name__]


_RESULT = "ScalarType? out_dtype=None, bool batch_invariant=False) -> Tensor"

for _schema, _function, _fake in (
    (f"gemm({_OPERANDS}, *, {_EPILOGUE}, {_RESULT}", gemm, torch_fakes.gemm),
    (
        f"gemm_out({_OPERANDS}, *, Tensor(a!) out, {_EPILOGUE}, bool batch_invariant=False) -> ()",
        *(gemm_out, torch_fakes.nothing),
    ),
    (
        f"grouped_gemm({_OPERANDS}, {_GROUPS}, {_EPILOGUE}, {_RESULT}",
        *(grouped_gemm, torch_fakes.grouped_gemm),
    ),
    (
        f"grouped_gemm_out({_OPERANDS}, {_GROUPS}, Tensor(a!) out, {_EPILOGUE},"
        " bool batch_invariant=False) -> ()",
        *(grouped_gemm_out, torch_fakes.nothing),
    ),
    (f"swiglu({_OPERANDS}) -> (Tensor, Tensor)", swiglu, torch_fakes.swiglu),
    (
        f"grouped_swiglu({_OPERANDS}, {_GROUPS}) -> (Tensor, Tensor)",
        *(grouped_swiglu, torch_fakes.swiglu),
    ),
    (
        f"mla_decode({_CACHE}, *, {_ATTENTION}) -> (Tensor, Tensor)",
        *(mla_decode, torch_fakes.mla_decode),
    ),
    (
        f"mla_decode_out({_CACHE}, *, Tensor(a!) out, {_ATTENTION}) -> Tensor",
        *(mla_decode_out, torch_fakes.mla_decode_out),
    ),
    (
        "mla_decode_sparse(Tensor q, Tensor kv_cache, Tensor indices, *, Tensor? topk_length=None,"
        " Tensor? attention_sink=None, float? softmax_scale=None) -> (Tensor, Tensor)",
        *(mla_decode_sparse, torch_fakes.mla_decode),
    ),
    ("quantize(Tensor x, int rows=1) -> (Tensor, Tensor)", quantize, torch_fakes.quantize),
    (
        "quantize_both(Tensor x, int rows=1, int columns=1) -> (Tensor, Tensor, Tensor, Tensor)",
        *(quantize_both, torch_fakes.quantize_both),
    ),
):
    _LIBRARY.define(_schema)
    _name = _schema.partition("(")[0]
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)
    torch.library.register_fake(f"jitgen::{_name}", _fake, lib=_LIBRARY)
