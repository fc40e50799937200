"""Epilogues that the command line knows by name."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from .expr import Expr, acc, gelu, matrix, relu, silu, vector

EPILOGUE_HELP = "What is fused; Python can spell any other."


class Epilogue(str, Enum):
    """The common ones; operands are bfloat16, named bias and residual."""

    none = "none"
    bias = "bias"
    bias_relu = "bias-relu"
    bias_gelu = "bias-gelu"
    bias_silu = "bias-silu"
    residual = "residual"

    @property
    def expr(self) -> Expr:
        if self is Epilogue.none:
            return acc
        if self is Epilogue.residual:
            return acc + matrix("residual")
        biased = acc + vector("bias")
        functions: dict[Epilogue, Callable[[Expr], Expr]] = {
            Epilogue.bias_relu: relu,
            Epilogue.bias_gelu: gelu,
            Epilogue.bias_silu: silu,
        }
        return functions[self](biased) if self in functions else biased
