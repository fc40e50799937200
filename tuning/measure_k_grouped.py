"""K-grouped GEMM for the measurer: one m, with groups of several lengths."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import CandidateError, VerifyError
from ..problem import GroupedGemm
from ..schedule import Schedule
from .operands_k_grouped import KGroupedOperands, deal_k

# A schedule is chosen whatever k is, and measured where a group has about so much of it: where D
# takes as long as the arithmetic, and where arithmetic is all.
LENGTHS = (1024, 4096)


class KGroupedCase:
    """The operands of one problem with m rows, for each length, and the results that are proven."""

    def __init__(self, problem: GroupedGemm, m: int, device: str) -> None:
        import torch

        self.problem, self.m = problem, m
        dtype = getattr(torch, problem.d_dtype.name)
        d = torch.empty(problem.num_groups, m, problem.n, dtype=dtype, device=device)
        dealt = (deal_k(problem.num_groups, length, some_empty=True) for length in LENGTHS)
        self._operands = [KGroupedOperands(problem, m, ks, d) for ks in dealt]
        # By length: all schedules give the same bits, for those of groups do not split k.
        self._proven: dict[int, tuple[Schedule, Any]] = {}

    def calls(self, schedule: Schedule) -> list[Callable[[], None]]:
        """One of each length, launched as a user would."""
        return [functools.partial(operands.run, schedule) for operands in self._operands]

    def check(self, schedule: Schedule) -> None:
        """Run on a known D, and compare all of it with what is proven, or else tiles of it with the
        interpreter."""
        for length, operands in zip(LENGTHS, self._operands, strict=True):
            if length in self._proven:
                operands.fill()
                operands.run(schedule)
                self._compare(operands, schedule, *self._proven[length])
                continue
            with _blaming(schedule):
                operands.check(schedule)
            self._proven[length] = schedule, operands.d.clone()

    def _compare(
        self, operands: KGroupedOperands, schedule: Schedule, proven_by: Schedule, proven: Any
    ) -> None:
        """Raise the error of the wrong one unless D has the bits of what is proven."""
        import torch

        words = {2: torch.int16, 4: torch.int32}[proven.itemsize]
        if torch.equal(operands.d.view(words), proven.view(words)):
            return
        group = next(
            g
            for g, (d, other) in enumerate(zip(operands.d, proven, strict=True))
            if not torch.equal(d.view(words), other.view(words))
        )
        wrong = operands.d[group].view(words) != proven[group].view(words)
        row, column = divmod(int(wrong.flatten().byte().argmax()), self.problem.n)
        tile = operands.tile_of(group, row, column)
        got = operands.part(tile)
        operands.fill()
        with _blaming(schedule):
            operands.check_tile(tile, operands.part(tile), got)
        raise VerifyError(
            f"{self.problem}, m = {self.m}: {proven_by} is wrong at [{group}, {row}, {column}],"
            f" where {schedule} has the interpreter's bits: report this"
        )


@contextlib.contextmanager
def _blaming(schedule: Schedule) -> Iterator[None]:
    """What is not verified is the schedule's fault: a CandidateError."""
    try:
        yield
    except VerifyError as error:
        raise CandidateError(f"{schedule}: {error}") from None
