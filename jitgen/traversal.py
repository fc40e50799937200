"""The order in which blocks walk the tiles of D."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Traversal:
    """The order in which persistent clusters walk the tiles of D.

    Groups of `group` tile rows one after the other; within a group column by column.
    """

    block_m: int
    block_n: int
    cluster_m: int
    cluster_n: int
    group: int

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """Cluster tiles along m and n that cover an m x n output."""
        return -(-m // (self.block_m * self.cluster_m)), -(-n // (self.block_n * self.cluster_n))

    def cluster_tile(self, index: int, m: int, n: int) -> tuple[int, int]:
        """The (m, n) cluster-tile coordinates of the `index`-th cluster tile."""
        rows, columns = self.grid(m, n)
        first = index // (self.group * columns) * self.group
        size = min(self.group, rows - first)
        within = index - first * columns
        return first + within % size, within // size

    def tiles(self, m: int, n: int) -> Iterator[tuple[int, int]]:
        """The (row, column) origin of every block's tile, in order, those outside D included."""
        rows, columns = self.grid(m, n)
        for index in range(rows * columns):
            tile_m, tile_n = self.cluster_tile(index, m, n)
            for rank in range(self.cluster_m * self.cluster_n):
                row = tile_m * self.cluster_m + rank % self.cluster_m
                column = tile_n * self.cluster_n + rank // self.cluster_m
                yield row * self.block_m, column * self.block_n
