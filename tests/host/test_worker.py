"""The measuring process: what a schedule does to it, and that the search goes on."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jitgen.errors import CandidateError, DeviceError, VerifyError
from jitgen.problem import Gemm
from jitgen.schedule import Schedule
from jitgen.tuning.tune import Job, tune
from jitgen.tuning.worker import IsolatedMeasurer

PROBLEM = Gemm(256, 512)
FINE, OTHER, BAD = (Schedule(64, columns, 4, 1) for columns in (64, 32, 48))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of fakes under a name that a spawned process can import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("fake_measurer")


@pytest.fixture
def isolated(fake: Any) -> Iterator[Callable[..., IsolatedMeasurer]]:
    """Makes an IsolatedMeasurer of a fake with these faults, and ends it after the test."""
    made: list[IsolatedMeasurer] = []

    def make(call_timeout_s: float = 60.0, **faults: object) -> IsolatedMeasurer:
        factory = functools.partial(fake.make_fake, **faults)
        made.append(IsolatedMeasurer(factory, call_timeout_s=call_timeout_s))
        return made[-1]

    yield make
    for measurer in made:
        measurer.__exit__(None, None, None)


Isolated = Callable[..., IsolatedMeasurer]


def test_isolated_measurer_answers_like_the_one_inside(isolated: Isolated, fake: Any) -> None:
    measurer = isolated(times_us={OTHER: 50.0})
    measurer.check(PROBLEM, 64, FINE)
    times = measurer.time(PROBLEM, 64, [FINE, OTHER], 3)
    assert times == fake.make_fake(times_us={OTHER: 50.0}).time(PROBLEM, 64, [FINE, OTHER], 3)


@pytest.mark.parametrize(("fault", "error"), [("wrong", CandidateError), ("refuted", VerifyError)])
def test_isolated_measurer_passes_errors_on_and_lives(
    isolated: Isolated, fault: str, error: type[Exception]
) -> None:
    measurer = isolated(**{fault: (BAD,)})
    measurer.time(PROBLEM, 64, [FINE], 1)
    with pytest.raises(error, match=str(BAD)):
        measurer.check(PROBLEM, 64, BAD)
    # A new process would give the times of a first call again.
    first, second = (measurer.time(PROBLEM, 64, [FINE], 1) for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("die", "message"),
    [
        ("exit_now", "died with exit code 9"),
        ("raise_runtime_error", "RuntimeError: an illegal memory access"),
        ("raise_device_error", "the GPU is gone"),
    ],
)
def test_isolated_measurer_starts_anew_after_a_schedule_broke_its_process(
    isolated: Isolated, fake: Any, die: str, message: str
) -> None:
    measurer = isolated(deadly=(BAD,), die=getattr(fake, die))
    first = measurer.time(PROBLEM, 64, [FINE], 1)
    with pytest.raises(CandidateError, match=message):
        measurer.check(PROBLEM, 64, BAD)
    assert measurer.time(PROBLEM, 64, [FINE], 1) == first


def test_isolated_measurer_kills_a_process_that_hangs(isolated: Isolated) -> None:
    measurer = isolated(call_timeout_s=2, hanging=(BAD,))
    measurer.check(PROBLEM, 64, FINE)
    with pytest.raises(CandidateError, match="did not answer for 2 s"):
        measurer.check(PROBLEM, 64, BAD)
    measurer.check(PROBLEM, 64, FINE)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("fail_to_start", "ValueError: no such thing"),
        ("die_at_start", "died with exit code 7 at its start"),
    ],
)
def test_isolated_measurer_rejects_a_start_that_fails(
    fake: Any, factory: str, message: str
) -> None:
    with IsolatedMeasurer(getattr(fake, factory)) as measurer:
        for _ in range(2):
            with pytest.raises(DeviceError, match=message):
                measurer.check(PROBLEM, 64, FINE)


def test_isolated_measurer_ends_its_process(isolated: Isolated) -> None:
    measurer = isolated()
    measurer.check(PROBLEM, 64, FINE)
    process = measurer._process
    assert process
    with measurer:
        assert process.is_alive()
    assert process.exitcode == 0


def test_tune_goes_on_after_a_death_and_a_hang(isolated: Isolated) -> None:
    hangs = Schedule(64, 80, 4, 1)
    measurer = isolated(
        call_timeout_s=2,
        times_us={OTHER: 80.0, BAD: 10.0, hangs: 10.0},
        deadly=(BAD,),
        hanging=(hangs,),
    )
    (outcome,) = tune([Job(PROBLEM, 64, (FINE, BAD, hangs, OTHER))], measurer)
    assert outcome.winner
    assert outcome.winner.schedule == OTHER
    assert "exit code 9" in outcome.errors[BAD]
    assert "did not answer" in outcome.errors[hangs]
