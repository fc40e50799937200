"""The public API: torch CUDA tensors run on the GPU, NumPy arrays on the interpreter.

What tensors need is in `calls`; arrays of other libraries become one or the other in `dlpack`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any

import numpy as np

from .arrays import check_gemm, name_arrays, numpy_view
from .calls import find_call
from .dlpack import borrow, borrow_call, is_foreign
from .errors import ProblemError, ScheduleError
from .expr import Bound, Expr, acc, as_expr
from .groups import expected_rows, find_fault, num_values
from .layouts import GroupLayout, check_layout
from .problem import GroupedGemm
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
    ue8m0: bool = False,
    schedule: Schedule | None = None,
    batch_invariant: bool = False,
) -> Any:
    """D = epilogue((A * sfa) @ (B * sfb)^T), in FP8 with FP32 promotion every 128 of k.

    Parameters
    ----------
    a : float8_e4m3fn [m, k], row-major; k % 16 == 0
    b : float8_e4m3fn [n, k], row-major; n % 8 == 0
    scales : the pair of sfa float32 [m, ceil(k/128)], with any strides,
        and sfb float32 [ceil(n/128), ceil(k/128)], row-major, or [n, ceil(k/128)], with any strides
    out : where to put D, rows a multiple of 16 bytes apart; a new array if None
    out_dtype : bfloat16, float32 or float8_e4m3fn; default that of `out`, or bfloat16
    epilogue : expression of `jitgen.acc`, bound to the operands it has: `expr.bind(bias=bias)`; or
        of `jitgen.gate` and `jitgen.up`, the two halves of the rows of b: D has n / 2 columns then,
        n % 256 == 0
    ue8m0 : the scales of a float8_e4m3fn D are powers of two
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
    bfloat16 or float32 [m, n], of the kind of the inputs; `out` if it was given. With float8_e4m3fn
    the pair of D and its scales, float32 [m, n/128], as `out` is a pair: columns % 128 == 0

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
    return _run(a, b, scales, bound, out, out_dtype, schedule, batch_invariant, None, ue8m0)


def grouped_gemm(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    *,
    layout: GroupLayout,
    out: Any = None,
    out_dtype: object = None,
    epilogue: Expr | Bound = acc,
    ue8m0: bool = False,
    schedule: Schedule | None = None,
    batch_invariant: bool = False,
    debug: bool = False,
) -> Any:
    """For the rows of each group g: D = epilogue((A * sfa) @ (B[g] * sfb[g])^T), in one launch.

    With KGrouped, for weight gradients, groups are parts of k instead, each a multiple of 128: D[g]
    += A[:, ks_g] @ B[:, ks_g]^T, both scaled, in float32. A group of no k leaves its D alone.

    Which rows are whose is read on the device when the kernel runs: no synchronization, and a CUDA
    graph replays with what the layout's tensor holds then. Rows of no group are neither read into a
    result nor written: in `out` they stay as they were, in a new array they hold anything.

    Parameters
    ----------
    a : float8_e4m3fn [m, k] or, with Masked, [num_groups, max_m, k], row-major; k % 16 == 0
    b : float8_e4m3fn [num_groups, n, k] or, with KGrouped, [n, k], row-major; n % 8 == 0, 1 to 512
        groups
    scales : the pair of sfa float32 [m, ceil(k/128)] or [num_groups, max_m, ceil(k/128)], with any
        strides, and sfb float32 [num_groups, ceil(n/128), ceil(k/128)], row-major, or, with
        KGrouped, [n, k/128], with any strides
    layout : Ragged(offsets), Contiguous(group_of_row or group_ends), Masked(rows) or
        KGrouped(offsets): int32 arrays of the same kind as a. Faulty ones are clamped: no row (or
        column, with KGrouped, which cuts them to multiples of 128) is in two groups, or beyond the
        end
    out : where to put D or, with KGrouped, what to add to; a new array if None, of zeros then
    out_dtype, epilogue, ue8m0, schedule, batch_invariant : as for `gemm`. Vectors of the epilogue
        are [num_groups, n], one a group; its matrices have the rows of D. KGrouped makes float32,
        with no epilogue
    debug : raise ProblemError if the layout's tensor is faulty; copies it to the host and waits

    Returns
    -------
    bfloat16 or float32 [m, n] or, with Masked, [num_groups, max_m, n]; `out` if it was given. With
    float8_e4m3fn the pair of D and its scales, as `gemm`. With KGrouped float32 [num_groups, m, n]

    Raises
    ------
    As `gemm`
    """
    bound = _check_options(scales, epilogue, schedule)
    check_layout(layout)
    if debug:
        _check_values(a, b, layout)
    return _run(a, b, scales, bound, out, out_dtype, schedule, batch_invariant, layout, ue8m0)


def bind(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    *,
    out: Any,
    epilogue: Expr | Bound = acc,
    ue8m0: bool = False,
    schedule: Schedule | None = None,
    batch_invariant: bool = False,
    layout: GroupLayout | None = None,
) -> Callable[[], Any]:
    """`gemm` on these very arrays, checked and prepared once, to be called many times.

    For static buffers, CUDA graphs and benchmarks. A call reads what the arrays hold then, writes D
    to `out` and returns it; tensors run on their device, ordered on the stream that is current at
    the call. Threads may share the callable.

    Parameters
    ----------
    a, b, scales, epilogue : as for `gemm`; kept alive by the callable. It knows their memory: to
        resize a tensor or to give it other storage does not reach it
    out : where to put D: bfloat16 or float32 [m, n], rows a multiple of 16 bytes apart; or the pair
        of D, float8_e4m3fn, and its scales
    ue8m0, schedule, batch_invariant : as for `gemm`
    layout : makes it a `grouped_gemm`, of arrays as that takes them

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
    if layout is not None:
        check_layout(layout)
    if is_foreign(a):
        loan = borrow_call(a, b, scales, bound, out, layout)
        run = bind(
            *(loan.a, loan.b, loan.scales),
            out=loan.out,
            epilogue=loan.bound,
            ue8m0=ue8m0,
            schedule=schedule,
            batch_invariant=batch_invariant,
            layout=loan.layout,
        )
        return loan.in_order(run)
    arrays = name_arrays(a, b, scales, bound, out, layout)
    if isinstance(a, np.ndarray):
        return _bind_numpy(arrays, None, bound, schedule, batch_invariant, layout, ue8m0)
    call, addresses = find_call(
        a, b, scales, bound, out, None, schedule, batch_invariant, layout, ue8m0
    )
    return call.bind(addresses, arrays)


def _check_options(scales: object, epilogue: Any, schedule: object) -> Bound:
    """The epilogue with its operands; scales must be a pair and schedule a Schedule or None."""
    if not isinstance(scales, (tuple, list)) or len(scales) != 2:
        raise ProblemError(f"scales must be the pair (sfa, sfb), got {type(scales).__name__}")
    if not isinstance(schedule, (Schedule, NoneType)):
        raise ScheduleError(f"schedule is a {type(schedule).__name__}, must be a jitgen.Schedule")
    if isinstance(epilogue, Bound):
        return epilogue
    return PLAIN if epilogue is acc else Bound(as_expr(epilogue), {})


def _run(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    bound: Bound,
    out: Any,
    out_dtype: object,
    schedule: Schedule | None,
    batch_invariant: bool,
    layout: GroupLayout | None,
    ue8m0: bool,
) -> Any:
    """Interpret or launch, once."""
    if isinstance(a, np.ndarray):
        arrays = name_arrays(a, b, scales, bound, out, layout)
        return _bind_numpy(arrays, out_dtype, bound, schedule, batch_invariant, layout, ue8m0)()
    try:
        call, addresses = find_call(
            a, b, scales, bound, out, out_dtype, schedule, batch_invariant, layout, ue8m0
        )
    except ProblemError:
        if not is_foreign(a):
            raise
        loan = borrow_call(a, b, scales, bound, out, layout)
        loan.check_output(out_dtype)
        operands = (loan.a, loan.b, loan.scales, loan.bound, loan.out)
        made = _run(*operands, out_dtype, schedule, batch_invariant, loan.layout, ue8m0)
        return loan.give_back(made)
    if out is None:
        outputs = call.empty()
        addresses += tuple(tensor.data_ptr() for tensor in outputs)
        out = outputs if len(outputs) > 1 else outputs[0]
    call.launch(addresses)
    return out


def _bind_numpy(
    arrays: dict[str, Any],
    out_dtype: object,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
    layout: GroupLayout | None,
    ue8m0: bool,
) -> Callable[[], Any]:
    """Check everything; what comes back interprets the call."""
    from .interpret import interpret
    from .lower import lower

    views = {name: numpy_view(name, array) for name, array in arrays.items()}
    out = arrays.pop("d", None)
    if "sfd" in arrays:
        out = out, arrays.pop("sfd")
    problem, m = check_gemm(views, out_dtype, bound, layout, ue8m0)
    rows = expected_rows(problem, m, layout.expected_rows if layout else None)
    kernel = lower(problem, schedule or select(problem, rows, batch_invariant=batch_invariant))
    return functools.partial(interpret, kernel, arrays, out=out)


def _check_values(a: Any, b: Any, layout: GroupLayout) -> None:
    """Raise ProblemError if the layout's tensor is faulty; a GPU's is copied, which waits for it.

    What has not even the right shape is left to the rules that hold without `debug`.
    """
    values = layout.tensor
    if is_foreign(values):
        values = borrow("groups", values, a)
    if not isinstance(values, np.ndarray):
        values = values.cpu().numpy()
    by_k = layout.kind == "k_grouped"
    if a.ndim < 2 or b.ndim != 3 - by_k or values.ndim != 1:
        return
    num_groups = len(values) - 1 if by_k else b.shape[0]
    problem = GroupedGemm(
        *b.shape[-2:], num_groups=num_groups, layout=layout.kind, alignment=layout.alignment
    )
    m = a.shape[-1 if by_k else -2]
    if values.shape == (num_values(problem, m),) and (fault := find_fault(problem, values, m)):
        raise ProblemError(fault)
