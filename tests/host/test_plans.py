"""Plans: a finite set of kernels, into which every m of the range falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgen import Gemm, GroupedGemm, Plan, ProblemError, acc, build, plan, vector
from jitgen.groups import expected_rows
from jitgen.lower import lower
from jitgen.problem import of_k_groups
from jitgen.runtime.store import KernelStore
from jitgen.target import H100
from jitgen.tuning.model import M_BUCKETS, m_bucket, m_buckets
from jitgen.tuning.select import select

PROBLEM = Gemm(264, 512, epilogue=acc + vector("bias"))
ON_H100 = {"gpu": H100.name, "num_sms": H100.num_sms}

ranges = st.builds(
    range, st.integers(0, 9000), st.integers(0, 70_000), st.integers(-500, 500).filter(bool)
)
extents = st.one_of(ranges, st.lists(st.integers(0, 2**31 - 1), max_size=20)).filter(len)


@settings(max_examples=50)
@given(extents)
def test_plan_holds_the_kernel_of_every_m_and_no_other(m_range: range | list[int]) -> None:
    made = plan(PROBLEM, m_range, **ON_H100)
    some = m_range if len(m_range) < 300 else m_range[:: len(m_range) // 100]
    for m in some:
        assert made.schedule(m) == select(PROBLEM, m)
        assert (PROBLEM, made.schedule(m)) in made.kernels
    assert len(set(made.kernels)) == len(made.kernels) <= len(M_BUCKETS)
    assert {m_bucket(m) for m in m_range} == {bucket for bucket, _ in made.schedules}


@given(extents)
def test_m_buckets_are_those_of_the_extents(m_range: range | list[int]) -> None:
    assert m_buckets(sorted(m_range)) == sorted({m_bucket(m) for m in m_range})


def test_plan_of_all_m_is_finite() -> None:
    made = plan(PROBLEM, range(2**31))
    assert [bucket for bucket, _ in made.schedules] == list(M_BUCKETS)


def test_plan_is_hashable_and_a_value() -> None:
    assert plan(PROBLEM, [64, 1]) == plan(PROBLEM, (64, 1))
    assert len({plan(PROBLEM, range(1, 65)), plan(PROBLEM, range(1, 65))}) == 1
    assert isinstance(plan(PROBLEM, range(1, 65)), Plan)


def test_plan_batch_invariant_is_one_kernel() -> None:
    made = plan(PROBLEM, range(1, 5000), batch_invariant=True)
    ((_, schedule),) = made.kernels
    assert schedule == select(PROBLEM, 7, batch_invariant=True)
    assert {made.schedule(m) for m in (1, 100, 4999)} == {schedule}


@pytest.mark.parametrize(
    ("m_range", "message"),
    [
        ([], "m_range is empty"),
        (range(5, 5), "m_range is empty"),
        ([3, -1], "m = -1 must be in 0"),
        (range(10, -10, -1), "m = -9 must be in 0"),
        ([1, 2**31], "must be in 0"),
        ([1, 2.5], "m_range must hold ints, got 2.5"),
    ],
)
def test_plan_rejects(m_range: list[int], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        plan(PROBLEM, m_range)


def test_plan_rejects_a_problem_that_breaks_a_rule() -> None:
    with pytest.raises(ProblemError, match="n = 100"):
        plan(Gemm(100, 512), range(1, 9))


@pytest.mark.parametrize("m", [0, 65, -1])
def test_plan_schedule_rejects_an_m_outside(m: int) -> None:
    with pytest.raises(ProblemError, match=rf"m = {m} is not in the plan, which is for range\(1"):
        plan(PROBLEM, range(1, 65)).schedule(m)


def test_plan_prebuild_leaves_nothing_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path))
    made = plan(PROBLEM, range(1, 65))
    built = made.prebuild(num_processes=1)
    assert [prebuilt.compiled for prebuilt in built] == [True] * len(made.kernels)
    store = KernelStore()
    for m in range(1, 65):
        build.build(lower(PROBLEM, made.schedule(m)), store)
    assert store.stats.compiles == 0


@settings(max_examples=30)
@given(
    st.sampled_from(["ragged", "group_ends", "group_of_row", "masked"]),
    st.integers(1, 3000),
    st.integers(1, 500),
)
def test_plan_of_groups_holds_the_kernel_of_every_call(layout: Any, m: int, step: int) -> None:
    """m counts rows of A or, if masked, those that all groups are expected to have."""
    problem = GroupedGemm(264, 512, num_groups=6, layout=layout)
    m_range = range(m, m + 5 * step, step)
    made = plan(problem, m_range, **ON_H100)
    for m in m_range:
        rows = expected_rows(problem, m)
        if layout == "masked":
            rows = expected_rows(problem, 4096, -(-m // 6))
        assert made.schedule(m) == select(problem, rows)
        assert (problem, made.schedule(m)) in made.kernels


@given(st.integers(1, 20_000), st.sampled_from([1, 8, 64]))
def test_plan_of_k_groups_is_by_the_rows_of_the_weight(m: int, num_groups: int) -> None:
    """Every m that makes as many tile rows of 64 has one schedule, whatever k is."""
    problem = of_k_groups(264, num_groups)
    bucket = m_bucket(m, problem)
    assert bucket == -(-m // 64) * 64
    made = plan(problem, range(m, bucket + 1), **ON_H100)
    assert [at for at, _ in made.schedules] == [bucket]
    assert made.schedule(m) == select(problem, m) == select(problem, bucket)


def test_plan_of_k_groups_of_all_m_is_finite() -> None:
    problem = of_k_groups(7168, 8)
    buckets = m_buckets(range(2**31), problem)
    assert buckets == list(range(64, 65537, 64))
    made = plan(problem, [64, 2112, 7168, 2**31 - 1], **ON_H100)
    assert [at for at, _ in made.schedules] == [64, 2112, 7168, 65536]
