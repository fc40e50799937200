"""What the hardware takes of a lowered kernel: TMA boxes, shared memory, registers.

Every check raises VerifyError, naming the op and the rule.
"""

from __future__ import annotations

from .errors import VerifyError
from .ir import Buffer, Load, Store, Tensor
from .kernel import Kernel
from .schedule import (
    REGISTER_SPLIT,
    SWIZZLE_ATOM_BYTES,
    WARPGROUP_THREADS,
    accumulator_registers,
    group_table_bytes,
    num_barriers,
    num_scale_stages,
    part_columns,
    part_registers,
)

MAX_BOX = 256  # elements of a TMA box in each dimension (CUDA driver API, cuTensorMapEncodeTiled)
TMA_BYTES = 16  # unit of a tensor's row (ibid.)


def require(condition: bool, op: object, rule: str) -> None:
    """Raise VerifyError, which names the op and the rule, unless the condition holds."""
    if not condition:
        raise VerifyError(f"{op}: {rule}")


def check_tma(op: Load | Store, tensor: Tensor, buffer: Buffer, box: tuple[int, ...]) -> None:
    """TMA can move the box between the tensor and the buffer."""
    size = buffer.dtype.size_bytes
    require(all(0 < extent <= MAX_BOX for extent in box), op, f"box {box} exceeds {MAX_BOX}")
    require(box[-1] * size == buffer.swizzle_bytes, op, f"box {box} is not one swizzle span wide")
    extent = tensor.dims[-1].extent
    if extent is None:
        return  # each call's arrays are checked
    row_bytes = extent * size
    require(
        row_bytes > 0 and row_bytes % TMA_BYTES == 0,
        op,
        f"rows of {row_bytes} bytes are not whole units of {TMA_BYTES}",
    )


def check_smem(kernel: Kernel, buffers: dict[str, Buffer]) -> None:
    """Buffers do not overlap, swizzled tiles are aligned, and all fit."""
    plan, stages = kernel.smem, kernel.schedule.num_stages
    num_bytes = {what: buffer.num_bytes for what, buffer in buffers.items()}
    scales = num_bytes["tile of sfa"] + num_bytes["tile of sfb"]
    regions = (
        ("a", plan.a, stages * num_bytes["tile of a"], SWIZZLE_ATOM_BYTES),
        ("b", plan.b, stages * num_bytes["tile of b"], SWIZZLE_ATOM_BYTES),
        ("d", plan.d, kernel.body.num_turns * num_bytes["result"], SWIZZLE_ATOM_BYTES),
        ("inbox", plan.inbox, num_bytes.get("inbox", 0), 16),
        ("scales", plan.scales, num_scale_stages(kernel.schedule) * scales, 16),
        ("groups", plan.groups, group_table_bytes(kernel.problem), 16),
        ("barriers", plan.barriers, 8 * num_barriers(kernel.schedule), 8),
    )
    end = 0
    for name, offset, size, alignment in regions:
        require(offset >= end, plan, f"{name} at {offset} overlaps what ends at {end}")
        require(offset % alignment == 0, plan, f"{name} at {offset} is not {alignment}-aligned")
        end = offset + size
    limit = kernel.target.smem_per_block_bytes
    require(end <= plan.total_bytes <= limit, plan, f"needs {end} bytes, {limit} are allowed")


def check_registers(kernel: Kernel, sums: Buffer) -> None:
    """Accumulators fit a math thread's registers, and all threads' registers fit the SM's."""
    problem, schedule = kernel.problem, kernel.schedule
    math_threads = WARPGROUP_THREADS * schedule.num_math_warpgroups
    producer, math = REGISTER_SPLIT[schedule.num_math_warpgroups]
    columns = part_columns(problem, schedule) or 0
    tile_threads = math_threads // kernel.body.num_turns
    need = sums.num_bytes // 4 // tile_threads + part_registers(problem, schedule, columns)
    free = accumulator_registers(problem, schedule)
    require(need <= free < math, kernel.name, f"sums take {need} of {free} registers a thread")
    total = WARPGROUP_THREADS * producer + math_threads * math
    # setmaxnreg moves registers within what the block got at its launch: an equal share a thread,
    # in steps of 8.
    share = kernel.target.registers_per_sm // kernel.num_threads // 8 * 8
    share = min(share, kernel.target.max_registers_per_thread)
    require(
        total <= share * kernel.num_threads,
        kernel.name,
        f"takes {total} registers of {share} a thread",
    )
