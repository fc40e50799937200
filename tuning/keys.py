"""What a tuning record is the answer to: a problem, of a GEMM or of MLA decode, as JSON and names.

A file holds the records of one GPU model and of one head: a GEMM's n, k and num_groups, with layout
k_grouped its n and num_groups, or the fields of an `MlaDecode`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..dtypes import BF16, F32, dtype_of
from ..errors import ProblemError, StoreError
from ..expr import acc, gate, up
from ..problem import (
    Gemm,
    GroupedGemm,
    ScaleBlock,
    as_tuned,
    check_problem,
    is_k_grouped,
    legal_b_scales,
    of_k_groups,
    tuned_name,
)
from ..problem_mla import MlaDecode, check_mla
from ..schedule import Schedule
from ..schedule_mla import MlaSchedule
from .space_mla import TOPK, mla_as_tuned, mla_name

TunedProblem = Gemm | MlaDecode
TunedSchedule = Schedule | MlaSchedule
MLA_HEAD = tuple(f.name for f in fields(MlaDecode) if f.name not in ("dtype", "causal", "sink"))


def tuned(problem: TunedProblem) -> TunedProblem:
    """What schedules are chosen and measured for in the problem's place."""
    return mla_as_tuned(problem) if isinstance(problem, MlaDecode) else as_tuned(problem)


def is_tunable(problem: TunedProblem, bucket: int, max_keys: int | None = None) -> bool:
    """Whether one schedule is best at `bucket`, the measured one, for calls with `max_keys`.

    For dense MLA decode, and for one sequence, it depends on what a bucket does not say, the most
    keys that there may be; sparse decode is measured with TOPK.
    """
    if not isinstance(problem, MlaDecode):
        return True
    return problem.sparse and bucket > 1 and (max_keys is None or max_keys <= 2 * TOPK)


def file_stem(problem: TunedProblem) -> str:
    """The name of the file that holds the problem's records."""
    if isinstance(problem, MlaDecode):
        return f"mla-{mla_name(problem)}"
    family = "grouped-gemm" if isinstance(problem, GroupedGemm) else "gemm"
    return f"{family}-{tuned_name(problem)}"


def job_name(problem: TunedProblem, m: int) -> str:
    """The problem at one extent, in a word: m rows, or b sequences."""
    if isinstance(problem, MlaDecode):
        return f"b{m}-mla-{mla_name(problem)}"
    name = f"m{m}-{tuned_name(problem)}-{problem.d_dtype}{'-gated' * (problem.num_halves > 1)}"
    return name if _has_usual_b_scale(problem) else f"{name}-b{problem.b_scale}"


_GEMM_JOB = re.compile(
    r"m(\d+)-(?:g(\d+)-)?n(\d+)-(?:k(\d+)|by-k)-(\w+?)(-gated)?(?:-b(\d+x\d+))?", re.ASCII
)


def read_gemm_job(name: str) -> tuple[Gemm, int] | None:
    """The problem and m that `job_name` named; None for those of another family or version."""
    if not (found := _GEMM_JOB.fullmatch(name)):
        return None
    m, groups, n, k, dtype, gated, block = found.groups()
    b_scale = read_scale_block(block) if block else None
    try:
        problem = tuned_gemm(
            *(int(n), int(k) if k else None, int(groups) if groups else None, dtype),
            gated=bool(gated),
            b_scale=b_scale,
        )
        check_problem(problem)
    except ProblemError:
        return None
    return problem, int(m)


def tuned_gemm(
    n: int,
    k: int | None,
    num_groups: int | None,
    dtype: str | None,
    *,
    gated: bool = False,
    b_scale: ScaleBlock | None = None,
) -> Gemm:
    """The GEMM of these, as `as_tuned`; not checked.

    k, num_groups : with groups and no k it is K-grouped
    dtype : of D; by default bfloat16 or, K-grouped, float32
    b_scale : by default the usual one
    """
    epilogue = gate * up if gated else acc
    problem: Gemm
    if k is None:
        d_dtype = F32 if dtype is None else dtype_of(dtype)
        problem = replace(of_k_groups(n, num_groups or 0, d_dtype), epilogue=epilogue)
    else:
        problem = Gemm(n, k, BF16 if dtype is None else dtype_of(dtype), epilogue)
        if num_groups is not None:
            problem = GroupedGemm(**vars(problem), num_groups=num_groups)
    return problem if b_scale is None else replace(problem, b_scale=b_scale)


def schedule_type(job: str) -> type[Schedule] | type[MlaSchedule]:
    """Of what class the schedules of a job are, by its name."""
    return MlaSchedule if "-mla-" in job else Schedule


def place(problem: TunedProblem) -> tuple[int | str, ...]:
    """Where it stands in an order of all problems, those of one file side by side."""
    if isinstance(problem, MlaDecode):
        return 1, problem.num_heads, problem.num_queries, mla_name(problem)
    groups = problem.num_groups if isinstance(problem, GroupedGemm) else 0
    return 0, groups, problem.n, problem.k


def place_in_file(problem: TunedProblem) -> tuple[int | str, ...]:
    """Where it stands among those of its file."""
    if isinstance(problem, MlaDecode):
        return ()
    return problem.d_dtype.name, problem.num_halves, not _has_usual_b_scale(problem)


def head_json(problem: TunedProblem) -> dict[str, Any]:
    """What a file says of all its problems."""
    if isinstance(problem, MlaDecode):
        return {"mla": {name: getattr(problem, name) for name in MLA_HEAD}}
    if isinstance(problem, GroupedGemm) and is_k_grouped(problem):
        return {"n": problem.n, "num_groups": problem.num_groups, "layout": problem.layout}
    groups = {"num_groups": problem.num_groups} if isinstance(problem, GroupedGemm) else {}
    return {"n": problem.n, "k": problem.k, **groups}


def entry_json(problem: TunedProblem) -> dict[str, Any]:
    """What a record says of its problem."""
    if isinstance(problem, MlaDecode):
        return {}
    gated = {"gated": True} if problem.num_halves > 1 else {}
    b_scale = {} if _has_usual_b_scale(problem) else {"b_scale": str(problem.b_scale)}
    return {"out_dtype": problem.d_dtype.name, **gated, **b_scale}


def _has_usual_b_scale(problem: Gemm) -> bool:
    return problem.b_scale == legal_b_scales(problem)[0]


def read_problem(head: Mapping[str, Any], entry: Mapping[str, Any]) -> TunedProblem:
    """The problem that `head_json` and `entry_json` wrote.

    Raises
    ------
    StoreError, ProblemError : a field is missing, unknown or not legal
    """
    if "mla" in head:
        given = head["mla"]
        if not isinstance(given, dict) or set(given) != set(MLA_HEAD):
            raise StoreError(f"mla must have the fields {', '.join(MLA_HEAD)}, got {given!r:.80}")
        attention = mla_as_tuned(MlaDecode(**given))
        check_mla(attention)
        return attention
    gated, name = entry.get("gated", False), entry["out_dtype"]
    if type(gated) is not bool:
        raise StoreError(f"gated must be a bool, got {gated!r:.80}")
    if not isinstance(name, str) or not name:
        raise StoreError(f"out_dtype must be a text, not empty, got {name!r:.80}")
    if (layout := head.get("layout", "k_grouped")) != "k_grouped":
        raise StoreError(f"layout must be k_grouped or left out, got {layout!r:.80}")
    b_scale = read_scale_block(entry["b_scale"]) if "b_scale" in entry else None
    problem = tuned_gemm(
        *(head["n"], head.get("k"), head.get("num_groups"), name), gated=gated, b_scale=b_scale
    )
    check_problem(problem)
    return problem


def read_scale_block(text: object) -> ScaleBlock:
    """Of its name, such as "1x128"; ProblemError if it is none."""
    if not isinstance(text, str) or not (found := re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)):
        raise ProblemError(f'b_scale must be a text such as "1x128", got {text!r:.80}')
    return ScaleBlock(int(found[1]), int(found[2]))


def head_fields(data: object) -> tuple[set[str], set[str]]:
    """The fields of a file's head that there must be, and that there may be."""
    if isinstance(data, dict) and "mla" in data:
        return {"mla"}, set()
    if isinstance(data, dict) and "layout" in data:
        return {"n", "num_groups", "layout"}, set()
    return {"n", "k"}, {"num_groups"}


def entry_fields(head: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The fields of a record that say its problem: that there must be, and that there may be."""
    return (set(), set()) if "mla" in head else ({"out_dtype"}, {"gated", "b_scale"})
