"""Measuring on a GPU: schedules are run as users run them, checked, and timed in turns.

It runs in a process of its own, see `worker`: a kernel may end that.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..api import gemm, quantize
from ..dtypes import E4M3, F32
from ..errors import (
    CandidateError,
    CompileError,
    DeviceError,
    ProblemError,
    ScheduleError,
    VerifyError,
)
from ..kernel import Kernel
from ..lower import lower
from ..problem import Gemm
from ..schedule import BLOCK_K, Schedule
from .bench import check_machine, check_tiles, sample_tiles, to_numpy
from .space import numerics_class
from .timing import NUM_PROFILES, profile_calls, summarize_calls

SAMPLE_MACS = 3 * 10**7  # multiply-adds of the interpreter that may prove a result, about


class GpuMeasurer:
    """A Measurer on torch's current GPU.

    The first schedule of a numerics class is compared with the interpreter in a sample of tiles,
    and roughly with the whole result of another class; all others of its class are compared with
    the whole of its result, bit for bit.

    Raises
    ------
    DeviceError : torch is missing or sees no GPU, or the GPU cannot run the kernels
    """

    def __init__(self, device: str = "cuda") -> None:
        check_machine()
        self._device = device
        self._case: _Case | None = None

    def check(self, problem: Gemm, m: int, schedule: Schedule) -> None:
        """Raise CandidateError unless D is the interpreter's, bit for bit."""
        import torch

        try:
            self._case_of(problem, m).check(schedule)
        except (CompileError, ScheduleError) as error:
            raise CandidateError(str(error)) from None
        except torch.OutOfMemoryError:
            raise ProblemError(
                f"{problem} with m = {m} does not fit into the GPU's memory twice: tune smaller m"
            ) from None

    def time(
        self, problem: Gemm, m: int, schedules: Sequence[Schedule], num_calls: int
    ) -> list[list[float]]:
        """Device times of each schedule in microseconds, L2 cold; the schedules take turns."""
        case = self._case_of(problem, m)
        calls = [functools.partial(case.run, schedule) for schedule in schedules]
        for call in calls:
            call()  # all kernels are loaded before the first is timed
        return time_in_turns(calls, num_calls)

    def _case_of(self, problem: Gemm, m: int) -> _Case:
        if self._case is None or (self._case.problem, self._case.m) != (problem, m):
            self._case = None  # frees its memory first
            self._case = _Case(problem, m, self._device)
        return self._case


def time_in_turns(calls: Sequence[Callable[[], object]], num_calls: int) -> list[list[float]]:
    """Device times of each of `calls` in microseconds; they take turns, the first is not counted.

    Raises
    ------
    DeviceError : records of the profiler were lost, several times
    """

    def attempt() -> list[list[float]]:
        runs = profile_calls([*calls] * (1 + num_calls))
        of_each = [runs[i :: len(calls)][1:] for i in range(len(calls))]
        for same in of_each:
            summarize_calls(same)  # which sees that they ran the same kernels
        return [[sum(event.duration_us for event in run) for run in same] for same in of_each]

    for _ in range(NUM_PROFILES - 1):
        with contextlib.suppress(DeviceError):
            return attempt()
    return attempt()


class _Case:
    """The operands of one problem with m rows, and the results that are proven right."""

    def __init__(self, problem: Gemm, m: int, device: str) -> None:
        import torch

        self.problem, self.m = problem, m
        generator = torch.Generator(device).manual_seed(m)
        x = torch.randn(m, problem.k, device=device, generator=generator)
        self.a, self.sfa = quantize(x)
        self.b, self.sfb = _weights(problem.n, problem.k, device)
        dtype = getattr(torch, problem.d_dtype.name)
        self.d = torch.empty(m, problem.n, dtype=dtype, device=device)
        self._proven: dict[tuple[object, ...], tuple[Schedule, Any]] = {}

    def run(self, schedule: Schedule) -> None:
        """D, launched as a user would."""
        gemm(self.a, self.b, (self.sfa, self.sfb), out=self.d, schedule=schedule)

    def check(self, schedule: Schedule) -> None:
        """Run on a poisoned D, and compare with what is proven or else with the interpreter."""
        self.d.fill_(math.nan)
        self.run(schedule)
        kind = numerics_class(schedule)
        if kind in self._proven:
            proven_by, proven = self._proven[kind]
            self._check_places(schedule, proven_by, self._bits(self.d) != self._bits(proven))
            return
        self._compare_with_interpreter(schedule)
        for proven_by, proven in [*self._proven.values()][:1]:
            self._check_places(schedule, proven_by, self._is_far(proven))
        self._proven[kind] = schedule, self.d.clone()

    def _check_places(self, schedule: Schedule, proven_by: Schedule, wrong: Any) -> None:
        """Where `wrong`, D is not that of another schedule: raise the error of the wrong one."""
        if not wrong.any():
            return
        row, column = divmod(int(wrong.flatten().byte().argmax()), self.problem.n)
        tile = row - row % schedule.block_m, column - column % schedule.block_n
        self._check_tile(lower(self.problem, schedule), *tile)
        raise VerifyError(
            f"{self.problem}, m = {self.m}: {proven_by} is wrong at [{row}, {column}], where"
            f" {schedule} has the interpreter's bits: report this"
        )

    def _is_far(self, proven: Any) -> Any:
        """Where D is not the proven result with its N K blocks added in another order.

        Either order errs by N * 2^-24 times the sum of the blocks' sizes at most. That sum is about
        sqrt(N) standard deviations of D (the blocks are random), and taken to be 4 times as much.
        Then D is rounded, to neighbouring bfloat16 perhaps, which are 2^-7 of themselves apart.
        """
        d, other = self.d.float(), proven.float()
        num_blocks = -(-self.problem.k // BLOCK_K)
        limit_of_sums = 2 * 4 * num_blocks**1.5 * 2**-24 * other.std()
        return (d - other).abs() > 2**-7 * other.abs() + limit_of_sums

    def _compare_with_interpreter(self, schedule: Schedule) -> None:
        import torch

        if unwritten := int(torch.isnan(self.d).sum()):
            raise CandidateError(f"{schedule}: {unwritten} elements of D are NaN")
        kernel = lower(self.problem, schedule)
        num_random = max(1, SAMPLE_MACS // (schedule.block_m * schedule.block_n * self.problem.k))
        for row, column in sample_tiles(kernel, self.m, num_random):
            self._check_tile(kernel, row, column)

    def _check_tile(self, kernel: Kernel, row: int, column: int) -> None:
        """Raise CandidateError unless the tile at [row, column] has the interpreter's bits."""
        rows = slice(row, row + kernel.schedule.block_m)  # which depend on no others
        tensors = {"a": to_numpy(self.a[rows], E4M3), "sfa": to_numpy(self.sfa[rows], F32)}
        d = to_numpy(self.d[rows], self.problem.d_dtype)
        try:
            check_tiles(kernel, self._host_weights | tensors, d, [(0, column)])
        except VerifyError as error:
            raise CandidateError(f"m = {self.m}, in the rows from {row}: {error}") from None

    @functools.cached_property
    def _host_weights(self) -> dict[str, Any]:
        return {"b": to_numpy(self.b, E4M3), "sfb": to_numpy(self.sfb, F32)}

    def _bits(self, d: Any) -> Any:
        import torch

        return d.view(torch.int16 if self.problem.d_dtype.size_bytes == 2 else torch.int32)


@functools.lru_cache(maxsize=1)
def _weights(n: int, k: int, device: str) -> tuple[Any, Any]:
    """B and sfb, which all m of a problem share."""
    import torch

    generator = torch.Generator(device).manual_seed(n)
    return quantize(torch.randn(n, k, device=device, generator=generator), (128, 128))
