"""Linear layers whose three products, forward and backward, are FP8 GEMMs.

    y  = x W^T      x in 1x128 blocks along the features, W in 128x128 blocks
    dx = dy W       dy in 1x128 blocks along the features, the codes of W transposed
    dW = dy^T x     dy in 1x128 blocks along the tokens, x in 128x128 blocks, by the K-grouped GEMM

x, W and dy are each read once, for both products that they are in. Gradients have the widest
range, so theirs are the small blocks. No kernel depends on the number of tokens. On CUDA tensors
all runs on the GPU, on CPU tensors on the interpreter, with the same bits; torch.compile and CUDA
graphs take the layers as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ProblemError
from ..groups import find_fault
from ..integrations.modules import gemm, grouped_gemm, quantize, quantize_both
from ..integrations.tensors import is_recorded, to_numpy
from ..problem import K_UNIT, of_k_groups

BLOCK = 128  # rows and columns of a weight that share a scale
FEATURES_UNIT = 16  # K of a GEMM, and so both numbers of features: of dx and dW the other is K or N


class _Layer(torch.nn.Module):  # type: ignore[misc]
    in_features: int
    weight: torch.nn.Parameter

    def __init__(self, keep_codes: bool) -> None:
        super().__init__()
        self.keep_codes = keep_codes
        self._kept: tuple[object, tuple[torch.Tensor, ...]] | None = None

    def forget_codes(self) -> None:
        """Quantize the weight anew at the next call, whatever its version counter says."""
        self._kept = None

    def weight_codes(self, transposed: bool) -> tuple[torch.Tensor, ...]:
        """Codes and scales of the weight, and of its transpose if that is wanted."""
        weight = self.weight
        # What a graph replays, or a compiler traces, quantizes the weight that is there then.
        if not self.keep_codes or is_recorded(weight) or weight.is_inference():
            return _quantize(weight, (BLOCK, BLOCK), transposed)
        key = weight.data_ptr(), weight._version, weight.shape, weight.dtype, weight.device
        if self._kept is None or self._kept[0] != key or (transposed and len(self._kept[1]) < 4):
            self._kept = key, _quantize(weight, (BLOCK, BLOCK), transposed)
        return self._kept[1]

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
    keep_codes : quantize the weight only when it has changed, not at every call: for inference, and
        where gradients of several batches are added up. It takes 2 bytes of memory a weight. A
        change is what moves the parameter's version counter, as the optimizers of torch do and
        every operation in place; behind writes through `.data`, or to a view of it as a library of
        its own may have, call `forget_codes`. CUDA graphs and torch.compile always quantize

    Called with x [..., in_features], bfloat16 or float32; gives [..., out_features] in its dtype.
    Values must be finite.

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
        keep_codes: bool = False,
    ) -> None:
        super().__init__(keep_codes)
        _check(in_features, out_features, FEATURES_UNIT, dtype)
        self.in_features, self.out_features = in_features, out_features
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **options))
        self.bias = torch.nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(x, self.in_features)
        codes = self.weight_codes(torch.is_grad_enabled() and x.requires_grad)
        if x.ndim == 2:
            return multiply(x, self.weight, codes, self.bias)
        y = multiply(x.reshape(-1, self.in_features), self.weight, codes, self.bias)
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
    keep_codes : as of Fp8Linear
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
        keep_codes: bool = False,
        debug: bool = False,
    ) -> None:
        super().__init__(keep_codes)
        _check(in_features, out_features, BLOCK, dtype)
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
        codes = self.weight_codes(torch.is_grad_enabled() and x.requires_grad)
        return multiply(x, self.weight, codes, offsets=offsets)

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


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, or with offsets x W[g]^T for the rows of each group, of the weight's `codes`.

    codes : those of `weight_codes`, with the transpose's if x needs a gradient
    """
    wants_dw = torch.is_grad_enabled() and weight.requires_grad
    y: torch.Tensor = _Product.apply(x, weight, bias, offsets, wants_dw, *codes)
    return y


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """`multiply`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        offsets: torch.Tensor | None,
        wants_dw: bool,
        *weight_codes: torch.Tensor,
    ) -> torch.Tensor:
        codes, scales, *weight_t = weight_codes
        x_codes, x_scales, *x_t = _quantize(x, (1, BLOCK), wants_dw)
        y = _multiply_rows((x_codes, x_scales), (codes, scales), x.dtype, offsets, bias)
        ctx.save_for_backward(*(weight_t or (None, None)), *(x_t or (None, None)), offsets)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight_codes, weight_scales, x_codes, x_scales, offsets = ctx.saved_tensors
        of_x, of_weight, of_bias, *others = ctx.needs_input_grad
        dx = dw = db = None
        if of_x or of_weight:
            codes, scales, *dy_t = _quantize(dy, (1, 1), of_weight)
        if of_x:
            if weight_codes.shape[-1] != dy.shape[1]:  # without what pads the transpose
                weight_codes = weight_codes[..., : dy.shape[1]]
            dx = _multiply_rows((codes, scales), (weight_codes, weight_scales), dy.dtype, offsets)
        if of_weight:
            dw = _multiply_columns(dy_t, (x_codes, x_scales), ctx.weight_dtype, offsets)
        if of_bias:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, *(None for _ in others)


def _quantize(
    x: torch.Tensor, blocks: tuple[int, int], transposed: bool
) -> tuple[torch.Tensor, ...]:
    """Codes and scales of each matrix of x in blocks[0] x 128, then those of its transpose in
    blocks[1] x 128 if they are wanted."""
    return quantize_both(x, *blocks) if transposed else quantize(x, blocks[0])


Pair = tuple[torch.Tensor, torch.Tensor]  # codes and scales


def _multiply_rows(
    x: Pair,
    weight: Pair,
    dtype: torch.dtype,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times the transpose of a matrix, or of each group's, plus bias, in `dtype`."""
    operands = x[0], weight[0], x[1], weight[1]
    if offsets is None:
        return gemm(*operands, bias=bias, dtype=dtype)
    y = torch.zeros(len(x[0]), weight[0].shape[1], device=x[0].device, dtype=dtype)
    return grouped_gemm(*operands, offsets, layout="ragged", out=y)


def _multiply_columns(
    dy: Sequence[torch.Tensor], x: Pair, dtype: torch.dtype, offsets: torch.Tensor | None
) -> torch.Tensor:
    """dy^T x of all tokens or, [num_groups, .., ..], of each group's, from transposes."""
    operands, tokens = (dy[0], x[0], dy[1], x[1]), dy[0].shape[1]
    options: dict[str, Any] = {"device": dy[0].device, "dtype": dtype}
    num_groups = 1 if offsets is None else len(offsets) - 1
    shape = num_groups, len(dy[0]), len(x[0])
    # In float32 it is added to what is there, and a group of no tokens leaves its own alone.
    is_set = offsets is None and tokens > 0 and dtype != torch.float32
    dw = torch.empty(shape, **options) if is_set else torch.zeros(shape, **options)
    if tokens:
        whole = _whole(tokens, dy[0].device) if offsets is None else offsets
        grouped_gemm(*operands, whole, layout="k_grouped", out=dw)
    return dw[0] if offsets is None else dw


_wholes: dict[tuple[int, torch.device], torch.Tensor] = {}
_MAX_WHOLES = 256


def _whole(tokens: int, device: torch.device) -> torch.Tensor:
    """Offsets of one group that has all tokens; made on the device, without waiting for it."""
    if torch.compiler.is_compiling():
        return torch.arange(0, tokens + 1, tokens, device=device, dtype=torch.int32)
    whole = _wholes.get((tokens, device))
    if whole is None:
        whole = torch.arange(0, tokens + 1, tokens, device=device, dtype=torch.int32)
        # Kept for good, as graphs may read it; what a graph makes exists when it is replayed only.
        is_captured = whole.is_cuda and torch.cuda.is_current_stream_capturing()
        if not is_captured and len(_wholes) < _MAX_WHOLES:
            _wholes[tokens, device] = whole
    return whole
