"""MLA decode for the measurer: one batch, at several lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..errors import CandidateError, VerifyError
from ..problem_mla import MlaDecode
from ..schedule_mla import MlaSchedule
from .operands_mla import MlaOperands, make_cache
from .space_mla import LENGTHS, TOPK


class MlaCase:
    """The operands of one problem with `batch` sequences, for each length."""

    def __init__(self, problem: MlaDecode, batch: int) -> None:
        self.problem, self.m = problem, batch
        cache = make_cache(problem, batch * -(-max(LENGTHS) // problem.page))
        self._operands = [MlaOperands(problem, batch, length, cache, TOPK) for length in LENGTHS]

    def calls(self, schedule: Any) -> list[Callable[[], None]]:
        """One of each length, launched as a user would."""
        return [functools.partial(operands.run, schedule) for operands in self._operands]

    def check(self, schedule: MlaSchedule) -> None:
        """Run into NaN, and compare with float64."""
        for operands in self._operands:
            operands.o.fill_(float("nan"))
            operands.run(schedule)
            try:
                operands.check()
            except VerifyError as error:
                raise CandidateError(f"{schedule}: {error}") from None
