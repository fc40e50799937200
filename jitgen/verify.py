"""The verifier: what must hold of a lowered kernel, whoever lowered it.

It trusts no field that it can derive. What a problem and a schedule must be is left to
check_problem and check_schedule, the program of a tile to `verify_tile`.
"""

from __future__ import annotations

from dataclasses import replace

from .dtypes import F32, I32
from .errors import ProblemError, ScheduleError, VerifyError
from .expr import operands
from .ir import Axis, Dim, Tensor
from .ir_mla import MlaKernel
from .kernel import Kernel
from .limits import check_registers, check_smem, require
from .merge import MergeKernel, verify_merge
from .problem import D_SCALE, Gemm, GroupedGemm, check_problem, is_k_grouped, is_masked
from .quantization import QuantizationKernel, verify_quantization
from .schedule import Schedule, tile_columns
from .schedule_rules import check_schedule
from .traversal import Traversal
from .verify_mla import verify_mla
from .verify_tile import Block


def verify(kernel: Kernel | MlaKernel | MergeKernel | QuantizationKernel) -> None:
    """Raise VerifyError, naming the op and the rule, unless `kernel` is sound.

    Checked: every tile of D is computed and stored exactly once; the K blocks cover k once, in
    order; every op gets what the problem asks of it, in buffers of the right type and shape; boxes
    and alignments are what TMA and wgmma take; shared memory and registers suffice.
    MLA decode, merges, quantization: see verify_mla, verify_merge, verify_quantization.
    """
    if isinstance(kernel, MlaKernel):
        return verify_mla(kernel)
    if isinstance(kernel, MergeKernel):
        return verify_merge(kernel)
    if isinstance(kernel, QuantizationKernel):
        return verify_quantization(kernel)
    try:
        check_problem(kernel.problem)
        check_schedule(kernel.problem, kernel.schedule, kernel.target)
    except (ProblemError, ScheduleError) as error:
        raise VerifyError(f"{kernel.name}: {error}") from error
    tensors = _tensors(kernel.problem)
    arguments = tuple(tensors.values())
    require(kernel.tensors == arguments, kernel.name, f"takes {kernel.tensors}, not {arguments}")
    groups = kernel.body.groups
    require(groups == tensors.get("groups"), kernel.name, f"walks the groups of {groups}")
    schedule = kernel.schedule
    columns = tile_columns(kernel.problem, schedule)
    _check_traversal(kernel.body.traversal, schedule, columns)
    turns = kernel.body.num_turns
    require(turns == schedule.num_turns, kernel.name, f"takes {turns} turns, not as {schedule}")
    tile: dict[Axis, int] = {"m": schedule.block_m, "n": columns, "k": kernel.problem.max_k}
    block = Block(kernel, tensors, tile)
    block.run(kernel.body.body)
    block.end(kernel.name)
    require("result" in block.written, kernel.name, "does not store D")
    check_smem(kernel, block.written)
    check_registers(kernel, block.written["sums"])


def _tensors(problem: Gemm) -> dict[str, Tensor]:
    """The tensors of `problem` by name."""
    m, n = Dim("m", None), Dim("n", problem.columns)
    a_scale, b_scale = problem.a_scale, problem.b_scale
    of_group: tuple[Dim, ...] = ()  # of what each group has; and of A and D, which may be shared
    of_rows: tuple[Dim, ...] = ()
    of_d: tuple[Dim, ...] = ()
    groups = []
    if isinstance(problem, GroupedGemm):
        of_group = (Dim("g", problem.num_groups),)
        of_rows = of_d = of_group if is_masked(problem) else ()
        if is_k_grouped(problem):
            of_group, of_d = (), of_group
        count = Dim("g", problem.num_groups + (problem.layout in ("ragged", "k_grouped")))
        groups = [Tensor("groups", I32, (m if problem.layout == "group_of_row" else count,))]
    k = Dim("k", None if is_k_grouped(problem) else problem.k)
    sfa = replace(m, block=a_scale.rows), replace(k, block=a_scale.k)
    sfb = replace(n, block=b_scale.rows), replace(k, block=b_scale.k)
    halves = (Dim("h", 2),) if problem.num_halves == 2 else ()
    sfd = replace(m, block=D_SCALE.rows), replace(n, block=D_SCALE.k)
    scales = [Tensor("sfd", F32, (*of_rows, *sfd))] if problem.is_quantized else []
    tensors = [
        Tensor("a", problem.a_dtype, (*of_rows, m, k)),
        Tensor("b", problem.b_dtype, (*of_group, *halves, n, k)),
        Tensor("sfa", F32, (*of_rows, *sfa)),
        Tensor("sfb", F32, (*of_group, *halves, *sfb)),
        Tensor("d", problem.d_dtype, (*of_d, m, n)),
        *scales,
        *groups,
    ]
    for operand in operands(problem.epilogue):
        dims = tuple(m if axis == "m" else n for axis in operand.axes)
        outer = of_rows if m in dims else of_group if dims else ()
        tensors.append(Tensor(operand.name, operand.dtype, (*outer, *dims)))
    return {tensor.name: tensor for tensor in tensors}


def _check_traversal(traversal: Traversal, schedule: Schedule, columns: int) -> None:
    """It walks the schedule's tiles, and visits each one of a few small and odd grids once."""
    t, s = traversal, schedule
    walked = (t.block_m, t.block_n, t.cluster_m, t.cluster_n, t.group)
    planned = (s.block_m, columns, s.cluster_m, s.cluster_n, s.raster_group)
    require(walked == planned, traversal, f"is not that of the schedule {schedule}")
    # A group of 1024 rows is walked like one of 3, which takes less time to try.
    small = replace(traversal, group=min(t.group, 3))
    height, width = t.block_m * t.cluster_m, t.block_n * t.cluster_n
    for rows in (1, small.group, small.group + 1, 2 * small.group + 2):
        for m, n in ((rows * height, 2 * width), (rows * height - height + 1, 3 * width - 1)):
            seen = list(small.tiles(m, n))
            expected = {
                (row, column) for row in range(0, m, t.block_m) for column in range(0, n, t.block_n)
            }
            inside = {(row, column) for row, column in seen if row < m and column < n}
            require(
                len(seen) == len(set(seen)) and inside == expected,
                traversal,
                f"does not cover {m} x {n} once",
            )
