"""The rules that the arrays of an MLA decode call must keep: tensors and NumPy arrays alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .arrays import ADDRESS_UNIT, ArrayView
from .dtypes import BF16, F16, F32
from .errors import ProblemError
from .problem import MAX_EXTENT
from .problem_mla import TOKEN_BYTES, MlaDecode, check_mla

NAMES = ("q", "kv_cache", "block_table", "seqlens_k")
SPARSE_NAMES = ("q", "kv_cache", "indices", "topk_length", "sink")  # the last two if given


@dataclass(frozen=True)
class MlaCall:
    """What a call is about beside addresses.

    pitch_q, pitch_kv : elements from one query row, one key, to the next
    page_rows : keys from one page to the next, in units of pitch_kv
    list_stride : elements from one row of the block table, or of indices, to the next
    topk : entries of a list of sparse decode, 0 if dense
    max_keys : of a sequence, or that a query token looks at: for which there is room in the lists
    scale_log2 : softmax_scale * log2(e)
    """

    problem: MlaDecode
    batch: int
    num_blocks: int
    list_stride: int
    pitch_q: int
    pitch_kv: int
    page_rows: int
    topk: int
    max_keys: int
    scale_log2: float


def check_mla_call(
    views: Mapping[str, ArrayView], head_dim_v: int, softmax_scale: float | None, causal: bool
) -> MlaCall:
    """The problem and the layout of a call, sparse if it has `indices`.

    Raises
    ------
    ProblemError : an array breaks a rule of `jitgen.mla_decode`, or of `jitgen.mla_decode_sparse`;
        says which, and what is legal
    """
    q, kv, is_sparse = views["q"], views["kv_cache"], "indices" in views
    if len(q.shape) != 4 or len(kv.shape) != 4 or kv.shape[2] != 1:
        raise ProblemError(
            f"{q}; {kv}: q must be [b, s_q, h_q, head_dim], kv_cache [num_blocks, page, 1,"
            " head_dim]"
        )
    batch, num_queries, num_heads, head_dim = q.shape
    is_fp8 = kv.dtype.name == "uint8"
    if is_fp8 and kv.shape[3] != TOKEN_BYTES:
        raise ProblemError(f"{kv}: an FP8 cache has {TOKEN_BYTES} bytes a token")
    if is_fp8 and kv.shape[0] == 0:
        raise ProblemError(f"{kv}: an FP8 cache must have a block")
    if is_sparse and not is_fp8:
        raise ProblemError(f"{kv}: sparse decode takes an FP8 cache, uint8 [.., {TOKEN_BYTES}]")
    if q.dtype not in (BF16, F16) or not (is_fp8 or (kv.dtype, kv.shape[3]) == (q.dtype, head_dim)):
        raise ProblemError(f"{q}; {kv}: must have one head_dim and one dtype, bfloat16 or float16")
    problem = MlaDecode(
        num_heads,
        num_queries,
        head_dim,
        head_dim_v,
        kv.shape[1],
        q.dtype,
        bool(causal) and num_queries > 1,
        "fp8" if is_fp8 else "plain",
        is_sparse,
        "sink" in views,
    )
    check_mla(problem)
    list_stride = _check_lists(views, problem, batch)
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ProblemError(f"softmax_scale = {softmax_scale} must be positive and finite")
    pitch_q = _row_pitch(q, (num_queries * num_heads, num_heads, 1))
    # A page of one token has no next row: its stride may be anything.
    pitch_kv = kv.strides[1] if kv.shape[1] > 1 else kv.shape[3]
    page_rows, rest = divmod(kv.strides[0], max(pitch_kv, 1))
    if is_fp8 and pitch_kv != TOKEN_BYTES:
        raise ProblemError(f"{kv}: the tokens of a page must follow one another")
    if kv.shape[0] > 1 and (rest or page_rows < 1):  # pages may overlap
        raise ProblemError(f"{kv}: pages must be whole multiples of its row stride apart")
    for view, pitch in ((q, pitch_q), (kv, pitch_kv)):
        pitch_bytes = pitch * view.dtype.size_bytes
        if (
            view.strides[3] != 1
            or pitch < view.shape[3]
            or pitch_bytes % ADDRESS_UNIT
            or view.address % ADDRESS_UNIT
        ):
            raise ProblemError(
                f"{view}: rows must be contiguous, and begin at multiples of {ADDRESS_UNIT} bytes"
            )
    num_rows = batch * num_queries * num_heads
    if kv.shape[0] * page_rows > MAX_EXTENT or num_rows > MAX_EXTENT:
        raise ProblemError(f"{kv}; {q}: more than {MAX_EXTENT} rows cannot be addressed")
    if is_fp8 and problem.num_rows * pitch_q > MAX_EXTENT:
        raise ProblemError(f"{q}: the rows of a sequence are too far apart to be addressed")
    topk = views["indices"].shape[2] if is_sparse else 0
    return MlaCall(
        problem,
        batch,
        kv.shape[0],
        list_stride,
        pitch_q,
        pitch_kv,
        page_rows,
        topk,
        topk if is_sparse else views["block_table"].shape[1] * problem.page,
        scale * math.log2(math.e),
    )


def _check_lists(views: Mapping[str, ArrayView], problem: MlaDecode, batch: int) -> int:
    """Check what says which keys a sequence, or a query token, has; the stride of those lists."""
    wanted: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "block_table": ("int32", (batch, "max_pages")),
        "seqlens_k": ("int32", (batch,)),
        "indices": ("int32", (batch, problem.num_queries, "topk")),
        "topk_length": ("int32", (batch,)),
        "sink": (F32.name, (problem.num_heads,)),
    }
    for name, (dtype, shape) in wanted.items():
        view = views.get(name)
        if view is None:
            continue
        fits = len(view.shape) == len(shape) and all(
            isinstance(want, str) or want == got
            for want, got in zip(shape, view.shape, strict=True)
        )
        if view.dtype.name != dtype or not fits or view.address % 4:
            raise ProblemError(f"{view}: must be {dtype} {list(shape)}".replace("'", ""))
        if view.shape[-1] > 1 and view.strides[-1] != 1:
            raise ProblemError(f"{view}: its last dimension must be contiguous")
    lists = views["indices" if problem.sparse else "block_table"]
    return _row_pitch(lists, (problem.num_queries, 1)[-len(lists.shape) + 1 :])


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
