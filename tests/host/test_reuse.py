"""What makes compiled kernels useless, and what must not: a move, a touch, another home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jitgen import build
from jitgen.build import key_of
from jitgen.codegen import headers, render
from jitgen.expr import acc, silu, vector
from jitgen.kernel import Kernel
from jitgen.lower import lower
from jitgen.problem import Gemm
from jitgen.runtime.key import KernelKey, make_key
from jitgen.runtime.nvrtc import headers_used
from jitgen.runtime.store import KernelStore
from jitgen.schedule import Schedule

from .test_store import Compiler, never

PACKAGE = Path(__file__).parents[2] / "jitgen"
KERNELS: list[Kernel] = [
    lower(Gemm(256, 512), Schedule(64, 32, 4, 1)),
    lower(Gemm(256, 1024), Schedule(64, 64, 4, 1, split_k=2)),
    lower(Gemm(256, 512, epilogue=silu(acc + vector("bias"))), Schedule(128, 64, 3, 2)),
]
HEADERS = headers()
PROBES = {name: f'#include "{name}"\n' for name in HEADERS}  # kernels that include one header

# Builds the first two kernels, and prints what that took.
SERVE = """
import json
from jitgen import Gemm, Schedule, stats
from jitgen.build import build
from jitgen.lower import lower
names = [
    build(lower(Gemm(256, 512), Schedule(64, 32, 4, 1))).name,
    build(lower(Gemm(256, 1024), Schedule(64, 64, 4, 1, split_k=2))).name,
]
import jitgen
counts = stats()
print(json.dumps([jitgen.__file__, counts.compiles, counts.disk_hits, names]))
"""


def probe_key(name: str, texts: Mapping[str, str]) -> KernelKey:
    return make_key(PROBES[name], texts, (), "13.0.88", "sm_90a")


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    """A store with KERNELS and PROBES."""
    filled = KernelStore(tmp_path / "kernels")
    for kernel in KERNELS:
        source = render(kernel)
        filled.get_or_compile(key_of(kernel), Compiler(), name=kernel.name, source=source)
    for name, source in PROBES.items():
        filled.get_or_compile(probe_key(name, HEADERS), Compiler(), name=name, source=source)
    return KernelStore(tmp_path / "kernels")


def serve(installation: Path, home: Path, store: Path) -> list[Any]:
    """What SERVE prints, run with the jitgen that is in `installation`."""
    home.mkdir(exist_ok=True)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(installation), *sys.path]),
        "HOME": str(home),
        "JITGEN_CACHE_DIR": str(store),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SERVE],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: list[Any] = json.loads(done.stdout)
    assert result[0] == str(installation / "jitgen" / "__init__.py")
    return result[1:3]


def test_moved_installation_touched_files_and_another_home_hit_all(tmp_path: Path) -> None:
    first, store = tmp_path / "venv 1", tmp_path / "store"
    shutil.copytree(PACKAGE, first / "jitgen", ignore=shutil.ignore_patterns("__pycache__"))
    assert serve(first, tmp_path / "home", store) == [2, 0]
    second = tmp_path / "elsewhere" / "venv 2"
    second.parent.mkdir()
    first.rename(second)
    for path in second.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert serve(second, tmp_path / "another home", store) == [0, 2]
    for path in store.rglob("*"):
        os.utime(path, (1e9, 1e9))
    store.rename(tmp_path / "moved store")
    assert serve(second, tmp_path / "home", tmp_path / "moved store") == [0, 2]
    header = second / "jitgen/templates/include/jitgen/ptx.cuh"
    header.write_text(header.read_text() + " ")
    assert serve(second, tmp_path / "home", tmp_path / "moved store") == [2, 0]
    header.write_text(header.read_text()[:-1])
    assert serve(second, tmp_path / "home", tmp_path / "moved store") == [0, 2]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("at", ["space", "end"])
def test_one_byte_of_a_header_costs_exactly_the_kernels_that_include_it(
    header: str, at: str, store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = HEADERS[header]
    idx = text.index(" ") if at == "space" else len(text) - 1
    changed = {**HEADERS, header: text[:idx] + "\t" + text[idx + 1 :]}
    assert len(changed[header]) == len(text)
    assert changed[header] != text
    dependents = [kernel for kernel in KERNELS if header in headers_used(render(kernel), HEADERS)]
    including = [name for name in HEADERS if header in headers_used(PROBES[name], HEADERS)]
    assert header in including
    monkeypatch.setattr(build, "headers", lambda: changed)
    assert [kernel for kernel in KERNELS if store.get(key_of(kernel)) is None] == dependents
    assert [name for name in HEADERS if store.get(probe_key(name, changed)) is None] == including


def test_probes_tell_headers_apart() -> None:
    counts = {len(headers_used(PROBES[name], HEADERS)) for name in HEADERS}
    assert min(counts) == 1  # a change elsewhere must not cost this one
    assert max(counts) > 2


def test_another_header_costs_nothing(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "headers", lambda: {**HEADERS, "jitgen/new.cuh": "// new\n"})
    for kernel in KERNELS:
        store.get_or_compile(key_of(kernel), never, name=kernel.name, source=render(kernel))
