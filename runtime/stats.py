"""Counters and log records of what the runtime does: compile, find, wait, heal, load."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace

# Silent unless the user's program takes its records, which have the fields `kernel` and `key`.
log = logging.getLogger("jitgen")
log.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Stats:
    """Counts since a store was opened or, of `jitgen.stats()`, since the process started.

    A lookup in a store is a hit in one tier (see tiers.py) or a miss. Seconds do not count in a
    comparison.
    """

    compiles: int = 0
    compile_seconds: float = field(default=0.0, compare=False)
    memory_hits: int = 0
    disk_hits: int = 0  # in the own folder
    lower_hits: int = 0
    shared_hits: int = 0
    remote_hits: int = 0
    misses: int = 0
    heals: int = 0  # damaged entries on disk replaced by a fresh compile, or a copy from a tier
    waits: int = 0  # for another process that compiled the same kernel
    uploads: int = 0  # to the remote store
    outages: int = 0  # of the remote store: it failed, or did not answer in time
    loads: int = 0  # of kernels onto a GPU, which no store does


class Counters:
    """Stats that grow; safe in threads.

    Parameters
    ----------
    total : what is counted here is counted there too
    """

    def __init__(self, total: Counters | None = None) -> None:
        self._total = total
        self._mutex = threading.Lock()
        self._stats = Stats()

    @property
    def stats(self) -> Stats:
        """The counters as they are now, all of one moment."""
        return self._stats

    def add(self, **amounts: float) -> None:
        """Add to the fields of Stats that are named, at once."""
        with self._mutex:
            sums = {name: getattr(self._stats, name) + amounts[name] for name in amounts}
            self._stats = replace(self._stats, **sums)
        if self._total:
            self._total.add(**amounts)


PROCESS = Counters()  # of all stores and GPUs
