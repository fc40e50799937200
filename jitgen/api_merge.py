"""Merging attention results for users: torch CUDA tensors on the GPU, NumPy arrays on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import ADDRESS_UNIT, ArrayView, numpy_view
from .calls import Call, Prepared, check_device, load
from .dtypes import F32, array_dtype
from .errors import ProblemError
from .merge import (
    MergeSchedule,
    MergeStates,
    check_merge,
    interpret_merge,
    lower_merge,
    num_merge_blocks,
)
from .problem import MAX_EXTENT
from .runtime import driver
from .runtime.launch import Argument, LaunchPool, Pointer, UInt32

if TYPE_CHECKING:
    import torch

NAMES = ("o_a", "lse_a", "o_b", "lse_b")


def merge_states(o_a: Any, lse_a: Any, o_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """(o, lse) of attention over two sets of keys, from its results over each.

    Parameters
    ----------
    o_a, o_b : bfloat16, float16 or float32 [b, s_q, h_q, head_dim_v], contiguous; head_dim_v a
        multiple of 8
    lse_a, lse_b : float32 [b, h_q, s_q], contiguous, natural logarithms as `mla_decode` returns
        them; a row of no keys has +inf (or -inf), and its o is not looked at

    Returns
    -------
    o like o_a and lse like lse_a; rows without keys in either have o = 0 and lse = +inf

    Raises
    ------
    ProblemError : a dtype, shape or stride breaks a rule above
    DeviceError : tensors are not on one CUDA device of compute capability 9.0
    CaptureError, CompileError, StoreError, JitForbiddenError : as `mla_decode`
    """
    given = dict(zip(NAMES, (o_a, lse_a, o_b, lse_b), strict=True))
    if isinstance(o_a, np.ndarray):
        for name, array in given.items():
            if not isinstance(array, np.ndarray):
                kind = type(array).__name__
                raise ProblemError(f"{name} is a {kind}, o_a is a NumPy array: convert it")
        problem = _check({name: numpy_view(name, array) for name, array in given.items()})
        return interpret_merge(lower_merge(problem, MergeSchedule()), given)
    return _on_device(given)


def _check(views: dict[str, ArrayView]) -> MergeStates:
    """The problem that the arrays pose; ProblemError if they break a rule."""
    o, lse = views["o_a"], views["lse_a"]
    if len(o.shape) != 4:
        raise ProblemError(f"{o}: must be [b, s_q, h_q, head_dim_v]")
    problem = MergeStates(o.shape[3], o.dtype)
    check_merge(problem)
    b, s_q, h_q, _ = o.shape
    wanted = {"o": (o.dtype, o.shape), "lse": (F32, (b, h_q, s_q))}
    for name, view in views.items():
        dtype, shape = wanted[name[:-2]]
        if view.dtype != dtype or view.shape != shape:
            raise ProblemError(f"{view}: must be {dtype.name}{list(shape)}")
        stride = 1
        for extent, given in zip(reversed(shape), reversed(view.strides), strict=True):
            if extent > 1 and given != stride:
                raise ProblemError(f"{view}: must be contiguous")
            stride *= extent
        if dtype == o.dtype and len(shape) == 4 and view.address % ADDRESS_UNIT:
            raise ProblemError(f"{view}: must begin at a multiple of {ADDRESS_UNIT} bytes")
    if lse.shape[0] * h_q * s_q > MAX_EXTENT:
        raise ProblemError(f"{o}: more than {MAX_EXTENT} rows cannot be addressed")
    return problem


def _on_device(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        signature: tuple[Any, ...] = tuple(
            (t.dtype, t.shape, t.stride(), t.device) for t in given.values()
        )
        addresses = tuple(t.data_ptr() for t in given.values())
    except AttributeError as error:
        raise ProblemError(
            f"{', '.join(NAMES)} must be all torch tensors, or all NumPy arrays: {error}"
        ) from error
    signature += tuple(address % ADDRESS_UNIT for address in addresses)
    call = _calls.get(signature)
    if call is None:
        call = _calls.keep(signature, _prepare(given))
    o, lse = call.empty()
    call.launch((*addresses, o.data_ptr(), lse.data_ptr()))
    return o, lse


_calls: Prepared[Call] = Prepared()


def _prepare(given: dict[str, torch.Tensor]) -> Call:
    """Check everything, then build, load and lay out the launches of one signature."""
    device = given["o_a"].device
    check_device(given, device)
    driver.check_architecture(driver.device(device.index))
    views = {
        name: ArrayView(
            name, array_dtype(t.dtype, t.itemsize), tuple(t.shape), tuple(t.stride()), t.data_ptr()
        )
        for name, t in given.items()
    }
    problem = _check(views)
    o, lse = views["o_a"], views["lse_a"]
    outputs = [ArrayView("o", o.dtype, o.shape, ()), ArrayView("lse", F32, lse.shape, ())]
    b, s_q, h_q, _ = o.shape
    if b * s_q * h_q == 0:
        return Call(device, outputs, None)
    kernel, loaded = load(problem, MergeSchedule(), device.index)
    sizes = {"num_rows": b * s_q * h_q, "num_queries": s_q, "num_heads": h_q}
    arguments: list[Argument] = [Pointer(i) for i in range(len(kernel.tensors))]
    arguments += [UInt32(sizes[p.name]) for p in kernel.parameters[len(arguments) :]]
    launches = LaunchPool(
        loaded,
        arguments,
        grid=num_merge_blocks(kernel, b * s_q * h_q),
        num_threads=kernel.num_threads,
    )
    return Call(device, outputs, launches)
