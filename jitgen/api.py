"""The public API: torch CUDA tensors run on the GPU, NumPy arrays on the interpreter.

This is the only module of the compiler that knows torch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import ArrayView, check_operands, check_output, gemm_problem
from .build import build
from .dtypes import BF16, DType, array_dtype, dtype_of
from .errors import DeviceError, ProblemError, ScheduleError
from .expr import Bound, Expr, acc, as_expr
from .interpret import interpret
from .ir import (
    ExtentParameter,
    Kernel,
    Parameter,
    PointerParameter,
    StrideParameter,
    TensorMapParameter,
)
from .lower import lower
from .numerics import AMAX_FLOOR, E4M3_MAX, check_block, quantize_blocks
from .problem import Gemm, check_operand_names
from .runtime import driver
from .runtime.launch import Argument, Launch, Pointer, UInt32
from .runtime.tensor_map import TensorMapSpec
from .schedule import Schedule
from .tuning.select import select

if TYPE_CHECKING:
    import torch

MAX_CACHED_LAUNCHES = 4096


def gemm(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    *,
    out: Any = None,
    out_dtype: object = None,
    epilogue: Expr | Bound = acc,
    schedule: Schedule | None = None,
    batch_invariant: bool = False,
) -> Any:
    """D = epilogue((A * sfa) @ (B * sfb)^T), in FP8 with FP32 promotion every 128 of k.

    Parameters
    ----------
    a : float8_e4m3fn [m, k], row-major; k % 16 == 0
    b : float8_e4m3fn [n, k], row-major; n % 8 == 0
    scales : the pair of sfa float32 [m, ceil(k/128)], with any strides,
        and sfb float32 [ceil(n/128), ceil(k/128)], row-major
    out : where to put D, rows a multiple of 16 bytes apart; a new array if None
    out_dtype : bfloat16 or float32; default that of `out`, or bfloat16
    epilogue : expression of `jitgen.acc`, bound to the operands it has: `expr.bind(bias=bias)`
    schedule : pins the schedule; None lets jitgen choose, by m
    batch_invariant : the choice does not depend on m, so that the bits of a row of D depend on
        that row of A only, not on the rows beside it; costs time where m is far from the middle

    All are torch CUDA tensors of one device, or all are NumPy arrays. Tensors run on their device,
    ordered on its current stream; arrays run on the interpreter, which predicts the same bits.

    Returns
    -------
    bfloat16 or float32 [m, n], of the kind of the inputs; `out` if it was given

    Raises
    ------
    ProblemError : a dtype, shape or stride breaks a rule above; says which, and what is legal
    ScheduleError : `schedule` cannot run this problem
    DeviceError : tensors are not on one CUDA device, or it is not of compute capability 9.0
    CompileError, StoreError : the kernel is not in the store and cannot be compiled or stored
    """
    if not isinstance(scales, (tuple, list)) or len(scales) != 2:
        raise ProblemError(f"scales must be the pair (sfa, sfb), got {type(scales).__name__}")
    if not isinstance(schedule, (Schedule, NoneType)):
        raise ScheduleError(f"schedule is a {type(schedule).__name__}, must be a jitgen.Schedule")
    bound = epilogue if isinstance(epilogue, Bound) else Bound(as_expr(epilogue), {})
    check_operand_names(bound.tensors)
    arrays = {"a": a, "b": b, "sfa": scales[0], "sfb": scales[1], **bound.tensors}
    if out is not None:
        arrays["d"] = out
    _check_kinds(arrays)
    if isinstance(a, np.ndarray):
        return _gemm_numpy(arrays, out_dtype, bound, schedule, batch_invariant)
    return _gemm_torch(arrays, out_dtype, bound, schedule, batch_invariant)


def quantize(x: Any, block: tuple[int, int] = (1, 128)) -> tuple[Any, Any]:
    """x as float8_e4m3fn and one float32 scale a block: x ~= q * scale.

    scale = max(amax(|block|), 448 * 2^-63) / 448 and q = round(x / scale), both in float32, to
    nearest even: the same bits from NumPy and torch. NumPy input must be finite; on a GPU that
    check would cost a synchronization, so there a block with a NaN or an infinity gets a scale that
    is one too.

    Parameters
    ----------
    x : float32 or bfloat16 [rows, k]: NumPy array, or torch tensor on any device
    block : rows x k elements that share a scale: (1, 128) for activations, (128, 128) for weights

    Returns
    -------
    (float8_e4m3fn [rows, k], float32 [ceil(rows / block[0]), ceil(k / block[1])])

    Raises
    ------
    ProblemError : x is not such a matrix, or (NumPy) not finite
    """
    if isinstance(x, np.ndarray):
        return quantize_blocks(x, block)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        raise ProblemError(f"x is a {type(x).__name__}, must be a NumPy array or a torch tensor")
    check_block(block)
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ProblemError(f"x is {x.dtype}{list(x.shape)}, must be float32 or bfloat16 [rows, k]")
    rows, k = x.shape
    grid = -(-rows // block[0]), -(-k // block[1])
    padded = torch.zeros(
        grid[0] * block[0], grid[1] * block[1], device=x.device, dtype=torch.float32
    )
    padded[:rows, :k] = x
    blocks = padded.view(grid[0], block[0], grid[1], block[1])
    amax = blocks.abs().amax(dim=(1, 3)).clamp_min(AMAX_FLOOR)
    # The divisor is a tensor: torch multiplies by the reciprocal of a Python number.
    scale = amax / amax.new_tensor(E4M3_MAX)
    quantized = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return quantized.view_as(padded)[:rows, :k].to(torch.float8_e4m3fn), scale


def _check_kinds(arrays: Mapping[str, Any]) -> None:
    """Raise ProblemError unless all are NumPy arrays, or all torch tensors."""
    torch = sys.modules.get("torch")
    in_numpy = [name for name, array in arrays.items() if isinstance(array, np.ndarray)]
    in_torch = [name for name, array in arrays.items() if torch and isinstance(array, torch.Tensor)]
    unknown = [name for name in arrays if name not in (*in_numpy, *in_torch)]
    if unknown or (in_numpy and in_torch):
        name = (*unknown, *in_numpy)[0]
        raise ProblemError(
            f"{name} is a {type(arrays[name]).__name__}: give torch CUDA tensors only, or NumPy"
            " arrays only"
        )


def _gemm_numpy(
    arrays: dict[str, Any],
    out_dtype: object,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
) -> np.ndarray[Any, Any]:
    views = {
        name: ArrayView(
            name,
            array_dtype(array.dtype, array.itemsize),
            array.shape,
            tuple(stride // max(array.itemsize, 1) for stride in array.strides),
        )
        for name, array in arrays.items()
    }
    out = arrays.pop("d", None)
    problem, m = _check_gemm(views, out_dtype, bound)
    schedule = schedule or select(problem, m, batch_invariant=batch_invariant)
    kernel = lower(problem, schedule)
    d = interpret(kernel, arrays)
    if out is None:
        return d
    out[...] = d
    return out  # type: ignore[no-any-return]


def _gemm_torch(
    arrays: dict[str, torch.Tensor],
    out_dtype: object,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
) -> torch.Tensor:
    import torch

    a = arrays["a"]
    if "d" not in arrays:
        d_dtype = dtype_of(out_dtype if out_dtype is not None else BF16)
        if a.ndim == 2 and arrays["b"].ndim == 2:  # what is not a matrix is refused below
            shape = (a.shape[0], arrays["b"].shape[0])
            arrays["d"] = torch.empty(shape, dtype=getattr(torch, d_dtype.name), device=a.device)
            out_dtype = None
    signature = (
        bound.expr,
        schedule,
        batch_invariant,
        out_dtype,
        a.device,
        *((n, t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for n, t in arrays.items()),
    )
    launch = _launches.get(signature)
    if launch is None:
        launch = _prepare_torch(arrays, out_dtype, bound, schedule, batch_invariant)
        _launches.put(signature, launch)
    index = a.device.index
    with (
        torch.cuda.device(index)
        if torch.cuda.current_device() != index
        else contextlib.nullcontext()
    ):
        launch(torch._C._cuda_getCurrentRawStream(index))
    return arrays["d"]


def _prepare_torch(
    arrays: dict[str, torch.Tensor],
    out_dtype: object,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
) -> Callable[[int], None]:
    """Check everything, then build, load and lay out the launch of one call signature."""
    device = arrays["a"].device
    _check_device(arrays, device)
    found = driver.device(device.index)
    driver.check_architecture(found)
    views = {
        name: ArrayView(
            name,
            array_dtype(t.dtype, t.itemsize),
            tuple(t.shape),
            tuple(t.stride()),
            t.data_ptr(),
        )
        for name, t in arrays.items()
    }
    problem, m = _check_gemm(views, out_dtype, bound)
    if m == 0:
        return lambda stream: None  # an empty D needs no kernel
    schedule = schedule or select(problem, m, found.gpu, batch_invariant=batch_invariant)
    kernel, loaded = _load(problem, schedule, device.index)
    return Launch(
        loaded,
        [_argument(parameter, views, m) for parameter in kernel.parameters],
        grid=kernel.num_blocks(m, found.num_sms),
        num_threads=kernel.num_threads,
    )


def _check_gemm(
    views: Mapping[str, ArrayView], out_dtype: object, bound: Bound
) -> tuple[Gemm, int]:
    """The problem and its m; every rule on dtypes, shapes and strides is checked here."""
    d: DType = BF16
    if out_dtype is not None:
        d = dtype_of(out_dtype)
    elif "d" in views:
        d = views["d"].dtype
    problem, m = gemm_problem(views["a"], views["b"], views["sfa"], views["sfb"], d, bound.expr)
    if "d" in views:
        check_output(views["d"], problem, m)
    check_operands({name: views[name] for name in bound.tensors}, problem, m)
    return problem, m


def _check_device(arrays: Mapping[str, torch.Tensor], device: torch.device) -> None:
    for name, tensor in arrays.items():
        if tensor.device.type != "cuda":
            raise DeviceError(
                f"{name} is on {tensor.device}: torch tensors must be on a CUDA device (`.cuda()`);"
                " NumPy arrays (`.numpy()`) run on the interpreter"
            )
        if tensor.device != device:
            raise DeviceError(
                f"{name} is on {tensor.device}, a is on {device}: all must be on one device"
            )


@functools.cache
def _load(problem: Gemm, schedule: Schedule, ordinal: int) -> tuple[Kernel, driver.LoadedKernel]:
    """The kernel, built or taken from the store, and loaded on one device."""
    kernel = lower(problem, schedule)
    entry = build(kernel)
    return kernel, driver.load(
        entry.cubin, kernel.name, smem_bytes=kernel.smem.total_bytes, ordinal=ordinal
    )


def _argument(parameter: Parameter, views: Mapping[str, ArrayView], m: int) -> Argument:
    """The value of a kernel parameter for these arrays."""
    match parameter:
        case ExtentParameter():
            return UInt32(m)
        case PointerParameter():
            return Pointer(views[parameter.tensor.name].address)
        case StrideParameter():
            return UInt32(views[parameter.tensor.name].strides[parameter.dim])
        case TensorMapParameter():
            view = views[parameter.tensor.name]
            size = view.dtype.size_bytes
            box_rows, box_columns = parameter.box
            if parameter.tensor.dims[0].extent is None:
                box_rows = min(box_rows, m)
            return TensorMapSpec(
                address=view.address,
                element_bytes=size,
                rows=max(view.shape[0], 1),
                columns=view.shape[1],
                pitch_bytes=view.row_stride * size,
                box_rows=box_rows,
                box_columns=box_columns,
                swizzle_bytes=parameter.swizzle_bytes,
            )


class _LaunchCache:
    """The launches of recent call signatures, least recently used first; safe in threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[object, Callable[[int], None]] = OrderedDict()
        self._mutex = threading.Lock()

    def get(self, signature: object) -> Callable[[int], None] | None:
        with self._mutex:
            launch = self._entries.get(signature)
            if launch is not None:
                self._entries.move_to_end(signature)
            return launch

    def put(self, signature: object, launch: Callable[[int], None]) -> None:
        with self._mutex:
            self._entries[signature] = launch
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)


_launches = _LaunchCache(MAX_CACHED_LAUNCHES)
