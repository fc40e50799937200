"""Groups: whose rows are which, whatever the device tensor holds, and how many tiles they make."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgen import Gemm, GroupedGemm
from jitgen.groups import (
    Rows,
    expected_rows,
    find_fault,
    max_tile_rows,
    num_values,
    planned_rows,
    rows_of_groups,
    spread_rows,
)
from jitgen.problem import of_k_groups


def problem(layout: str, num_groups: int, alignment: int = 1) -> GroupedGemm:
    if layout == "k_grouped":
        return of_k_groups(8, num_groups)
    return GroupedGemm(8, 16, num_groups=num_groups, layout=layout, alignment=alignment)  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple[GroupedGemm, np.ndarray, int]:
    """A problem, an m, and any values at all, or nearly right ones."""
    layout = draw(st.sampled_from(("ragged", "group_ends", "group_of_row", "masked", "k_grouped")))
    num_groups, m = draw(st.integers(1, 12)), draw(st.integers(0, 300))
    alignment = draw(st.sampled_from((1, 64, 128))) if layout == "group_ends" else 1
    p = problem(layout, num_groups, alignment)
    near = st.integers(-1, num_groups if layout == "group_of_row" else m + 1)
    wild = st.integers(-(2**31), 2**31 - 1)
    count = num_values(p, m)
    values = draw(st.lists(draw(st.sampled_from((near, wild))), min_size=count, max_size=count))
    if layout in ("ragged", "group_ends") and draw(st.booleans()):
        values = sorted(values)
    return p, np.array(values, np.int32), m


@given(cases())
def test_rows_of_groups_are_inside_and_disjoint(case: tuple[GroupedGemm, np.ndarray, int]) -> None:
    p, values, m = case
    rows = rows_of_groups(p, values, m)
    assert len(rows) == p.num_groups
    owners = np.zeros(m, int)
    for group, (begin, end) in enumerate(rows):
        assert 0 <= begin <= end <= m
        if p.layout == "group_of_row":
            owners[begin:end] += values[begin:end] == group
        elif p.layout != "masked":
            owners[begin:end] += 1
        assert begin == end or begin % p.alignment == 0
    assert (owners <= 1).all()


@given(cases(), st.sampled_from((64, 128, 256)))
def test_max_tile_rows_is_enough(case: tuple[GroupedGemm, np.ndarray, int], height: int) -> None:
    p, values, m = case
    rows = rows_of_groups(p, values, m)
    if p.layout == "k_grouped":  # m is k there; each group that has some has as many rows as D
        rows = [Rows(0, 300 if begin < end else 0) for begin, end in rows]
        m = 300
    assert sum(-(-(end - begin) // height) for begin, end in rows) <= max_tile_rows(p, height, m)


@pytest.mark.parametrize(
    ("layout", "alignment", "values", "rows"),
    [
        ("ragged", 1, [0, 3, 3, 7], [(0, 3), (3, 3), (3, 7)]),
        ("ragged", 1, [2, 9, 5, 12], [(2, 9), (9, 9), (9, 10)]),
        ("ragged", 1, [-5, 4, -1, 99], [(0, 4), (4, 4), (4, 10)]),
        ("k_grouped", 128, [0, 128, 128, 384], [(0, 128), (128, 128), (128, 384)]),
        ("k_grouped", 128, [300, -7, 129, 9999], [(256, 256), (256, 256), (256, 384)]),
        ("group_ends", 1, [3, 3, 7], [(0, 3), (3, 3), (3, 7)]),
        ("group_ends", 64, [3, 3, 70], [(0, 3), (10, 10), (10, 10)]),
        ("group_of_row", 1, [1, 1, -1, 0, 0, 0, 5, -7, 2, 2], [(3, 6), (0, 2), (8, 10)]),
        ("group_of_row", 1, [0, 1, 0, -1, 1, 1, 1, 1, -1, -1], [(0, 3), (1, 8), (0, 0)]),
        ("masked", 1, [-1, 4, 99], [(0, 0), (0, 4), (0, 10)]),
    ],
)
def test_rows_of_groups_clamps(
    layout: str, alignment: int, values: list[int], rows: list[tuple[int, int]]
) -> None:
    p = problem(layout, 3, alignment)
    m = 384 if layout == "k_grouped" else 10
    assert rows_of_groups(p, np.array(values, np.int32), m) == [Rows(*r) for r in rows]


def test_rows_of_groups_begin_at_multiples() -> None:
    p = problem("group_ends", 4, 64)
    rows = rows_of_groups(p, np.array([3, 64, 70, 200], np.int32), 256)
    assert rows == [(0, 3), (64, 64), (64, 70), (128, 200)]


@pytest.mark.parametrize(
    ("layout", "alignment", "values", "fault"),
    [
        ("ragged", 1, [0, 3, 3, 10], ""),
        ("ragged", 1, [0, 3, 2, 10], r"groups\[2\] = 2 is below groups\[1\] = 3"),
        ("ragged", 1, [0, 3, 3, 11], r"groups\[3\] = 11 of layout ragged must be in 0\.\.10"),
        ("group_ends", 64, [3, 3, 3], ""),
        ("group_ends", 64, [3, 7, 7], r"groups\[1\] = 7, but group 1 begins at row 10"),
        ("group_of_row", 1, [1, 1, -1, 0, 0, 0, 2, 2, 2, 2], ""),
        ("group_of_row", 1, [1, 1, -2, 0, 0, 0, 2, 2, 2, 2], r"groups\[2\] = -2 .* -1\.\.2"),
        ("masked", 1, [0, 10, 5], ""),
        ("masked", 1, [0, 10, -5], r"groups\[2\] = -5 of layout masked must be in 0\.\.10"),
    ],
)
def test_find_fault_names_the_first(
    layout: str, alignment: int, values: list[int], fault: str
) -> None:
    found = find_fault(problem(layout, 3, alignment), np.array(values, np.int32), 10)
    assert re.search(fault, found) if fault else not found


def test_expected_rows() -> None:
    dense, ragged, masked = Gemm(8, 16), problem("ragged", 32), problem("masked", 32)
    assert [expected_rows(p, 100) for p in (dense, ragged, masked)] == [100, 100, 4000]
    assert expected_rows(masked, 100, 20) == 32 * 25
    assert planned_rows(masked, 32 * 20) == planned_rows(masked, 32 * 19 + 1) == 32 * 25
    assert planned_rows(ragged, 100) == planned_rows(dense, 100) == 100
    assert expected_rows(problem("group_of_row", 32), 10_000) == 10_000 - 32 * 64
    assert expected_rows(problem("group_ends", 32, 64), 10_000) == 10_000 - 32 * 32
    assert expected_rows(problem("group_of_row", 32), 1000) == 500
    assert expected_rows(masked, 100, 500) == 4000
    assert expected_rows(masked, 4096, 1024) == 32 * (1024 + 64)  # the largest reserve


@given(st.integers(1, 512), st.integers(0, 100_000))
def test_spread_rows_are_all_and_near_the_mean(num_groups: int, m: int) -> None:
    rows = spread_rows(num_groups, m)
    assert (len(rows), sum(rows)) == (num_groups, m)
    mean = m / num_groups
    assert all(0.69 * mean - 1 <= count <= 1.32 * mean + 1 for count in rows)
