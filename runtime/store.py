"""The kernel store: compiled kernels on disk and in memory, addressed by what they depend on.

    <root>/<digest[:2]>/<digest>/   kernel.cubin   kernel.cu (source)   entry.json (manifest)
    <root>/locks/                   <digest>.lock and, while a process compiles, <digest>.holder
    <root>/tmp/                     entries being written; what a killed process left is not read

An entry appears by one rename, is never changed afterwards, and goes by one rename (eviction.py),
so readers take no lock.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ..errors import StoreError
from .entry import (
    DamagedError,
    Entry,
    distrust,
    entry_files,
    entry_folder,
    make_private,
    parse_entry,
    publish_entry,
    read_entry,
    remove_damaged,
)
from .eviction import SHARDS, Collected, evict, mark_used, num_bytes, remove_all
from .key import KernelKey, sha256_hex
from .locks import hold_lock
from .nvrtc import Compiled
from .stats import PROCESS, Counters, Stats, log

DEFAULT_MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class Verified:
    """How many entries are sound, and what was wrong with those that were removed."""

    num_sound: int
    damages: tuple[str, ...]


class KernelStore:
    """Compiled kernels, shared by all processes that open the same folder; safe in threads.

    Parameters
    ----------
    root : folder of the store, made (0700) if missing; default: `kernels` in $JITGEN_CACHE_DIR or,
        without it, in the user's cache folder. One that cannot be made or written (read-only file
        system, no HOME) costs a warning, and new kernels are kept in memory only.
    locking : False to take no lock files, where the file system has none that work. Entries stay
        correct: processes may compile the same kernel twice, and each uses what it compiled.
    lock_timeout_s : longest wait for another thread or process that compiles the same kernel
    max_bytes : size of the entries on disk beyond which a publish evicts those least recently used
        (by the rule of eviction.py); 0 for no cap; default: $JITGEN_CACHE_MAX_BYTES or 2 GiB

    Raises
    ------
    StoreError : the root is a symlink, belongs to another user, or others may write to it; the cap
        is no number of bytes
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        locking: bool = True,
        lock_timeout_s: float = 120.0,
        max_bytes: int | None = None,
    ) -> None:
        self._locking = locking
        self._lock_timeout_s = lock_timeout_s
        self._max_bytes = default_max_bytes() if max_bytes is None else max_bytes
        if self._max_bytes < 0:
            raise StoreError(f"max_bytes = {max_bytes} must be a number of bytes, or 0 for no cap")
        self._mutex = threading.Lock()  # guards the four fields below
        self._unchecked_bytes = self._max_bytes  # published since the cap was last looked at
        self._memory: dict[str, Entry] = {}
        self._compiling: dict[str, threading.Lock] = {}
        self._writable = True
        self._counters = Counters(PROCESS)
        self._root = self._open_root(default_root() if root is None else Path(root).absolute())

    @property
    def root(self) -> Path | None:
        """The folder of the store; None if there is none and all is kept in memory."""
        return self._root

    @property
    def stats(self) -> Stats:
        """The counters as they are now."""
        return self._counters.stats

    def get(self, key: KernelKey) -> Entry | None:
        """The entry of `key`, or None; one that is damaged on disk warns and counts as a miss."""
        entry, damage = self._lookup(key)
        if damage:
            _warn(f"{damage}; it is not used")
        if not entry:
            self._counters.add(misses=1)
        return entry

    def get_or_compile(
        self, key: KernelKey, compile: Callable[[], Compiled], *, name: str, source: str
    ) -> Entry:
        """The entry of `key`, from memory, from disk, or from `compile()`, which is then published.

        Of all threads and processes that ask for a new key at once, one compiles (see `locking`).

        Parameters
        ----------
        key : from `make_key`
        compile : makes the kernel; what it raises passes through, and nothing is stored
        name : of the kernel, for people
        source : that `key` was made of

        Raises
        ------
        StoreError : `source` is not the key's, a lock was not released in time, or the file system
            has no locks
        """
        entry, _ = self._lookup(key)
        if entry:
            return entry
        if sha256_hex(source.encode()) != key.source_sha256:
            raise StoreError(f"source of {name} is not the one its key was made of: use make_key")
        with self._single_flight(key.digest, name):
            entry, damage = self._lookup(key)
            if entry:
                return entry
            if damage:
                _warn(f"{damage}; compiling it again")
            self._counters.add(misses=1)
            compiled = compile()
            seconds = compiled.resources.compile_seconds
            self._counters.add(compiles=1, compile_seconds=seconds)
            fields = {"kernel": name, "key": key.digest, "seconds": seconds}
            log.info("compiled %s in %.2f s", name, seconds, extra=fields)
            files = entry_files(key, name, source, compiled)
            path = self._publish(key.digest, name, files, heal=bool(damage))
            entry = Entry(key, name, compiled.cubin, source, compiled.resources, path)
            with self._mutex:
                entry = self._memory.setdefault(key.digest, entry)
        if path:
            self._keep_to_cap(num_bytes(path))
        return entry

    def add(self, digest: str, files: Mapping[str, bytes]) -> bool:
        """Publish an entry that another store made; False if a sound one is there, which stays.

        Parameters
        ----------
        digest : of the entry's key, in hex
        files : the contents of its files, by name

        Raises
        ------
        DamagedError : the entry is not sound; nothing is published
        StoreError : the store cannot be written, or a lock was not released in time
        """
        name = parse_entry(digest, files).name
        with self._writing() as root, self._single_flight(digest, name):
            path = entry_folder(root, digest)
            mark_used(path)  # before it is read, so that it stays
            damage = ""
            try:
                if read_entry(path):
                    return False
            except DamagedError as error:
                damage = str(error)
            published = publish_entry(root, digest, files, heal=bool(damage))
            if published and damage:
                self._record_heal(digest, name)
        self._keep_to_cap(num_bytes(path))
        return published

    def entries(self) -> Iterator[Entry]:
        """All entries, on disk and in memory; damaged ones are left out with a warning."""
        seen = set()
        for folder in self._folders():
            try:
                entry = read_entry(folder)
            except DamagedError as damage:
                _warn(f"{damage}; it is left out")
            else:
                if entry:
                    seen.add(entry.key.digest)
                    yield entry
        with self._mutex:
            in_memory = list(self._memory.values())
        yield from (entry for entry in in_memory if entry.key.digest not in seen)

    def verify(self) -> Verified:
        """Read and hash every entry on disk, and remove those that are damaged.

        Raises
        ------
        StoreError : a damaged entry could not be removed
        """
        num_sound, damages = 0, []
        for folder in self._folders():
            try:
                num_sound += read_entry(folder) is not None
            except DamagedError as damage:
                damages.append(str(damage))
                with self._writing() as root:
                    remove_damaged(root, folder)
        return Verified(num_sound, tuple(damages))

    def gc(self, max_bytes: int | None = None) -> Collected:
        """Evict entries down to `max_bytes`, by the rule of eviction.py, and tidy up.

        Parameters
        ----------
        max_bytes : 0 for no cap; default: the store's

        Raises
        ------
        StoreError : the store cannot be written
        """
        with self._mutex:
            loaded = set(self._memory)
        with self._writing() as root:
            return evict(root, self._max_bytes if max_bytes is None else max_bytes, loaded)

    def clear(self) -> int:
        """Remove all entries on disk, in use or not; how many. Processes keep what they loaded.

        Raises
        ------
        StoreError : the store cannot be written
        """
        with self._writing() as root:
            return remove_all(root)

    def _folders(self) -> list[Path]:
        return sorted(self._root.glob(f"{SHARDS}/*")) if self._root else []

    def require_root(self) -> Path:
        """The folder, for work that has no use without one; StoreError if there is none."""
        if self._root is None:
            raise StoreError("there is no kernel store on disk: name a folder in JITGEN_CACHE_DIR")
        return self._root

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Path]:
        root = self.require_root()
        try:
            yield root
        except OSError as error:
            raise StoreError(f"kernel store {root} cannot be written: {error}") from error

    def _open_root(self, root: Path | None) -> Path | None:
        if root is None:
            self._fall_back("this user has no home folder")
            return None
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            make_private(root)
            reason = distrust(os.lstat(root), stat.S_ISDIR)
        except OSError as error:
            self._fall_back(str(error))
            return None
        if reason:
            raise StoreError(
                f"kernel store {root} {reason}: it must be a folder of your own that only you can"
                " write to; `chmod go-w` it, or name another one in JITGEN_CACHE_DIR"
            )
        return root

    def _lookup(self, key: KernelKey) -> tuple[Entry | None, str]:
        """The entry, or None and what is damaged about the one on disk."""
        with self._mutex:
            if entry := self._memory.get(key.digest):
                self._counters.add(memory_hits=1)
                return entry, ""
        if not self._root:
            return None, ""
        folder = entry_folder(self._root, key.digest)
        mark_used(folder)  # before it is read, so that it stays
        try:
            entry = read_entry(folder)
        except DamagedError as damage:
            return None, str(damage)
        if entry:
            self._counters.add(disk_hits=1)
            with self._mutex:
                entry = self._memory.setdefault(key.digest, entry)
        return entry, ""

    @contextlib.contextmanager
    def _single_flight(self, digest: str, name: str) -> Iterator[None]:
        deadline = time.monotonic() + self._lock_timeout_s
        with self._mutex:
            lock = self._compiling.setdefault(digest, threading.Lock())
        if not lock.acquire(timeout=self._lock_timeout_s):
            raise StoreError(
                f"kernel {digest} is still being compiled by another thread of this process"
                f" ({os.getpid()}) after {self._lock_timeout_s:g} s: raise lock_timeout_s"
            )
        try:
            with self._file_lock(digest, name, deadline):
                yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _file_lock(self, digest: str, name: str, deadline: float) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            if self._root and self._locking and self._writable:
                left_s = deadline - time.monotonic()
                lock = hold_lock(
                    self._root, digest, name, timeout_s=left_s, counters=self._counters
                )
                try:
                    held.enter_context(lock)
                except OSError as error:
                    self._fall_back(str(error))
            yield

    def _publish(
        self, digest: str, name: str, files: Mapping[str, bytes], *, heal: bool
    ) -> Path | None:
        """The folder of the new entry, or of the one that another process was faster with."""
        if not self._root or not self._writable:
            return None
        try:
            published = publish_entry(self._root, digest, files, heal=heal)
        except OSError as error:
            self._fall_back(str(error))
            return None
        if published and heal:
            self._record_heal(digest, name)
        path = entry_folder(self._root, digest)
        return path if path.is_dir() else None

    def _record_heal(self, digest: str, name: str) -> None:
        self._counters.add(heals=1)
        log.warning("replaced the damaged %s", name, extra={"kernel": name, "key": digest})

    def _keep_to_cap(self, published_bytes: int) -> None:
        """Evict after the first publish, and each time 1/16 of the cap was published."""
        step = self._max_bytes // 16
        with self._mutex:
            self._unchecked_bytes += published_bytes
            is_due = self._max_bytes and self._unchecked_bytes > step
            if is_due:
                self._unchecked_bytes = 0
        if is_due:
            with contextlib.suppress(StoreError):  # it stays larger, and works
                self.gc(self._max_bytes - step)

    def _fall_back(self, reason: str) -> None:
        """Keep new kernels in memory only from now on, and say so once."""
        with self._mutex:
            was_writable, self._writable = self._writable, False
        if was_writable:
            _warn(
                f"kernel store cannot be written ({reason}): new kernels stay in memory, and each"
                " process compiles its own; name a writable folder in JITGEN_CACHE_DIR"
            )


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


def default_root() -> Path | None:
    """`kernels` in $JITGEN_CACHE_DIR or else in the user's cache folder; None if there is none."""
    if base := os.environ.get("JITGEN_CACHE_DIR"):
        return Path(base).absolute() / "kernels"
    try:  # neither HOME nor an account: older platformdirs leave "~", newer ones raise
        root = Path(platformdirs.user_cache_dir("jitgen")) / "kernels"
    except RuntimeError:
        return None
    return root if root.is_absolute() else None


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
