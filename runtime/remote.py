"""The remote tier: entries in an object store, or in whatever else fsspec reaches.

    <url>/<digest[:2]>/<digest>/   the files of the entry, as on disk (entry.py)

All that comes is checked as if it came from disk. The manifest is written last and read first, so
an entry that is half written is a miss. Who writes there decides what runs on the GPU: trust them.

The remote store is never needed. When it fails, or does not answer in time, that is said once in a
process; kernels are compiled here, and it is asked again after PAUSE_S.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import StoreError
from .entry import CUBIN, MANIFEST, SOURCE, DamagedError, Entry, entry_files, parse_entry
from .stats import Counters, log

PAUSE_S = 60.0

_T = TypeVar("_T")


class RemoteTier:
    """Entries below a URL; safe in threads.

    Parameters
    ----------
    url : of the folder, as fsspec takes it
    write : whether `save` publishes
    timeout_s : longest wait for an answer
    counters : for uploads and outages
    """

    hits = "remote_hits"
    is_far = True

    def __init__(self, url: str, *, write: bool, timeout_s: float, counters: Counters) -> None:
        self.url = url
        self._write = write
        self._timeout_s = timeout_s
        self._counters = counters
        self._mutex = threading.Lock()  # guards the two fields below
        self._asks_again = 0.0  # on the monotonic clock
        self._has_warned = False

    def load(self, digest: str) -> Entry | None:
        """The entry, all of it checked; None if there is none, or no answer.

        Raises
        ------
        DamagedError : the entry must not be used
        """

        def fetch(fs: Any, root: str) -> dict[str, bytes] | None:
            folder = f"{root}/{digest[:2]}/{digest}"
            try:
                files = {MANIFEST: bytes(fs.cat_file(f"{folder}/{MANIFEST}"))}
            except FileNotFoundError:
                return None
            for file in (CUBIN, SOURCE):
                with contextlib.suppress(FileNotFoundError):
                    files[file] = bytes(fs.cat_file(f"{folder}/{file}"))
            return files

        files = self._ask(fetch)
        if files is None:
            return None
        where = f"{self.url}/{digest[:2]}/{digest}"
        if missing := {CUBIN, SOURCE} - set(files):
            raise DamagedError(f"kernel store entry {where} is damaged: no {min(missing)}")
        try:
            return parse_entry(digest, files)
        except DamagedError as damage:
            raise DamagedError(f"kernel store entry {where} is damaged: {damage}") from damage

    def save(self, entry: Entry, *, heal: bool) -> None:
        """Publish the entry if this tier is written to, in place of the one that is there."""
        if not self._write:
            return

        def upload(fs: Any, root: str) -> bool:
            folder = f"{root}/{entry.key.digest[:2]}/{entry.key.digest}"
            files = entry_files(entry)
            for file in (CUBIN, SOURCE, MANIFEST):
                try:
                    fs.pipe_file(f"{folder}/{file}", files[file])
                except FileNotFoundError:  # a file system, which has folders
                    fs.makedirs(folder, exist_ok=True)
                    fs.pipe_file(f"{folder}/{file}", files[file])
            return True

        if self._ask(upload):
            self._counters.add(uploads=1)

    def check(self) -> str:
        """What the URL answers, in words; StoreError if it does not."""
        is_there, error = self._try(lambda fs, root: fs.exists(root))
        if error:
            raise StoreError(f"{self.url} cannot be used: {_describe(error)}")
        return f"{self.url}, {'there' if is_there else 'empty'}"

    def _ask(self, work: Callable[[Any, str], _T]) -> _T | None:
        """What `work` returns; None in a pause, and when it fails, which begins one."""
        with self._mutex:
            if time.monotonic() < self._asks_again:
                return None
        value, error = self._try(work)
        if error:
            self._begin_pause(_describe(error))
        return value

    def _try(self, work: Callable[[Any, str], _T]) -> tuple[_T | None, BaseException | None]:
        """Run `work` on the file system, in a thread that is left behind if it hangs."""
        results: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                import fsspec

                results.put((work(*fsspec.core.url_to_fs(self.url)), None))
            except BaseException as error:  # a plugin may raise anything
                results.put((None, error))

        try:
            threading.Thread(target=run, name="jitgen-remote", daemon=True).start()
            return results.get(timeout=self._timeout_s)
        except RuntimeError as error:  # the process ends, or has no thread left
            return None, error
        except queue.Empty:
            return None, TimeoutError(f"no answer in {self._timeout_s:g} s")

    def _begin_pause(self, reason: str) -> None:
        with self._mutex:
            self._asks_again = time.monotonic() + PAUSE_S
            has_warned, self._has_warned = self._has_warned, True
        self._counters.add(outages=1)
        log.warning("remote kernel store %s: %s", self.url, reason)
        if not has_warned:
            warnings.warn(
                f"remote kernel store {self.url} cannot be used ({reason}): kernels are compiled"
                f" here, and it is asked again every {PAUSE_S:g} s",
                RuntimeWarning,
                stacklevel=2,
            )


def _describe(error: BaseException) -> str:
    """One line on a failure, with the remedy where a library is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name == "fsspec":
        return "fsspec is missing: pip install 'jitgen[remote]'"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
