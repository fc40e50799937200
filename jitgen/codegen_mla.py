"""What the template of MLA decode takes of a kernel."""

from __future__ import annotations

from typing import Any

from .ir_mla import ForKeys, LoadKeys, LoadQueries, Merge, MlaKernel, walk_mla
from .schedule_mla import (
    BATCH_TOKENS,
    LOADER_WARPS,
    group_chunks,
    num_token_barriers,
    register_chunks,
    registers,
    stages_tokens,
)


def mla_context(kernel: MlaKernel) -> dict[str, Any]:
    """The template's variables beside the kernel."""
    return {
        "dtype": kernel.problem.dtype.cuda,
        "stages_tokens": stages_tokens(kernel.problem, kernel.schedule),
        "constants": mla_constants(kernel),
        "parameters": [parameter.cuda for parameter in kernel.parameters],
    }


def mla_constants(kernel: MlaKernel) -> dict[str, int]:
    """Every number that the source takes from the kernel, by its CUDA name."""
    problem, schedule, body, smem = kernel.problem, kernel.schedule, kernel.body, kernel.smem
    stmts = list(walk_mla(body.body))
    loop = next(stmt for stmt in stmts if isinstance(stmt, ForKeys))
    queries = next(stmt for stmt in stmts if isinstance(stmt, LoadQueries))
    merge = next(stmt for stmt in stmts if isinstance(stmt, Merge))
    boxes = [stmt.box[0] for stmt in stmts if isinstance(stmt, LoadKeys)]
    producer_registers, math_registers = registers(problem)
    if problem.is_fp8:
        run = 1 if problem.sparse else min(problem.page & -problem.page, 64)
        return {
            "kHeads": problem.num_heads,
            "kQueries": problem.num_rows // problem.num_heads,
            "kTokens": problem.num_tokens,
            "kDimQk": problem.head_dim_qk,
            "kDimV": problem.head_dim_v,
            "kPage": problem.page,
            "kRunTokens": run,
            "kCausal": int(problem.causal),
            "kTileRows": body.tile_rows,
            "kTiles": body.tiles,
            "kBlockKeys": loop.step,
            "kOverhead": body.split.overhead,
            "kWhole": int(body.split.whole),
            "kSlack": body.split.slack,
            "kNumStages": schedule.num_stages,
            "kHasSink": int(problem.sink),
            "kTokenBlockBytes": 1040,
            "kPBlockBytes": 264,
            "kProducerRegisters": 40,
            "kScoreRegisters": 120,
            "kOutRegisters": 176,
            "kSmemQueries": smem.queries,
            "kSmemP": smem.p,
            "kSmemTokens": smem.tokens,
            "kSmemTokenBlocks": smem.token_blocks,
            "kSmemPBlocks": smem.p_blocks,
            "kSmemStates": smem.states,
            "kSmemBarriers": smem.barriers,
            "kSmemAnnouncement": smem.announcement,
            "kSmemWalkers": smem.walkers,
            "kSmemBytes": smem.total_bytes,
        }
    return {
        "kHeads": problem.num_heads,
        "kQueries": problem.num_rows // problem.num_heads,
        "kTokens": problem.num_tokens,
        "kDimQk": problem.head_dim_qk,
        "kDimV": problem.head_dim_v,
        "kPage": problem.page,
        "kCausal": int(problem.causal),
        "kTileRows": body.tile_rows,
        "kTiles": body.tiles,
        "kBlockKeys": loop.step,
        "kOverhead": body.split.overhead,
        "kWhole": int(body.split.whole),
        "kSlack": body.split.slack,
        "kNumStages": schedule.num_stages,
        "kCluster": body.cluster,
        "kMeet": merge.meet,
        "kIsFp8": int(problem.is_fp8),
        "kIsSparse": int(problem.sparse),
        "kHasSink": int(problem.sink),
        "kLoaders": LOADER_WARPS if problem.is_fp8 else 1,
        "kPrefetch": schedule.prefetch,
        "kEvictFirst": schedule.evict_first,
        "kScoreAhead": int(schedule.score_ahead),
        "kQueryBoxRows": queries.box[0],
        **({"kPieceRows": boxes[0]} if boxes else {}),
        "kGroupChunks": group_chunks(problem),
        "kRegisterChunks": register_chunks(problem),
        "kProducerRegisters": producer_registers,
        "kMathRegisters": math_registers,
        "kSmemKeys": smem.keys,
        "kSmemP": smem.p,
        "kSmemStates": smem.states,
        "kSmemBarriers": smem.barriers,
        **({"kSmemMaxima": smem.maxima} if merge.meet > 1 else {}),
        "kSmemAnnouncement": smem.announcement,
        **({"kSmemWalkers": smem.walkers} if problem.is_fp8 else {}),
        **_token_constants(kernel),
        "kSmemBytes": smem.total_bytes,
    }


def _token_constants(kernel: MlaKernel) -> dict[str, int]:
    """Of an FP8 cache's tokens on their way through shared memory; neighbours lie side by side in a
    page."""
    problem = kernel.problem
    if not stages_tokens(problem, kernel.schedule):
        return {}
    has_runs = not problem.sparse and problem.page % BATCH_TOKENS == 0
    return {
        "kSmemTokens": kernel.smem.tokens,
        "kTokenBarriers": num_token_barriers(problem, kernel.schedule),
        "kRunTokens": BATCH_TOKENS if has_runs else 1,
    }
