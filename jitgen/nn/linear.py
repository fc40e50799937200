"""Linear layers whose three products, forward and backward, are FP8 GEMMs.

    y  = x W^T      x in 1x128 blocks along the features, W in 128x128 blocks
    dx = dy W       dy in 1x128 blocks along the features, the codes of W transposed
    dW = dy^T x     both in 1x128 blocks along the tokens, in float32, by the K-grouped GEMM

So no kernel depends on the number of tokens. On CUDA tensors the products run on the GPU, on CPU
tensors on the interpreter, with the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import pad

from ..api import PLAIN, quantize
from ..errors import ProblemError
from ..expr import Bound, acc, vector
from ..groups import find_fault
from ..integrations.tensors import multiply, to_numpy
from ..layouts import KGrouped, Ragged
from ..problem import K_UNIT, of_k_groups

BLOCK = (128, 128)  # of weights
FEATURES_UNIT = 16  # K of a GEMM, and so both numbers of features: of dx and dW the other is K or N


class _Layer(torch.nn.Module):  # type: ignore[misc]
    in_features: int

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(in_features), as torch.nn.Linear begins."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)


class Fp8Linear(_Layer):
    """y = x W^T + bias in FP8; gradients too, that of the weight summed in float32.

    Parameters
    ----------
    in_features, out_features : multiples of 16
    bias : whether there is one
    device, dtype : of the parameters; bfloat16 or float32

    Called with x [..., in_features], bfloat16 or float32; gives [..., out_features] in its dtype.
    Weights are quantized at every call, since an optimizer changes them. Values must be finite.

    Raises
    ------
    ProblemError : a number of features or a dtype breaks a rule above
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        _check(in_features, out_features, FEATURES_UNIT, dtype)
        self.in_features, self.out_features = in_features, out_features
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **options))
        self.bias = torch.nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(x, self.in_features)
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = _Product.apply(rows, self.weight, self.bias, None)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class Fp8GroupedLinear(_Layer):
    """y = x W[g]^T for the rows of each group g, as experts have them; gradients in FP8 too.

    Parameters
    ----------
    num_groups : 1..512
    in_features, out_features : multiples of 128
    device, dtype : of the parameter `weight` [num_groups, out_features, in_features]; bfloat16 or
        float32
    debug : raise ProblemError if offsets are faulty; copies them to the host and waits

    Called with x [m, in_features], bfloat16 or float32, m % 128 == 0, and offsets int32
    [num_groups + 1], multiples of 128: rows offsets[g] .. offsets[g + 1] are group g's, which may
    be none. Rows of no group get y = 0 and no gradient. Pad groups with rows of zeros.

    Raises
    ------
    ProblemError : an extent or a dtype breaks a rule above
    """

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        debug: bool = False,
    ) -> None:
        super().__init__()
        _check(in_features, out_features, BLOCK[0], dtype)
        self.num_groups, self.debug = num_groups, debug
        self.in_features, self.out_features = in_features, out_features
        shape = num_groups, out_features, in_features
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        _check_input(x, self.in_features)
        if x.ndim != 2 or len(x) % K_UNIT:
            raise ProblemError(f"x is {list(x.shape)}, must be [m, k], m a multiple of {K_UNIT}")
        if self.debug:
            problem = of_k_groups(self.in_features, self.num_groups)
            if fault := find_fault(problem, to_numpy(offsets.cpu()), len(x)):
                raise ProblemError(fault)
        y: torch.Tensor = _Product.apply(x, self.weight, None, offsets)
        return y

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"num_groups={self.num_groups}, {features}"


def _check(in_features: int, out_features: int, unit: int, dtype: torch.dtype) -> None:
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if value <= 0 or value % unit:
            raise ProblemError(f"{name} = {value} must be a positive multiple of {unit}")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ProblemError(f"dtype is {dtype}, must be torch.bfloat16 or torch.float32")


def _check_input(x: torch.Tensor, in_features: int) -> None:
    if x.ndim == 0 or x.shape[-1] != in_features or x.dtype not in (torch.bfloat16, torch.float32):
        raise ProblemError(
            f"x is {x.dtype}{list(x.shape)}, must be bfloat16 or float32 [..., {in_features}]"
        )


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """x W^T + bias, or with offsets x W[g]^T for the rows of each group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        offsets: torch.Tensor | None,
    ) -> torch.Tensor:
        codes, scales = _quantize_weight(weight.detach())
        epilogue = PLAIN
        if bias is not None:
            epilogue = (acc + vector("bias", bias.dtype)).bind(bias=bias.detach())
        y = _multiply_rows(x.detach(), codes, scales, offsets, epilogue)
        of_x = _quantize_columns(x.detach()) if weight.requires_grad else (None, None)
        ctx.save_for_backward(codes, scales, *of_x, offsets)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales, x_codes, x_scales, offsets = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _multiply_rows(dy, _transposed(codes), scales.mT.contiguous(), offsets)
        if ctx.needs_input_grad[1]:
            dy_codes, dy_scales = _quantize_columns(dy)
            parts = _whole(dy_codes) if offsets is None else offsets
            operands = dy_codes, x_codes, (dy_scales, x_scales)
            dw = multiply(*operands, layout=KGrouped(parts)).to(ctx.weight_dtype)
            dw = dw[0] if offsets is None else dw
        if ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None


def _multiply_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    epilogue: Bound = PLAIN,
) -> torch.Tensor:
    """x times the transpose of a quantized matrix, or of each group's, in x's dtype."""
    x_codes, x_scales = quantize(x.contiguous())
    operands = x_codes, codes, (x_scales, scales)
    if offsets is None:
        return multiply(*operands, epilogue=epilogue, out_dtype=x.dtype)
    y = torch.zeros(len(x), codes.shape[1], device=x.device, dtype=x.dtype)
    return multiply(*operands, epilogue=epilogue, layout=Ragged(offsets), out=y)


def _quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each 128x128 block; of all groups' matrices, if there are some."""
    codes, scales = quantize(weight.reshape(-1, weight.shape[-1]), BLOCK)
    outer = weight.shape[:-2]
    return codes.view_as(weight), scales.view(*outer, -1, scales.shape[-1])


def _quantize_columns(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The transpose of x [m, n], with zeros up to a multiple of 128, and a scale a 1x128 block."""
    return quantize(pad(x, (0, 0, 0, -len(x) % K_UNIT)).t().contiguous())


def _whole(codes: torch.Tensor) -> torch.Tensor:
    """Offsets of one group that has all of k; made on the device, without waiting for it."""
    return torch.arange(2, device=codes.device, dtype=torch.int32) * codes.shape[1]


def _transposed(codes: torch.Tensor) -> torch.Tensor:
    """The transpose of each matrix, contiguous."""
    return codes.view(torch.uint8).mT.contiguous().view(codes.dtype)
