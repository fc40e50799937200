"""Lowering of MLA decode: problem and schedule to the tile program."""

from __future__ import annotations

import math
from typing import NamedTuple

from .dtypes import BF16, E4M3, F16, F32
from .ir import Buffer, MlaTensor
from .ir_mla import (
    Attend,
    Fill,
    ForKeys,
    ForSegments,
    LoadKeys,
    LoadQueries,
    Mask,
    MaskTokens,
    Merge,
    MlaKernel,
    MlaStmt,
    Score,
    Soften,
    Split,
    StoreOutput,
)
from .ir_mla_fp8 import (
    AttendTokens,
    LoadTokens,
    ScaleQueries,
    ScoreTokens,
    Settle,
    SoftenTokens,
    Tokens,
    WeighTokens,
)
from .problem_mla import TOKEN_BYTES, MlaDecode, check_mla
from .schedule_mla import (
    BLOCK_KEYS,
    CHUNK_COLUMNS,
    MlaSchedule,
    check_mla_schedule,
    mla_smem_plan,
    num_tiles,
)
from .target import SM90A, Target
from .tokens_mla import CODES, COLUMNS, NO_MAX, NUM_SCALES


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
    form = "_fp8" * p.is_fp8 + "_sparse" * p.sparse
    meet, once = f"_m{s.meet}" * (s.meet > 1), f"_e{s.evict_first}" * (s.evict_first > 0)
    return (
        f"flash_fwd_splitkv_mla{form}_kernel{'_sink' * p.sink}_{p.dtype}_h{p.num_heads}"
        f"_q{p.num_queries}_d{p.head_dim_qk}x{p.head_dim_v}_p{p.page}"
        f"{'_causal' * p.causal}_r{s.tile_rows}{meet}_s{s.num_stages}_o{s.overhead}"
        f"_t{s.slack}{once}{'_ahead' * s.score_ahead}{'_whole' * s.whole}"
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


class _Carried(NamedTuple):
    """What ops over either cache write and read."""

    scores: Buffer
    out: Buffer
    max: Buffer
    sum: Buffer
    factor: Buffer


def _body(problem: MlaDecode, schedule: MlaSchedule) -> ForSegments:
    rows, tensors = schedule.tile_rows, mla_tensors(problem)
    top, total, factor = (
        Buffer(name, F32, (rows,), "registers") for name in ("max", "sum", "factor")
    )
    scores = Buffer("scores", F32, (rows, BLOCK_KEYS), "registers")
    out = Buffer("out", F32, (rows, problem.head_dim_v), "registers")
    of_cache = _over_tokens if problem.is_fp8 else _over_keys
    return ForSegments(
        Split(BLOCK_KEYS, schedule.overhead, schedule.slack, schedule.whole),
        rows,
        num_tiles(problem, rows),
        (
            *of_cache(problem, schedule, _Carried(scores, out, top, total, factor)),
            Merge(out, top, total, schedule.meet),
            StoreOutput(tensors["o"], tensors["lse"], tensors.get("sink"), out, top, total),
        ),
    )


def _over_keys(problem: MlaDecode, schedule: MlaSchedule, carried: _Carried) -> tuple[MlaStmt, ...]:
    scores, out, top, total, factor = carried
    tensors, dtype, rows = mla_tensors(problem), problem.dtype, schedule.tile_rows
    columns = problem.head_dim_qk
    smem_q = Buffer("smem_q", dtype, (rows, columns), "smem", swizzle_bytes=128)
    smem_k = Buffer("smem_k", dtype, (BLOCK_KEYS, columns), "smem", True, 128)
    p = Buffer("p", dtype, (rows, BLOCK_KEYS), "registers")
    q_box = (min(rows, problem.num_rows), CHUNK_COLUMNS)
    kv_box = (min(problem.page, BLOCK_KEYS), CHUNK_COLUMNS)
    loop = ForKeys(
        BLOCK_KEYS,
        (
            LoadKeys(smem_k, tensors["kv_cache"], tensors["block_table"], kv_box),
            Score(scores, smem_q, smem_k),
            Mask(scores, tensors["seqlens_k"], problem.causal),
            Soften(p, scores, top, total, factor),
            Attend(out, p, smem_k, factor),
        ),
    )
    return (
        LoadQueries(smem_q, tensors["q"], q_box),
        Fill(top, -math.inf),
        Fill(total, 0.0),
        Fill(out, 0.0),
        loop,
    )


def _over_tokens(
    problem: MlaDecode, schedule: MlaSchedule, carried: _Carried
) -> tuple[MlaStmt, ...]:
    scores, out, top, total, factor = carried
    tensors, rows, keys = mla_tensors(problem), schedule.tile_rows, BLOCK_KEYS
    where = tensors["indices" if problem.sparse else "block_table"]
    smem_q = Buffer("smem_q", F16, (rows, CODES), "smem", swizzle_bytes=128)
    smem_q_tail = Buffer("smem_q_tail", BF16, (rows, COLUMNS - CODES), "smem", swizzle_bytes=128)
    tokens = Tokens(
        Buffer("smem_codes", E4M3, (keys, CODES), "smem", True),
        Buffer("smem_tail", BF16, (keys, COLUMNS - CODES), "smem", True),
        Buffer("smem_ratios", F16, (keys, NUM_SCALES), "smem", True),
        Buffer("smem_units", F32, (keys,), "smem", True),
    )
    p = Buffer("p", F16, (rows, keys), "smem", True, 128)
    weights = Buffer("weights", F32, (keys,), "registers")
    unit, exponent, growth = (
        Buffer(name, F32, (1,), "registers") for name in ("unit", "exponent", "growth")
    )
    mask = (
        MaskTokens(scores, where)
        if problem.sparse
        else Mask(scores, tensors["seqlens_k"], problem.causal)
    )
    loop = ForKeys(
        keys,
        (
            LoadTokens(tokens, tensors["kv_cache"], where),
            ScoreTokens(scores, smem_q, smem_q_tail, tokens),
            mask,
            WeighTokens(weights, growth, exponent, tokens.units),
            SoftenTokens(p, scores, unit, top, total, factor, weights, growth),
            AttendTokens(out, p, tokens, factor),
        ),
    )
    return (
        ScaleQueries(smem_q, smem_q_tail, unit, tensors["q"]),
        Fill(top, NO_MAX),
        Fill(total, 0.0),
        Fill(exponent, -math.inf),
        Fill(out, 0.0),
        loop,
        Settle(out, top, total, exponent),
    )
