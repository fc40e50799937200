"""The public API: torch CUDA tensors run on the GPU, NumPy arrays on the interpreter.

What tensors need is in `calls`; arrays of other libraries become one or the other in `dlpack`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import NoneType
from typing import Any

import numpy as np

from .arrays import ArrayView, check_gemm, name_arrays
from .calls import find_call
from .dlpack import borrow, check_hand_over, hand_over, is_foreign, keep_until_done
from .dtypes import BF16, array_dtype, dtype_of
from .errors import ProblemError, ScheduleError
from .expr import Bound, Expr, acc, as_expr
from .interpret import interpret
from .lower import lower
from .numerics import AMAX_FLOOR, E4M3_MAX, check_block, quantize_blocks
from .schedule import Schedule
from .tuning.select import select

PLAIN = Bound(acc, {})


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
    ordered on its current stream; arrays run on the interpreter, which predicts the same bits for
    the same schedule: by default that of an H100 SXM. Schedules that split k alike agree in all.
    Or all are arrays of another library that speaks DLPack, such as CuPy or JAX: on a GPU they run
    as torch tensors do, without a copy, else on the interpreter. a and b may be uint8 there, the
    codes of float8_e4m3fn.

    Returns
    -------
    bfloat16 or float32 [m, n], of the kind of the inputs; `out` if it was given

    Raises
    ------
    ProblemError : a dtype, shape or stride breaks a rule above; says which, and what is legal
    ScheduleError : `schedule` cannot run this problem
    DeviceError : tensors are not on one CUDA device, or it is not of compute capability 9.0
    CompileError, StoreError : the kernel is not in the store and cannot be compiled or stored
    JitForbiddenError : it is not in the store, and `configure` forbids to compile
    CaptureError : it is not loaded yet, and the current stream is being captured
    """
    bound = _check_options(scales, epilogue, schedule)
    if isinstance(a, np.ndarray):
        arrays = name_arrays(a, b, scales, bound, out)
        return _bind_numpy(arrays, out_dtype, bound, schedule, batch_invariant)()
    try:
        call, addresses = find_call(a, b, scales, bound, out, out_dtype, schedule, batch_invariant)
    except ProblemError:
        if not is_foreign(a):
            raise
        return _gemm_foreign(a, b, scales, out, out_dtype, bound, schedule, batch_invariant)
    if out is None:
        out = call.empty()
        addresses = (*addresses, out.data_ptr())
    call.launch(addresses)
    return out


def bind(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    *,
    out: Any,
    epilogue: Expr | Bound = acc,
    schedule: Schedule | None = None,
    batch_invariant: bool = False,
) -> Callable[[], Any]:
    """`gemm` on these very arrays, checked and prepared once, to be called many times.

    For static buffers, CUDA graphs and benchmarks. A call reads what the arrays hold then, writes D
    to `out` and returns it; tensors run on their device, ordered on the stream that is current at
    the call. Threads may share the callable.

    Parameters
    ----------
    a, b, scales, epilogue : as for `gemm`; kept alive by the callable. It knows their memory: to
        resize a tensor or to give it other storage does not reach it
    out : where to put D: bfloat16 or float32 [m, n], rows a multiple of 16 bytes apart
    schedule, batch_invariant : as for `gemm`

    Returns
    -------
    a callable without arguments that returns `out`; on NumPy arrays it interprets every time

    Raises
    ------
    As `gemm`, at once; a call raises DeviceError if the driver refuses the launch
    """
    bound = _check_options(scales, epilogue, schedule)
    if out is None:
        raise ProblemError("out is None: give the array that every call writes D to")
    if is_foreign(a):
        return _bind_foreign(a, b, scales, out, bound, schedule, batch_invariant)
    arrays = name_arrays(a, b, scales, bound, out)
    if isinstance(a, np.ndarray):
        return _bind_numpy(arrays, None, bound, schedule, batch_invariant)
    call, addresses = find_call(a, b, scales, bound, out, None, schedule, batch_invariant)
    return call.bind(addresses, arrays)


def quantize(x: Any, block: tuple[int, int] = (1, 128)) -> tuple[Any, Any]:
    """x as float8_e4m3fn and one float32 scale a block: x ~= q * scale.

    scale = max(amax(|block|), 448 * 2^-63) / 448 and q = round(x / scale), both in float32, to
    nearest even: the same bits from NumPy and torch. NumPy input must be finite; on a GPU that
    check would cost a synchronization, so there a block with a NaN or an infinity gets a scale that
    is one too.

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
    """
    if isinstance(x, np.ndarray):
        return quantize_blocks(x, block)
    if is_foreign(x):
        native = borrow("x", x, x)
        quantized, scale = quantize(native, block)
        keep_until_done(native)
        return hand_over(quantized, x), hand_over(scale, x)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        raise ProblemError(f"x is a {type(x).__name__}, must be an array")
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


def _check_options(scales: object, epilogue: Any, schedule: object) -> Bound:
    """The epilogue with its operands; scales must be a pair and schedule a Schedule or None."""
    if not isinstance(scales, (tuple, list)) or len(scales) != 2:
        raise ProblemError(f"scales must be the pair (sfa, sfb), got {type(scales).__name__}")
    if not isinstance(schedule, (Schedule, NoneType)):
        raise ScheduleError(f"schedule is a {type(schedule).__name__}, must be a jitgen.Schedule")
    if isinstance(epilogue, Bound):
        return epilogue
    return PLAIN if epilogue is acc else Bound(as_expr(epilogue), {})


def _gemm_foreign(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    out: Any,
    out_dtype: object,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
) -> Any:
    """`gemm` of another library's arrays, ordered on that library's stream."""
    operands = _borrow_operands(a, b, scales, bound)
    if out is None:
        check_hand_over(dtype_of(BF16 if out_dtype is None else out_dtype), operands[0], a)
    d = gemm(
        *operands[:3],
        out=None if out is None else borrow("out", out, a, is_output=True),
        out_dtype=out_dtype,
        epilogue=operands[3],
        schedule=schedule,
        batch_invariant=batch_invariant,
    )
    keep_until_done(*operands[:2], *operands[2], *operands[3].tensors.values())
    handed_over = hand_over(d, a)
    return handed_over if out is None else out


def _bind_foreign(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    out: Any,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
) -> Callable[[], Any]:
    """`bind` of another library's arrays: each call takes its place on that library's stream."""
    operands = _borrow_operands(a, b, scales, bound)
    d = borrow("out", out, a, is_output=True)
    run = bind(
        *operands[:3],
        out=d,
        epilogue=operands[3],
        schedule=schedule,
        batch_invariant=batch_invariant,
    )

    def call() -> Any:
        borrow("out", out, a, is_output=True)
        run()
        hand_over(d, a)
        return out

    return call


def _borrow_operands(
    a: Any, b: Any, scales: tuple[Any, Any], bound: Bound
) -> tuple[Any, Any, tuple[Any, Any], Bound]:
    sfa, sfb = (borrow(name, array, a) for name, array in zip(("sfa", "sfb"), scales, strict=True))
    tensors = {name: borrow(name, tensor, a) for name, tensor in bound.tensors.items()}
    return borrow("a", a, a), borrow("b", b, a), (sfa, sfb), Bound(bound.expr, tensors)


def _bind_numpy(
    arrays: dict[str, Any],
    out_dtype: object,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
) -> Callable[[], np.ndarray[Any, Any]]:
    """Check everything; what comes back interprets the call."""
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
    problem, m = check_gemm(views, out_dtype, bound)
    kernel = lower(problem, schedule or select(problem, m, batch_invariant=batch_invariant))

    def call() -> np.ndarray[Any, Any]:
        d = interpret(kernel, arrays)
        if out is None:
            return d
        out[...] = d
        return out  # type: ignore[no-any-return]

    return call
