"""What all processes did with a store: their counts, added up in a file of its folder.

Each store adds a line when it is closed or its process ends; one that is killed adds none.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path

from .entry import scratch_path
from .stats import Counters, Stats

FILE = "stats.jsonl"
MAX_BYTES = 256 << 10  # beyond it, the lines are made one

_FIELDS = {field.name for field in fields(Stats)}


def record(root: Path, counters: Counters, pid: int) -> None:
    """Add the counts to those in `root`, as well as that can be done; `pid`: of who counted."""
    counts = {name: count for name, count in asdict(counters.stats).items() if count}
    if not counts or pid != os.getpid():  # a child that was forked repeats its parent's
        return
    with contextlib.suppress(OSError):
        path = root / FILE
        _append(path, counts)
        if path.stat().st_size > MAX_BYTES:
            aside = scratch_path(root, FILE)
            os.rename(path, aside)
            _append(path, asdict(_sum(aside)))
            aside.unlink()


def read(root: Path) -> Stats:
    """The sum of all that was recorded in `root`."""
    try:
        return _sum(root / FILE)
    except OSError:
        return Stats()


def _append(path: Path, counts: dict[str, float]) -> None:
    """Add a line by one write, which on a local file system no other writer can split."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        os.write(descriptor, f"{json.dumps(counts)}\n".encode())
    finally:
        os.close(descriptor)


def _sum(path: Path) -> Stats:
    """The sum of the lines; one that is not as `_append` writes them is left out."""
    counters = Counters()
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            counts = json.loads(line)
            is_ours = isinstance(counts, dict) and counts.keys() <= _FIELDS
            if is_ours and all(type(count) in (int, float) for count in counts.values()):
                counters.add(**counts)
    return counters.stats
