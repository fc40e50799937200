"""Rendering: a Kernel to CUDA C++. Pure: the same kernel gives the same bytes."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, get_args

import numpy as np

from .codegen_mla import mla_context
from .expr import Accumulator, Apply, Cast, Constant, Expr, Half, Operand, acc
from .ir import Evaluate, ForK, Load, Promote, Store, walk
from .ir_mla import MlaKernel
from .kernel import (
    ExtentParameter,
    Kernel,
    Parameter,
    PointerParameter,
    StrideParameter,
    TensorMapParameter,
    operand_parameter,
)
from .merge import MergeKernel, merge_context
from .problem import GroupedGemm, Layout, adds_to_d, is_k_grouped, is_masked
from .quantization import QuantizationKernel, quantization_context
from .schedule import (
    REGISTER_SPLIT,
    UNROLL_K,
    is_scaled_by_row,
    num_parts,
    num_scale_stages,
    part_columns,
    products_ahead,
    slice_columns,
)

if TYPE_CHECKING:
    from jinja2 import Environment


def render(kernel: Kernel | MlaKernel | MergeKernel | QuantizationKernel) -> str:
    """The CUDA source of `kernel`; it includes only headers of `headers()`."""
    template = _environment().get_template(f"{kernel.family}.cu.j2")
    if isinstance(kernel, MlaKernel):
        return template.render(kernel=kernel, **mla_context(kernel))
    if isinstance(kernel, MergeKernel):
        return template.render(kernel=kernel, **merge_context(kernel))
    if isinstance(kernel, QuantizationKernel):
        return template.render(kernel=kernel, **quantization_context(kernel))
    evaluate, is_grouped = _evaluate(kernel), kernel.body.groups is not None
    store = next(stmt for stmt in walk(kernel.body.body) if isinstance(stmt, Store))
    operand_parameters = [p for p in kernel.parameters if p.name.startswith("operand_")]
    return template.render(
        kernel=kernel,
        d_type=kernel.problem.d_dtype.cuda,
        constants=constants(kernel),
        parameters=[declaration(p) for p in kernel.parameters],
        operand_parameters=[declaration(p) for p in operand_parameters],
        operand_arguments=", ".join(p.name for p in operand_parameters),
        epilogue=render_expr(evaluate.expr, is_grouped),
        is_grouped=is_grouped,
        is_masked=is_masked(kernel.problem),
        is_k_grouped=is_k_grouped(kernel.problem),
        adds=adds_to_d(kernel.problem),
        is_row_grouped=is_grouped and not is_k_grouped(kernel.problem),
        is_scaled_by_row=is_scaled_by_row(kernel.problem),
        is_stored_by_row=store.by_row,
        is_quantized=kernel.problem.is_quantized,
    )


@cache
def headers() -> dict[str, str]:
    """Every device header by the name under which it is included."""
    folder = resources.files("jitgen.templates") / "include" / "jitgen"
    return {
        f"jitgen/{file.name}": file.read_text()
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".cuh")
    }


_SOURCES = ("groups", "schedule", "traversal", "ir", "kernel", "lower", "codegen")


@cache
def fingerprint() -> str:
    """A hash, in hex, of all that decides a kernel's source beside its problem and schedule.

    Timings made with different ones are those of different kernels.
    """
    package, templates = resources.files("jitgen"), resources.files("jitgen.templates")
    files = [package / f"{name}.py" for name in _SOURCES]
    files += sorted(
        (file for file in templates.iterdir() if file.name.endswith(".j2")),
        key=lambda file: file.name,
    )
    texts = [(file.name, file.read_text()) for file in files]
    return hashlib.sha256(repr((texts, headers())).encode()).hexdigest()[:16]


def constants(kernel: Kernel) -> dict[str, int]:
    """Every number that the source takes from the kernel, by its CUDA name."""
    problem, schedule, traversal = kernel.problem, kernel.schedule, kernel.body.traversal
    *_, chunks, blocks = (stmt for stmt in walk(kernel.body.body) if isinstance(stmt, ForK))
    loads = {stmt.src.name: stmt for stmt in walk(kernel.body.body) if isinstance(stmt, Load)}
    promote = next(stmt for stmt in blocks.body if isinstance(stmt, Promote))
    store = next(stmt for stmt in walk(kernel.body.body) if isinstance(stmt, Store))
    producer_registers, math_registers = REGISTER_SPLIT[schedule.num_math_warpgroups]
    special = {"kNumMatrices": 1}  # of A and D
    if isinstance(problem, GroupedGemm):
        special = {
            "kNumMatrices": problem.num_groups if is_masked(problem) else 1,
            "kNumGroups": problem.num_groups,
            "kGroupLayout": get_args(Layout).index(problem.layout),
            "kAlignment": problem.alignment,
            "kSmemGroups": kernel.smem.groups,
        }
    if is_scaled_by_row(problem):
        special["kProductsAhead"] = products_ahead(problem, schedule)
    if problem.is_quantized:
        special["kUe8m0"] = int(problem.ue8m0)
    return special | {
        "kN": problem.columns,
        "kK": kernel.problem.max_k,
        "kBlockM": traversal.block_m,
        "kBlockN": schedule.block_n,
        "kHalves": problem.num_halves,
        "kOutN": traversal.block_n,
        "kBlockK": blocks.step,
        "kNumStages": schedule.num_stages,
        "kNumMathWarpgroups": schedule.num_math_warpgroups,
        "kNumTurns": kernel.body.num_turns,
        "kSwapAB": int(schedule.swap_ab),
        "kNumWaves": schedule.num_waves,
        "kPartColumns": part_columns(kernel.problem, schedule) or 0,
        "kOverlap": num_parts(schedule) - 1,
        "kUnroll": UNROLL_K,
        "kClusterM": traversal.cluster_m,
        "kClusterN": traversal.cluster_n,
        "kSplitK": schedule.split_k,
        "kPartBlocks": -(-chunks.extent // blocks.step),
        "kSliceColumns": slice_columns(schedule),
        "kRasterGroup": traversal.group,
        "kPlainEpilogue": int(_evaluate(kernel).expr == acc),
        "kQuantize": int(problem.is_quantized),
        "kScaleN": promote.windows[1].block,
        "kNumSfbRows": loads["sfb"].dst.shape[0],
        "kScaleBlocks": loads["sfa"].dst.shape[1],
        "kNumScaleStages": num_scale_stages(schedule),
        "kStoreRows": store.box[0],
        "kStoreColumns": store.box[1],
        "kStoreSpan": store.src.swizzle_bytes,
        "kProducerRegisters": producer_registers,
        "kMathRegisters": math_registers,
        "kSmemA": kernel.smem.a,
        "kSmemB": kernel.smem.b,
        "kSmemD": kernel.smem.d,
        "kSmemInbox": kernel.smem.inbox,
        "kSmemScales": kernel.smem.scales,
        "kSmemBarriers": kernel.smem.barriers,
        "kSmemBytes": kernel.smem.total_bytes,
    }


def declaration(parameter: Parameter) -> str:
    """The C++ declaration of a kernel parameter."""
    match parameter:
        case TensorMapParameter():
            return f"const __grid_constant__ TensorMap {parameter.name}"
        case PointerParameter():
            const = "" if parameter.is_output else "const "
            return f"{const}{parameter.tensor.dtype.cuda}* {parameter.name}"
        case StrideParameter() | ExtentParameter():
            return f"u32 {parameter.name}"


def render_expr(expr: Expr, is_grouped: bool = False) -> str:
    """`expr` for a pair of adjacent columns, as C++ over acc, up, operands, row, column, group."""
    match expr:
        case Accumulator():
            return "acc"
        case Half():
            return "up" if expr.name == "up" else "acc"
        case Constant():
            return f"epilogue::constant({_float_literal(expr.value)})"
        case Operand():
            pointer = f"operands.{operand_parameter(expr.name)}"
            if not expr.axes:
                return f"epilogue::load_scalar({pointer})"
            if expr.axes == ("m",):
                return f"epilogue::load_scalar({pointer} + row)"
            index = f"u64(row) * {pointer}_stride + column"
            if expr.axes == ("n",):
                index = "group * kN + column" if is_grouped else "column"
            return f"epilogue::load_pair({pointer}, {index})"
        case Apply():
            arguments = (render_expr(arg, is_grouped) for arg in expr.args)
            return f"epilogue::{expr.op}({', '.join(arguments)})"
        case Cast():
            return f"epilogue::cast<{expr.dtype.cuda}>({render_expr(expr.arg, is_grouped)})"
    raise TypeError(f"no rendering of {type(expr).__name__}")


def _evaluate(kernel: Kernel) -> Evaluate:
    return next(stmt for stmt in walk(kernel.body.body) if isinstance(stmt, Evaluate))


def _float_literal(value: float) -> str:
    bits = int(np.float32(value).view(np.uint32))
    return f"__uint_as_float(0x{bits:08x}u)"


@cache
def _environment() -> Environment:
    """Jinja with delimiters that PTX and C++ never use; an undefined name is an error."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("jitgen.templates")
    return Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text()),
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="/*%",
        block_end_string="%*/",
        comment_start_string="/*#",
        comment_end_string="#*/",
        line_statement_prefix="//%",
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
