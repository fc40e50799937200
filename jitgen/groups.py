"""Groups: which rows of A and D, or columns of A and B, are whose, as the device finds it, and how
many tiles they make.

`Layout` in jitgen.problem says what the int32 tensor `groups` holds. Whatever it holds, no row is
computed for two groups, and none beyond the tensor's end: this module defines what a faulty one
means, and `find_fault` tells it.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .problem import Gemm, GroupedGemm, is_k_grouped, is_masked

Values = NDArray[Any]


class Rows(NamedTuple):
    """Rows `begin` .. `end` of A and D; of group_of_row, those among them that name the group.

    Of k_grouped, columns of A and B.
    """

    begin: int
    end: int


def num_values(problem: GroupedGemm, m: int) -> int:
    """Elements of the tensor `groups`."""
    if problem.layout == "group_of_row":
        return m
    return problem.num_groups + (problem.layout in ("ragged", "k_grouped"))


def rows_of_groups(problem: GroupedGemm, values: Values, m: int) -> list[Rows]:
    """The rows of every group; in A[g] if A has one matrix a group, which has m rows then.

    Positions are clamped to 0..m, and to those before them where they must not decrease. Of
    k_grouped m is k, and positions are cut to multiples of `alignment` first.
    """
    if problem.layout == "group_of_row":
        return [_span(np.flatnonzero(values == group)) for group in range(problem.num_groups)]
    positions = np.clip(values.astype(np.int64), 0, m)
    if is_masked(problem):
        return [Rows(0, int(count)) for count in positions]
    if is_k_grouped(problem):
        positions = positions // problem.alignment * problem.alignment
    ends = np.maximum.accumulate(positions)
    if problem.layout in ("ragged", "k_grouped"):
        return [Rows(int(a), int(b)) for a, b in itertools.pairwise(ends)]
    unit = problem.alignment
    begins = np.minimum(-(-np.concatenate(([0], ends[:-1])) // unit) * unit, m)
    return [Rows(int(a), max(int(a), int(b))) for a, b in zip(begins, ends, strict=True)]


def _span(found: NDArray[np.int64]) -> Rows:
    return Rows(int(found[0]), int(found[-1]) + 1) if len(found) else Rows(0, 0)


def find_fault(problem: GroupedGemm, values: Values, m: int) -> str:
    """What is wrong with the tensor `groups`, of which the device makes what it can; or nothing.

    m : rows of A, or of A[g]; of k_grouped, k
    """
    low, high = (-1, problem.num_groups - 1) if problem.layout == "group_of_row" else (0, m)
    outside = np.flatnonzero((values < low) | (values > high))
    if len(outside):
        i = outside[0]
        return f"groups[{i}] = {values[i]} of layout {problem.layout} must be in {low}..{high}"
    if is_k_grouped(problem) and (values % problem.alignment).any():
        i = np.flatnonzero(values % problem.alignment)[0]
        return f"groups[{i}] = {values[i]} must be a multiple of {problem.alignment}"
    if problem.layout in ("ragged", "group_ends", "k_grouped"):
        falls = np.flatnonzero(np.diff(values) < 0)
        if len(falls):
            i = falls[0] + 1
            return f"groups[{i}] = {values[i]} is below groups[{i - 1}] = {values[i - 1]}"
    if problem.layout == "group_ends":
        for group, (begin, end) in enumerate(rows_of_groups(problem, values, m)):
            before = values[group - 1] if group else 0
            if values[group] not in (end, before):
                return (
                    f"groups[{group}] = {values[group]}, but group {group} begins at row {begin},"
                    f" the next multiple of {problem.alignment}"
                )
    return ""


def max_tile_rows(problem: Gemm, height: int, m: int) -> int:
    """Most tile rows of `height` rows that m rows of D (of each group's, if it has one) make."""
    if not isinstance(problem, GroupedGemm):
        return -(-m // height)
    if is_masked(problem) or is_k_grouped(problem):
        return problem.num_groups * -(-m // height)
    if problem.layout == "group_of_row":  # rows of all groups may alternate
        return min(problem.num_groups, m) * -(-m // height)
    groups = min(problem.num_groups, m)
    return groups + (m - groups) // height


def expected_rows(problem: Gemm, m: int, of_group: int | None = None) -> int:
    """Rows to choose a schedule for: m or, where each group may have m of them, all in all.

    of_group : rows that a group is expected to have
    """
    if not isinstance(problem, GroupedGemm) or not is_masked(problem):
        return m
    return problem.num_groups * min(m if of_group is None else of_group, m)


def typical_rows(problem: Gemm, m: int) -> tuple[int, int]:
    """Groups that have rows, and how many each, when m rows are dealt out evenly."""
    if not isinstance(problem, GroupedGemm) or m == 0:
        return 1, m
    if is_k_grouped(problem):
        return problem.num_groups, m
    groups = min(problem.num_groups, m)
    return groups, -(-m // groups)
