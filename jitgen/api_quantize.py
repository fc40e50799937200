"""Quantizing for users: torch CUDA tensors on the GPU, NumPy arrays on the host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import ArrayView
from .calls import Call, Prepared, check_device, load
from .dlpack import borrow, hand_over, is_foreign, keep_until_done
from .dtypes import E4M3, F32, dtype_of
from .errors import ProblemError
from .numerics import AMAX_FLOOR, E4M3_MAX, check_block, quantize_blocks
from .problem import MAX_EXTENT
from .quantization import (
    TILE,
    Quantization,
    QuantizationSchedule,
    Rule,
    interpret_quantization,
    lower_quantization,
    num_quantization_blocks,
    output_shapes,
)
from .runtime import driver
from .runtime.launch import Argument, LaunchPool, Pointer, UInt32

if TYPE_CHECKING:
    import torch

Block = tuple[int, int]

BLOCKS = ((1, TILE), (TILE, TILE))  # of activations, of weights


def quantize(x: Any, block: Block = (1, 128)) -> tuple[Any, Any]:
    """x as float8_e4m3fn and one float32 scale a block: x ~= q * scale.

    scale = max(amax(|block|), 448 * 2^-63) / 448 and q = round(x / scale), both in float32, to
    nearest even: the same bits from NumPy, torch and the kernel that CUDA tensors in blocks of
    (1, 128) or (128, 128) run. NumPy input must be finite; on a GPU that check would cost a
    synchronization, so there a block with a NaN or an infinity gets a scale that is one too.

    Parameters
    ----------
    x : float32 or bfloat16 [rows, k]: NumPy array, torch tensor on any device, or array of another
        library that speaks DLPack
    block : rows x k elements that share a scale: (1, 128) for activations, (128, 128) for weights

    Returns
    -------
    (float8_e4m3fn [rows, k], float32 [ceil(rows / block[0]), ceil(k / block[1])]); the codes as
    uint8 from a library that has no float8

    Raises
    ------
    ProblemError : x is not such a matrix, or (NumPy) not finite
    DeviceError : x is on a CUDA device that is not of compute capability 9.0
    CaptureError, CompileError, StoreError, JitForbiddenError : as `gemm`, of a CUDA tensor
    """
    if isinstance(x, np.ndarray):
        return quantize_blocks(x, block)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        if is_foreign(x):
            native = borrow("x", x, x)
            quantized, scale = quantize(native, block)
            keep_until_done(native)
            return hand_over(quantized, x), hand_over(scale, x)
        raise ProblemError(f"x is a {type(x).__name__}, must be an array")
    if x.ndim == 2 and x.is_cuda and block in BLOCKS:
        quantized, scale = launch(x, block[0])
        return quantized, scale
    check_block(block)
    _check_dtype(x)
    if x.ndim != 2:
        raise _not_a_matrix(x)
    return _quantize_by_torch(x, block)


def quantize_both(
    x: Any, block: Block = (1, 128), transposed_block: Block = (1, 128)
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """`quantize(x, block)`, and `quantize` of the transpose of x: x is read once.

    The transpose has zeros up to a multiple of 128 columns, so that it is an operand of
    `grouped_gemm` with `KGrouped`. For training: `jitgen.nn` says what is used where.

    Parameters
    ----------
    x : float32 or bfloat16 [rows, k], or [matrices, rows, k] of which each is quantized; NumPy
        array, or torch tensor on any device
    block, transposed_block : (1, 128) or (128, 128) elements that share a scale, of x and of its
        transpose

    Returns
    -------
    ((q, scale), (q_t, scale_t)) : of x as of `quantize`; of its transpose float8_e4m3fn
    [k, rows up to a multiple of 128] and float32 [k or ceil(k / 128), ceil(rows / 128)], the former
    column by column in memory. Each with `matrices` before if x has them

    Raises
    ------
    ProblemError : x or a block breaks a rule above, or x (NumPy) is not finite
    As `quantize`
    """
    for name, given in (("block", block), ("transposed_block", transposed_block)):
        if given not in BLOCKS:
            raise ProblemError(f"{name} is {given!r}, must be one of {BLOCKS}")
    if isinstance(x, np.ndarray):
        if x.ndim not in (2, 3) or not np.isfinite(x.astype(np.float32)).all():
            raise ProblemError(f"x is {list(x.shape)}, must be a matrix or some, and finite")
        problem = Quantization(dtype_of(x.dtype), block[0], transposed_block[0])
        kernel = lower_quantization(problem, QuantizationSchedule())
        made: Any = tuple(interpret_quantization(kernel, {"x": x}).values())
        transposed_scale = made[3].swapaxes(-1, -2) if transposed_block[0] == 1 else made[3]
        return made[:2], (made[2], transposed_scale)
    _check_dtype(x)
    if x.is_cuda:
        q, scale, q_t, scale_t = launch(x, block[0], transposed_block[0])
        return (q, scale), (q_t, scale_t.mT if transposed_block[0] == 1 else scale_t)
    if x.ndim not in (2, 3):
        raise _not_a_matrix(x)
    q_t, scale_t = _by_torch(_transposed(x), transposed_block)
    if transposed_block[0] == 1:  # column by column in memory, as of the kernel
        scale_t = scale_t.mT.contiguous().mT
    return _by_torch(x, block), (q_t, scale_t)


def _check_dtype(x: Any) -> None:
    import torch

    if not isinstance(x, torch.Tensor):
        raise ProblemError(f"x is a {type(x).__name__}, must be an array")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise _not_a_matrix(x)


def _not_a_matrix(x: torch.Tensor) -> ProblemError:
    return ProblemError(f"x is {x.dtype}{list(x.shape)}, must be float32 or bfloat16 [rows, k]")


def _quantize_by_torch(x: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """In blocks of any size, or on a CPU."""
    import torch

    rows, k = x.shape
    grid = -(-rows // block[0]), -(-k // block[1])
    padding = grid[1] * block[1] - k, grid[0] * block[0] - rows
    padded = torch.nn.functional.pad(x, (0, padding[0], 0, padding[1])) if any(padding) else x
    blocks = padded.reshape(grid[0], block[0], grid[1], block[1])
    amax = torch.linalg.vector_norm(blocks, torch.inf, dim=(1, 3), dtype=torch.float32)
    # The divisor is a tensor: torch multiplies by the reciprocal of a Python number.
    scale = amax.clamp_min(AMAX_FLOOR) / amax.new_full((), E4M3_MAX)
    quantized = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return quantized.view(padded.shape)[:rows, :k].contiguous(), scale


def _by_torch(x: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_quantize_by_torch`, of each matrix of x."""
    import torch

    if x.ndim == 2:
        return _quantize_by_torch(x, block)
    codes, scales = zip(*(_quantize_by_torch(matrix, block) for matrix in x), strict=True)
    packed = torch.stack([c.view(torch.uint8) for c in codes])
    return packed.view(codes[0].dtype), torch.stack(scales)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    """The transpose of each matrix, with zeros up to a multiple of TILE columns."""
    import torch

    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % TILE)).mT.contiguous()


def launch(
    x: torch.Tensor, rows: int, columns: int = 0, rule: Rule = "divide"
) -> tuple[torch.Tensor, ...]:
    """What `Quantization(.., rows, columns, rule)` makes of a CUDA tensor, as it lies in memory.

    Raises
    ------
    As `quantize`
    """
    strides = x.is_contiguous() or x.stride()
    signature = (x.dtype, x.shape, strides, x.get_device(), rows, columns, rule)
    call = _calls.get(signature)
    if call is None:
        if x.ndim not in (2, 3):
            raise _not_a_matrix(x)
        if strides is not True and (x.ndim == 3 or strides[-1] != 1):
            return launch(x.contiguous(), rows, columns, rule)
        call = _calls.keep(signature, _prepare(x, rows, columns, rule))
    made = call.empty()
    call.launch((x.data_ptr(), *[tensor.data_ptr() for tensor in made]))
    return made


_calls: Prepared[Call] = Prepared()


def _prepare(x: torch.Tensor, rows: int, columns: int, rule: Rule) -> Call:
    """Check everything, then build, load and lay out the launches of one signature."""
    _check_dtype(x)
    check_device({"x": x}, x.device)
    driver.check_architecture(driver.device(x.device.index))
    problem = Quantization(dtype_of(x.dtype), rows, columns, rule)
    shape = tuple(x.shape)
    outputs = [
        ArrayView(name, E4M3 if name.startswith("q") else F32, made, ())
        for name, made in output_shapes(problem, shape).items()
    ]
    stride = x.stride(-2) if shape[-2] > 1 else shape[-1]
    if max(*shape, stride) > MAX_EXTENT:
        raise ProblemError(f"x is {list(shape)}, row pitch {stride}: beyond {MAX_EXTENT}")
    if x.numel() == 0:
        return Call(x.device, outputs, None)
    kernel, loaded = load(problem, QuantizationSchedule(), x.device.index)
    sizes = {"m": shape[-2], "n": shape[-1], "stride": stride}
    arguments: list[Argument] = [Pointer(i) for i in range(len(kernel.tensors))]
    arguments += [UInt32(sizes[p.name]) for p in kernel.parameters[len(arguments) :]]
    launches = LaunchPool(
        loaded,
        arguments,
        grid=num_quantization_blocks(kernel, shape),
        num_threads=kernel.num_threads,
    )
    return Call(x.device, outputs, launches)
