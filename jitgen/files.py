"""Files that users name: read and written with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ProblemError


def read_json(path: Path) -> Any:
    """What the JSON file holds.

    Raises
    ------
    ProblemError : the file cannot be read, or is not JSON
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ProblemError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ProblemError(f"{path} is not JSON: {error}") from None


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON, which knows no NaN; errors as `write_text`."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write the file, and the folders above it where there are none.

    Raises
    ------
    ProblemError : it cannot be written
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ProblemError(f"cannot write {path}: {error.strerror}") from None
