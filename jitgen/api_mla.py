"""MLA decode for users: torch CUDA tensors run on the GPU, NumPy arrays on the interpreter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from .api_quantize import quantize
from .arrays import numpy_view
from .arrays_mla import NAMES, check_mla_call, check_mla_out
from .calls_mla import mla_on_device
from .errors import ProblemError, ScheduleError
from .problem_mla import FP8_HEAD_DIMS, SCALE_COLUMNS, TOKEN_BYTES
from .schedule_mla import MlaSchedule, num_parts
from .target import H100
from .tokens_mla import CODES, COLUMNS, quantize_tokens
from .tuning.select import select

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
    batch_invariant: bool = False,
) -> tuple[Any, Any]:
    """(o, lse): attention of each sequence's query tokens over its paged latent keys.

    o = softmax(softmax_scale * q k^T) v with k the sequence's first seqlens_k keys and v their
    first head_dim_v columns, accumulated in FP32. What lies in unused pages, behind the last key
    of a page, and in unused slots of the block table is never looked at.

    Parameters
    ----------
    q : bfloat16 or float16 [b, s_q, h_q, head_dim], s_q in 1..8, h_q in 1..128; rows evenly spaced
    kv_cache : of the same dtype, [num_blocks, page, 1, head_dim], page 16, 32, 64 or 128; or, for
        bfloat16 q of head_dim 576, an FP8 one as `quantize_mla_cache` makes it, uint8
        [num_blocks, page, 1, 656], page in 1..4096
    block_table : int32 [b, max_pages], for each sequence the blocks of its pages, in order
    seqlens_k : int32 [b], keys of each sequence, at most max_pages * page
    head_dim_v : (head_dim, head_dim_v) must be (576, 512), (512, 512) or (320, 256)
    softmax_scale : positive; default head_dim^-0.5
    causal : token t of s_q sees s_q - 1 - t keys less than the last one
    plan : workspace of this call; default one a stream or, under capture, memory of the graph
    out : where to put o, contiguous; a new array if None
    schedule : pins the schedule; None lets jitgen choose
    batch_invariant : no sequence is split, so that its bits do not depend on the others of the
        batch; slow where there are fewer sequences than multiprocessors

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
    given = dict(zip(NAMES, (q, kv_cache, block_table, seqlens_k), strict=True))
    return _decode(given, head_dim_v, softmax_scale, causal, plan, out, schedule, batch_invariant)


def mla_decode_sparse(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    topk_length: Any = None,
    attention_sink: Any = None,
    softmax_scale: float | None = None,
    plan: MlaPlan | None = None,
    out: Any = None,
    schedule: MlaSchedule | None = None,
    batch_invariant: bool = False,
) -> tuple[Any, Any]:
    """(o, lse): attention of each query token over its own list of tokens of an FP8 cache.

    o = softmax(softmax_scale * q k^T) v with k the listed tokens, as often as they are listed, and
    v their first 512 columns. Entries that are no token of the cache (negative, or too large) are
    skipped, and no other tokens are looked at.

    Parameters
    ----------
    q : bfloat16 [b, s_q, h_q, 576], s_q in 1..8, h_q in 1..128; rows evenly spaced
    kv_cache : uint8 [num_blocks, page, 1, 656], as `quantize_mla_cache` makes it, page in 1..4096
    indices : int32 [b, s_q, topk], tokens of the cache: block * page + position in the block
    topk_length : int32 [b], how many entries of each list of a sequence count; None for all
    attention_sink : float32 [h_q], in natural units: o is divided by e^sink more than the sum of
        its keys' weights; lse is without
    softmax_scale : positive; default 576^-0.5
    plan, out, schedule, batch_invariant : as of `mla_decode`

    Returns
    -------
    o bfloat16 [b, s_q, h_q, 512], `out` if it was given; lse float32 [b, h_q, s_q], natural
    logarithm; a row without keys has o = 0 and lse = +inf

    Raises
    ------
    As `mla_decode`
    """
    given = {"q": q, "kv_cache": kv_cache, "indices": indices}
    if topk_length is not None:
        given["topk_length"] = topk_length
    if attention_sink is not None:
        given["sink"] = attention_sink
    return _decode(
        given, FP8_HEAD_DIMS[1], softmax_scale, False, plan, out, schedule, batch_invariant
    )


def quantize_mla_cache(keys: Any) -> Any:
    """uint8 [.., 656]: keys as tokens of an FP8 cache of `mla_decode`, the format of FlashMLA.

    A token's first 512 columns become E4M3 codes with a float32 scale for each 128 of them, as
    `quantize` makes them; the last 64 columns stay bfloat16. The same bits from NumPy and torch.
    Magnitudes must stay below 57344: a scale, their largest in 128 columns / 448, below 128.

    Parameters
    ----------
    keys : bfloat16 [.., 576]: NumPy array, or torch tensor on any device

    Raises
    ------
    ProblemError : keys are not such an array, or (NumPy) not finite
    """
    if isinstance(keys, np.ndarray):
        return quantize_tokens(keys)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(keys, torch.Tensor):
        raise ProblemError(f"keys are a {type(keys).__name__}, must be an array")
    if keys.dtype != torch.bfloat16 or keys.ndim == 0 or keys.shape[-1] != COLUMNS:
        raise ProblemError(
            f"keys are {keys.dtype}{list(keys.shape)}, must be bfloat16 [.., {COLUMNS}]"
        )
    rows = keys.reshape(-1, COLUMNS)
    codes, scales = quantize(rows[:, :CODES].contiguous(), (1, SCALE_COLUMNS))
    parts = (codes, scales, rows[:, CODES:].contiguous())
    tokens = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    return tokens.view(*keys.shape[:-1], TOKEN_BYTES)


def _decode(
    given: dict[str, Any],
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    plan: MlaPlan | None,
    out: Any,
    schedule: MlaSchedule | None,
    batch_invariant: bool,
) -> tuple[Any, Any]:
    if not isinstance(schedule, (MlaSchedule, type(None))):
        raise ScheduleError(
            f"schedule is a {type(schedule).__name__}, must be a jitgen.MlaSchedule"
        )
    if isinstance(given["q"], np.ndarray):
        return _interpret(given, head_dim_v, softmax_scale, causal, out, schedule, batch_invariant)
    return mla_on_device(
        given, head_dim_v, softmax_scale, causal, plan, out, schedule, batch_invariant
    )


def _interpret(
    arrays: dict[str, Any],
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    out: Any,
    schedule: MlaSchedule | None,
    batch_invariant: bool,
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
    chosen = schedule or select(
        about.problem, about.batch, max_keys=about.max_keys, batch_invariant=batch_invariant
    )
    kernel = lower_mla(about.problem, chosen)
    if about.problem.sparse and "topk_length" not in arrays:
        arrays = {**arrays, "topk_length": np.full(about.batch, about.topk, np.int32)}
    o, lse = interpret_mla(
        kernel,
        arrays,
        softmax_scale=about.scale_log2 / LOG2_E,
        num_parts=num_parts(kernel.body.tiles, H100.num_sms, kernel.schedule.meet),
    )
    if out is None:
        return o, lse
    out[...] = o
    return out, lse
