"""Lowering of MLA decode: problem and schedule to the tile program."""

from __future__ import annotations

import math

from .dtypes import F32
from .ir import Buffer
from .ir_mla import (
    Attend,
    Fill,
    ForKeys,
    ForSegments,
    LoadKeys,
    LoadQueries,
    LoadTokens,
    Mask,
    MaskTokens,
    Merge,
    MlaKernel,
    MlaTensor,
    Score,
    Soften,
    Split,
    StoreOutput,
)
from .problem_mla import TOKEN_BYTES, MlaDecode, check_mla
from .schedule_mla import (
    BLOCK_KEYS,
    CHUNK_COLUMNS,
    LOADER_WARPS,
    MlaSchedule,
    check_mla_schedule,
    mla_smem_plan,
    num_tiles,
    own_tokens,
    stages_tokens,
)
from .target import SM90A, Target


def lower_mla(problem: MlaDecode, schedule: MlaSchedule, target: Target = SM90A) -> MlaKernel:
    """The tile program of `problem` under `schedule`.

    Raises
    ------
    ProblemError, ScheduleError : a rule of check_mla or check_mla_schedule is broken
    """
    check_mla(problem)
    check_mla_schedule(problem, schedule, target)
    return MlaKernel(
        name=mla_kernel_name(problem, schedule),
        family="mla_decode_fp8" if problem.is_fp8 else "mla_decode",
        problem=problem,
        schedule=schedule,
        target=target,
        tensors=tuple(mla_tensors(problem).values()),
        smem=mla_smem_plan(problem, schedule),
        body=_body(problem, schedule),
    )


def mla_kernel_name(problem: MlaDecode, schedule: MlaSchedule) -> str:
    """The kernel's `extern "C"` name: stable, and found by those who look for FlashMLA's."""
    p, s = problem, schedule
    mask, ahead = "_causal" if p.causal else "", "_ahead" if s.score_ahead else ""
    ahead += "_whole" if s.whole else ""
    meet = f"_m{s.meet}" if s.meet > 1 else ""
    once = f"_e{s.evict_first}" if s.evict_first else ""
    form = "_fp8" * p.is_fp8 + "_sparse" * p.sparse
    return (
        f"flash_fwd_splitkv_mla{form}_kernel{'_sink' * p.sink}_{p.dtype}_h{p.num_heads}"
        f"_q{p.num_queries}_d{p.head_dim_qk}x{p.head_dim_v}_p{p.page}{mask}"
        f"_r{s.tile_rows}_c{s.cluster}{meet}_s{s.num_stages}_f{s.prefetch}_o{s.overhead}"
        f"_t{s.slack}{once}{ahead}"
    )


def mla_tensors(problem: MlaDecode) -> dict[str, MlaTensor]:
    """The tensors of `problem` by name, outputs last."""
    p, kind = problem, problem.dtype.short
    token: tuple[str, int] = ("u8", TOKEN_BYTES) if p.is_fp8 else (kind, p.head_dim_qk)
    where: tuple[MlaTensor, ...] = (
        MlaTensor("block_table", "i32", ("b", "max_pages")),
        MlaTensor("seqlens_k", "i32", ("b",)),
    )
    if p.sparse:
        where = (
            MlaTensor("indices", "i32", ("b", p.num_queries, "topk")),
            MlaTensor("topk_length", "i32", ("b",)),
        )
    if p.sink:
        where += (MlaTensor("sink", "f32", (p.num_heads,)),)
    tensors = (
        MlaTensor("q", kind, ("b", p.num_queries, p.num_heads, p.head_dim_qk)),
        MlaTensor("kv_cache", token[0], ("num_blocks", p.page, 1, token[1])),
        *where,
        MlaTensor("o", kind, ("b", p.num_queries, p.num_heads, p.head_dim_v)),
        MlaTensor("lse", "f32", ("b", p.num_heads, p.num_queries)),
    )
    return {tensor.name: tensor for tensor in tensors}


def _body(problem: MlaDecode, schedule: MlaSchedule) -> ForSegments:
    tensors, dtype = mla_tensors(problem), problem.dtype
    rows, keys = schedule.tile_rows, BLOCK_KEYS
    smem_q = Buffer("smem_q", dtype, (rows, problem.head_dim_qk), "smem", swizzle_bytes=128)
    smem_k = Buffer("smem_k", dtype, (keys, problem.head_dim_qk), "smem", True, 128)
    scores = Buffer("scores", F32, (rows, keys), "registers")
    p = Buffer("p", dtype, (rows, keys), "registers")
    out = Buffer("out", F32, (rows, problem.head_dim_v), "registers")
    top, total, factor = (
        Buffer(name, F32, (rows,), "registers") for name in ("max", "sum", "factor")
    )
    q_box = (min(rows, problem.num_rows), CHUNK_COLUMNS)
    kv_box = (min(problem.page, keys // schedule.cluster), CHUNK_COLUMNS)
    where = tensors["indices" if problem.sparse else "block_table"]
    load: LoadKeys | LoadTokens = LoadKeys(
        smem_k, tensors["kv_cache"], where, kv_box, schedule.cluster
    )
    if problem.is_fp8:
        waiting = 0
        load = LoadTokens(
            smem_k, tensors["kv_cache"], where, LOADER_WARPS, schedule.cluster, waiting
        )
    mask = (
        MaskTokens(scores, where)
        if problem.sparse
        else Mask(scores, tensors["seqlens_k"], problem.causal)
    )
    loop = ForKeys(
        keys,
        (
            load,
            Score(scores, smem_q, smem_k),
            mask,
            Soften(p, scores, top, total, factor),
            Attend(out, p, smem_k, factor),
        ),
    )
    return ForSegments(
        Split(keys, schedule.overhead, schedule.slack, schedule.whole),
        rows,
        num_tiles(problem, rows),
        schedule.cluster,
        (
            LoadQueries(smem_q, tensors["q"], q_box),
            Fill(top, -math.inf),
            Fill(total, 0.0),
            Fill(out, 0.0),
            loop,
            Merge(out, top, total, schedule.meet),
            StoreOutput(tensors["o"], tensors["lse"], tensors.get("sink"), out, top, total),
        ),
    )
