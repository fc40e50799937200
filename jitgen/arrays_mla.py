"""The rules that the arrays of an MLA decode call must keep: tensors and NumPy arrays alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .arrays import ADDRESS_UNIT, ArrayView
from .dtypes import BF16, F16
from .errors import ProblemError
from .problem import MAX_EXTENT
from .problem_mla import MlaDecode, check_mla

NAMES = ("q", "kv_cache", "block_table", "seqlens_k")


@dataclass(frozen=True)
class MlaCall:
    """What a call is about beside addresses.

    pitch_q, pitch_kv : elements from one query row, one key, to the next
    page_rows : keys from one page to the next, in units of pitch_kv
    scale_log2 : softmax_scale * log2(e)
    """

    problem: MlaDecode
    batch: int
    num_blocks: int
    block_table_stride: int
    pitch_q: int
    pitch_kv: int
    page_rows: int
    scale_log2: float


def check_mla_call(
    views: Mapping[str, ArrayView], head_dim_v: int, softmax_scale: float | None, causal: bool
) -> MlaCall:
    """The problem and the layout of a call.

    Raises
    ------
    ProblemError : an array breaks a rule of `jitgen.mla_decode`; says which, and what is legal
    """
    q, kv, table, lengths = (views[name] for name in NAMES)
    if len(q.shape) != 4 or len(kv.shape) != 4 or kv.shape[2] != 1:
        raise ProblemError(
            f"{q}; {kv}: q must be [b, s_q, h_q, head_dim], kv_cache [num_blocks, page, 1,"
            " head_dim]"
        )
    batch, num_queries, num_heads, head_dim = q.shape
    if q.dtype not in (BF16, F16) or kv.dtype != q.dtype or kv.shape[3] != head_dim:
        raise ProblemError(f"{q}; {kv}: must have one head_dim and one dtype, bfloat16 or float16")
    problem = MlaDecode(
        num_heads,
        num_queries,
        head_dim,
        head_dim_v,
        kv.shape[1],
        q.dtype,
        bool(causal) and num_queries > 1,
    )
    check_mla(problem)
    for view, shape in ((table, (batch, *table.shape[1:2])), (lengths, (batch,))):
        if view.dtype.name != "int32" or view.shape != shape or len(view.shape) != len(shape):
            raise ProblemError(f"{view}: must be int32{[batch, 'max_pages'][: len(shape)]}")
        if view.shape and view.shape[-1] > 1 and view.strides[-1] != 1:
            raise ProblemError(f"{view}: its last dimension must be contiguous")
    if len(table.shape) != 2:
        raise ProblemError(f"{table}: must be int32 [b, max_pages]")
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ProblemError(f"softmax_scale = {softmax_scale} must be positive and finite")
    pitch_q = _row_pitch(q, (num_queries * num_heads, num_heads, 1))
    pitch_kv = kv.strides[1]
    page_rows, rest = divmod(kv.strides[0], max(pitch_kv, 1))
    if kv.shape[0] > 1 and (rest or page_rows < 1):  # pages may overlap
        raise ProblemError(f"{kv}: pages must be whole multiples of its row stride apart")
    for view, pitch in ((q, pitch_q), (kv, pitch_kv)):
        if view.strides[3] != 1 or pitch < head_dim or pitch % 8 or view.address % ADDRESS_UNIT:
            raise ProblemError(
                f"{view}: rows must be contiguous, and begin at multiples of {ADDRESS_UNIT} bytes"
            )
    if kv.shape[0] * page_rows > MAX_EXTENT or batch * problem.num_rows > MAX_EXTENT:
        raise ProblemError(f"{kv}; {q}: more than {MAX_EXTENT} rows cannot be addressed")
    stride = table.strides[0] if batch > 1 else table.shape[1]
    return MlaCall(
        problem,
        batch,
        kv.shape[0],
        stride,
        pitch_q,
        pitch_kv,
        page_rows,
        scale * math.log2(math.e),
    )


def check_mla_out(view: ArrayView, problem: MlaDecode, batch: int) -> None:
    """Raise ProblemError unless o can be written there."""
    shape = (batch, problem.num_queries, problem.num_heads, problem.head_dim_v)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(4))
    is_dense = all(
        stride == want or extent <= 1
        for stride, want, extent in zip(view.strides, strides, shape, strict=False)
    )
    if view.shape != shape or view.dtype != problem.dtype or not is_dense:
        raise ProblemError(f"{view}: must be {problem.dtype.name}{list(shape)}, contiguous")
    if view.address % ADDRESS_UNIT:
        raise ProblemError(f"{view}: its address must be a multiple of {ADDRESS_UNIT}")


def _row_pitch(view: ArrayView, units: tuple[int, ...]) -> int:
    """The stride between rows, of which the outer dimensions' must be these multiples."""
    outer = list(zip(view.shape, view.strides, units, strict=False))
    used = [(stride, unit) for extent, stride, unit in outer if extent > 1]
    if not used:
        return view.shape[-1]
    pitch = used[-1][0] // used[-1][1]
    if any(stride != pitch * unit for stride, unit in used):
        raise ProblemError(f"{view}: its rows must be evenly spaced: call .contiguous()")
    return pitch
