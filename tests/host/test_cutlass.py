"""Building CUTLASS's kernels, with a stand-in for nvcc."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import resources
from pathlib import Path

import pytest

from jitgen.errors import DeviceError
from jitgen.tuning import cutlass

VERSION = "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0 \n"
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit; fi
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
test -f "$3" && echo library > "$2"
{more}
"""
FAILS = "echo '1 error detected' >&2; exit 2"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs headers and an nvcc that logs its arguments and ends with `more`; gives the log."""

    def install(more: str = "") -> Path:
        headers = tmp_path / "site" / "cutlass_library" / "source" / "include" / "cutlass"
        headers.mkdir(parents=True)
        (headers / "cutlass.h").touch()
        (headers / "version.h").write_text(VERSION)
        nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(NVCC.format(log=tmp_path / "log", more=more))
        nvcc.chmod(0o755)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
        return tmp_path / "log"

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cutlass, "Library", lambda path: path)
    cutlass._libraries.cache_clear()
    yield install
    cutlass._libraries.cache_clear()


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutlass.importlib.util, "find_spec", lambda name: None)


def test_libraries_builds_each_configuration_once(machine: Callable[..., Path]) -> None:
    log = machine()
    built = cutlass.libraries()
    assert list(built) == list(cutlass.CONFIGS)
    assert {path.read_text() for path in built.values()} == {"library\n"}
    assert len(set(built.values())) == len(cutlass.CONFIGS)
    assert built[cutlass.CONFIGS[0]].parent.stat().st_mode & 0o777 == 0o700
    commands = sorted(log.read_text().splitlines())
    assert len(commands) == len(cutlass.CONFIGS)
    assert all("-gencode=arch=compute_90a,code=sm_90a" in command for command in commands)
    assert all("site/cutlass_library/source/include" in command for command in commands)
    cutlass._libraries.cache_clear()  # as in another process
    assert cutlass.libraries() == built
    assert sorted(log.read_text().splitlines()) == commands


def test_libraries_tries_a_failing_build_once(machine: Callable[..., Path]) -> None:
    log = machine(FAILS)
    tries = []
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"^nvcc failed with exit code 2: 1 error detected$"):
            cutlass.libraries()
        tries.append(log.read_text())
    assert tries[0] == tries[1]


@pytest.mark.usefixtures("no_package")
def test_libraries_rejects_missing_headers(machine: Callable[..., Path]) -> None:
    machine()
    with pytest.raises(DeviceError, match=r"headers are missing: pip install 'jitgen\[bench\]'"):
        cutlass.libraries()


def test_libraries_rejects_missing_nvcc(
    machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(DeviceError, match="CUTLASS needs nvcc: put it on PATH, or"):
        cutlass.libraries()


def test_describe_names_both_versions_or_what_is_missing(
    machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    assert cutlass.describe() == "4.2.0 (nvcc 13.0.88)"
    monkeypatch.delenv("CUDA_HOME")
    assert cutlass.describe().startswith("none (CUTLASS needs nvcc")


def test_find_headers_does_not_import_the_package(machine: Callable[..., Path]) -> None:
    machine()
    assert cutlass.find_headers().parts[-3:] == ("cutlass_library", "source", "include")
    assert "cutlass_library" not in sys.modules


def test_macros_are_those_of_the_source() -> None:
    source = (resources.files("jitgen.tuning") / cutlass.SOURCE).read_text()
    code = re.sub(r"//.*", "", source)
    for field in fields(cutlass.Config):
        assert re.search(rf"\b{field.name.upper()}\b", code), field.name
    assert cutlass.Config(128, 64, stream_k=True).macros == [
        *("-DTILE_M=128", "-DTILE_N=64", "-DCLUSTER_M=1"),
        *("-DPINGPONG=0", "-DSTREAM_K=1", "-DSWAPPED=0"),
    ]


def test_configs_differ_in_name() -> None:
    assert len({str(config) for config in cutlass.CONFIGS}) == len(cutlass.CONFIGS)
    assert str(cutlass.CONFIGS[3]) == "128x64 cluster=1x1 stream_k swapped"


def test_library_rejects_what_cutlass_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Function:
        def __init__(self, result: object) -> None:
            self.result = result

        def __call__(self, *arguments: object) -> object:
            assert len(arguments) == len(self.argtypes)
            return self.result

    class Loaded:
        cutlass_workspace_bytes = Function(4096)
        cutlass_gemm = Function(7)
        cutlass_status_name = Function(b"Invalid status")

    monkeypatch.setattr(cutlass.ctypes, "CDLL", lambda path: Loaded)
    library = cutlass.Library(Path("any.so"))
    assert library.workspace_bytes(1, 2, 3) == 4096
    with pytest.raises(DeviceError, match="refuses m4-n8-k24: Invalid status"):
        library.gemm([0] * 5, (4, 8, 24), 0, 0)
