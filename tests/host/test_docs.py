"""The code in docs/ runs, and gives the figures beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: str) -> dict[str, Any]:
    """The names that the page's Python blocks define, run one after the other."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(block, names)
    return names


def test_numerics_page_shows_its_own_figures() -> None:
    table = run_blocks("numerics.md")["table"]
    shown = re.findall(
        r"^\| N\((\S+), 1\) \| (\d+) \| (\S+)% \| (\S+)% \| (\S+)% \|$",
        (DOCS / "numerics.md").read_text(),
        re.MULTILINE,
    )
    assert len(shown) == len(table) == 6
    for mean, k, *percents in shown:
        errors = table[float(mean), int(k)]
        assert [float(p) for p in percents] == pytest.approx(
            [100 * error for error in errors], rel=0.02
        )
