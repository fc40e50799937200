"""Wheel and sdist hold the symlinked folders as real files, and the package finds them."""

from __future__ import annotations

import importlib.resources
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("runtime", "tuning", "templates")


def _source_files() -> set[str]:
    """Every file that the package must carry, as its path in the wheel."""
    found = {f"jitgen/{path.name}" for path in (ROOT / "jitgen").glob("*.py")}
    for folder in LINKED:
        for path in (ROOT / "jitgen" / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                found.add(path.relative_to(ROOT).as_posix())
    return found


def _build(target: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    return folder / getattr(build, f"build_{target}")(str(folder))


@pytest.mark.parametrize("folder", LINKED)
def test_link_is_relative_and_resolves_in_the_package(folder: str) -> None:
    link = ROOT / "jitgen" / folder
    if link.is_symlink():  # real folders in an unpacked sdist
        assert link.readlink() == Path("..") / folder
    assert importlib.resources.files("jitgen").joinpath(folder).is_dir()


def test_wheel_holds_every_file_under_jitgen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(_build("wheel", tmp_path, monkeypatch)) as wheel:
        members = [info for info in wheel.infolist() if ".dist-info/" not in info.filename]
        assert {info.filename for info in members} >= _source_files()
        assert {info.filename.partition("/")[0] for info in members} == {"jitgen"}


def test_sdist_holds_every_file_as_a_regular_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(_build("sdist", tmp_path, monkeypatch)) as sdist:
        members = {info.name.partition("/")[2]: info for info in sdist}
    assert set(members) >= _source_files() | {"Makefile", "LICENSE", "README.md", "pyproject.toml"}
    assert all(info.isreg() for info in members.values())
    assert not {name.partition("/")[0] for name in members} & set(LINKED)
