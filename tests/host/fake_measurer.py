"""A Measurer without a GPU, in a module that a spawned process can import."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jitgen.errors import CandidateError, DeviceError, VerifyError
from jitgen.tuning.keys import TunedProblem, TunedSchedule

Faults = tuple[TunedSchedule, ...]


def exit_now() -> None:
    os._exit(9)


def raise_runtime_error() -> None:
    raise RuntimeError("an illegal memory access")


def raise_device_error() -> None:
    raise DeviceError("the GPU is gone")


def no_slowdown(call: int, round_: int) -> float:
    return 1.0


@dataclass
class FakeMeasurer:
    """Each schedule takes its time in `times_us`, or 100, with Gaussian noise.

    wrong, refuted, deadly, hanging : schedules that `check` refuses, refutes the proven one with,
        dies of, hangs in
    deadly_later : schedules that `time` dies of (`die` says how)
    slowdown : by the number of the call of `time`: a factor for each of its rounds
    steady : schedules that it leaves alone
    """

    times_us: Mapping[TunedSchedule, float] = field(default_factory=dict)
    noise: float = 0.01
    seed: int = 0
    wrong: Faults = ()
    refuted: Faults = ()
    deadly: Faults = ()
    hanging: Faults = ()
    deadly_later: Faults = ()
    die: Callable[[], None] = exit_now
    slowdown: Callable[[int, int], float] = no_slowdown
    steady: Faults = ()
    checked: list[tuple[int, TunedSchedule]] = field(default_factory=list)
    timed: list[tuple[tuple[TunedSchedule, ...], int]] = field(default_factory=list)

    def check(self, problem: TunedProblem, m: int, schedule: TunedSchedule) -> None:
        self.checked.append((m, schedule))
        if schedule in self.wrong:
            raise CandidateError(f"{schedule} is wrong")
        if schedule in self.refuted:
            raise VerifyError(f"{schedule} refutes another")
        if schedule in self.deadly:
            self.die()
        if schedule in self.hanging:
            time.sleep(600)

    def time(
        self, problem: TunedProblem, m: int, schedules: Sequence[TunedSchedule], num_calls: int
    ) -> list[list[float]]:
        self.timed.append((tuple(schedules), num_calls))
        if set(schedules) & set(self.deadly_later):
            self.die()
        rng = random.Random(f"{self.seed} {len(self.timed)}")
        return [
            [
                self.times_us.get(schedule, 100.0)
                * rng.gauss(1, self.noise)
                * (1.0 if schedule in self.steady else self.slowdown(len(self.timed), i))
                for i in range(num_calls)
            ]
            for schedule in schedules
        ]


def make_fake(**options: object) -> FakeMeasurer:
    """A FakeMeasurer in this process; functools.partial of it can be pickled."""
    return FakeMeasurer(**options)  # type: ignore[arg-type]


def fail_to_start() -> FakeMeasurer:
    raise ValueError("no such thing")


def die_at_start() -> FakeMeasurer:
    os._exit(7)
