"""What the template of MLA decode takes of a kernel."""

from __future__ import annotations

from typing import Any

from .ir_mla import ForKeys, LoadKeys, LoadQueries, MlaKernel, walk_mla
from .schedule import REGISTER_SPLIT
from .schedule_mla import GROUP_CHUNKS, REGISTER_CHUNKS


def mla_context(kernel: MlaKernel) -> dict[str, Any]:
    """The template's variables beside the kernel."""
    return {
        "dtype": kernel.problem.dtype.cuda,
        "constants": mla_constants(kernel),
        "parameters": [parameter.cuda for parameter in kernel.parameters],
    }


def mla_constants(kernel: MlaKernel) -> dict[str, int]:
    """Every number that the source takes from the kernel, by its CUDA name."""
    problem, schedule, body, smem = kernel.problem, kernel.schedule, kernel.body, kernel.smem
    stmts = list(walk_mla(body.body))
    loop = next(stmt for stmt in stmts if isinstance(stmt, ForKeys))
    queries = next(stmt for stmt in stmts if isinstance(stmt, LoadQueries))
    keys = next(stmt for stmt in stmts if isinstance(stmt, LoadKeys))
    producer_registers, math_registers = REGISTER_SPLIT[schedule.num_math_warpgroups]
    return {
        "kHeads": problem.num_heads,
        "kQueries": problem.num_queries,
        "kDimQk": problem.head_dim_qk,
        "kDimV": problem.head_dim_v,
        "kPage": problem.page,
        "kCausal": int(problem.causal),
        "kTileRows": body.tile_rows,
        "kTiles": body.tiles,
        "kBlockKeys": loop.step,
        "kOverhead": body.split.overhead,
        "kNumStages": schedule.num_stages,
        "kCluster": body.cluster,
        "kPrefetch": schedule.prefetch,
        "kScoreAhead": int(schedule.score_ahead),
        "kQueryBoxRows": queries.box[0],
        "kPieceRows": keys.box[0],
        "kGroupChunks": GROUP_CHUNKS,
        "kRegisterChunks": REGISTER_CHUNKS,
        "kProducerRegisters": producer_registers,
        "kMathRegisters": math_registers,
        "kSmemKeys": smem.keys,
        "kSmemP": smem.p,
        "kSmemStates": smem.states,
        "kSmemBarriers": smem.barriers,
        "kSmemAnnouncement": smem.announcement,
        "kSmemScratch": smem.scratch,
        "kSmemBytes": smem.total_bytes,
    }
