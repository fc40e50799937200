"""Tiers: where a store looks for kernels, from the nearest to the farthest.

    memory    of the process
    own       the user's own folder: what is compiled is published here
    lower     folders that are read only, such as one baked into an image
    shared    a folder that several machines write to
    remote    an object store, through fsspec (remote.py)

What comes from a shared folder or from the remote store is published to the own folder, where the
next process finds it. Each folder is named as JITGEN_CACHE_DIR was when it was filled: the kernels
are in `kernels` below it, by the same layout everywhere (see store.py).
"""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import StoreError
from .entry import (
    Entry,
    distrust,
    entry_files,
    entry_folder,
    make_private,
    publish_entry,
    read_entry,
)
from .eviction import SHARDS, mark_used
from .remote import RemoteTier
from .stats import Counters

KERNELS = "kernels"
REMOTE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Tiers:
    """Where kernels are kept beside memory; the folders are those that hold the entries.

    own : folder of the user's, made (0700) if missing; None: all stays in memory
    lower : folders that are only read; of this user or root, and writable by nobody else
    shared : folder of this user's on a file system that other machines mount too
    remote : folder as fsspec names it, such as "s3://bucket/jitgen/kernels"; "" for none
    remote_write : publish there what is compiled here
    remote_timeout_s : longest wait for an answer
    """

    own: Path | None
    lower: tuple[Path, ...] = ()
    shared: Path | None = None
    remote: str = ""
    remote_write: bool = False
    remote_timeout_s: float = REMOTE_TIMEOUT_S

    @classmethod
    def of(
        cls,
        *,
        cache_dir: str | None = None,
        cache_lower: str | None = None,
        cache_shared: str | None = None,
        cache_remote: str | None = None,
        cache_remote_write: str | None = None,
        cache_remote_timeout: str | None = None,
    ) -> Tiers:
        """The tiers that texts name; a text that is None is that of its environment variable.

        Parameters
        ----------
        cache_dir : $JITGEN_CACHE_DIR, or else the user's cache folder
        cache_lower : $JITGEN_CACHE_LOWER: folders with ":" between them
        cache_shared : $JITGEN_CACHE_SHARED
        cache_remote : $JITGEN_CACHE_REMOTE: a URL
        cache_remote_write : $JITGEN_CACHE_REMOTE_WRITE: "1" or "0"
        cache_remote_timeout : $JITGEN_CACHE_REMOTE_TIMEOUT: seconds

        Raises
        ------
        StoreError : a text is not understood
        """
        own = _text("JITGEN_CACHE_DIR", cache_dir)
        lower = _text("JITGEN_CACHE_LOWER", cache_lower).split(os.pathsep)
        shared = _text("JITGEN_CACHE_SHARED", cache_shared)
        remote = _text("JITGEN_CACHE_REMOTE", cache_remote).rstrip("/")
        if remote and "://" not in remote:
            raise StoreError(
                f"JITGEN_CACHE_REMOTE is {remote!r:.80}: give a URL such as s3://bucket/jitgen;"
                " a folder is named in JITGEN_CACHE_SHARED"
            )
        return cls(
            own=_kernels(own) if own else _user_folder(),
            lower=tuple(_kernels(folder) for folder in lower if folder),
            shared=_kernels(shared) if shared else None,
            remote=f"{remote}/{KERNELS}" if remote else "",
            remote_write=switch("JITGEN_CACHE_REMOTE_WRITE", False, cache_remote_write),
            remote_timeout_s=_seconds("JITGEN_CACHE_REMOTE_TIMEOUT", cache_remote_timeout),
        )


class Tier(Protocol):
    """A place that entries are looked for in, after memory and the own folder.

    hits : the field of Stats that counts what is found here
    is_far : what is found here is worth keeping in the own folder
    """

    hits: str
    is_far: bool

    def load(self, digest: str) -> Entry | None:
        """The entry, all of it checked, or None; DamagedError if it must not be used."""

    def save(self, entry: Entry, *, heal: bool) -> None:
        """Publish an entry that was compiled or imported, if this tier takes any; never fails."""


class LowerTier:
    """A folder of entries that is only read."""

    hits = "lower_hits"
    is_far = False

    def __init__(self, root: Path) -> None:
        self.root = root
        check_folder(root, "JITGEN_CACHE_LOWER", or_root=True)
        if reason := self._unreadable():
            warnings.warn(
                f"lower kernel store {root} cannot be read ({reason}): what it holds is not found;"
                " `chmod -R a+rX` it, or name another one in JITGEN_CACHE_LOWER",
                RuntimeWarning,
                stacklevel=2,
            )

    def _unreadable(self) -> str:
        """Why entries cannot be found; empty if they can."""
        if not self.root.is_dir():
            return "there is no such folder"
        for folder in (self.root, *self.root.glob(SHARDS)):
            if not os.access(folder, os.R_OK | os.X_OK):
                return f"no permission for {folder}"
        return ""

    def load(self, digest: str) -> Entry | None:
        return read_entry(entry_folder(self.root, digest), or_root=True)

    def save(self, entry: Entry, *, heal: bool) -> None:
        pass


class SharedTier:
    """A folder of entries that several machines read and write."""

    hits = "shared_hits"
    is_far = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._is_writable = True
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            make_private(root)
        except OSError as error:
            self._give_up(error)
        check_folder(root, "JITGEN_CACHE_SHARED")

    def load(self, digest: str) -> Entry | None:
        folder = entry_folder(self.root, digest)
        mark_used(folder)  # before it is read, so that it stays
        return read_entry(folder)

    def save(self, entry: Entry, *, heal: bool) -> None:
        if self._is_writable:
            try:
                publish_entry(self.root, entry.key.digest, entry_files(entry), heal=heal)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._is_writable = False
        warnings.warn(
            f"shared folder {self.root} cannot be written ({error}): what is compiled here stays"
            " here",
            RuntimeWarning,
            stacklevel=3,
        )


def open_tiers(tiers: Tiers, counters: Counters) -> list[Tier]:
    """All tiers after the own folder, in the order that they are asked in.

    Parameters
    ----------
    counters : of the store, for what the remote tier counts itself

    Raises
    ------
    StoreError : a folder is not to be trusted
    """
    found: list[Tier] = [LowerTier(root) for root in tiers.lower]
    if tiers.shared:
        found.append(SharedTier(tiers.shared))
    if tiers.remote:
        timeout_s = tiers.remote_timeout_s
        found.append(
            RemoteTier(
                tiers.remote, write=tiers.remote_write, timeout_s=timeout_s, counters=counters
            )
        )
    return found


def check_folder(root: Path, variable: str, *, or_root: bool = False) -> None:
    """Raise StoreError if a folder of entries is not to be trusted; one that is missing may be.

    Parameters
    ----------
    variable : of the environment, that names the folder
    or_root : as for `distrust`
    """
    try:
        reason = distrust(os.lstat(root), stat.S_ISDIR, or_root=or_root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{root} cannot be read: {error}; name another in {variable}") from error
    if reason:
        owner = "of your own or root's" if or_root else "of your own"
        raise StoreError(
            f"kernel store {root} {reason}: it must be a folder {owner} that nobody else can"
            f" write to; `chmod go-w` it, or name another one in {variable}"
        )


def list_folders(root: Path) -> list[Path]:
    """The folders of all entries below `root`, by digest."""
    return sorted(root.glob(f"{SHARDS}/*"))


def switch(variable: str, default: bool, text: str | None = None) -> bool:
    """Whether `text`, or else the environment variable, is "1"; it may be "0" too.

    Raises
    ------
    StoreError : it is something else
    """
    value = _text(variable, text) or ("1" if default else "0")
    if value not in ("0", "1"):
        raise StoreError(f"{variable} is {value!r:.80}: give 0 or 1")
    return value == "1"


def _seconds(variable: str, text: str | None) -> float:
    value = _text(variable, text)
    try:
        seconds = float(value or REMOTE_TIMEOUT_S)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 3600:
        raise StoreError(f"{variable} is {value!r:.80}: give seconds, more than 0, below 3600")
    return seconds


def _text(variable: str, text: str | None) -> str:
    return os.environ.get(variable, "") if text is None else text


def _kernels(folder: str) -> Path:
    return Path(folder).absolute() / KERNELS


def _user_folder() -> Path | None:
    """The store's folder in the user's cache folder; None if there is none."""
    import platformdirs  # here, for those who name their folders

    try:  # neither HOME nor an account: older platformdirs leave "~", newer ones raise
        root = Path(platformdirs.user_cache_dir("jitgen")) / KERNELS
    except RuntimeError:
        return None
    return root if root.is_absolute() else None
