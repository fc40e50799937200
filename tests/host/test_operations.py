"""What docs/operations.md shows is true: its blocks run, in their order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import jitgen
from jitgen import Gemm, cli
from jitgen.tuning.select import select

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
VARIABLES = set(re.findall(r"\bJITGEN_[A-Z_]+", PAGE))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a shell with jitgen in its PATH, and none of the user's settings."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "jitgen"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m jitgen "$@"\n')
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JITGEN_")}
    return kept | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JITGEN_RECORDS_DIR": str(tmp_path / "records"),
    }


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_shell_and_python_blocks_run(tmp_path: Path, environment: dict[str, str]) -> None:
    shell = "".join(text for language, text in BLOCKS if language == "sh")
    output = run(["bash", "-euc", shell], tmp_path, environment)
    # The page's list, at m = 1 and 64: kernels that a call launches there; and that of `quantize`.
    calls = [(Gemm(576, 7168), 1), (Gemm(576, 7168), 64), (Gemm(7168, 2048), 64)]
    count = str(1 + len({(problem, select(problem, m)) for problem, m in calls}))
    assert re.findall(r"kernels: (\d+) compiled, (\d+) already", output) == [
        (count, "0"),
        ("0", count),
        (count, "0"),
        ("0", count),
    ]
    assert re.search(rf"^remote_hits +{count}$", output, re.MULTILINE)
    assert "not in the store" in output
    assert f"kernels: {count} exported" in output
    assert f"kernels: {count} added" in output
    code = "".join(text for language, text in BLOCKS if language == "python")
    run([sys.executable, "-W", "error", "-c", code], tmp_path, environment)


def test_dockerfile_makes_a_store_that_others_can_read(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (block,) = (text for language, text in BLOCKS if language == "dockerfile")
    (tmp_path / "list.json").write_text('[{"n": 576, "k": 7168, "m": [64]}]')
    for line in (
        block.replace("=/", f"={tmp_path}/").replace(" /opt", f" {tmp_path}/opt").split("\n")
    ):
        instruction, _, rest = line.partition(" ")
        if instruction == "ENV":
            environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif instruction == "RUN":
            run(["bash", "-euc", rest], tmp_path, environment)
    code = """
import jitgen
from jitgen.build import default_store
from jitgen.control import jit_mode
assert len(list(default_store().entries())) == 2
assert jit_mode() == "forbid"
"""
    run([sys.executable, "-W", "error", "-c", code], tmp_path, environment)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "opt").rglob("kernel.cubin")}
    assert modes == {0o644}


def test_commands_that_need_a_cluster_have_the_options_they_show() -> None:
    prebuild = typer.main.get_command(cli.app).commands["prebuild"]  # type: ignore[attr-defined]
    options = {option for parameter in prebuild.params for option in parameter.opts}
    shown = [text for language, text in BLOCKS if language == "text"]
    assert len(shown) == 1
    assert set(re.findall(r"--[\w-]+", shown[0])) <= options


@pytest.mark.parametrize("variable", sorted(VARIABLES))
def test_variables_are_read_somewhere(variable: str) -> None:
    package = Path(jitgen.__file__).parent
    sources = [*package.glob("*.py"), *package.glob("*/*.py")]
    assert any(f'"{variable}"' in path.read_text() for path in sources)
