"""Lists of problems, from a file or from options: what is to be compiled or tuned, at which m."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from .dtypes import BF16, F32, DType, dtype_of
from .errors import ProblemError
from .expr import acc, gate, silu, up
from .files import read_json
from .groups import planned_rows
from .lower import AnyProblem, AnySchedule
from .merge import MergeSchedule, MergeStates
from .problem import MAX_EXTENT, Gemm, GroupedGemm, check_problem, of_k_groups
from .problem_mla import MlaDecode, check_mla
from .quantization import Quantization, QuantizationSchedule
from .schedule_mla import key_limits
from .target import Gpu
from .tuning.keys import TunedProblem, read_scale_block
from .tuning.model import m_buckets
from .tuning.select import select
from .tuning.space_mla import BATCHES

PROBLEMS_HELP = (
    'JSON: a list of {"n": 7168, "k": 2048, "m": [1, 64]}; instead of m, "m_max": 4096 stands for'
    ' every m up to it; "out_dtype" is bfloat16 by default, "name" a remark. With "num_groups" a'
    ' grouped GEMM, m rows in all; "layout" is ragged by default; k_grouped has no k, which may be'
    ' any, and its out_dtype is float32 by default. "swiglu": true for silu(gate) * up of its rows.'
    ' "b_scale": "1x128" or "128x128", where B may have either. {"num_heads": 16, "num_queries": 1,'
    " ...}, the fields of jitgen.MlaDecode, is MLA decode, for any number of sequences or, with"
    ' "b": [1, 16], for these.'
)
GEMM_FIELDS = (
    *("name", "n", "k", "m", "m_max", "out_dtype", "swiglu", "b_scale", "num_groups", "layout"),
)
MLA_FIELDS = ("name", "b", *(field.name for field in fields(MlaDecode)))


GPU_HELP = 'Its name as the driver gives it; default: this machine\'s, or "NVIDIA H100 80GB HBM3".'
NUM_SMS_HELP = "Multiprocessors of that GPU; default: this machine's, or 132."


class Grid(str, Enum):
    """A named list of shapes."""

    dense = "dense"
    grouped = "grouped"
    k_grouped = "k_grouped"
    mla = "mla"

    def problems(self) -> list[tuple[TunedProblem, int]]:
        """The shapes that `jitgen bench gemm` measures, or `bench grouped` (of those with layout
        k_grouped by themselves), or the problems of `bench mla` with any number of sequences."""
        from .tuning.bench import GRID_DENSE
        from .tuning.bench_fused import FUSED_SHAPES, fused_problem
        from .tuning.bench_grouped import grid_grouped
        from .tuning.bench_k_grouped import K_GROUPED_SHAPES
        from .tuning.bench_mla import FORMS, mla_baselines

        if self is Grid.mla:
            decoded = [shape.problem for form in FORMS for shape in mla_baselines(form)]
            return [(problem, batch) for problem in dict.fromkeys(decoded) for batch in BATCHES]
        if self is Grid.k_grouped:
            return [(shape.problem, shape.m) for shape in K_GROUPED_SHAPES]
        if self is Grid.grouped:
            pairs = [(shape.problem, shape) for shape in (*grid_grouped(), *FUSED_SHAPES)]
            pairs += [(fused_problem(shape), shape) for shape in FUSED_SHAPES]
            return [(problem, shape.expected_rows) for problem, shape in pairs]
        return [(shape.problem, shape.m) for shape in GRID_DENSE]


def read_problems(path: Path) -> list[tuple[AnyProblem, int]]:
    """The problems of a file as PROBLEMS_HELP describes it, each with every m to choose for.

    Of MLA decode m counts sequences.

    Raises
    ------
    ProblemError : the file cannot be read, or an entry breaks a rule; says which entry and field
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ProblemError(f"{path} must hold a list of problems, not empty")
    pairs: list[tuple[AnyProblem, int]] = []
    for i, entry in enumerate(entries):
        try:
            problem, extents = _read_problem(entry)
        except ProblemError as error:
            raise ProblemError(f"{path}, entry {i}: {error}") from None
        pairs += [(problem, m) for m in extents]
    return pairs


def select_kernels(
    pairs: Iterable[tuple[AnyProblem, int]], gpu: Gpu, *, batch_invariant: bool = False
) -> list[tuple[AnyProblem, AnySchedule]]:
    """Each kernel that calls launch for the problems once, as `jitgen.build.prebuild` takes it.

    With GEMMs comes the kernel of `jitgen.quantize` for their activations, in bfloat16.

    Parameters
    ----------
    pairs : problems with every m to choose for
    gpu : from `jitgen.tuning.select.named_gpu`
    batch_invariant : as for `gemm`
    """

    def schedule(problem: AnyProblem, m: int, max_keys: int | None) -> AnySchedule:
        if isinstance(problem, MergeStates):
            return MergeSchedule()
        if isinstance(problem, Quantization):
            return QuantizationSchedule()
        return select(problem, m, gpu, max_keys=max_keys, batch_invariant=batch_invariant)

    problems = list(pairs)
    if any(isinstance(problem, Gemm) for problem, _ in problems):
        problems.append((Quantization(), 1))
    return list(
        dict.fromkeys(
            (problem, schedule(problem, m, max_keys))
            for problem, m in problems
            for max_keys in (key_limits() if isinstance(problem, MlaDecode) else (None,))
        )
    )


def parse_extents(text: str, problem: Gemm | None = None) -> list[int]:
    """Every m to choose for, of a text such as "1..4096" or "1,64,128..512", ends included.

    problem : for which, as for `m_buckets`

    Raises
    ------
    ProblemError : a part of `text` is not understood, or is no extent
    """
    extents: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part.strip(), re.ASCII)
        if not match:
            raise ProblemError(f"m has {part!r} where a number or a range is due, such as 1..4096")
        first, last = (_read_extent("m", int(number or match[1])) for number in match.groups())
        if first > last:
            raise ProblemError(f"m has {part!r}, a range that ends before it begins")
        extents += [first] if match[2] is None else m_buckets(range(first, last + 1), problem)
    return extents


def _read_problem(entry: object) -> tuple[AnyProblem, list[int]]:
    if not isinstance(entry, dict):
        raise ProblemError(f"must be an object with n, k and m or m_max, got {entry!r:.80}")
    known = MLA_FIELDS if "num_heads" in entry else GEMM_FIELDS
    if unknown := set(entry) - set(known):
        raise ProblemError(f"unknown field {min(unknown)}: use {', '.join(known)}")
    if not isinstance(name := entry.get("name", ""), str):
        raise ProblemError(f"name must be a string, got {name!r:.80}")
    if "num_heads" in entry:
        given = {field: value for field, value in entry.items() if field not in ("name", "b")}
        dtype = _read_dtype("dtype", given.pop("dtype", BF16.name))
        attention = MlaDecode(**given, dtype=dtype)
        check_mla(attention)
        return attention, _read_list("b", entry["b"]) if "b" in entry else list(BATCHES)
    problem = _read_gemm(entry)
    check_problem(problem)
    if ("m" in entry) == ("m_max" in entry):
        raise ProblemError("give either m, a list, or m_max")
    if "m_max" in entry:
        return problem, m_buckets(range(1, _read_extent("m_max", entry["m_max"]) + 1), problem)
    return problem, [planned_rows(problem, m) for m in _read_list("m", entry["m"])]


def _read_gemm(entry: dict[str, Any]) -> Gemm:
    by_k = entry.get("layout") == "k_grouped"
    if missing := {"n", "num_groups" if by_k else "k"} - set(entry):
        raise ProblemError(f"field {min(missing)} is missing")
    dtype = _read_dtype("out_dtype", entry.get("out_dtype", F32.name if by_k else BF16.name))
    if type(swiglu := entry.get("swiglu", False)) is not bool:
        raise ProblemError(f"swiglu must be a bool, got {swiglu!r:.80}")
    problem: Gemm
    if by_k:
        if given := {"k", "swiglu"} & set(entry):
            raise ProblemError(f"{min(given)} is no choice of layout k_grouped: leave it out")
        problem = of_k_groups(entry["n"], entry["num_groups"], dtype)
    else:
        problem = Gemm(entry["n"], entry["k"], dtype, silu(gate) * up if swiglu else acc)
        if "num_groups" in entry:
            groups, layout = entry["num_groups"], entry.get("layout", "ragged")
            problem = GroupedGemm(**vars(problem), num_groups=groups, layout=layout)
        elif "layout" in entry:
            raise ProblemError("layout is of a grouped GEMM: give num_groups too")
    if "b_scale" in entry:
        problem = replace(problem, b_scale=read_scale_block(entry["b_scale"]))
    return problem


def _read_dtype(field: str, name: object) -> DType:
    if not isinstance(name, str):
        raise ProblemError(f"{field} must be a name, got {name!r:.80}")
    return dtype_of(name)


def _read_list(field: str, value: object) -> list[int]:
    if not isinstance(value, list) or not value:
        raise ProblemError(f"{field} must be a list of extents, not empty, got {value!r:.80}")
    return [_read_extent(f"{field}[{i}]", extent) for i, extent in enumerate(value)]


def _read_extent(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_EXTENT:
        raise ProblemError(f"{field} must be an int in 1..{MAX_EXTENT}, got {value!r:.80}")
    return value
