"""Measuring on a GPU: schedules are run as users run them, checked, and timed in turns.

It runs in a process of its own, see `worker`: a kernel may end that.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..api import gemm, grouped_gemm
from ..api_quantize import quantize
from ..dtypes import E4M3, F32
from ..errors import (
    CandidateError,
    CompileError,
    ProblemError,
    ScheduleError,
    VerifyError,
)
from ..groups import Rows, spread_rows
from ..kernel import Kernel
from ..layouts import Ragged
from ..lower import lower
from ..problem import D_SCALE, Gemm, GroupedGemm, is_k_grouped
from ..problem_mla import MlaDecode
from ..schedule import BLOCK_K, WGMMA_M, Schedule
from .bench import check_machine, check_tiles, sample_tiles, to_numpy
from .keys import TunedProblem
from .measure_k_grouped import KGroupedCase
from .measure_mla import MlaCase
from .operands import make_weights
from .space import numerics_class
from .timing import profile_in_turns

E4M3_NAN = 0x7F
SAMPLE_MACS = 3 * 10**7  # multiply-adds of the interpreter that may prove a result, about


class GpuMeasurer:
    """A Measurer on torch's current GPU.

    The first schedule of a numerics class is compared with the interpreter in a sample of tiles,
    and roughly with the whole result of another class; all others of its class are compared with
    the whole of its result, bit for bit. MLA decode is compared with float64.

    Raises
    ------
    DeviceError : torch is missing or sees no GPU, or the GPU cannot run the kernels
    """

    def __init__(self, device: str = "cuda") -> None:
        check_machine()
        self._device = device
        self._case: _Case | KGroupedCase | MlaCase | None = None

    def check(self, problem: TunedProblem, m: int, schedule: Any) -> None:
        """Raise CandidateError unless the result of the schedule, one of the problem's family, is
        right."""
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
        self, problem: TunedProblem, m: int, schedules: Sequence[Any], num_calls: int
    ) -> list[list[float]]:
        """Device times of each schedule in microseconds, L2 cold; the schedules take turns.

        Where one takes several calls, of several lengths, their geometric mean.
        """
        case = self._case_of(problem, m)
        calls = [call for schedule in schedules for call in case.calls(schedule)]
        for call in calls:
            call()  # all kernels are loaded before the first is timed
        times = time_in_turns(calls, num_calls)
        each = len(calls) // len(schedules)
        return [
            [statistics.geometric_mean(run) for run in zip(*times[i : i + each], strict=True)]
            for i in range(0, len(calls), each)
        ]

    def _case_of(self, problem: TunedProblem, m: int) -> _Case | KGroupedCase | MlaCase:
        if self._case is None or (self._case.problem, self._case.m) != (problem, m):
            self._case = None  # frees its memory first
            if isinstance(problem, MlaDecode):
                self._case = MlaCase(problem, m)
            elif isinstance(problem, GroupedGemm) and is_k_grouped(problem):
                self._case = KGroupedCase(problem, m, self._device)
            else:
                self._case = _Case(problem, m, self._device)
        return self._case


def time_in_turns(calls: Sequence[Callable[[], object]], num_calls: int) -> list[list[float]]:
    """Device times of each of `calls` in microseconds; they take turns, the first is not counted.

    Raises
    ------
    DeviceError : records of the profiler were lost, several times
    """
    of_each = profile_in_turns(calls, 1 + num_calls, skipped=1)
    return [[sum(event.duration_us for event in run) for run in same] for same in of_each]


class _Case:
    """The operands of one problem with m rows, and the results that are proven right."""

    def __init__(self, problem: Gemm, m: int, device: str) -> None:
        import torch

        self.problem, self.m = problem, m
        generator = torch.Generator(device).manual_seed(m)
        x = torch.randn(m, problem.k, device=device, generator=generator)
        self.a, self.sfa = quantize(x)
        self._rows, self._layout, groups = {0: Rows(0, m)}, None, 0
        if isinstance(problem, GroupedGemm):
            groups = problem.num_groups
            ends = [0, *itertools.accumulate(spread_rows(groups, m))]
            rows = itertools.starmap(Rows, itertools.pairwise(ends))
            self._rows = {g: some for g, some in enumerate(rows) if some.begin < some.end}
            self._layout = Ragged(torch.tensor(ends, dtype=torch.int32, device=device))
        scale_rows = problem.b_scale.rows
        self.b, self.sfb = make_weights(groups, problem.n, problem.k, device, scale_rows)
        dtype = getattr(torch, problem.d_dtype.name)
        self._outputs = [torch.empty(m, problem.columns, dtype=dtype, device=device)]
        if problem.is_quantized:
            scales = m, problem.columns // D_SCALE.k
            self._outputs.append(torch.empty(scales, dtype=torch.float32, device=device))
        self._proven: dict[tuple[object, ...], tuple[Schedule, list[Any]]] = {}
        self._on_host: dict[int, dict[str, Any]] = {}  # weights, by group

    def run(self, schedule: Schedule) -> None:
        """D, launched as a user would."""
        operands = self.a, self.b, (self.sfa, self.sfb)
        out = tuple(self._outputs) if len(self._outputs) > 1 else self._outputs[0]
        epilogue = self.problem.epilogue
        if self._layout is None:
            gemm(*operands, out=out, epilogue=epilogue, schedule=schedule)
        else:
            grouped_gemm(
                *operands, layout=self._layout, out=out, epilogue=epilogue, schedule=schedule
            )

    def calls(self, schedule: Schedule) -> list[Callable[[], None]]:
        """The one that `run` makes."""
        return [functools.partial(self.run, schedule)]

    def check(self, schedule: Schedule) -> None:
        """Run on a poisoned D, and compare with what is proven or else with the interpreter."""
        for output in self._outputs:
            _poison(output)
        self.run(schedule)
        kind = numerics_class(schedule)
        if kind in self._proven:
            proven_by, proven = self._proven[kind]
            self._check_places(schedule, proven_by, self._differs(proven))
            return
        self._compare_with_interpreter(schedule)
        for proven_by, proven in [*self._proven.values()][:1]:
            self._check_places(schedule, proven_by, self._is_far(proven[0]))
        self._proven[kind] = schedule, [output.clone() for output in self._outputs]

    def _differs(self, others: Sequence[Any]) -> Any:
        """Where D, or its scale, has other bits than that of `others`."""
        found, *scales = (
            _bits(output) != _bits(other)
            for output, other in zip(self._outputs, others, strict=True)
        )
        for of_scales in scales:
            found |= of_scales.repeat_interleave(D_SCALE.k, 1)
        return found

    def _check_places(self, schedule: Schedule, proven_by: Schedule, wrong: Any) -> None:
        """Where `wrong`, D is not that of another schedule: raise the error of the wrong one."""
        if not wrong.any():
            return
        row, column = divmod(int(wrong.flatten().byte().argmax()), self.problem.columns)
        begin = self._rows[self._group_of(row)].begin
        kernel = lower(self._of_one_group, schedule)
        width = kernel.body.traversal.block_n
        self._check_tile(kernel, row - (row - begin) % schedule.block_m, column - column % width)
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
        d, other = self._outputs[0].float(), proven.float()
        num_blocks = -(-self.problem.k // BLOCK_K)
        limit_of_sums = 2 * 4 * num_blocks**1.5 * 2**-24 * other.std()
        return (d - other).abs() > 2**-7 * other.abs() + limit_of_sums

    def _compare_with_interpreter(self, schedule: Schedule) -> None:
        if unwritten := sum(int(_is_nan(output).sum()) for output in self._outputs):
            raise CandidateError(f"{schedule}: {unwritten} elements of D are NaN")
        groups = [*self._rows.values()]
        if len(groups) > 1:  # in small tiles, as no schedule of groups changes a bit
            unit = D_SCALE.k if self.problem.is_quantized else WGMMA_M // self.problem.num_halves
            schedule = Schedule(WGMMA_M, unit * self.problem.num_halves, 2, 1)
        kernel = lower(self._of_one_group, schedule)
        num_random = max(1, SAMPLE_MACS // (schedule.block_m * schedule.block_n * self.problem.k))
        if len(groups) > 1:  # the first and the last tile of some
            middle = random.Random(0).choice(groups)
            groups, num_random = list(dict.fromkeys((groups[0], middle, groups[-1]))), 0
        tiles = [
            (begin + row, column)
            for begin, end in groups
            for row, column in sample_tiles(kernel, end - begin, num_random)
        ]
        for row, column in tiles:
            self._check_tile(kernel, row, column)

    def _check_tile(self, kernel: Kernel, row: int, column: int) -> None:
        """Raise CandidateError unless the tile at [row, column] has the interpreter's bits."""
        group = self._group_of(row)
        end = min(row + kernel.schedule.block_m, self._rows[group].end)
        rows = slice(row, end)  # which depend on no others
        tensors = {"a": to_numpy(self.a[rows], E4M3), "sfa": to_numpy(self.sfa[rows], F32)}
        d = to_numpy(self._outputs[0][rows], self.problem.d_dtype)
        parts = (d, *(to_numpy(scales[rows], F32) for scales in self._outputs[1:]))
        try:
            check_tiles(
                kernel,
                self._host_weights(group) | tensors,
                (parts[0], parts[1]) if len(parts) > 1 else d,
                [(0, column)],
            )
        except VerifyError as error:
            raise CandidateError(f"m = {self.m}, in the rows from {row}: {error}") from None

    @property
    def _of_one_group(self) -> Gemm:
        problem = self.problem
        return problem.of_one_group if isinstance(problem, GroupedGemm) else problem

    def _group_of(self, row: int) -> int:
        return next(group for group, rows in self._rows.items() if rows.begin <= row < rows.end)

    def _host_weights(self, group: int) -> dict[str, Any]:
        if group not in self._on_host:
            b, sfb = self.b, self.sfb
            if self._layout is not None:
                b, sfb = b[group], sfb[group]
            self._on_host[group] = {"b": to_numpy(b, E4M3), "sfb": to_numpy(sfb, F32)}
        return self._on_host[group]


def _poison(output: Any) -> None:
    """Fill the tensor with NaN."""
    if output.itemsize > 1:
        output.fill_(math.nan)
    else:
        _bits(output).fill_(E4M3_NAN)


def _is_nan(output: Any) -> Any:
    import torch

    if output.itemsize > 1:
        return torch.isnan(output)
    return (_bits(output) & E4M3_NAN) == E4M3_NAN


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
