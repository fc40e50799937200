"""The kernel store: compiled kernels on disk and in memory, addressed by what they depend on.

    <root>/<digest[:2]>/<digest>/   kernel.cubin   kernel.cu (source)   entry.json (manifest)
    <root>/locks/                   <digest>.lock and, while a process compiles, <digest>.holder
    <root>/tmp/                     entries being written; what a killed process left is not read
    <root>/stats.jsonl              what processes did with the store, see history.py

An entry appears by one rename, is never changed afterwards, and goes by one rename (eviction.py),
so readers take no lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import StoreError
from .entry import (
    DamagedError,
    Entry,
    entry_files,
    entry_folder,
    make_private,
    parse_entry,
    publish_entry,
    read_entry,
    remove_damaged,
)
from .eviction import Collected, default_max_bytes, evict, mark_used, num_bytes, remove_all
from .history import record
from .key import KernelKey, sha256_hex
from .locks import SingleFlight
from .nvrtc import Compiled
from .stats import PROCESS, Counters, Stats, log
from .tiers import Tier, Tiers, check_folder, list_folders, open_tiers, switch


@dataclass(frozen=True)
class Verified:
    """How many entries are sound, and what was wrong with those that were removed."""

    num_sound: int
    damages: tuple[str, ...]


class KernelStore:
    """Compiled kernels, shared by all processes that open the same folder; safe in threads.

    Parameters
    ----------
    tiers : where kernels are kept, default `Tiers.of()`; a path is that of the own folder alone.
        An own folder that cannot be made or written (read-only file system, no HOME) costs a
        warning, and new kernels are kept in memory only.
    locking : False to take no lock files, where the file system has none that work; default:
        $JITGEN_CACHE_LOCKING is not 0. Entries stay correct: processes may compile the same kernel
        twice, and each uses what it compiled.
    lock_timeout_s : longest wait for another thread or process that compiles the same kernel
    max_bytes : size of the entries in the own folder beyond which a publish evicts those least
        recently used (by the rule of eviction.py); 0 for no cap; default: $JITGEN_CACHE_MAX_BYTES
        or 2 GiB

    Raises
    ------
    StoreError : a folder is a symlink, belongs to another user, or others may write to it; an
        environment variable is not understood
    """

    def __init__(
        self,
        tiers: Tiers | Path | None = None,
        *,
        locking: bool | None = None,
        lock_timeout_s: float = 120.0,
        max_bytes: int | None = None,
    ) -> None:
        if not isinstance(tiers, Tiers):
            tiers = Tiers.of() if tiers is None else Tiers(Path(tiers).absolute())
        self._locking = switch("JITGEN_CACHE_LOCKING", True) if locking is None else locking
        self._max_bytes = default_max_bytes() if max_bytes is None else max_bytes
        if self._max_bytes < 0:
            raise StoreError(f"max_bytes = {max_bytes} must be a number of bytes, or 0 for no cap")
        self._mutex = threading.Lock()  # guards the three fields below
        self._unchecked_bytes = self._max_bytes  # published since the cap was last looked at
        self._memory: dict[str, Entry] = {}
        self._writable = True
        self._counters = Counters(PROCESS)
        self._flights = SingleFlight(timeout_s=lock_timeout_s, counters=self._counters)
        self._configured = tiers
        self._root = self._open_root(tiers.own)
        self._tiers = open_tiers(tiers, self._counters)
        self._near = [tier for tier in self._tiers if not tier.is_far]
        if self._root:
            weakref.finalize(self, record, self._root, self._counters, os.getpid())

    @property
    def root(self) -> Path | None:
        """The folder of the store; None if there is none and all is kept in memory."""
        return self._root

    @property
    def stats(self) -> Stats:
        """The counters as they are now."""
        return self._counters.stats

    def count_load(self) -> None:
        """Count a kernel of this store that was loaded onto a GPU."""
        self._counters.add(loads=1)

    def get(self, key: KernelKey) -> Entry | None:
        """The entry of `key`, or None; what is damaged on the way to it warns, and is a miss."""
        entry, damages = self._look_up(key.digest, self._tiers)
        _warn_of(damages, "it is not used")
        if not entry:
            self._counters.add(misses=1)
        return entry

    def peek(self, key: KernelKey) -> Entry | None:
        """The entry of `key`, if it is near: in memory, in the own folder or in a lower one.

        For those who go on to `get_or_compile`: it warns of nothing, and counts no miss.
        """
        return self._look_up(key.digest, self._near)[0]

    def get_or_compile(
        self, key: KernelKey, compile: Callable[[], Compiled], *, name: str, source: str
    ) -> Entry:
        """The entry of `key`, from a tier, or from `compile()`, which is then published.

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
        entry, damages = self._look_up(key.digest, self._near)
        if entry:
            _warn_of(damages, "it is not used")
            return entry
        if sha256_hex(source.encode()) != key.source_sha256:
            raise StoreError(f"source of {name} is not the one its key was made of: use make_key")
        with self._single_flight(key.digest, name):
            entry, damages = self._look_up(key.digest, self._tiers)
            _warn_of(damages, "it is not used" if entry else "compiling it again")
            if entry:
                return entry
            self._counters.add(misses=1)
            compiled = compile()
            seconds = compiled.resources.compile_seconds
            self._counters.add(compiles=1, compile_seconds=seconds)
            fields = {"kernel": name, "key": key.digest, "seconds": seconds}
            log.info("compiled %s in %.2f s", name, seconds, extra=fields)
            entry = Entry(key, name, compiled.cubin, source, compiled.resources, compiled.log, None)
            entry = self._keep(entry, heal=None in damages)
        for tier in self._tiers:
            tier.save(entry, heal=tier in damages)
        return entry

    def add(self, digest: str, files: Mapping[str, bytes]) -> bool:
        """Publish an entry that another store made, in all tiers that are written to.

        False if the own folder has a sound one, which stays.

        Parameters
        ----------
        digest : of the entry's key, in hex
        files : the contents of its files, by name

        Raises
        ------
        DamagedError : the entry is not sound; nothing is published
        StoreError : the store cannot be written, or a lock was not released in time
        """
        entry = parse_entry(digest, files)
        with self._writing() as root, self._single_flight(digest, entry.name):
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
                self._record_heal(digest, entry.name)
        self._keep_to_cap(num_bytes(path))
        for tier in self._tiers:
            tier.save(entry, heal=False)
        return published

    def entries(self) -> Iterator[Entry]:
        """All entries in folders and in memory; damaged ones are left out with a warning.

        Those of the remote store are not listed.
        """
        seen = set()
        for folder, or_root in self._folders():
            try:
                entry = read_entry(folder, or_root=or_root)
            except DamagedError as damage:
                _warn(f"{damage}; it is left out")
            else:
                if entry and entry.key.digest not in seen:
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
        for folder in list_folders(self._root) if self._root else ():
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

    def require_root(self) -> Path:
        """The folder, for work that has no use without one; StoreError if there is none."""
        if self._root is None:
            raise StoreError("there is no kernel store on disk: name a folder in JITGEN_CACHE_DIR")
        return self._root

    def _folders(self) -> Iterator[tuple[Path, bool]]:
        """The folders of entries in all tiers, and whether they may be root's."""
        for root in (self._root, *self._configured.lower, self._configured.shared):
            for folder in list_folders(root) if root else ():
                yield folder, root in self._configured.lower

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
            os.lstat(root)
        except OSError as error:
            self._fall_back(str(error))
            return None
        check_folder(root, "JITGEN_CACHE_DIR")
        return root

    def _look_up(
        self, digest: str, tiers: Sequence[Tier]
    ) -> tuple[Entry | None, dict[Tier | None, str]]:
        """The entry, or None; and what is damaged about it, by tier, None for the own folder."""
        with self._mutex:
            if entry := self._memory.get(digest):
                self._counters.add(memory_hits=1)
                return entry, {}
        damages: dict[Tier | None, str] = {}
        if self._root:
            folder = entry_folder(self._root, digest)
            mark_used(folder)  # before it is read, so that it stays
            try:
                entry = read_entry(folder)
            except DamagedError as damage:
                damages[None] = str(damage)
            if entry:
                self._counters.add(disk_hits=1)
                return self._remember(entry), damages
        for tier in tiers:
            try:
                entry = tier.load(digest)
            except DamagedError as damage:
                damages[tier] = str(damage)
            else:
                if entry:
                    self._counters.add(**{tier.hits: 1})
                    if tier.is_far or None in damages:
                        return self._keep(entry, heal=None in damages), damages
                    return self._remember(entry), damages
        return None, damages

    def _remember(self, entry: Entry) -> Entry:
        """The entry from now on in memory, which may be that of a faster thread."""
        with self._mutex:
            return self._memory.setdefault(entry.key.digest, entry)

    @contextlib.contextmanager
    def _single_flight(self, digest: str, name: str) -> Iterator[None]:
        root = self._root if self._locking and self._writable else None
        with self._flights.hold(digest, name, root, self._fall_back):
            yield

    def _keep(self, entry: Entry, *, heal: bool) -> Entry:
        """The entry from now on in memory and, if it can be written, in the own folder."""
        files = entry_files(entry)
        path = self._publish(entry.key.digest, entry.name, files, heal=heal)
        entry = self._remember(replace(entry, path=path or entry.path))
        if path:
            self._keep_to_cap(num_bytes(path))
        return entry

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


def _warn_of(damages: Mapping[Tier | None, str], consequence: str) -> None:
    for damage in damages.values():
        _warn(f"{damage}; {consequence}")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
