"""One compiled kernel on disk: its files, how they are written, and what is checked in reading."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import StoreError
from .key import KernelKey, json_sha256, sha256_hex
from .nvrtc import Resources

FORMAT_VERSION = 2
CUBIN, SOURCE, MANIFEST = "kernel.cubin", "kernel.cu", "entry.json"
FILES = (CUBIN, SOURCE, MANIFEST)
_MANIFEST_FIELDS = {"format_version", "name", "key", "cubin_sha256", "resources", "log", "sha256"}

# A rename onto an entry that another process published first, or into a folder that one took away.
_LOST_RACE = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT}


class DamagedError(Exception):
    """An entry on disk that must not be used; the text says why."""


@dataclass(frozen=True)
class Entry:
    """One compiled kernel; `path` is its folder, None if it is in memory only."""

    key: KernelKey
    name: str
    cubin: bytes
    source: str
    resources: Resources
    log: str  # the compiler's
    path: Path | None


def make_private(*folders: Path) -> None:
    """Make the folders that are missing, for this user only."""
    for folder in folders:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)


def work_folder(root: Path, name: str) -> Path:
    """A private folder of the store's own use, made in place of whatever else is there."""
    folder = root / name
    clear_stray(folder, stat.S_ISDIR)
    make_private(folder)
    return folder


def clear_stray(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Remove what is at `path` if it is of another kind, which no store made."""
    with contextlib.suppress(OSError):  # gone already, or a folder that is not empty
        mode = os.lstat(path).st_mode
        if not is_kind(mode):
            os.rmdir(path) if stat.S_ISDIR(mode) else os.unlink(path)


def distrust(info: os.stat_result, is_kind: Callable[[int], bool], *, or_root: bool = False) -> str:
    """Why something on disk, seen by lstat, is not to be used; empty if it may be.

    Parameters
    ----------
    info : from lstat
    is_kind : stat.S_ISDIR or stat.S_ISREG
    or_root : it may belong to root instead of this user, as the files of an image do
    """
    if stat.S_ISLNK(info.st_mode):
        return "is a symlink"
    if not is_kind(info.st_mode):
        return "is not a folder" if is_kind is stat.S_ISDIR else "is not a regular file"
    if info.st_uid != os.geteuid() and not (or_root and info.st_uid == 0):
        return f"belongs to user {info.st_uid}, not to {os.geteuid()}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(info.st_mode):o})"
    return ""


def scratch_path(root: Path, name: str) -> Path:
    """A path of its own in the store's `tmp`, which is made, for an entry on its way in or out."""
    return work_folder(root, "tmp") / f"{name[:64]}.{os.getpid()}.{secrets.token_hex(4)}"


def entry_folder(root: Path, digest: str) -> Path:
    """Where the store in `root` has the entry of the key with this digest."""
    return root / digest[:2] / digest


def entry_files(entry: Entry) -> dict[str, bytes]:
    """The contents of an entry's FILES; `parse_entry` reads them back."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": entry.name,
        "key": entry.key.to_json(),
        "cubin_sha256": sha256_hex(entry.cubin),
        "resources": asdict(entry.resources),
        "log": entry.log,
    }
    manifest["sha256"] = json_sha256(manifest)
    return {
        CUBIN: entry.cubin,
        SOURCE: entry.source.encode(),
        MANIFEST: json.dumps(manifest, indent=1).encode(),
    }


def publish_entry(root: Path, digest: str, files: Mapping[str, bytes], *, heal: bool) -> bool:
    """Let an entry appear by one rename; False if another process was faster.

    Parameters
    ----------
    root : folder of the store
    digest : of the entry's key
    files : from `entry_files`
    heal : remove what is there first

    Raises
    ------
    OSError : the folder cannot be written
    """
    final = entry_folder(root, digest)
    make_private(root)
    scratch = scratch_path(root, digest)
    try:
        make_private(scratch)
        _write_files(scratch, files)
        if heal:
            remove_damaged(root, final)
        make_private(final.parent)
        try:
            os.rename(scratch, final)
        except OSError as error:
            if error.errno not in _LOST_RACE:
                raise
            return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of an entry, down to the disk, into an empty folder."""
    for file, data in files.items():
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)


def read_entry(folder: Path, *, or_root: bool = False) -> Entry | None:
    """The entry in `folder`, all of it checked; `or_root` as for `distrust`.

    None if there is no such folder, or if it was moved away (see eviction.py) in the meantime.

    Raises
    ------
    DamagedError : the entry must not be used
    """
    found = _identity(folder)
    try:
        for path in (folder.parent, folder):
            if not os.path.lexists(path):
                return None
            _check_trust(path, stat.S_ISDIR, or_root)
        for file in FILES:
            _check_trust(folder / file, stat.S_ISREG, or_root)
        files = {file: (folder / file).read_bytes() for file in FILES}
        return parse_entry(folder.name, files, folder)
    except (OSError, ValueError, DamagedError) as error:
        if _identity(folder) != found:
            return None
        raise DamagedError(f"kernel store entry {folder} is damaged: {error}") from error


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _check_trust(path: Path, is_kind: Callable[[int], bool], or_root: bool) -> None:
    if reason := distrust(os.lstat(path), is_kind, or_root=or_root):
        raise ValueError(f"{path.name} {reason}")


def parse_entry(digest: str, files: Mapping[str, bytes], path: Path | None = None) -> Entry:
    """The entry of the key with this digest, all of it checked.

    Parameters
    ----------
    digest : in hex
    files : the contents of its FILES
    path : its folder, if it is on disk

    Raises
    ------
    DamagedError : the entry must not be used
    """
    try:
        return _parse_entry(digest, files, path)
    except (ValueError, RecursionError, StoreError) as error:
        raise DamagedError(str(error)) from error


def _parse_entry(digest: str, files: Mapping[str, bytes], path: Path | None) -> Entry:
    cubin, source, manifest = (files[file] for file in FILES)
    data = json.loads(manifest)
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST} is not of format version {FORMAT_VERSION}")
    if set(data) != _MANIFEST_FIELDS:
        raise ValueError(f"{MANIFEST} needs exactly the fields {sorted(_MANIFEST_FIELDS)}")
    if not isinstance(data["name"], str) or not isinstance(data["log"], str):
        raise ValueError(f"{MANIFEST} has a name or a log that is no text")
    key = KernelKey.from_json(data["key"])
    if key.digest != digest:
        raise ValueError(f"{MANIFEST} is that of kernel {key.digest}")
    if sha256_hex(cubin) != data["cubin_sha256"]:
        raise ValueError(f"{CUBIN} has another SHA-256 than {MANIFEST} says")
    if sha256_hex(source) != key.source_sha256:
        raise ValueError(f"{SOURCE} has another SHA-256 than {MANIFEST} says")
    resources = Resources.from_json(data["resources"])
    said = data.pop("sha256")
    if json_sha256(data) != said:
        raise ValueError(f"{MANIFEST} has another SHA-256 than it says")
    return Entry(key, data["name"], cubin, source.decode(), resources, data["log"], path)


def remove_damaged(root: Path, folder: Path) -> None:
    """Remove the entry, or the folder around it if that is not trusted."""
    around = folder.parent
    with contextlib.suppress(FileNotFoundError):  # another process may heal it too
        remove(root, around if distrust(os.lstat(around), stat.S_ISDIR) else folder)


def remove(root: Path, path: Path) -> None:
    """Move what is at `path` out of the readers' sight by one rename, then delete it.

    Killed between the two, it leaves a leftover in `tmp` and the store whole.

    Raises
    ------
    OSError : it could not be moved; FileNotFoundError: another process was faster
    """
    grave = scratch_path(root, path.name)
    os.rename(path, grave)
    if grave.is_dir() and not grave.is_symlink():
        shutil.rmtree(grave, ignore_errors=True)
    else:
        grave.unlink(missing_ok=True)
