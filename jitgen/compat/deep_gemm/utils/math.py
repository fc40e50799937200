"""deep_gemm.utils.math: casts to FP8 with DeepGEMM's scales, the same bits on any device.

scale = max(amax of a block, 1e-4) * (1 / 448), as torch divides by 448 on a GPU, and a value is
multiplied by the scale's reciprocal: `jitgen.quantize` divides, and keeps smaller blocks. CUDA
tensors in blocks of 1x128 and 128x128 run one kernel.
"""

from __future__ import annotations

import torch

from ....api_quantize import BLOCKS, launch

_SMALLEST_AMAX, _E4M3_MAX = 1e-4, 448.0
_DTYPES = (torch.bfloat16, torch.float32)  # that the kernel takes


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The first multiple of y from x on."""
    return ceil_div(x, y) * y


def ceil_to_ue8m0(x: torch.Tensor) -> torch.Tensor:
    """The first power of two from |x| on, 2^-126 at least; float32."""
    mantissa, exponent = torch.frexp(x.abs().float())
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-126, 127)
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, k] as float8_e4m3fn, and its scales, float32 [m, ceil(k / gran_k)]."""
    if use_packed_ue8m0:
        raise NotImplementedError("use_packed_ue8m0: scales of that kind are Blackwell's")
    return _cast(x, (1, gran_k), use_ue8m0)


def per_channel_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [k, n] as float8_e4m3fn, and its scales, float32 [ceil(k / gran_k), n]."""
    return _cast(x, (gran_k, 1), use_ue8m0)


def per_block_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, k] as float8_e4m3fn, and its scales, one a block of gran_k x gran_k."""
    return _cast(x, (gran_k, gran_k), use_ue8m0)


def per_custom_dims_cast_to_fp8(
    x: torch.Tensor, dims: tuple[int, ...], use_ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float8_e4m3fn, and its scales, one for each index of `dims`."""
    others = tuple(dim for dim in range(x.ndim) if dim not in dims)
    scale = _scale(x.abs().float().amax(dim=others, keepdim=True), use_ue8m0)
    return (x * (1.0 / scale)).to(torch.float8_e4m3fn), scale.squeeze()


def _cast(
    x: torch.Tensor, block: tuple[int, int], use_ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x and one scale a block of rows x columns."""
    if x.is_cuda and block in BLOCKS and x.dtype in _DTYPES:
        codes, scales = launch(x, block[0], rule="reciprocal_ue8m0" if use_ue8m0 else "reciprocal")
        return codes, scales
    rows, columns = x.shape
    grid = ceil_div(rows, block[0]), ceil_div(columns, block[1])
    padded = x.new_zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :columns] = x
    blocks = padded.view(grid[0], block[0], grid[1], block[1])
    scale = _scale(blocks.abs().float().amax(dim=(1, 3), keepdim=True), use_ue8m0)
    codes = (blocks * (1.0 / scale)).to(torch.float8_e4m3fn).view_as(padded)
    return codes[:rows, :columns].contiguous(), scale.view(grid)


def _scale(amax: torch.Tensor, use_ue8m0: bool) -> torch.Tensor:
    scale = amax.clamp(_SMALLEST_AMAX) * amax.new_full((), _E4M3_MAX).reciprocal()
    return ceil_to_ue8m0(scale) if use_ue8m0 else scale
