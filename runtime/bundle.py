"""Bundles: compiled kernels in one file, to carry from one user's store to another's.

    manifest.json             format, what the kernels were made with, and each kernel's key digest,
                              name, and SHA-256 and size of each file
    <digest>/entry.json       the files as they are in the store (see entry.py)
    <digest>/kernel.cu
    <digest>/kernel.cubin     ... and so on, by digest

It is a plain ustar archive, and of the same entries there is one, byte for byte: headers hold a
name and a size, and otherwise the same values always. So a reader need not understand tar, and
cannot be misled by it: it compares each header with the one that the manifest calls for.

The hashes find accidents, not forgers: who writes a bundle decides what runs on the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import StoreError
from .entry import FILES, DamagedError, Entry, parse_entry
from .key import sha256_hex
from .store import KernelStore

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # of some 100,000 kernels
MAX_FILE_BYTES = 64 << 20  # a cubin has some 50 KiB

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True)
class Toolchain:
    """What kernels are made with; a call never finds those that were made with another.

    template_fingerprint : from `jitgen.codegen.fingerprint`
    """

    jitgen_version: str
    arch: str
    compiler_version: str
    template_fingerprint: str


@dataclass(frozen=True)
class Imported:
    """How many kernels of a bundle were put into the store, and how many were there."""

    num_added: int
    num_present: int


@dataclass(frozen=True)
class _File:
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class _Kernel:
    key: str  # digest
    name: str
    files: dict[str, _File]


def export_bundle(path: Path, toolchain: Toolchain, entries: Iterable[Entry]) -> int:
    """Write a bundle of `entries`, whole or not at all; its size in bytes.

    Parameters
    ----------
    path : of the file, which is replaced if it is there
    toolchain : that made the entries
    entries : from a store on disk, in any order

    Raises
    ------
    StoreError : an entry is of another compiler or architecture, or was removed meanwhile; the
        file cannot be written
    """
    folders: dict[str, Path] = {}
    kernels = []
    by_digest = {entry.key.digest: entry for entry in entries}
    for _, entry in sorted(by_digest.items()):
        _check_made_by(toolchain, entry)
        if entry.path is None:
            raise StoreError(f"kernel {entry.name} is in memory only: no bundle can hold it")
        folders[entry.key.digest] = entry.path
        files = {file: _describe(data) for file, data in _read_files(entry.path).items()}
        kernels.append(_Kernel(entry.key.digest, entry.name, files))
    manifest = _encode_manifest(_manifest(toolchain, kernels))
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with part.open("xb") as stream:
            stream.write(_member(MANIFEST, manifest))
            for kernel in kernels:
                files_now = _read_files(folders[kernel.key])
                _check_files(kernel, files_now, toolchain)
                for file, data in files_now.items():
                    stream.write(_member(f"{kernel.key}/{file}", data))
            stream.write(_END)
            size = stream.tell()
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except DamagedError as damage:
        raise StoreError(f"the store changed while it was exported: {damage}") from None
    except OSError as error:
        raise StoreError(f"bundle {path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return size


def import_bundle(path: Path, toolchain: Toolchain, store: KernelStore) -> Imported:
    """Put the kernels of a bundle into `store`; those that are there and sound stay.

    All of the bundle is checked before any of it is published. Each kernel appears whole or not at
    all, so an import that was killed can be run again.

    Parameters
    ----------
    path : of the bundle; of someone you trust, see above
    toolchain : of this machine; jitgen_version may be another than the bundle's
    store : on disk

    Raises
    ------
    StoreError : the bundle was made with another format, architecture, compiler or templates, or is
        not one that `export_bundle` wrote, or cannot be read; the store cannot be written
    """
    num_added = num_kernels = 0
    try:
        with path.open("rb") as stream:
            kernels = _read_manifest(stream, toolchain)
            start = stream.tell()
            for _ in _read_kernels(stream, kernels, toolchain):
                pass
            stream.seek(start)
            for digest, files in _read_kernels(stream, kernels, toolchain):
                num_added += store.add(digest, files)
                num_kernels += 1
    except DamagedError as damage:
        raise StoreError(f"bundle {path} is damaged: {damage}; copy or export it again") from None
    except StoreError as error:
        raise StoreError(f"bundle {path}: {error}") from None
    except OSError as error:
        raise StoreError(f"bundle {path} cannot be read: {error}") from error
    return Imported(num_added, num_kernels - num_added)


def _manifest(toolchain: Toolchain, kernels: list[_Kernel]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        **asdict(toolchain),
        "kernels": [asdict(kernel) for kernel in kernels],
    }


def _encode_manifest(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _describe(data: bytes) -> _File:
    return _File(sha256_hex(data), len(data))


def _header(name: str, size: int) -> bytes:
    """The tar header of a regular file: no owner, no time, mode 0644."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + _padding(len(data))


def _read_files(folder: Path) -> dict[str, bytes]:
    try:
        return {file: (folder / file).read_bytes() for file in sorted(FILES)}
    except OSError as error:
        raise StoreError(f"kernel {folder.name} was removed from the store: {error}") from error


def _read_manifest(stream: IO[bytes], toolchain: Toolchain) -> list[_Kernel]:
    """The kernels of the bundle whose start `stream` is at; made with `toolchain`, and all there.

    Raises DamagedError and StoreError as import_bundle says.
    """
    header = stream.read(_BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(header, "ascii", "strict").size
        if not 0 < size <= MAX_MANIFEST_BYTES or header != _header(MANIFEST, size):
            raise ValueError
    except (tarfile.TarError, ValueError):
        raise DamagedError(f"it does not begin with a {MANIFEST}") from None
    data = stream.read(size)
    try:
        manifest = json.loads(data)
        _check_toolchain(manifest, toolchain)
        kernels = _parse_kernels(manifest["kernels"])
        made_with = Toolchain(**{field: manifest[field] for field in asdict(toolchain)})
        if _encode_manifest(_manifest(made_with, kernels)) != data:
            raise ValueError("has other fields than it should, or in another order")
    except KeyError as error:
        raise DamagedError(f"{MANIFEST} has no {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST}: {error}") from None
    if stream.read(len(_padding(size))) != _padding(size):
        raise DamagedError(f"there is something between {MANIFEST} and the kernels")
    sizes = [file.size for kernel in kernels for file in kernel.files.values()]
    want = stream.tell() + sum(_BLOCK + size + len(_padding(size)) for size in sizes) + len(_END)
    have = os.fstat(stream.fileno()).st_size
    if have != want:
        raise DamagedError(f"it has {have} bytes, its {MANIFEST} describes {want}")
    return kernels


def _check_toolchain(manifest: Any, toolchain: Toolchain) -> None:
    wanted = {
        "format_version": (FORMAT_VERSION, "export it with this version of jitgen"),
        "arch": (toolchain.arch, "export it for this architecture"),
        "compiler_version": (
            toolchain.compiler_version,
            "install the same nvidia-cuda-nvrtc on both machines, and export it again",
        ),
        "template_fingerprint": (
            toolchain.template_fingerprint,
            "install the same jitgen on both machines, and export it again",
        ),
    }
    for field, (want, remedy) in wanted.items():
        if manifest[field] != want:
            raise StoreError(
                f"its {field} is {manifest[field]!r:.80}, wanted is {want!r}: {remedy}"
            )


def _parse_kernels(values: Any) -> list[_Kernel]:
    """The kernels of a manifest; raises ValueError, KeyError or TypeError if it has no such."""
    kernels: list[_Kernel] = []
    for value in values:
        files = {name: _File(**value["files"][name]) for name in sorted(FILES)}
        kernel = _Kernel(value["key"], value["name"], files)
        if not re.fullmatch("[0-9a-f]{64}", kernel.key):
            raise ValueError(f"key {kernel.key!r:.80} is no digest")
        for name, file in files.items():
            if type(file.size) is not int or not 0 <= file.size <= MAX_FILE_BYTES:
                raise ValueError(f"{name} of {kernel.name} has {file.size!r:.80} bytes")
        if kernels and kernels[-1].key >= kernel.key:
            raise ValueError("its kernels are not in the order of their keys")
        kernels.append(kernel)
    return kernels


def _read_kernels(
    stream: IO[bytes], kernels: list[_Kernel], toolchain: Toolchain
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Digest and files of each kernel, all of it checked, and then that nothing follows."""
    for kernel in kernels:
        files = {}
        for name, file in kernel.files.items():
            if stream.read(_BLOCK) != _header(f"{kernel.key}/{name}", file.size):
                raise DamagedError(f"{kernel.key}/{name} is not where it should be")
            files[name] = stream.read(file.size)
            if stream.read(len(_padding(file.size))) != _padding(file.size):
                raise DamagedError(f"there is something after {kernel.key}/{name}")
        _check_files(kernel, files, toolchain)
        yield kernel.key, files
    if stream.read(len(_END) + 1) != _END:
        raise DamagedError("there is something after the last kernel")


def _check_files(kernel: _Kernel, files: dict[str, bytes], toolchain: Toolchain) -> None:
    """Raise DamagedError if they are not those of the manifest, or no sound entry of the store."""
    for name, data in files.items():
        if _describe(data) != kernel.files[name]:
            raise DamagedError(f"{kernel.key}/{name} has another SHA-256 than {MANIFEST} says")
    entry = parse_entry(kernel.key, files)
    if entry.name != kernel.name:
        raise DamagedError(f"kernel {kernel.key} is {entry.name}, {MANIFEST} says {kernel.name}")
    _check_made_by(toolchain, entry)


def _check_made_by(toolchain: Toolchain, entry: Entry) -> None:
    for field in ("arch", "compiler_version"):
        have, want = getattr(entry.key, field), getattr(toolchain, field)
        if have != want:
            raise StoreError(f"kernel {entry.name} is of {field} {have}, the bundle of {want}")
