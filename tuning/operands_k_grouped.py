"""Operands of K-grouped GEMMs that the benchmark and the tuner share, and the check of a result."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..api import grouped_gemm
from ..api_quantize import quantize
from ..dtypes import E4M3, F32
from ..errors import VerifyError
from ..interpret import interpret
from ..layouts import KGrouped
from ..lower import lower
from ..problem import K_UNIT, GroupedGemm, adds_to_d, of_k_groups
from ..schedule import Schedule
from .bench import to_numpy

CHECK = Schedule(64, 64, 2, 1)  # of which size tiles are: no schedule of groups changes a bit
NUM_RANDOM_TILES = 4  # that are compared with the interpreter, beside the first and the last


class KTile(NamedTuple):
    """Rows and columns of D[group] from here on, CHECK's tile or up to the end."""

    group: int
    row: int
    column: int


def deal_k(num_groups: int, expected: int, *, some_empty: bool = False) -> tuple[int, ...]:
    """The k of each group: 0.7 to 1.3 of what is expected, in whole K_UNITs; always the same.

    some_empty : one group of eight, from the fourth on, has none
    """
    rng = random.Random(f"{num_groups} {expected}")
    units = expected / K_UNIT
    ks = [K_UNIT * max(round(units * rng.uniform(0.7, 1.3)), 1) for _ in range(num_groups)]
    if num_groups == 1:
        return (expected,)
    if some_empty:
        ks[3::8] = [0] * len(ks[3::8])
    return tuple(ks)


class KGroupedOperands:
    """One call's tensors: random data, quantized.

    Parameters
    ----------
    ks : of each group, multiples of K_UNIT, not all 0
    d : [num_groups, m, n] in the problem's dtype; calls may share it

    Calls that add to D let it grow, which neither time nor a finite number of them minds.
    """

    def __init__(self, problem: GroupedGemm, m: int, ks: Sequence[int], d: Any) -> None:
        import torch

        self.problem, self.m, self.d = problem, m, d
        device = d.device
        self._ends = [0, *itertools.accumulate(ks)]
        k = self._ends[-1]
        generator = torch.Generator(device).manual_seed(m)
        x = torch.randn(m, k, device=device, generator=generator)
        self.a, self.sfa = quantize(x)
        del x  # is of many gigabytes, perhaps
        weight = torch.randn(problem.n, k, device=device, generator=generator)
        self.b, self.sfb = quantize(weight, (problem.b_scale.rows, problem.b_scale.k))
        self.offsets = torch.tensor(self._ends, dtype=torch.int32, device=device)
        self.tiles = self._sample()

    @property
    def flops(self) -> int:
        return 2 * self.m * self.problem.n * self._ends[-1]

    def run(self, schedule: Schedule) -> None:
        """D += or = the product, launched as a user would."""
        grouped_gemm(
            *(self.a, self.b, (self.sfa, self.sfb)),
            layout=KGrouped(self.offsets),
            out=self.d,
            schedule=schedule,
        )

    def fill(self) -> None:
        """Set D to what checks begin with: the same random numbers, or NaN if it is set anyway."""
        import torch

        if adds_to_d(self.problem):
            self.d.normal_(generator=torch.Generator(self.d.device).manual_seed(1))
        else:
            self.d.fill_(float("nan"))

    def check(self, schedule: Schedule) -> None:
        """Run on a known D, and raise VerifyError unless tiles of it are the interpreter's."""
        self.fill()
        before = [self.part(tile) for tile in self.tiles]
        self.run(schedule)
        for tile, part in zip(self.tiles, before, strict=True):
            self.check_tile(tile, part, self.part(tile))

    def part(self, tile: KTile) -> Any:
        """The tile of D as it is now, a copy."""
        return self.d[tile.group][self._rows(tile), self._columns(tile)].clone()

    def check_tile(self, tile: KTile, before: Any, got: Any) -> None:
        """Raise VerifyError unless `before` became `got` as the interpreter has it.

        before, got : from `part`
        """
        begin, end = self._ends[tile.group : tile.group + 2]
        want = to_numpy(before, self.problem.d_dtype).copy()
        if begin < end:
            interpret(*self._of_tile(tile, begin, end), out=want[None])
        found = to_numpy(got, self.problem.d_dtype)
        word = f"u{found.dtype.itemsize}"
        wrong = (found.view(word) != want.view(word)).nonzero()
        if len(wrong[0]):
            i, j = int(wrong[0][0]), int(wrong[1][0])
            raise VerifyError(
                f"{self.problem}, m = {self.m}: in the tile at {list(tile)} D differs from the"
                f" interpreter's in {len(wrong[0])} of {found.size} elements; the first,"
                f" [{tile.row + i}, {tile.column + j}], is {found[i, j]}, must be {want[i, j]}"
            )

    def _of_tile(self, tile: KTile, begin: int, end: int) -> tuple[Any, dict[str, Any]]:
        """A kernel of one group that has the tile's rows, columns and k alone, and its tensors."""
        import numpy as np

        rows, columns, k = self._rows(tile), self._columns(tile), slice(begin, end)
        blocks = slice(begin // K_UNIT, end // K_UNIT)
        unit = self.problem.b_scale.rows
        of_b = slice(columns.start // unit, -(-columns.stop // unit))
        problem = of_k_groups(
            columns.stop - columns.start, 1, self.problem.d_dtype, self.problem.b_scale
        )
        tensors = {
            "a": to_numpy(self.a[rows, k].contiguous(), E4M3),
            "b": to_numpy(self.b[columns, k].contiguous(), E4M3),
            "sfa": to_numpy(self.sfa[rows, blocks].contiguous(), F32),
            "sfb": to_numpy(self.sfb[of_b, blocks].contiguous(), F32),
            "groups": np.array([0, end - begin], np.int32),
        }
        return lower(problem, CHECK), tensors

    def _rows(self, tile: KTile) -> slice:
        return slice(tile.row, min(tile.row + CHECK.block_m, self.m))

    def _columns(self, tile: KTile) -> slice:
        return slice(tile.column, min(tile.column + CHECK.block_n, self.problem.n))

    def tile_of(self, group: int, row: int, column: int) -> KTile:
        """The tile with an element of D."""
        return KTile(group, row - row % CHECK.block_m, column - column % CHECK.block_n)

    def _sample(self) -> list[KTile]:
        """The first tile and the last one of those that are computed, and some others; then one of
        a group without k, if there is one."""
        groups = [g for g, (a, b) in enumerate(itertools.pairwise(self._ends)) if a < b]
        empty = [g for g, (a, b) in enumerate(itertools.pairwise(self._ends)) if a == b]
        rng = random.Random(0)
        rows, columns = range(0, self.m, CHECK.block_m), range(0, self.problem.n, CHECK.block_n)
        found = [
            KTile(groups[0], 0, 0),
            KTile(groups[-1], rows[-1], columns[-1]),
            *(
                KTile(rng.choice(groups), rng.choice(rows), rng.choice(columns))
                for _ in range(NUM_RANDOM_TILES)
            ),
            *(KTile(group, 0, 0) for group in empty[:1]),
        ]
        return list(dict.fromkeys(found))
