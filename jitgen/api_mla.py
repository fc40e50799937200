"""MLA decode for users: torch CUDA tensors run on the GPU, NumPy arrays on the interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import numpy_view
from .arrays_mla import NAMES, check_mla_call, check_mla_out
from .calls_mla import mla_on_device
from .errors import ProblemError, ScheduleError
from .schedule_mla import MlaSchedule, num_parts, select_mla
from .target import H100

if TYPE_CHECKING:
    from .calls_mla import MlaPlan


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    seqlens_k: Any,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = True,
    plan: MlaPlan | None = None,
    out: Any = None,
    schedule: MlaSchedule | None = None,
) -> tuple[Any, Any]:
    """(o, lse): attention of each sequence's query tokens over its paged latent keys.

    o = softmax(softmax_scale * q k^T) v with k the sequence's first seqlens_k keys and v their
    first head_dim_v columns, accumulated in FP32. What lies in unused pages, behind the last key
    of a page, and in unused slots of the block table is never looked at.

    Parameters
    ----------
    q : bfloat16 or float16 [b, s_q, h_q, head_dim], s_q in 1..8, h_q in 1..128; rows evenly spaced
    kv_cache : of the same dtype, [num_blocks, page, 1, head_dim], page 16, 32, 64 or 128
    block_table : int32 [b, max_pages], for each sequence the blocks of its pages, in order
    seqlens_k : int32 [b], keys of each sequence, at most max_pages * page
    head_dim_v : (head_dim, head_dim_v) must be (576, 512), (512, 512) or (320, 256)
    softmax_scale : positive; default head_dim^-0.5
    causal : token t of s_q sees s_q - 1 - t keys less than the last one
    plan : workspace of this call; default one a stream or, under capture, memory of the graph
    out : where to put o, contiguous; a new array if None
    schedule : pins the schedule; None lets jitgen choose

    The sequences are split over the GPU by their lengths as the kernel finds them: a captured call
    may be replayed with other lengths, and gives the bits of an eager call. All are torch CUDA
    tensors of one device, or all are NumPy arrays. Tensors run on their device, ordered on its
    current stream; arrays run on the interpreter (see jitgen/interpret_mla.py for how near).

    Returns
    -------
    o of q's dtype [b, s_q, h_q, head_dim_v], `out` if it was given;
    lse float32 [b, h_q, s_q], natural logarithm; a row without keys has o = 0 and lse = +inf

    Raises
    ------
    ProblemError : a dtype, shape or stride breaks a rule above; says which, and what is legal
    ScheduleError : `schedule` cannot run this problem
    DeviceError : tensors are not on one CUDA device of compute capability 9.0, or `plan` is
        another device's
    CaptureError : the current stream is being captured, and the kernel is not loaded yet
    CompileError, StoreError : the kernel is not in the store and cannot be compiled or stored
    JitForbiddenError : it is not in the store, and `configure` forbids to compile
    """
    if not isinstance(schedule, (MlaSchedule, type(None))):
        raise ScheduleError(
            f"schedule is a {type(schedule).__name__}, must be a jitgen.MlaSchedule"
        )
    tensors = (q, kv_cache, block_table, seqlens_k)
    if not isinstance(q, np.ndarray):
        return mla_on_device(tensors, head_dim_v, softmax_scale, causal, plan, out, schedule)
    arrays = dict(zip(NAMES, tensors, strict=True))
    return _interpret(arrays, head_dim_v, softmax_scale, causal, out, schedule)


def _interpret(
    arrays: dict[str, Any],
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    out: Any,
    schedule: MlaSchedule | None,
) -> tuple[Any, Any]:
    """Check everything, and interpret the call."""
    from .interpret_mla import LOG2_E, interpret_mla
    from .lower_mla import lower_mla

    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ProblemError(
                f"{name} is a {type(array).__name__}, q is a NumPy array: convert it"
            )
    about = check_mla_call(
        {name: numpy_view(name, array) for name, array in arrays.items()},
        head_dim_v,
        softmax_scale,
        causal,
    )
    if out is not None:
        check_mla_out(numpy_view("out", out), about.problem, about.batch)
    kernel = lower_mla(about.problem, schedule or select_mla(about.problem))
    o, lse = interpret_mla(
        kernel,
        arrays,
        softmax_scale=about.scale_log2 / LOG2_E,
        num_parts=num_parts(about.problem, H100.num_sms),
    )
    if out is None:
        return o, lse
    out[...] = o
    return out, lse
