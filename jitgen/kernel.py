"""A lowered kernel: its tile program, and the arguments that a launch gives it."""

from __future__ import annotations

from dataclasses import dataclass

from .groups import max_tile_rows
from .ir import Axis, Evaluate, ForK, ForTiles, Load, Quantize, Stmt, Store, Tensor, walk
from .problem import Gemm, GroupedGemm, is_k_grouped
from .schedule import WARPGROUP_THREADS, Schedule, SmemPlan
from .target import Target


@dataclass(frozen=True)
class TensorMapParameter:
    """A TMA descriptor of `tensor`: `box` rows x columns, swizzled over `swizzle_bytes`.

    The matrices of all groups are one, one below the other; or apart, in a third dimension.

    If the tensor's rows are known at run time only, a box has at most as many: rows beyond the end
    would take time to fill.
    """

    tensor: Tensor
    box: tuple[int, ...]
    swizzle_bytes: int
    is_apart: bool = False

    @property
    def name(self) -> str:
        return f"map_{self.tensor.name}"


@dataclass(frozen=True)
class PointerParameter:
    """The address of a tensor's first element."""

    tensor: Tensor
    name: str
    is_output: bool = False


@dataclass(frozen=True)
class StrideParameter:
    """The stride of dimension `dim` of a tensor, in elements, as an unsigned 32-bit integer."""

    tensor: Tensor
    dim: int
    name: str


@dataclass(frozen=True)
class ExtentParameter:
    """A run-time extent, as an unsigned 32-bit integer."""

    name: Axis


Parameter = TensorMapParameter | PointerParameter | StrideParameter | ExtentParameter


@dataclass(frozen=True)
class Kernel:
    """A lowered kernel: what the interpreter runs, the template renders and the verifier checks."""

    name: str
    family: str
    problem: Gemm
    schedule: Schedule
    target: Target
    tensors: tuple[Tensor, ...]
    smem: SmemPlan
    body: ForTiles

    def num_blocks(self, m: int, num_sms: int) -> int:
        """Blocks of a launch for `m` rows of D, at least one, on a GPU with `num_sms` SMs.

        Persistent clusters walk the tiles; where blocks share the k of a tile, a cluster has one.
        What the device alone knows of groups does not matter: there may be blocks without a tile.
        """
        traversal, size = self.body.traversal, self.schedule.cluster_size
        rows = max_tile_rows(self.problem, traversal.block_m * traversal.cluster_m, m)
        columns = traversal.grid(m, self.problem.columns)[1]
        if self.schedule.split_k > 1:
            return rows * columns * size
        return min(rows * columns, num_sms // size) * size

    @property
    def num_threads(self) -> int:
        """Threads of a block: the math warpgroups and the producer's."""
        return WARPGROUP_THREADS * (self.schedule.num_math_warpgroups + 1)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The kernel's arguments, in order: TMA maps, scales with strides, extents, operands.

        Behind the extents, if there are groups: their tensor, B to ask L2 for what comes first, and
        D to write rows one by one.
        """
        maps: list[Parameter] = []
        scales: list[Parameter] = []
        groups: list[Parameter] = [ExtentParameter("k")] if is_k_grouped(self.problem) else []
        epilogue: list[Parameter] = []
        if self.body.groups:
            groups.append(PointerParameter(self.body.groups, "groups"))
        for stmt in walk(self.body.body):
            if isinstance(stmt, Load) and stmt.via == "tma":
                maps.append(TensorMapParameter(stmt.src, stmt.box, stmt.dst.swizzle_bytes))
                if stmt.src.name == "b" and self.body.groups and not is_k_grouped(self.problem):
                    row_dim = len(stmt.src.dims) - 2
                    groups.append(PointerParameter(stmt.src, "b"))
                    groups.append(StrideParameter(stmt.src, row_dim, "b_stride"))
            elif isinstance(stmt, Load):
                name = stmt.src.name
                scales.append(PointerParameter(stmt.src, name))
                if stmt.any_strides:
                    dims = enumerate(stmt.src.dims)
                    scales += [
                        StrideParameter(stmt.src, i, f"{name}_stride_{dim.axis}") for i, dim in dims
                    ]
            elif isinstance(stmt, Store):
                span = stmt.src.swizzle_bytes
                is_apart = is_k_grouped(self.problem)
                maps.append(TensorMapParameter(stmt.dst, stmt.box, span, is_apart))
                if stmt.by_row:
                    groups.append(PointerParameter(stmt.dst, "d", is_output=True))
                    groups.append(StrideParameter(stmt.dst, len(stmt.dst.dims) - 2, "d_stride"))
            elif isinstance(stmt, Quantize):
                groups.append(PointerParameter(stmt.scales, "sfd", is_output=True))
            elif isinstance(stmt, Evaluate):
                for tensor in stmt.operands:
                    name = operand_parameter(tensor.name)
                    epilogue.append(PointerParameter(tensor, name))
                    axes = [dim.axis for dim in tensor.dims]
                    if axes[-2:] == ["m", "n"]:
                        stride = StrideParameter(tensor, len(axes) - 2, f"{name}_stride")
                        epilogue.append(stride)
        return (*maps, *scales, ExtentParameter("m"), *groups, *epilogue)

    def _of_groups(self) -> str:
        if not isinstance(self.problem, GroupedGemm):
            return ""
        of_k = " and its part of k" if is_k_grouped(self.problem) else ""
        return f", of each of {self.problem.num_groups} groups{of_k}"

    def __str__(self) -> str:
        lines = [f"kernel {self.name}({', '.join(map(str, self.tensors))})"]
        lines += [f"  schedule {self.schedule}", f"  smem {self.smem.total_bytes} B"]
        t = self.body.traversal
        turns = f", {self.body.num_turns} in turns" if self.body.num_turns > 1 else ""
        lines.append(
            f"  for tile m:{t.block_m} n:{t.block_n} cluster {t.cluster_m}x{t.cluster_n}"
            f" in groups of {t.group} rows{self._of_groups()}{turns}:"
        )
        lines += _format(self.body.body, 4)
        return "\n".join(lines)


def operand_parameter(operand: str) -> str:
    """The parameter of an operand's address; `_stride` after it names that of its row stride.

    An underscore keeps operand x_stride and the stride of operand x apart.
    """
    ends_like_stride = operand.rstrip("_").endswith("_stride")
    return f"operand_{operand}_" if ends_like_stride else f"operand_{operand}"


def _format(stmts: tuple[Stmt, ...], indent: int) -> list[str]:
    lines = []
    for stmt in stmts:
        if isinstance(stmt, ForK):
            blocks = f" on {stmt.num_blocks} blocks of a cluster" if stmt.num_blocks > 1 else ""
            lines.append(f"{' ' * indent}for {stmt.extent} of k by {stmt.step}{blocks}:")
            lines += _format(stmt.body, indent + 2)
        else:
            lines.append(f"{' ' * indent}{stmt}")
    return lines
