"""The kernel store: compiled kernels on disk and in memory, addressed by what they depend on.

    <root>/<digest[:2]>/<digest>/   kernel.cubin   kernel.cu (source)   entry.json (manifest)
    <root>/locks/                   <digest>.lock and, while a process compiles, <digest>.holder
    <root>/tmp/                     entries being written; what a killed process left is not read

An entry appears by one rename and is never changed afterwards, so readers take no lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import platformdirs

from ..errors import StoreError
from .key import KernelKey, sha256_hex
from .nvrtc import Compiled, Resources
from .stats import PROCESS, Counters, Stats, log

FORMAT_VERSION = 1
CUBIN, SOURCE, MANIFEST = "kernel.cubin", "kernel.cu", "entry.json"
_MANIFEST_FIELDS = {"format_version", "name", "key", "cubin_sha256", "resources", "log"}

# A rename onto an entry that another process published first, or into a folder that one took away.
_LOST_RACE = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT}
# What flock says on a file system that has no locks (NFS without a lock daemon, some FUSE mounts).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class _DamagedError(Exception):
    """An entry on disk that must not be used; the text says why."""


@dataclass(frozen=True)
class Entry:
    """One compiled kernel; `path` is its folder, None if it is in memory only."""

    key: KernelKey
    name: str
    cubin: bytes
    source: str
    resources: Resources
    path: Path | None


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

    Raises
    ------
    StoreError : the root is a symlink, belongs to another user, or others may write to it
    """

    def __init__(
        self, root: Path | None = None, *, locking: bool = True, lock_timeout_s: float = 120.0
    ) -> None:
        self._locking = locking
        self._lock_timeout_s = lock_timeout_s
        self._mutex = threading.Lock()  # guards the three fields below
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
            path = self._publish(key, name, source, compiled, heal=bool(damage))
            entry = Entry(key, name, compiled.cubin, source, compiled.resources, path)
            with self._mutex:
                return self._memory.setdefault(key.digest, entry)

    def entries(self) -> Iterator[Entry]:
        """All entries, on disk and in memory; damaged ones are left out with a warning."""
        seen = set()
        for folder in sorted(self._root.glob("[0-9a-f][0-9a-f]/*")) if self._root else []:
            try:
                entry = _read_entry(folder)
            except _DamagedError as damage:
                _warn(f"{damage}; it is left out")
            else:
                if entry:
                    seen.add(entry.key.digest)
                    yield entry
        with self._mutex:
            in_memory = list(self._memory.values())
        yield from (entry for entry in in_memory if entry.key.digest not in seen)

    def _open_root(self, root: Path | None) -> Path | None:
        if root is None:
            self._fall_back("this user has no home folder")
            return None
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            _make_private(root)
            reason = _distrust(os.lstat(root), stat.S_ISDIR)
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
        try:
            entry = _read_entry(self._root / key.digest[:2] / key.digest)
        except _DamagedError as damage:
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
                folder = self._root / "locks"
                try:
                    _make_private(self._root, folder)
                    lock = filelock.FileLock(folder / f"{digest}.lock", mode=0o600)
                    self._acquire(lock, digest, name, deadline)
                    held.callback(lock.release)
                    held.enter_context(_holder_file(folder / f"{digest}.holder"))
                except filelock.Timeout:
                    raise StoreError(self._lock_timeout_message(folder, digest)) from None
                except (OSError, NotImplementedError) as error:
                    if isinstance(error, NotImplementedError) or error.errno in _NO_LOCKS:
                        raise StoreError(
                            f"no file locks in {folder} ({error}): use another JITGEN_CACHE_DIR, or"
                            " locking=False"
                        ) from error
                    self._fall_back(str(error))
            yield

    def _acquire(self, lock: filelock.BaseFileLock, digest: str, name: str, end: float) -> None:
        """Take the lock, until `end` of time.monotonic(); a wait is counted and recorded."""
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            self._counters.add(waits=1)
            started = time.monotonic()
            try:
                lock.acquire(timeout=max(0.0, end - started))
            finally:
                seconds = time.monotonic() - started
                fields = {"kernel": name, "key": digest, "seconds": seconds}
                log.info("waited %.2f s for the lock of %s", seconds, name, extra=fields)

    def _lock_timeout_message(self, folder: Path, digest: str) -> str:
        try:
            holder = (folder / f"{digest}.holder").read_text(errors="replace")[:200]
        except OSError:
            holder = ""
        return (
            f"kernel {digest} is still locked by {holder or 'an unknown process'} after"
            f" {self._lock_timeout_s:g} s: end that process if it hangs, raise lock_timeout_s if it"
            " is compiling, or do without locks (locking=False)"
        )

    def _publish(
        self, key: KernelKey, name: str, source: str, compiled: Compiled, *, heal: bool
    ) -> Path | None:
        """The folder of the new entry, or of the one that another process was faster with."""
        if not self._root or not self._writable:
            return None
        final = self._root / key.digest[:2] / key.digest
        scratch = self._root / "tmp" / f"{key.digest}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            _make_private(self._root, scratch.parent, scratch)
            _write_entry(scratch, key, name, source, compiled)
            if heal:
                _remove_damaged(final, scratch.with_name(f"{scratch.name}.damaged"))
            _make_private(final.parent)
            try:
                os.rename(scratch, final)
            except OSError as error:
                if error.errno not in _LOST_RACE:
                    raise
                return final if final.is_dir() else None
        except OSError as error:
            self._fall_back(str(error))
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if heal:
            self._counters.add(heals=1)
            log.warning("replaced the damaged %s", name, extra={"kernel": name, "key": key.digest})
        return final

    def _fall_back(self, reason: str) -> None:
        """Keep new kernels in memory only from now on, and say so once."""
        with self._mutex:
            was_writable, self._writable = self._writable, False
        if was_writable:
            _warn(
                f"kernel store cannot be written ({reason}): new kernels stay in memory, and each"
                " process compiles its own; name a writable folder in JITGEN_CACHE_DIR"
            )


def default_root() -> Path | None:
    """`kernels` in $JITGEN_CACHE_DIR or else in the user's cache folder; None if there is none."""
    if base := os.environ.get("JITGEN_CACHE_DIR"):
        return Path(base).absolute() / "kernels"
    try:  # neither HOME nor an account: older platformdirs leave "~", newer ones raise
        root = Path(platformdirs.user_cache_dir("jitgen")) / "kernels"
    except RuntimeError:
        return None
    return root if root.is_absolute() else None


def _make_private(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)


def _distrust(info: os.stat_result, is_kind: Callable[[int], bool]) -> str:
    """Why something on disk, seen by lstat, is not to be used; empty if it may be."""
    if stat.S_ISLNK(info.st_mode):
        return "is a symlink"
    if not is_kind(info.st_mode):
        return "is not a folder" if is_kind is stat.S_ISDIR else "is not a regular file"
    if info.st_uid != os.geteuid():
        return f"belongs to user {info.st_uid}, not to {os.geteuid()}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(info.st_mode):o})"
    return ""


def _write_entry(folder: Path, key: KernelKey, name: str, source: str, compiled: Compiled) -> None:
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "key": key.to_json(),
        "cubin_sha256": sha256_hex(compiled.cubin),
        "resources": asdict(compiled.resources),
        "log": compiled.log,
    }
    contents = {
        CUBIN: compiled.cubin,
        SOURCE: source.encode(),
        MANIFEST: json.dumps(manifest, indent=1).encode(),
    }
    for file, data in contents.items():
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)


def _read_entry(folder: Path) -> Entry | None:
    """The entry in `folder`, all of it checked; None if there is no such folder."""
    files = [folder / CUBIN, folder / SOURCE, folder / MANIFEST]
    try:
        for path in (folder.parent, folder):
            if not os.path.lexists(path):
                return None
            _check_trust(path, stat.S_ISDIR)
        for path in files:
            _check_trust(path, stat.S_ISREG)
        return _parse_entry(folder, *(path.read_bytes() for path in files))
    except (OSError, ValueError, RecursionError, StoreError) as error:
        raise _DamagedError(f"kernel store entry {folder} is damaged: {error}") from error


def _check_trust(path: Path, is_kind: Callable[[int], bool]) -> None:
    if reason := _distrust(os.lstat(path), is_kind):
        raise ValueError(f"{path.name} {reason}")


def _parse_entry(folder: Path, cubin: bytes, source: bytes, manifest: bytes) -> Entry:
    data = json.loads(manifest)
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST} is not of format version {FORMAT_VERSION}")
    if set(data) != _MANIFEST_FIELDS:
        raise ValueError(f"{MANIFEST} needs exactly the fields {sorted(_MANIFEST_FIELDS)}")
    if not isinstance(data["name"], str) or not isinstance(data["log"], str):
        raise ValueError(f"{MANIFEST} has a name or a log that is no text")
    key = KernelKey.from_json(data["key"])
    if key.digest != folder.name:
        raise ValueError(f"{MANIFEST} is that of kernel {key.digest}")
    if sha256_hex(cubin) != data["cubin_sha256"]:
        raise ValueError(f"{CUBIN} has another SHA-256 than {MANIFEST} says")
    if sha256_hex(source) != key.source_sha256:
        raise ValueError(f"{SOURCE} has another SHA-256 than {MANIFEST} says")
    resources = Resources.from_json(data["resources"])
    return Entry(key, data["name"], cubin, source.decode(), resources, folder)


def _remove_damaged(folder: Path, grave: Path) -> None:
    """Move the entry, or the folder around it if that is not trusted, to `grave` and delete it."""
    around = folder.parent
    with contextlib.suppress(FileNotFoundError):  # another process may heal it too
        os.rename(around if _distrust(os.lstat(around), stat.S_ISDIR) else folder, grave)
        if grave.is_dir() and not grave.is_symlink():
            shutil.rmtree(grave, ignore_errors=True)
        else:
            grave.unlink()


@contextlib.contextmanager
def _holder_file(path: Path) -> Iterator[None]:
    """A file, there as long as the lock is held, that names this process to those who wait."""
    with contextlib.suppress(OSError):
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
