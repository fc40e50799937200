"""The search: which schedules are measured for a problem, and which one wins.

It only decides. What measures them is handed in, so that the decisions are tested without a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..errors import CandidateError, ProblemError, VerifyError, one_line
from ..problem_mla import MlaDecode
from ..schedule import Schedule
from ..schedule_mla import select_mla
from ..target import Gpu
from .keys import TunedProblem, TunedSchedule, job_name, place, place_in_file, tuned
from .model import m_bucket, rank
from .select import select
from .space import numerics_class
from .space_mla import LENGTHS, TOPK, mla_candidates

NUM_CANDIDATES = 32
MAX_PREDICTED = 1.6  # of the least predicted time: what is worth a measurement
NUM_FINALISTS = 6
# Calls of each schedule, in turns with the others: in the first round, and in each half of the
# final, where short kernels, whose times spread more, get more: as many as take that long. One of
# MLA decode launches each length once, and counts for as many.
NUM_SCREENING_CALLS = 6
NUM_FINAL_CALLS = (10, 60)
FINAL_US = 6000.0
MIN_NOISE = 0.005  # medians that are closer than this are equal
# So are those within this many standard errors, which for a median are larger than for a mean.
NOISE_ERRORS = 3 * math.sqrt(math.pi / 2)
# What all medians may move together between the rounds (a GPU that gets warm runs slower, by 15% at
# large m), what one may move against all, and its standard deviation in the final: more, and
# something else ran on the GPU.
MAX_COMMON_DRIFT = 0.25
MAX_DRIFT = 0.05
MAX_SPREAD = 0.1
NUM_ATTEMPTS = 3

Status = Literal["measured", "unstable", "failed"]
Times = dict[TunedSchedule, list[float]]  # microseconds of each call


class Measurer(Protocol):
    """Runs schedules of `problem`, from `keys.tuned`, with `m` rows, of all groups, on one GPU.

    Of MLA decode m counts sequences.

    Both methods raise CandidateError if it is a schedule's fault, ProblemError if nothing can be
    measured, VerifyError if a schedule that had been proven right is wrong. Other JitgenErrors end
    the search.
    """

    def check(self, problem: TunedProblem, m: int, schedule: TunedSchedule) -> None:
        """Raise CandidateError unless D is the interpreter's, bit for bit, or o, within bounds,
        that of float64."""

    def time(
        self, problem: TunedProblem, m: int, schedules: Sequence[TunedSchedule], num_calls: int
    ) -> list[list[float]]:
        """Device times of each schedule in microseconds, L2 cold; the schedules take turns."""


@dataclass(frozen=True)
class Job:
    """One M bucket of a problem, and what may win: first what is used without tuning."""

    problem: TunedProblem
    m: int
    schedules: tuple[TunedSchedule, ...]

    def __str__(self) -> str:
        return job_name(self.problem, self.m)


@dataclass(frozen=True)
class Trial:
    """A schedule's device time of a call: the median, and the standard deviation."""

    schedule: TunedSchedule
    kernel_us: float
    spread_us: float
    num_calls: int


@dataclass(frozen=True)
class Outcome:
    """What came out of a job.

    status : "measured", with a winner; "unstable", the times moved too much for one; or "failed",
        no schedule could be measured, or one that was proven right is not
    reason : why it is not "measured"
    trials : what was measured, in the order of the job's schedules
    errors : why the others were not
    """

    job: Job
    status: Status
    reason: str = ""
    winner: Trial | None = None
    trials: tuple[Trial, ...] = ()
    errors: Mapping[TunedSchedule, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Time of what is used without tuning over the winner's, if both were measured."""
        used = (trial for trial in self.trials if trial.schedule == self.job.schedules[0])
        first = next(used, None)
        return first.kernel_us / self.winner.kernel_us if first and self.winner else None


# --- what to try ----------------------------------------------------------------------------------


def make_jobs(
    pairs: Iterable[tuple[TunedProblem, int]], gpu: Gpu, num_candidates: int = NUM_CANDIDATES
) -> list[Job]:
    """A job for each M bucket of each problem, those that share weights together."""
    keys = dict.fromkeys((tuned(problem), m_bucket(m, problem)) for problem, m in pairs)
    order = sorted(keys, key=lambda key: (place(key[0]), place_in_file(key[0]), key[1]))
    return [Job(problem, m, shortlist(problem, m, gpu, num_candidates)) for problem, m in order]


def shortlist(problem: TunedProblem, m: int, gpu: Gpu, count: int) -> tuple[TunedSchedule, ...]:
    """At most `count` schedules: what is used without tuning, then in order of predicted time.

    Half are the best predicted. Then comes the best of each kind, by row tile, cluster, split and
    promotion, lest the model be wrong about all of one. MLA decode has no model: what is chosen
    without a record, then what differs from it least.
    """
    first: TunedSchedule
    if isinstance(problem, MlaDecode):
        first = select(problem, m, gpu, max_keys=TOPK)
        found = mla_candidates(problem, select_mla(problem, batch=m, max_keys=TOPK))
        return tuple(dict.fromkeys([first, *found]))[:count]
    predicted = rank(problem, m, gpu.num_sms)
    limit = MAX_PREDICTED * min(predicted.values())
    ranked = [schedule for schedule, us in predicted.items() if us <= limit]
    best: dict[tuple[object, ...], Schedule] = {}
    for schedule in ranked:
        for kind in kinds(schedule):
            best.setdefault(kind, schedule)
    first = select(problem, m, gpu)
    wanted = dict.fromkeys([first, *ranked[: count // 2], *best.values(), *ranked])
    chosen = set(list(wanted)[:count])
    return (first, *(s for s in ranked if s in chosen and s != first))


def kinds(schedule: Schedule) -> tuple[tuple[object, ...], ...]:
    """The kinds of schedules that this one belongs to."""
    variant = (schedule.swap_ab, schedule.pingpong)
    return (
        ("rows", schedule.mma_tile[0], schedule.num_math_warpgroups, *variant),
        ("split", schedule.split_k > 1, *variant),
        ("cluster", schedule.cluster_m, schedule.cluster_n),
        ("promotion", schedule.promotion),
        ("numerics", *numerics_class(schedule)),
    )


# --- the race -------------------------------------------------------------------------------------


def tune(
    jobs: Iterable[Job],
    measurer: Measurer,
    *,
    is_late: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Job, str], None] = lambda job, text: None,
) -> Iterator[Outcome]:
    """The outcome of each job as it comes, until `is_late`.

    Parameters
    ----------
    is_late : asked before each job and each schedule; a job that it interrupts has no outcome
    on_progress : told what is being done for a job, with the best so far
    """
    for job in jobs:
        if is_late():
            return
        try:
            outcome = _Race(job, measurer, on_progress).run(is_late)
        except (ProblemError, VerifyError) as error:
            outcome = Outcome(job, "failed", one_line(error))
        if outcome is None:
            return
        yield outcome


class _Race:
    """One job: schedules leave it by their errors, then by their times."""

    def __init__(
        self, job: Job, measurer: Measurer, on_progress: Callable[[Job, str], None]
    ) -> None:
        self._job = job
        self._measurer = measurer
        self._on_progress = on_progress
        self._errors: dict[TunedSchedule, str] = {}

    def run(self, is_late: Callable[[], bool]) -> Outcome | None:
        """The outcome; None if it got late before the times were taken."""
        # Small tiles first: what proves the others is quick to compare with the interpreter.
        schedules = sorted(self._job.schedules, key=_tile_elements)
        for i, schedule in enumerate(schedules):
            if is_late():
                return None
            self._on_progress(self._job, f"checking {i + 1} of {len(schedules)}")
            try:
                self._measurer.check(self._job.problem, self._job.m, schedule)
            except CandidateError as error:
                self._errors[schedule] = one_line(error)
        outcome = self._attempt()
        for _ in range(NUM_ATTEMPTS - 1):
            if outcome.status == "unstable":
                outcome = self._attempt()
        return outcome

    def _attempt(self) -> Outcome:
        """All that are right briefly, then the best of them longer."""
        try:
            screened = self._time(self._job.schedules, NUM_SCREENING_CALLS)
            if not screened:
                return self._outcome("failed", "no schedule can be measured")
            fastest = sorted(screened, key=lambda schedule: statistics.median(screened[schedule]))
            best = _trial(fastest[0], screened[fastest[0]])
            self._on_progress(
                self._job, f"best so far {best.kernel_us:.2f} us with {best.schedule}"
            )
            reference = next(iter(screened))
            finalists = {reference, *fastest[:NUM_FINALISTS]}
            num_calls = 2 * num_final_calls(best.kernel_us, num_launches(self._job.problem))
            final = self._time([s for s in screened if s in finalists], num_calls)
            if not final:
                return self._outcome("failed", "no schedule can be measured twice")
            winner = pick_winner(final)
            self._measurer.check(self._job.problem, self._job.m, winner)
        except CandidateError as error:
            return self._outcome("failed", one_line(error))
        reason = why_unstable(screened, final, (next(iter(final)), winner))
        return self._outcome(
            "unstable" if reason else "measured", reason, winner, {**screened, **final}
        )

    def _time(self, schedules: Sequence[TunedSchedule], num_calls: int) -> Times:
        """The times of those that can be measured, in the same order."""

        def time(some: Sequence[TunedSchedule], num_calls: int) -> Times:
            lists = self._measurer.time(self._job.problem, self._job.m, some, num_calls)
            return dict(zip(some, lists, strict=True))

        alive = [schedule for schedule in schedules if schedule not in self._errors]
        try:
            return time(alive, num_calls) if alive else {}
        except CandidateError:
            for schedule in alive:  # one by one: whose fault was it?
                try:
                    time([schedule], 1)
                except CandidateError as error:
                    self._errors[schedule] = one_line(error)
        alive = [schedule for schedule in alive if schedule not in self._errors]
        return time(alive, num_calls) if alive else {}

    def _outcome(
        self,
        status: Status,
        reason: str,
        winner: TunedSchedule | None = None,
        times: Times | None = None,
    ) -> Outcome:
        trials = {schedule: _trial(schedule, lists) for schedule, lists in (times or {}).items()}
        won = trials[winner] if winner and status == "measured" else None
        return Outcome(self._job, status, reason, won, tuple(trials.values()), self._errors)


def _tile_elements(schedule: TunedSchedule) -> int:
    """Of D; MLA decode is not compared with the interpreter."""
    return schedule.block_m * schedule.block_n if isinstance(schedule, Schedule) else 0


def num_launches(problem: TunedProblem) -> int:
    """Launches that a call of the measurer's counts for."""
    return len(LENGTHS) if isinstance(problem, MlaDecode) else 1


def num_final_calls(kernel_us: float, launches: int = 1) -> int:
    """Calls of each schedule in each half of the final, of so many launches of `kernel_us` each."""
    least, most = NUM_FINAL_CALLS
    return max(min(int(FINAL_US / kernel_us), most) // launches, least)


def pick_winner(times: Times) -> TunedSchedule:
    """The first schedule that is as fast as the fastest, up to the noise of both."""
    fastest = min(times, key=lambda schedule: statistics.median(times[schedule]))
    limit = statistics.median(times[fastest])

    def noise_us(schedule: TunedSchedule) -> float:
        errors = (statistics.pvariance(times[s]) / len(times[s]) for s in (schedule, fastest))
        return max(MIN_NOISE * limit, NOISE_ERRORS * math.sqrt(sum(errors)))

    return next(s for s in times if statistics.median(times[s]) <= limit + noise_us(s))


def why_unstable(first: Times, final: Times, chosen: Sequence[TunedSchedule]) -> str:
    """What speaks against trusting the times of `chosen`; "" if nothing.

    first, final : of both rounds; what is in the final was in the first
    """
    half = len(next(iter(final.values()))) // 2
    parts = (
        {schedule: first[schedule] for schedule in final},
        {schedule: times[:half] for schedule, times in final.items()},
        {schedule: times[half:] for schedule, times in final.items()},
    )
    rounds = [{s: statistics.median(times) for s, times in part.items()} for part in parts]
    paces = [statistics.geometric_mean(medians.values()) for medians in rounds]
    if (drift := max(paces) / min(paces) - 1) > MAX_COMMON_DRIFT:
        return f"the times of all moved by {drift:.1%}, more than {MAX_COMMON_DRIFT:.0%}"
    for schedule in chosen:
        shares = [medians[schedule] / pace for medians, pace in zip(rounds, paces, strict=True)]
        if (drift := max(shares) / min(shares) - 1) > MAX_DRIFT:
            return f"the time of {schedule} moved by {drift:.1%}, more than {MAX_DRIFT:.0%}"
        spread = statistics.pstdev(final[schedule]) / statistics.median(final[schedule])
        if spread > MAX_SPREAD:
            return f"the times of {schedule} spread by {spread:.1%}, more than {MAX_SPREAD:.0%}"
    return ""


def _trial(schedule: TunedSchedule, times: list[float]) -> Trial:
    median, spread = statistics.median(times), statistics.pstdev(times)
    return Trial(schedule, round(median, 3), round(spread, 3), len(times))
