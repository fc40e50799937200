"""Regret of the cost model: what its choice costs against the fastest schedule measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..problem import Gemm
from ..schedule import Schedule
from ..target import Gpu
from .keys import place, read_gemm_job
from .model import predict_us
from .session import JournalLine
from .space import is_legal
from .tune import Trial


@dataclass(frozen=True)
class Regret:
    """One job of the tuner: among the schedules it measured, the fastest and the model's choice.

    picked : has the least time predicted by this version's model
    trials : each with that time, in microseconds
    """

    gpu: Gpu
    problem: Gemm
    m: int
    fastest: Trial
    picked: Trial
    trials: tuple[tuple[Trial, float], ...]

    @property
    def ratio(self) -> float:
        """Measured time of the model's choice over the fastest one's: 1 is no regret."""
        return self.picked.kernel_us / self.fastest.kernel_us


def regrets(journal: Iterable[JournalLine]) -> list[Regret]:
    """The regret of each GEMM that was measured, from its newest line, by problem and m.

    A schedule that is legal no more does not count.
    """
    newest = {(line.gpu, line.job): line for line in journal if line.status == "measured"}
    found = [regret for line in newest.values() if (regret := _regret(line))]
    return sorted(found, key=lambda regret: (*place(regret.problem), regret.m))


def _regret(line: JournalLine) -> Regret | None:
    if (job := read_gemm_job(line.job)) is None:
        return None  # another family's
    problem, m = job
    predicted = {
        trial: predict_us(problem, trial.schedule, m, line.gpu.num_sms)
        for trial in line.trials
        if isinstance(trial.schedule, Schedule) and is_legal(problem, trial.schedule)
    }
    if not predicted:
        return None
    fastest = min(predicted, key=lambda trial: trial.kernel_us)
    picked = min(predicted, key=predicted.__getitem__)
    return Regret(line.gpu, problem, m, fastest, picked, tuple(predicted.items()))
