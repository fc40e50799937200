"""Calls on torch tensors: those on a GPU run there, those on the CPU on the interpreter.

The interpreter gives the bits of an H100, and writes an `out` where it lies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import api, api_mla
from ..dtypes import E4M3, array_dtype, dtype_of
from ..expr import Bound
from ..layouts import GroupLayout, with_tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by the size of an element


def is_recorded(x: torch.Tensor) -> bool:
    """Whether a compiler traces what is done with x, or a CUDA graph captures it: it is done again
    later, with other values."""
    is_captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return bool(torch.compiler.is_compiling() or is_captured)


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    *,
    epilogue: Bound = api.PLAIN,
    layout: GroupLayout | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """`jitgen.gemm`, or `jitgen.grouped_gemm` if there is a layout."""
    if not a.is_cpu:
        d: torch.Tensor = _multiply(a, b, scales, epilogue, layout, out, out_dtype, batch_invariant)
        return d
    made = _multiply(
        *(to_numpy(a), to_numpy(b), (to_numpy(scales[0]), to_numpy(scales[1]))),
        Bound(epilogue.expr, {name: to_numpy(t) for name, t in epilogue.tensors.items()}),
        layout and with_tensor(layout, to_numpy(layout.tensor)),
        None if out is None else to_numpy(out),
        None if out_dtype is None else dtype_of(out_dtype),
        batch_invariant,
    )
    return to_torch(made) if out is None else out


def multiply_quantized(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    *,
    epilogue: Bound,
    layout: GroupLayout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`multiply` to float8_e4m3fn with scales, of an epilogue without operands."""
    if not a.is_cpu:
        d, sfd = _multiply(a, b, scales, epilogue, layout, None, torch.float8_e4m3fn, False)
        return d, sfd
    d, sfd = _multiply(
        *(to_numpy(a), to_numpy(b), (to_numpy(scales[0]), to_numpy(scales[1])), epilogue),
        *(layout and with_tensor(layout, to_numpy(layout.tensor)), None, E4M3, False),
    )
    return to_torch(d), to_torch(sfd)


def _multiply(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    epilogue: Bound,
    layout: GroupLayout | None,
    out: Any,
    out_dtype: object,
    batch_invariant: bool,
) -> Any:
    multiply = api.gemm if layout is None else functools.partial(api.grouped_gemm, layout=layout)
    return multiply(
        *(a, b, scales),
        out=out,
        out_dtype=out_dtype,
        epilogue=epilogue,
        batch_invariant=batch_invariant,
    )


def attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): `jitgen.mla_decode`."""
    options = {"head_dim_v": head_dim_v, "softmax_scale": softmax_scale, "causal": causal}
    return _attend(api_mla.mla_decode, (q, kv_cache, block_table, seqlens_k), options, out)


def attend_sparse(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None,
    attention_sink: torch.Tensor | None,
    softmax_scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): `jitgen.mla_decode_sparse`."""
    options = {
        "topk_length": topk_length,
        "attention_sink": attention_sink,
        "softmax_scale": softmax_scale,
    }
    return _attend(api_mla.mla_decode_sparse, (q, kv_cache, indices), options, None)


def _attend(
    function: Callable[..., tuple[Any, Any]],
    tensors: tuple[torch.Tensor, ...],
    options: dict[str, Any],
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not tensors[0].is_cpu:
        return function(*tensors, **options, out=out)
    options = {
        name: to_numpy(value) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    target = None if out is None else to_numpy(out)
    o, lse = function(*map(to_numpy, tensors), **options, out=target)
    return to_torch(o) if out is None else out, to_torch(lse)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a CPU tensor as an array; bfloat16 and FP8 as ml_dtypes has them."""
    words: np.ndarray[Any, Any] = tensor.detach().view(_WORDS[tensor.element_size()]).numpy()
    return words.view(array_dtype(tensor.dtype, tensor.element_size()).numpy)


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The memory of an array as a CPU tensor."""
    words = array.view({1: np.uint8, 2: np.int16, 4: np.int32}[array.itemsize])
    name = array_dtype(array.dtype, array.itemsize).name
    return torch.from_numpy(words).view(getattr(torch, name))
