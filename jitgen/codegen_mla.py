"""What the templates of MLA decode take of a kernel."""

from __future__ import annotations

from typing import Any

from .ir_mla import ForKeys, LoadKeys, LoadQueries, Merge, MlaKernel, walk_mla
from .schedule_mla import (
    GROUP_CHUNKS,
    P_BLOCK_BYTES,
    REGISTER_CHUNKS,
    TOKEN_BLOCK_BYTES,
    registers,
)


def mla_context(kernel: MlaKernel) -> dict[str, Any]:
    """The template's variables beside the kernel."""
    return {
        "dtype": kernel.problem.dtype.cuda,
        "constants": mla_constants(kernel),
        "parameters": [parameter.cuda for parameter in kernel.parameters],
    }


def mla_constants(kernel: MlaKernel) -> dict[str, int]:
    """Every number that the source takes from the kernel, by its CUDA name."""
    problem, schedule, body = kernel.problem, kernel.schedule, kernel.body
    loop = next(stmt for stmt in body.body if isinstance(stmt, ForKeys))
    of_family = _fp8_constants if problem.is_fp8 else _plain_constants
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
        **of_family(kernel),
        "kSmemBytes": kernel.smem.total_bytes,
    }


def _plain_constants(kernel: MlaKernel) -> dict[str, int]:
    schedule, stmts = kernel.schedule, list(walk_mla(kernel.body.body))
    queries = next(stmt for stmt in stmts if isinstance(stmt, LoadQueries))
    keys = next(stmt for stmt in stmts if isinstance(stmt, LoadKeys))
    merge = next(stmt for stmt in stmts if isinstance(stmt, Merge))
    producer_registers, math_registers, _ = registers(kernel.problem)
    offsets = _offsets(kernel)
    del offsets["kSmemQueries"]  # they come first
    return {
        "kMeet": merge.meet,
        "kEvictFirst": schedule.evict_first,
        "kScoreAhead": int(schedule.score_ahead),
        "kQueryBoxRows": queries.box[0],
        "kPieceRows": keys.box[0],
        "kGroupChunks": GROUP_CHUNKS,
        "kRegisterChunks": REGISTER_CHUNKS,
        "kProducerRegisters": producer_registers,
        "kMathRegisters": math_registers,
        **offsets,
    }


def _fp8_constants(kernel: MlaKernel) -> dict[str, int]:
    problem = kernel.problem
    producer_registers, score_registers, out_registers, _ = registers(problem)
    # Tokens that follow one another in a page, and so in memory, of which none is in another block.
    run = 1 if problem.sparse else min(problem.page & -problem.page, kernel.body.split.block_keys)
    return {
        "kRunTokens": run,
        "kHasSink": int(problem.sink),
        "kTokenBlockBytes": TOKEN_BLOCK_BYTES,
        "kPBlockBytes": P_BLOCK_BYTES,
        "kProducerRegisters": producer_registers,
        "kScoreRegisters": score_registers,
        "kOutRegisters": out_registers,
        **_offsets(kernel),
    }


def _offsets(kernel: MlaKernel) -> dict[str, int]:
    """Where each buffer lies in shared memory."""
    offsets = kernel.smem.offsets.items()
    return {f"kSmem{name.title().replace('_', '')}": offset for name, offset in offsets}
