"""torch operators, `torch.ops.jitgen`: importing this module registers them.

    gemm(a, b, sfa, sfb, *, bias=None, residual=None, activation="none", out_dtype=None,
         batch_invariant=False) -> Tensor
    gemm_out(a, b, sfa, sfb, *, out, ...) -> (), the same into `out`
    quantize(x, rows=1) -> (Tensor, Tensor)

torch.compile and torch.export trace through them, with dynamic m. CUDA tensors run on the GPU, CPU
tensors on the interpreter, which gives the bits of an H100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import api
from ..dtypes import BF16, dtype_of
from ..errors import ProblemError
from ..expr import Bound, Expr, acc, gelu, matrix, relu, silu, vector

ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "none": lambda x: x,
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
}

_LIBRARY = torch.library.Library("jitgen", "FRAGMENT")  # kept: what it registers goes with it
_OPERANDS = "Tensor a, Tensor b, Tensor sfa, Tensor sfb"
_EPILOGUE = "Tensor? bias=None, Tensor? residual=None, str activation='none'"


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
    epilogue = _epilogue(bias, residual, activation)
    if a.device.type != "cpu":
        d: torch.Tensor = api.gemm(
            *(a, b, (sfa, sfb)),
            epilogue=epilogue,
            out_dtype=out_dtype,
            batch_invariant=batch_invariant,
        )
        return d
    d_dtype = dtype_of(out_dtype or BF16)
    array = api.gemm(
        *(_to_numpy(a), _to_numpy(b), (_to_numpy(sfa), _to_numpy(sfb))),
        epilogue=Bound(epilogue.expr, {name: _to_numpy(t) for name, t in epilogue.tensors.items()}),
        out_dtype=d_dtype,
        batch_invariant=batch_invariant,
    )
    words = array.view(np.int16 if d_dtype == BF16 else np.int32)
    return torch.from_numpy(words).view(getattr(torch, d_dtype.name))


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
    if a.device.type == "cpu":
        operands = {"bias": bias, "residual": residual, "activation": activation}
        out.copy_(gemm(a, b, sfa, sfb, **operands, out_dtype=out.dtype))  # type: ignore[arg-type]
        return
    epilogue = _epilogue(bias, residual, activation)
    api.gemm(a, b, (sfa, sfb), out=out, epilogue=epilogue, batch_invariant=batch_invariant)


def quantize(x: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """`jitgen.quantize` in blocks of `rows` x 128; rows is 1 or 128."""
    return api.quantize(x, (rows, 128))


def _epilogue(bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str) -> Bound:
    tensors = {"bias": bias, "residual": residual}
    given = {name: t for name, t in tensors.items() if t is not None}
    dtypes = tuple((name, t.dtype) for name, t in given.items())
    return Bound(_expression(dtypes, activation), given)


@functools.cache
def _expression(dtypes: tuple[tuple[str, torch.dtype], ...], activation: str) -> Expr:
    """One expression for one kind of call: calls with the same one are prepared once."""
    if activation not in ACTIVATIONS:
        raise ProblemError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
    of = dict(dtypes)
    x: Expr = acc
    if "bias" in of:
        x = x + vector("bias", of["bias"])
    x = ACTIVATIONS[activation](x)
    if "residual" in of:
        x = x + matrix("residual", of["residual"])
    return x


def _to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array; bfloat16 and FP8 as ml_dtypes has them."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    array: np.ndarray[Any, Any] = tensor.detach().view(words).numpy()
    return array.view(dtype_of(tensor.dtype).numpy)


# --- what tracing sees ----------------------------------------------------------------------------


def _gemm_fake(
    a: torch.Tensor,
    b: torch.Tensor,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    **_: Any,
) -> torch.Tensor:
    torch._check(a.shape[1] == b.shape[1], lambda: "a and b must agree in k")
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype or torch.bfloat16)


def _gemm_out_fake(*_: torch.Tensor, **options: Any) -> None:
    return None


def _quantize_fake(x: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    grid = (x.shape[0] + rows - 1) // rows, (x.shape[1] + 127) // 128
    quantized = torch.empty_like(
        x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format
    )
    return quantized, x.new_empty(grid, dtype=torch.float32)


for _schema, _function, _fake in (
    (
        f"gemm({_OPERANDS}, *, {_EPILOGUE}, ScalarType? out_dtype=None,"
        " bool batch_invariant=False) -> Tensor",
        *(gemm, _gemm_fake),
    ),
    (
        f"gemm_out({_OPERANDS}, *, Tensor(a!) out, {_EPILOGUE}, bool batch_invariant=False) -> ()",
        *(gemm_out, _gemm_out_fake),
    ),
    ("quantize(Tensor x, int rows=1) -> (Tensor, Tensor)", quantize, _quantize_fake),
):
    _LIBRARY.define(_schema)
    _name = _schema.partition("(")[0]
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)
    torch.library.register_fake(f"jitgen::{_name}", _fake, lib=_LIBRARY)
