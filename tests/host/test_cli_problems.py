"""`jitgen problems`: the list that it writes is the one that the other commands read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import cli
from jitgen.models import read_model
from jitgen.problem_list import read_problems
from jitgen.tuning.model import m_buckets
from jitgen.tuning.space_mla import BATCHES

CONFIGS = Path(__file__).parent / "configs"
Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(cli.app, [str(part) for part in arguments])


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_problems_prints_what_read_problems_reads(run: Run, config: Path, tmp_path: Path) -> None:
    result = run("problems", config, "--tp", 8, "--m-max", 300)
    assert result.exit_code == 0, result.output
    path = tmp_path / "list.json"
    path.write_text(result.stdout)
    model = read_model(config, tp=8)
    extents = m_buckets(range(1, 301))
    expected: list[object] = [(p, m) for p in model.problems for m in extents]
    rows = range(1, 300 * model.rows_a_token + 1)
    expected += [(p, m) for p in model.experts for m in m_buckets(rows, p)]
    expected += [(p, b) for p in model.attention for b in BATCHES]
    assert read_problems(path) == expected
    for names in (model.problems, model.experts, model.attention):
        assert all(name in result.stdout for name in names.values())  # type: ignore[attr-defined]


def test_problems_writes_the_list_and_says_what_is_left_out(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "list.json"
    result = run("problems", CONFIGS / "deepseek-v3.json", "--tp", 8, "--ep", 8, "-o", path)
    assert (result.exit_code, result.stdout) == (0, "")
    first, *left_out = result.stderr.splitlines()
    assert first == "DeepseekV3ForCausalLM: problems 13, kinds left out 2"
    assert len(left_out) == 2
    assert "left out: lm_head: BF16 in published FP8 checkpoints" in left_out
    assert len({problem for problem, _ in read_problems(path)}) == 13
    assert max(m for _, m in read_problems(path)) == 8 * 8192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "cannot read none.json: No such file"),
        ([CONFIGS], f"cannot read {CONFIGS}: Is a directory"),
        ([__file__], f"{__file__} is not JSON"),
        ([CONFIGS / "qwen3-32b.json", "--tp", 7], "qwen3-32b.json: num_attention_heads = 64 must"),
        ([CONFIGS / "qwen3-32b.json", "-o", CONFIGS], f"cannot write {CONFIGS}: Is a directory"),
    ],
)
def test_problems_rejects_in_one_line(run: Run, arguments: list[object], message: str) -> None:
    result = run("problems", *arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("option", ["--tp", "--ep", "--m-max"])
def test_problems_rejects_numbers_below_one(run: Run, option: str) -> None:
    result = run("problems", CONFIGS / "qwen3-32b.json", option, 0)
    assert result.exit_code == 2
    assert option in result.stderr
