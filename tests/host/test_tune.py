"""The search, with a measurer that needs no GPU: who may win, and whose times are believed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgen.errors import CandidateError, DeviceError
from jitgen.problem import Gemm
from jitgen.schedule import Schedule
from jitgen.schedule_rules import check_schedule
from jitgen.target import H100
from jitgen.tuning import tune as search
from jitgen.tuning.model import predict_us, rank
from jitgen.tuning.select import select
from jitgen.tuning.space import numerics_class
from jitgen.tuning.tune import Job, Outcome, kinds, make_jobs, pick_winner, shortlist, tune

from .fake_measurer import FakeMeasurer

PROBLEM = Gemm(2112, 7168)
SCHEDULES = tuple(Schedule(64, columns, 4, 1) for columns in (64, 16, 32, 48, 80, 96, 112, 128))
USED, OTHER, THIRD, *REST = SCHEDULES
JOB = Job(PROBLEM, 64, SCHEDULES)


def run(measurer: FakeMeasurer, *jobs: Job, **options: Any) -> list[Outcome]:
    return list(tune(jobs or [JOB], measurer, **options))


def fail_in_process() -> None:
    """What the isolated measurer makes of a process that died."""
    raise CandidateError("the process that measures died with exit code 9")


# --- what to try ----------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [16, 256, 4096])
def test_shortlist_is_legal_distinct_and_begins_with_what_is_used(m: int) -> None:
    found = shortlist(PROBLEM, m, H100, 24)
    assert len(found) == len(set(found)) == 24
    assert found[0] == select(PROBLEM, m, H100)
    for schedule in found:
        check_schedule(PROBLEM, schedule)
    predicted = [predict_us(PROBLEM, schedule, m) for schedule in found]
    assert predicted[1:] == sorted(predicted[1:])
    assert max(predicted) <= search.MAX_PREDICTED * min(predicted)


@pytest.mark.parametrize("m", [16, 4096])
def test_shortlist_has_the_best_of_each_kind(m: int) -> None:
    predicted = rank(PROBLEM, m)
    limit = search.MAX_PREDICTED * min(predicted.values())
    found = shortlist(PROBLEM, m, H100, 50)
    for kind in {kind for schedule in predicted for kind in kinds(schedule)}:
        best = next(schedule for schedule in predicted if kind in kinds(schedule))
        assert best in found or predicted[best] > limit, kind


def test_shortlist_of_one_is_what_is_used() -> None:
    assert shortlist(PROBLEM, 64, H100, 1) == (select(PROBLEM, 64, H100),)


def test_make_jobs_gives_one_a_bucket_and_keeps_a_problem_together() -> None:
    other = Gemm(576, 7168)
    pairs = [(PROBLEM, 1), (other, 100), (PROBLEM, 16), (other, 1), (PROBLEM, 4000)]
    jobs = make_jobs(pairs, H100, 2)
    found = [(job.problem, job.m) for job in jobs]
    assert found == [(other, 16), (other, 128), (PROBLEM, 16), (PROBLEM, 4096)]
    assert all(len(job.schedules) == 2 for job in jobs)


def test_numerics_class_is_one_without_split_k() -> None:
    assert {numerics_class(schedule) for schedule in SCHEDULES} == {numerics_class(USED)}


# --- who wins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_tune_finds_the_fastest(seed: int) -> None:
    (outcome,) = run(FakeMeasurer({OTHER: 90.0, THIRD: 95.0}, seed=seed))
    assert (outcome.status, outcome.reason) == ("measured", "")
    assert outcome.winner
    assert outcome.winner.schedule == OTHER
    assert outcome.winner.kernel_us == pytest.approx(90, rel=0.02)
    assert 0.2 < outcome.winner.spread_us < 2
    assert outcome.winner.num_calls == 2 * search.num_final_calls(100.0) == 120
    assert outcome.speedup == pytest.approx(100 / 90, rel=0.03)
    assert {trial.schedule for trial in outcome.trials} == set(SCHEDULES)


@pytest.mark.parametrize("seed", range(5))
def test_tune_keeps_what_is_used_unless_it_is_beaten_beyond_the_noise(seed: int) -> None:
    times = dict.fromkeys(SCHEDULES, 100.0)
    (outcome,) = run(FakeMeasurer(times, noise=0.01, seed=seed))
    assert outcome.winner
    assert outcome.winner.schedule == USED
    (outcome,) = run(FakeMeasurer(times | {OTHER: 98.0}, noise=0.002, seed=seed))
    assert outcome.winner
    assert outcome.winner.schedule == OTHER


def test_tune_lets_no_wrong_schedule_win() -> None:
    measurer = FakeMeasurer({OTHER: 50.0, THIRD: 90.0}, wrong=(OTHER,))
    (outcome,) = run(measurer)
    assert outcome.winner
    assert outcome.winner.schedule == THIRD
    assert outcome.errors == {OTHER: f"{OTHER} is wrong"}
    assert all(OTHER not in schedules for schedules, _ in measurer.timed)


def test_tune_checks_every_schedule_before_the_first_is_timed() -> None:
    measurer = FakeMeasurer()
    order: list[str] = []
    check, time = measurer.check, measurer.time
    measurer.check = lambda *a: (order.append("check"), check(*a))[1]  # type: ignore[method-assign]
    measurer.time = lambda *a: (order.append("time"), time(*a))[1]  # type: ignore[method-assign]
    run(measurer)
    assert order == ["check"] * len(SCHEDULES) + ["time", "time", "check"]
    assert {schedule for _, schedule in measurer.checked} == set(SCHEDULES)


def test_tune_rejects_a_winner_whose_result_changed() -> None:
    measurer = FakeMeasurer({OTHER: 50.0})
    check = measurer.check

    def check_once(problem: Gemm, m: int, schedule: Schedule) -> None:
        if (m, schedule) in measurer.checked:
            raise CandidateError("another result than before")
        check(problem, m, schedule)

    measurer.check = check_once  # type: ignore[method-assign]
    (outcome,) = run(measurer)
    assert (outcome.status, outcome.winner) == ("failed", None)
    assert outcome.reason == "another result than before"


@given(
    st.lists(
        st.tuples(st.floats(1, 1e4), st.lists(st.floats(0.98, 1.02), min_size=2, max_size=9)),
        min_size=1,
        max_size=8,
    )
)
def test_pick_winner_is_the_first_of_those_as_fast_as_the_fastest(
    drawn: list[tuple[float, list[float]]],
) -> None:
    times = {
        schedule: [us * factor for factor in factors]
        for schedule, (us, factors) in zip(SCHEDULES, drawn, strict=False)
    }
    winner = pick_winner(times)
    medians = {schedule: statistics.median(values) for schedule, values in times.items()}
    fastest = min(times, key=medians.__getitem__)
    assert medians[winner] <= medians[fastest] * 1.1
    assert list(times).index(winner) <= list(times).index(fastest)


# --- whose times are believed ---------------------------------------------------------------------


def between_rounds(factor: float) -> Callable[[int, int], float]:
    return lambda call, i: factor if call % 2 else 1.0


def in_the_final(factor: float) -> Callable[[int, int], float]:
    return lambda call, i: factor if i >= search.num_final_calls(100.0) else 1.0


@pytest.mark.parametrize(
    ("slowdown", "steady", "reason"),
    [
        (between_rounds(1.1), (OTHER,), "the time of"),
        (in_the_final(1.1), (OTHER,), "the time of"),
        (between_rounds(1.4), (), "the times of all moved by"),
        (in_the_final(1.4), (), "the times of all moved by"),
        (lambda call, i: 1.5 if i % 4 == 3 else 1.0, (), "spread by"),  # bursts of another process
    ],
    ids=["drift", "drift in the final", "another pace", "another pace in the final", "bursts"],
)
def test_tune_does_not_believe_times_that_move(
    slowdown: Callable[[int, int], float], steady: tuple[Schedule, ...], reason: str
) -> None:
    measurer = FakeMeasurer({OTHER: 90.0}, noise=0.001, slowdown=slowdown, steady=steady)
    (outcome,) = run(measurer)
    assert (outcome.status, outcome.winner) == ("unstable", None)
    assert reason in outcome.reason
    assert len(measurer.timed) == 2 * search.NUM_ATTEMPTS
    assert outcome.trials  # for the journal


@pytest.mark.parametrize("slowdown", [between_rounds(1.15), in_the_final(1.15)])
def test_tune_believes_times_of_a_gpu_that_gets_warm(
    slowdown: Callable[[int, int], float],
) -> None:
    (outcome,) = run(FakeMeasurer({OTHER: 90.0}, noise=0.001, slowdown=slowdown))
    assert outcome.status == "measured"
    assert outcome.winner
    assert outcome.winner.schedule == OTHER


def test_tune_repeats_times_that_moved_once() -> None:
    measurer = FakeMeasurer({OTHER: 90.0}, slowdown=lambda call, i: 1.4 if call == 1 else 1.0)
    (outcome,) = run(measurer)
    assert outcome.status == "measured"
    assert len(measurer.timed) == 4


# --- what goes wrong ------------------------------------------------------------------------------


def test_tune_finds_the_schedule_that_dies_while_it_is_timed() -> None:
    measurer = FakeMeasurer({OTHER: 50.0, THIRD: 90.0}, deadly_later=(OTHER,), die=fail_in_process)
    (outcome,) = run(measurer)
    assert outcome.winner
    assert outcome.winner.schedule == THIRD
    assert list(outcome.errors) == [OTHER]
    assert "exit code 9" in outcome.errors[OTHER]


def test_tune_fails_where_nothing_can_be_measured() -> None:
    (outcome,) = run(FakeMeasurer(wrong=SCHEDULES))
    assert (outcome.status, outcome.reason) == ("failed", "no schedule can be measured")
    assert set(outcome.errors) == set(SCHEDULES)
    (outcome,) = run(FakeMeasurer(deadly_later=SCHEDULES, die=fail_in_process))
    assert (outcome.status, outcome.reason) == ("failed", "no schedule can be measured")
    (outcome,) = run(FakeMeasurer(), Job(PROBLEM, 64, ()))
    assert outcome.status == "failed"


def test_tune_goes_on_after_a_job_whose_proven_result_is_wrong() -> None:
    second = Job(PROBLEM, 128, SCHEDULES[:2])
    first, outcome = run(FakeMeasurer(refuted=(THIRD,)), JOB, second)
    assert (first.status, first.reason) == ("failed", f"{THIRD} refutes another")
    assert outcome.status == "measured"


def test_tune_passes_on_what_is_no_schedules_fault() -> None:
    def fail() -> None:
        raise DeviceError("the GPU is gone")

    with pytest.raises(DeviceError, match="the GPU is gone"):
        run(FakeMeasurer(deadly=(OTHER,), die=fail))


# --- time limit and progress ----------------------------------------------------------------------


def test_tune_stops_when_it_is_late_and_keeps_what_is_done() -> None:
    measurer = FakeMeasurer()
    second = Job(PROBLEM, 128, SCHEDULES)
    outcomes = run(measurer, JOB, second, is_late=lambda: len(measurer.checked) > 12)
    assert [outcome.job for outcome in outcomes] == [JOB]
    assert run(measurer, is_late=lambda: True) == []


def test_tune_tells_the_best_so_far() -> None:
    told: list[str] = []
    run(FakeMeasurer({OTHER: 90.0}), on_progress=lambda job, text: told.append(f"{job}: {text}"))
    assert told[0] == f"m64-n2112-k7168-bf16: checking 1 of {len(SCHEDULES)}"
    assert told[-1].startswith("m64-n2112-k7168-bf16: best so far ")
    assert str(OTHER) in told[-1]
