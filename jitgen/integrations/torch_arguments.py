"""What the torch operators' arguments stand for: epilogues and layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..api import PLAIN
from ..errors import ProblemError
from ..expr import Bound, Expr, acc, gate, gelu, matrix, relu, silu, up, vector
from ..layouts import Contiguous, GroupLayout, KGrouped, Masked, Ragged

ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "none": lambda x: x,
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
}

SWIGLU = Bound(silu(gate) * up, {})


def epilogue_of(
    bias: torch.Tensor | None, residual: torch.Tensor | None = None, activation: str = "none"
) -> Bound:
    """activation(acc + bias) + residual, bound to those that there are."""
    if bias is None and residual is None and activation == "none":
        return PLAIN
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


def layout_of(
    kind: str, groups: torch.Tensor, alignment: int, expected_rows: int | None
) -> GroupLayout:
    """What `kind` names, of its int32 tensor `groups`."""
    match kind:
        case "ragged":
            return Ragged(groups)
        case "group_of_row":
            return Contiguous(group_of_row=groups)
        case "group_ends":
            return Contiguous(group_ends=groups, alignment=alignment)
        case "masked":
            return Masked(groups, expected_rows)
        case "k_grouped":
            return KGrouped(groups)
    raise ProblemError(
        f"layout {kind!r} must be one of ragged, group_of_row, group_ends, masked, k_grouped"
    )
