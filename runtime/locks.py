"""Single flight: one thread of one process makes a kernel, and those who wait learn which."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError
from .entry import clear_stray, make_private, work_folder
from .stats import Counters, log

if TYPE_CHECKING:
    import filelock

# What a file system without working locks answers.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class SingleFlight:
    """The locks of a store, one a kernel, between threads and, with lock files, processes.

    Parameters
    ----------
    timeout_s : longest wait for whoever holds a lock
    counters : for waits
    """

    def __init__(self, *, timeout_s: float, counters: Counters) -> None:
        self._timeout_s = timeout_s
        self._counters = counters
        self._mutex = threading.Lock()  # guards the locks between threads
        self._locks: dict[str, threading.Lock] = {}

    @contextlib.contextmanager
    def hold(
        self, digest: str, name: str, root: Path | None, on_unwritable: Callable[[str], None]
    ) -> Iterator[None]:
        """Hold the locks of one kernel.

        Parameters
        ----------
        digest : of its key
        name : of the kernel, for people
        root : folder of the store, for the lock file; None for none
        on_unwritable : told why, where the lock file cannot be written; the work goes on without

        Raises
        ------
        StoreError : a lock was not released in time, or the file system has no locks
        """
        deadline = time.monotonic() + self._timeout_s
        with self._mutex:
            lock = self._locks.setdefault(digest, threading.Lock())
        if not lock.acquire(timeout=self._timeout_s):
            raise StoreError(
                f"kernel {digest} is still being compiled by another thread of this process"
                f" ({os.getpid()}) after {self._timeout_s:g} s: raise lock_timeout_s"
            )
        try:
            with contextlib.ExitStack() as held:
                if root:
                    left_s = deadline - time.monotonic()
                    file_lock = hold_lock(
                        root, digest, name, timeout_s=left_s, counters=self._counters
                    )
                    try:
                        held.enter_context(file_lock)
                    except OSError as error:
                        on_unwritable(str(error))
                yield
        finally:
            lock.release()


@contextlib.contextmanager
def hold_lock(
    root: Path, digest: str, name: str, *, timeout_s: float, counters: Counters
) -> Iterator[None]:
    """Hold the lock of a key in the store at `root`; a wait is counted and recorded.

    Parameters
    ----------
    digest : of the key
    name : of the kernel, for people
    timeout_s : longest wait for another process

    Raises
    ------
    StoreError : the lock was not released in time, or the file system has no locks
    OSError : the lock's folder cannot be written
    """
    import filelock  # here, for those who compile nothing

    make_private(root)
    folder = work_folder(root, "locks")
    path = folder / f"{digest}.lock"
    clear_stray(path, stat.S_ISREG)
    lock = filelock.FileLock(path, mode=0o600)
    try:
        _acquire(lock, digest, name, timeout_s, counters)
    except filelock.Timeout:
        raise StoreError(_timeout_message(folder, digest, timeout_s)) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in _NO_LOCKS:
            raise StoreError(
                f"no file locks in {folder} ({error}): use another JITGEN_CACHE_DIR, or do without"
                " locks (JITGEN_CACHE_LOCKING=0)"
            ) from error
        raise
    try:
        with _holder_file(folder / f"{digest}.holder"):
            yield
    finally:
        lock.release()


def _acquire(
    lock: filelock.BaseFileLock, digest: str, name: str, timeout_s: float, counters: Counters
) -> None:
    import filelock

    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        counters.add(waits=1)
        started = time.monotonic()
        try:
            lock.acquire(timeout=max(0.0, timeout_s))
        finally:
            seconds = time.monotonic() - started
            fields = {"kernel": name, "key": digest, "seconds": seconds}
            log.info("waited %.2f s for the lock of %s", seconds, name, extra=fields)


def _timeout_message(folder: Path, digest: str, timeout_s: float) -> str:
    try:
        holder = (folder / f"{digest}.holder").read_text(errors="replace")[:200]
    except OSError:
        holder = ""
    return (
        f"kernel {digest} is still locked by {holder or 'an unknown process'} after"
        f" {timeout_s:.3g} s: end that process if it hangs, raise lock_timeout_s if it"
        " is compiling, or do without locks (JITGEN_CACHE_LOCKING=0)"
    )


@contextlib.contextmanager
def _holder_file(path: Path) -> Iterator[None]:
    """A file, there as long as the lock is held, that names this process to those who wait."""
    with contextlib.suppress(OSError):
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
