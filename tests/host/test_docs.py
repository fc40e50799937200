"""The code in docs/ runs, and gives the figures beside it; links and API reference are whole."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jitgen

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
# Those that another test runs: the next one, and test_operations.py.
ELSEWHERE = {"numerics.md", "operations.md"}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in ELSEWHERE])
def test_python_of_page_runs(page: str, tmp_path: Path) -> None:
    code = "".join(blocks(page))
    for library in set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JITGEN_")}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JITGEN_CACHE_DIR": str(tmp_path / "cache"),
        "JITGEN_RECORDS_DIR": str(tmp_path / "records"),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["../README.md", *PAGES])
def test_links_lead_to_files(page: str) -> None:
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((DOCS / page).parent / link).exists(), link


def test_make_api_documents_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    pytest.importorskip("torch")
    makefile = (ROOT / "Makefile").read_text()
    (modules,) = re.findall(r"^API := (.*)$", makefile, re.MULTILINE)
    (options,) = re.findall(r"/pdoc (.*) --output-directory", makefile)
    command = [sys.executable, "-m", "pdoc", *options.split(), "--output-directory", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([*command, *modules.split()], env=environment, cwd=tmp_path, check=True)
    page = (tmp_path / "jitgen.html").read_text()
    for name in jitgen.__all__:
        assert f'id="{name}"' in page, name
    for module in modules.split()[1:]:
        assert (tmp_path / module.replace(".", "/")).with_suffix(".html").is_file()


@pytest.mark.parametrize("name", jitgen.__all__)
def test_public_name_has_a_docstring(name: str) -> None:
    value = getattr(jitgen, name)
    assert not callable(value) or (value.__doc__ or "").strip()


def test_numerics_page_shows_its_own_figures() -> None:
    names: dict[str, Any] = {}
    for block in blocks("numerics.md"):
        exec(block, names)
    table = names["table"]
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
