"""What README.md shows is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jitgen
from jitgen.lower import lower

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_readme_examples_run() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["d"].shape == (100, 256)
    assert names["d"].dtype == jitgen.BF16.numpy
    assert names["o"].shape == (2, 1, 16, 512)
    assert names["lse"].shape == (2, 16, 1)


def test_readme_shows_the_tile_program_as_it_is() -> None:
    program = str(lower(jitgen.Gemm(2112, 7168), jitgen.Schedule(128, 128, 5))).split("\n", 3)[3]
    shown = re.search(r"    for tile m:128.*?via tma\n\n", README, re.DOTALL)
    assert shown
    assert re.sub(r"(?m)^ +", "", shown[0]).strip() == re.sub(r"(?m)^ +", "", program).strip()
