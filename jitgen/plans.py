"""Plans: the finite set of kernels behind every m of a range, known and compiled in advance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ProblemError
from .groups import planned_rows
from .problem import Gemm, check_problem, check_rows
from .problem_mla import MlaDecode, check_mla
from .target import Gpu
from .tuning.keys import TunedProblem, TunedSchedule
from .tuning.model import m_bucket, m_buckets
from .tuning.select import named_gpu, select

if TYPE_CHECKING:
    from .build import Prebuilt


@dataclass(frozen=True)
class Plan:
    """What `gemm` or `mla_decode` launches for one problem, at every m of `extents`, on one GPU.

    Of a grouped problem, m counts the rows of all groups: those of A or, with Masked, num_groups
    times its expected_rows; of MLA decode sequences.

    schedules : by M bucket, see `jitgen.tuning.model.m_bucket`
    """

    problem: TunedProblem
    extents: range | tuple[int, ...]
    gpu: Gpu
    schedules: tuple[tuple[int, TunedSchedule], ...]

    @property
    def kernels(self) -> tuple[tuple[TunedProblem, TunedSchedule], ...]:
        """Each kernel once, as `prebuild` takes them."""
        return tuple(dict.fromkeys((self.problem, schedule) for _, schedule in self.schedules))

    def schedule(self, m: int) -> TunedSchedule:
        """The schedule of a call with `m` rows.

        Raises
        ------
        ProblemError : m is not one of the plan's
        """
        if m not in self.extents:
            raise ProblemError(f"m = {m} is not in the plan, which is for {self.extents}")
        rows = planned_rows(self.problem, m) if isinstance(self.problem, Gemm) else m
        return dict(self.schedules)[m_bucket(rows, self.problem)]

    def prebuild(self, *, num_processes: int | None = None) -> list[Prebuilt]:
        """Compile what is not in the store yet; needs no GPU. Errors as `jitgen.build.prebuild`.

        No call with an m of the plan compiles afterwards.
        """
        from .build import prebuild

        return prebuild(self.kernels, num_processes=num_processes)


def plan(
    problem: TunedProblem,
    m_range: Sequence[int],
    *,
    gpu: str | None = None,
    num_sms: int | None = None,
    max_keys: int | None = None,
    batch_invariant: bool = False,
) -> Plan:
    """The kernels that calls launch for `problem` at every m of `m_range`: all of them, no more.

    Parameters
    ----------
    problem : with the epilogue of the calls
    m_range : such as range(1, 4097), or [1, 2, 4, 8]: rows or, for MLA decode, sequences
    gpu, num_sms : its name as the driver gives it, and its multiprocessors; default as for
        `jitgen.tuning.select.named_gpu`
    max_keys : of MLA decode, that a sequence may have: the columns of block_table times a page, or
        sparse topk. Calls with others may launch other kernels; `jitgen prebuild` has all of them
    batch_invariant : as for `gemm`

    A plan follows the tuning records of the machine and moment that it is made at; a call follows
    those of its own.

    Raises
    ------
    ProblemError : the problem breaks a rule, or m_range is empty or has an m that is no extent
    """
    if isinstance(problem, MlaDecode):
        check_mla(problem)
    else:
        check_problem(problem)
    extents = m_range if isinstance(m_range, range) else tuple(m_range)
    ascending = _ascending(extents)
    chosen = named_gpu(gpu, num_sms)
    schedules = tuple(
        (
            bucket,
            select(problem, bucket, chosen, max_keys=max_keys, batch_invariant=batch_invariant),
        )
        for bucket in m_buckets(ascending, problem)
    )
    return Plan(problem, extents, chosen, schedules)


def _ascending(extents: range | tuple[int, ...]) -> Sequence[int]:
    """The extents in order, checked; a range stays one, it may be long."""
    if not extents:
        raise ProblemError("m_range is empty")
    if isinstance(extents, range):
        ordered: Sequence[int] = extents if extents.step > 0 else extents[::-1]
    else:
        for m in extents:
            if not isinstance(m, int) or isinstance(m, bool):
                raise ProblemError(f"m_range must hold ints, got {m!r:.80}")
        ordered = sorted(extents)
    check_rows(ordered[0])
    check_rows(ordered[-1])
    return ordered
