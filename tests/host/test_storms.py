"""The store in a crowd, under kill -9 and under random faults; marker `slow`: at full size.

pytest -m slow tests/host/test_storms.py -s
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jitgen.build import key_of
from jitgen.lower import lower
from jitgen.problem import Gemm
from jitgen.runtime.store import KernelStore
from jitgen.schedule import Schedule

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def full(*arguments: object) -> Any:
    return pytest.param(*arguments, marks=pytest.mark.slow, id="full")


def storm(script: str, *arguments: object) -> None:
    """Run a script of this folder; what it prints is shown."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.fixture
def seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


@pytest.mark.parametrize(
    ("processes", "keys", "rounds"), [pytest.param(16, 64, 1, id="small"), full(16, 64, 50)]
)
@pytest.mark.parametrize("locking", [1, 0], ids=["locking", "no-locking"])
def test_crowd_on_a_cold_folder_compiles_each_key_once(
    processes: int, keys: int, rounds: int, locking: int, seed: int, tmp_path: Path
) -> None:
    storm("storms.py", "crowd", tmp_path / "s", seed, processes, keys, rounds, locking)


@pytest.mark.parametrize(("processes", "rounds"), [pytest.param(16, 6, id="small"), full(16, 300)])
def test_churn_of_publishing_and_collecting(
    processes: int, rounds: int, seed: int, tmp_path: Path
) -> None:
    storm("storms.py", "churn", tmp_path / "s", seed, processes, rounds)


@pytest.mark.parametrize("count", [pytest.param(40, id="small"), full(500)])
def test_kills_leave_no_wrong_kernel(count: int, seed: int, tmp_path: Path) -> None:
    storm("storms.py", "kills", tmp_path / "s", seed, count)


@pytest.mark.parametrize("count", [pytest.param(200, id="small"), full(10_000)])
def test_faults_are_missed_refused_or_healed(count: int, seed: int, tmp_path: Path) -> None:
    storm("mutations.py", tmp_path / "s", seed, count)


CROWD_WITH_NVRTC = """
import sys
from pathlib import Path
from jitgen.build import build
from jitgen.lower import lower
from jitgen.problem import Gemm
from jitgen.runtime.store import KernelStore
from jitgen.schedule import Schedule
store = KernelStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for k in (256, 384):
    assert build(lower(Gemm(256, k), Schedule(64, 32, 4, 1)), store).cubin[:4] == b"\\x7fELF"
print(store.stats.compiles)
"""


def test_crowd_with_the_real_compiler_compiles_each_key_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CROWD_WITH_NVRTC, str(tmp_path / "kernels")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    results = [process.communicate("go\n", timeout=120) for process in processes]
    assert [errors for _, errors in results] == [""] * 4
    assert sum(int(count) for count, _ in results) == 2
    store = KernelStore(tmp_path / "kernels")
    for k in (256, 384):
        assert store.get(key_of(lower(Gemm(256, k), Schedule(64, 32, 4, 1))))
