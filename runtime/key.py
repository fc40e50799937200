"""What a compiled kernel depends on, and its digest: contents only, no paths, no times."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import StoreError
from .nvrtc import headers_used


@dataclass(frozen=True)
class KernelKey:
    """Everything that decides the bytes of a cubin."""

    source_sha256: str
    headers: tuple[tuple[str, str], ...]  # (include name, sha256), sorted by name
    options: tuple[str, ...]  # in the order that the compiler gets them
    compiler_version: str
    arch: str

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all fields, in hex: the kernel's place in the store."""
        return json_sha256(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` reads them back."""
        return {
            "source_sha256": self.source_sha256,
            "headers": [list(header) for header in self.headers],
            "options": list(self.options),
            "compiler_version": self.compiler_version,
            "arch": self.arch,
        }

    @classmethod
    def from_json(cls, data: object) -> KernelKey:
        """The key that `to_json` wrote.

        Raises
        ------
        StoreError : a field is missing, unknown, or of another type
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(names):
            raise StoreError(
                f"kernel key needs exactly the fields {', '.join(names)}; got {data!r:.200}"
            )
        headers, options = data["headers"], data["options"]
        pairs = headers if isinstance(headers, list) else [None]
        texts = [data["source_sha256"], data["compiler_version"], data["arch"]]
        if not (
            all(isinstance(pair, list) and len(pair) == 2 and _are_texts(pair) for pair in pairs)
            and isinstance(options, list)
            and _are_texts([*options, *texts])
        ):
            raise StoreError(f"kernel key has a field of a wrong type: {data!r:.200}")
        return cls(
            source_sha256=data["source_sha256"],
            headers=tuple((name, sha256) for name, sha256 in headers),
            options=tuple(options),
            compiler_version=data["compiler_version"],
            arch=data["arch"],
        )

    def differences(self, other: KernelKey) -> dict[str, tuple[str, str]]:
        """Each field that differs, with this key's value and the other's; "none" if it has none.

        A header is a field of its own, `headers[jitgen/tma.cuh]`. Of the options the values are
        those that the other key lacks; all of them, if only their order differs.
        """
        mine, theirs = self._values(), other._values()
        found = {
            name: (mine.get(name, "none"), theirs.get(name, "none"))
            for name in [*mine, *sorted(theirs.keys() - mine.keys())]
            if mine.get(name) != theirs.get(name)
        }
        if self.options != other.options:
            pair = (self.options, other.options)
            lacked = tuple(
                [option for option in these if option not in those]
                for these, those in (pair, pair[::-1])
            )
            ours, others = lacked if any(lacked) else pair
            found["options"] = (" ".join(ours) or "none", " ".join(others) or "none")
        return found

    def _values(self) -> dict[str, str]:
        """All fields but the options, as texts."""
        values = {"source_sha256": self.source_sha256, "arch": self.arch}
        values["compiler_version"] = self.compiler_version
        return values | {f"headers[{name}]": sha256 for name, sha256 in self.headers}


def make_key(
    source: str,
    headers: Mapping[str, str],
    options: Sequence[str],
    compiler_version: str,
    arch: str,
) -> KernelKey:
    """The key of `source` compiled with `options`; of `headers` only those that it includes count.

    Parameters
    ----------
    source : rendered CUDA C++ source
    headers : header text by include name
    options : all options of the compiler, from `nvrtc.compile_options`
    compiler_version : from `nvrtc.compiler_version`
    arch : such as "sm_90a"

    Raises
    ------
    CompileError : the source includes a header that is not in `headers`
    """
    return KernelKey(
        source_sha256=sha256_hex(source.encode()),
        headers=tuple(
            (name, sha256_hex(text.encode()))
            for name, text in headers_used(source, headers).items()
        ),
        options=tuple(options),
        compiler_version=compiler_version,
        arch=arch,
    )


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def json_sha256(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return sha256_hex(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _are_texts(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)
