"""`jitgen prebuild --ray` on a real cluster of three nodes on this machine.

Needs ray (`pip install 'jitgen[ray]'`), which the tests' own environment lacks: it is large.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import build, cli, ray_prebuild
from jitgen.build import Prebuilt
from jitgen.errors import CompileError, ScheduleError
from jitgen.lower import kernel_name
from jitgen.problem import Gemm
from jitgen.ray_prebuild import prebuild_on_ray
from jitgen.runtime.store import KernelStore
from jitgen.schedule import Schedule

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # of ray and its children

ROOT = Path(__file__).parents[2]
KERNELS = [(Gemm(256, 512 + 128 * idx), Schedule(64, 32, 4, 1)) for idx in range(12)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The store of the caller; the nodes have one of their own."""
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "caller"))
    monkeypatch.setattr(build, "_configured", None)
    yield tmp_path / "caller" / "kernels"
    ray.shutdown()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three nodes; the head runs no task, each of the others one at a time."""
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.MonkeyPatch.context() as of_nodes:
        of_nodes.setenv("JITGEN_CACHE_DIR", str(tmp_path / "nodes"))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
        made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def names(kernels: list[tuple[Gemm, Schedule]]) -> set[str]:
    return {kernel_name(*kernel) for kernel in kernels}


def task_processes() -> list[int]:
    """The processes that run a task now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith((b"ray::jitgen", b"ray::_compile")):
            found.append(int(process.name))
    return found


def test_kernels_of_every_node_reach_the_callers_store(cluster: Any, root: Path) -> None:
    seen: list[Prebuilt] = []
    built = prebuild_on_ray(KERNELS, cluster.address, on_done=seen.append)
    assert built == seen
    assert {prebuilt.name for prebuilt in built} == names(KERNELS)
    assert all(prebuilt.compiled for prebuilt in built)
    assert KernelStore(root).verify().num_sound == len(KERNELS)
    again = prebuild_on_ray(KERNELS, "nowhere: no cluster is asked")
    assert not any(prebuilt.compiled for prebuilt in again)


def test_a_killed_process_costs_no_kernel(cluster: Any, root: Path) -> None:
    killed: list[int] = []

    def kill_one(_: Prebuilt) -> None:
        if len(killed) < 3 and (victims := task_processes()):
            os.kill(victims[0], signal.SIGKILL)
            killed.append(victims[0])

    built = prebuild_on_ray(KERNELS, cluster.address, on_done=kill_one)
    assert killed
    assert {prebuilt.name for prebuilt in built} == names(KERNELS)
    assert KernelStore(root).verify().num_sound == len(KERNELS)


def test_a_node_that_dies_costs_no_kernel(cluster: Any, root: Path) -> None:
    def kill_a_node(_: Prebuilt) -> None:
        if cluster.workers:
            cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
            cluster.add_node(num_cpus=1)
            cluster.workers.clear()

    built = prebuild_on_ray(KERNELS, cluster.address, on_done=kill_a_node)
    assert {prebuilt.name for prebuilt in built} == names(KERNELS)
    assert KernelStore(root).verify().num_sound == len(KERNELS)


def test_cli_compiles_on_the_cluster(cluster: Any, root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"n": 256, "k": 512, "m": [1, 512]}]')
    command = ["prebuild", "--problems", str(tmp_path / "list.json"), "--ray", cluster.address]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "compiled, 0 already there" in result.stdout
    result = CliRunner().invoke(cli.app, command)
    assert result.stdout.startswith("kernels: 0 compiled, ")


def test_illegal_kernel_is_said_and_the_rest_is_built(cluster: Any, root: Path) -> None:
    illegal = KERNELS[0][0], Schedule(64, 100, 4, 1)
    with pytest.raises(ScheduleError, match="block_n"):
        prebuild_on_ray([illegal, *KERNELS[:2]], cluster.address)
    assert KernelStore(root).verify().num_sound == 2


def test_node_with_another_compiler_is_refused(
    cluster: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compiler_version", lambda: "13.1.5")
    with pytest.raises(CompileError, match=r"with compiler_version 13\.0.*, here it is 13\.1\.5"):
        prebuild_on_ray(KERNELS[:1], cluster.address)
    assert KernelStore(root).verify().num_sound == 0


def test_damaged_bytes_are_refused(root: Path) -> None:
    store = KernelStore(root)
    made = ray_prebuild._compile(*KERNELS[0])
    assert isinstance(made, ray_prebuild._Made)
    made.files["kernel.cubin"] = b"x"
    with pytest.raises(CompileError, match=r"came back damaged: kernel\.cubin"):
        ray_prebuild._keep(made, KERNELS[0], store)


def test_no_cluster_is_one_line(root: Path) -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        command = ["prebuild", "--grid", "dense", "--ray", address, "--shard", "0/500"]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 1
        assert f"no Ray cluster at {address} (" in result.stderr
        assert "Connection refused" in result.stderr
