"""Layouts of a grouped GEMM's rows, or of its k, with the device tensor that each needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from .dtypes import BF16, F32, DType
from .errors import ProblemError
from .problem import K_UNIT, Layout


@dataclass(frozen=True, eq=False)
class Ragged:
    """A [m, k]: rows offsets[g] .. offsets[g + 1] are group g's; no alignment, no padding rows.

    offsets : int32 [num_groups + 1], not decreasing, within 0..m. Rows before the first and behind
        the last one are no group's
    """

    offsets: Any

    kind: ClassVar[Layout] = "ragged"
    alignment: ClassVar[int] = 1
    expected_rows: ClassVar[None] = None

    @property
    def tensor(self) -> Any:
        return self.offsets


@dataclass(frozen=True, eq=False)
class Contiguous:
    """A [m, k] with one group after the other, as two kinds of tensor tell it: give one of them.

    group_of_row : int32 [m], the group of each row; rows of -1 are skipped. Rows of one group
        should be neighbours: others cost time
    group_ends : int32 [num_groups], where each group ends; it begins at the first multiple of
        `alignment` at or after the end of the one before
    alignment : of group_ends: 1, 64 or 128
    """

    group_of_row: Any = None
    group_ends: Any = None
    alignment: int = 128

    expected_rows: ClassVar[None] = None

    def __post_init__(self) -> None:
        if (self.group_of_row is None) == (self.group_ends is None):
            raise ProblemError("Contiguous takes either group_of_row or group_ends")
        if self.group_of_row is not None:
            object.__setattr__(self, "alignment", 1)  # any row may be any group's

    @property
    def kind(self) -> Layout:
        return "group_ends" if self.group_of_row is None else "group_of_row"

    @property
    def tensor(self) -> Any:
        return self.group_ends if self.group_of_row is None else self.group_of_row


@dataclass(frozen=True, eq=False)
class Masked:
    """A [num_groups, max_m, k]: the first rows[g] rows of A[g] are group g's.

    rows : int32 [num_groups], within 0..max_m
    expected_rows : how many rows a group has on average, which the choice of the schedule goes by,
        with a quarter more in reserve; by default max_m
    """

    rows: Any
    expected_rows: int | None = None

    kind: ClassVar[Layout] = "masked"
    alignment: ClassVar[int] = 1

    def __post_init__(self) -> None:
        expected = self.expected_rows
        if expected is not None and (type(expected) is not int or expected < 0):
            raise ProblemError(f"expected_rows must be an int, 0 or above, got {expected!r}")

    @property
    def tensor(self) -> Any:
        return self.rows


@dataclass(frozen=True, eq=False)
class KGrouped:
    """A [m, k], B [n, k]: columns offsets[g] .. offsets[g + 1] of both are group g's.

    offsets : int32 [num_groups + 1], multiples of 128, not decreasing, within 0..k. Columns before
        the first and behind the last one are no group's
    """

    offsets: Any

    kind: ClassVar[Layout] = "k_grouped"
    alignment: ClassVar[int] = K_UNIT
    expected_rows: ClassVar[None] = None

    @property
    def tensor(self) -> Any:
        return self.offsets


GroupLayout = Ragged | Contiguous | Masked | KGrouped


def default_dtype(layout: GroupLayout | None) -> DType:
    """That of D, if nobody names one."""
    return F32 if isinstance(layout, KGrouped) else BF16


def check_layout(layout: object) -> GroupLayout:
    """`layout`, if it is one; else ProblemError."""
    if not isinstance(layout, (Ragged, Contiguous, Masked, KGrouped)):
        raise ProblemError(
            f"layout is a {type(layout).__name__}, must be jitgen.Ragged, Contiguous, Masked or"
            " KGrouped"
        )
    return layout


def with_tensor(layout: GroupLayout, tensor: Any) -> GroupLayout:
    """`layout`, with another tensor in the place of its own."""
    name = next(f.name for f in fields(layout) if getattr(layout, f.name) is layout.tensor)
    return replace(layout, **{name: tensor})
