"""Groups: which rows of A and D, or columns of A and B, are whose, as the device finds it, and how
many tiles they make.

`Layout` in jitgen.problem says what the int32 tensor `groups` holds. Whatever it holds, no row is
computed for two groups, and none beyond the tensor's end: this module defines what a faulty one
means, and `find_fault` tells it.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .problem import Gemm, GroupedGemm, is_k_grouped, is_masked

Values = NDArray[Any]
ROW_PADDING = 128  # rows of which groups that are named row by row are often made a multiple
MAX_RESERVE = 64  # rows: half a tile of those that large groups take
GOLDEN_RATIO = 0.6180339887  # multiples of which spread evenly over 0..1, whole parts left out


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
    """Rows to choose a schedule for, of all groups: those of A, without the padding there may be.

    of_group : rows that a group is expected to have, if masked; a quarter more are reckoned with,
        at most MAX_RESERVE, because a tile row too many costs more than rows that stay empty
    """
    if not isinstance(problem, GroupedGemm) or is_k_grouped(problem):
        return m
    if is_masked(problem):
        rows = m if of_group is None else min(of_group, m)
        return problem.num_groups * (rows + min(rows // 4, MAX_RESERVE))
    unit = ROW_PADDING if problem.layout == "group_of_row" else problem.alignment
    return max(m - problem.num_groups * (unit // 2), m // 2)


def planned_rows(problem: Gemm, m: int) -> int:
    """As `expected_rows`, for an m that counts the rows of all groups if masked, too."""
    if not isinstance(problem, GroupedGemm) or not is_masked(problem):
        return expected_rows(problem, m)
    return expected_rows(problem, -(-m // problem.num_groups))


@functools.lru_cache(maxsize=1024)
def spread_rows(num_groups: int, m: int) -> tuple[int, ...]:
    """Rows of each group when m are dealt out as a router may: 0.7 to 1.3 of the mean.

    Schedules are chosen and measured for these; always the same, large groups among small ones.
    """
    shares = (0.7 + 0.6 * ((i + 0.5) * GOLDEN_RATIO % 1) for i in range(num_groups))
    ends = list(itertools.accumulate(shares))
    rows = [round(m * end / ends[-1]) for end in ends]
    return tuple(end - begin for begin, end in itertools.pairwise([0, *rows]))
