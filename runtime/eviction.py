"""What is in the kernel store's folder, and what has to go: least recently used entries first.

The time of an entry's last use is the mtime of its folder: a load sets it, a move keeps it. An
entry used in the last IN_USE_S seconds, by any process, is not evicted, and neither is one that
the evicting process has loaded; so the store may outgrow its cap while all of it is in use. What
another process loaded longer ago may go: that process goes on with its copy in memory.

Nothing here takes a lock. An entry goes by one rename; whoever was about to read it compiles again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from .entry import remove, work_folder

DEFAULT_MAX_BYTES = 2 << 30
IN_USE_S = 300.0
MARK_S = 60.0  # a use is marked once in this time; well below IN_USE_S
LEFTOVER_S = 3600.0  # a writer needs `tmp` for milliseconds; what is this old has no writer

SHARDS = "[0-9a-f][0-9a-f]"


@dataclass(frozen=True)
class Usage:
    """The size of an entry on disk, in bytes, and its last use, in seconds since the epoch."""

    path: Path
    num_bytes: int
    last_use: float

    @property
    def last_used(self) -> str:
        """The last use for people: local time, to the minute."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.last_use))


@dataclass(frozen=True)
class Collected:
    """What was taken out of a store's folder and what is left; sizes in bytes."""

    num_evicted: int
    evicted_bytes: int
    num_leftovers: int  # in `tmp`, of killed writers
    num_left: int
    left_bytes: int


def default_max_bytes() -> int:
    """$JITGEN_CACHE_MAX_BYTES, or else 2 GiB; 0 is no cap.

    Raises
    ------
    StoreError : the variable is set to something else than a number of bytes
    """
    text = os.environ.get("JITGEN_CACHE_MAX_BYTES") or str(DEFAULT_MAX_BYTES)
    if not (text.isascii() and text.isdigit()):
        raise StoreError(f"JITGEN_CACHE_MAX_BYTES is {text!r}: give bytes, or 0 for no cap")
    return int(text)


def list_usage(root: Path) -> list[Usage]:
    """All entries on disk, damaged ones too, least recently used first."""
    found = []
    for shard in root.glob(SHARDS):
        if not shard.is_symlink() and shard.is_dir():
            for path in shard.iterdir():
                with contextlib.suppress(FileNotFoundError):  # evicted since
                    found.append(usage_of(path))
    return sorted(found, key=lambda usage: (usage.last_use, usage.path))


def usage_of(path: Path) -> Usage:
    """The usage of one entry; FileNotFoundError if it is gone."""
    return Usage(path, num_bytes(path), os.lstat(path).st_mtime)


def num_bytes(path: Path) -> int:
    """The size of an entry's files; 0 if it is gone."""
    try:
        files = [path] if path.is_symlink() or not path.is_dir() else list(path.iterdir())
        return sum(os.lstat(file).st_size for file in files)
    except FileNotFoundError:
        return 0


def mark_used(path: Path) -> None:
    """Set the last use of an entry to now, if that is worth a write and the folder allows one."""
    with contextlib.suppress(OSError):
        if abs(time.time() - os.lstat(path).st_mtime) > MARK_S:
            os.utime(path, follow_symlinks=False)


def evict(root: Path, max_bytes: int, keep: Container[str] = ()) -> Collected:
    """Remove entries until at most `max_bytes` are left, and the leftovers of killed writers.

    Parameters
    ----------
    root : folder of the store
    max_bytes : 0 for no cap
    keep : digests of entries that stay

    Raises
    ------
    OSError : the folder cannot be written
    """
    now = _now(root)
    entries = list_usage(root)
    left_bytes = sum(usage.num_bytes for usage in entries)
    evicted = []
    num_gone = 0
    for usage in entries:
        if not max_bytes or left_bytes <= max_bytes:
            break
        try:
            if usage.path.name in keep or _is_recent(usage.path, now, IN_USE_S):
                continue
            remove(root, usage.path)
            evicted.append(usage)
        except FileNotFoundError:
            num_gone += 1  # another process evicted it
        left_bytes -= usage.num_bytes
    return Collected(
        num_evicted=len(evicted),
        evicted_bytes=sum(usage.num_bytes for usage in evicted),
        num_leftovers=_remove_leftovers(root, now),
        num_left=len(entries) - len(evicted) - num_gone,
        left_bytes=left_bytes,
    )


def remove_all(root: Path) -> int:
    """Remove every entry, in use or not, and say how many there were.

    Raises
    ------
    OSError : the folder cannot be written
    """
    num_removed = 0
    for usage in list_usage(root):
        with contextlib.suppress(FileNotFoundError):
            remove(root, usage.path)
            num_removed += 1
    _remove_leftovers(root, _now(root))
    return num_removed


def _remove_leftovers(root: Path, now: float) -> int:
    num_removed = 0
    for path in (root / "tmp").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if not _is_recent(path, now, LEFTOVER_S):
                remove(root, path)
                num_removed += 1
    return num_removed


def _now(root: Path) -> float:
    """The time by the clock that sets the mtimes, which may be that of a file server."""
    with tempfile.TemporaryFile(dir=work_folder(root, "tmp")) as file:
        return os.fstat(file.fileno()).st_mtime


def _is_recent(path: Path, now: float, seconds: float) -> bool:
    return abs(now - os.lstat(path).st_mtime) < seconds
