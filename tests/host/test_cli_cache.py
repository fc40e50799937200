"""`jitgen cache` on a store of kernels that were never compiled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import cli
from jitgen.runtime import history
from jitgen.runtime.eviction import IN_USE_S, list_usage
from jitgen.runtime.store import KernelStore

from .test_store import folder_of, key_of, put

SOURCES = [f"// {idx}\n" for idx in range(3)]
Run = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with three kernels, the first the longest unused."""
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path))
    then = time.time() - 86400
    for idx, source in enumerate(SOURCES):
        put(KernelStore(), source)
        os.utime(folder_of(tmp_path / "kernels", key_of(source)), (then + idx, then + idx))
    return tmp_path / "kernels"


@pytest.fixture
def run(root: Path) -> Run:
    return lambda *arguments, **options: CliRunner().invoke(
        cli.app, ["cache", *map(str, arguments)], **options
    )


def test_ls_prints_plain_lines_in_the_order_of_the_last_use(run: Run, root: Path) -> None:
    result = run("ls")
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == [key_of(source).digest for source in SOURCES]
    usage = list_usage(root)[0]
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(usage.last_use))
    assert rows[0][1:] == [str(usage.num_bytes), used, "13.0.88", "gemm"]


def test_ls_prints_a_table_on_a_terminal(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = run("ls").stdout
    for part in ("last use", "NVRTC", key_of(SOURCES[0]).digest[:12], "kernels: 3, 0.0 MiB"):
        assert part in output
    assert key_of(SOURCES[0]).digest not in output


def test_ls_warns_of_a_damaged_kernel_and_leaves_it(run: Run, root: Path) -> None:
    (folder_of(root, key_of(SOURCES[0])) / "kernel.cu").unlink()
    result = run("ls")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    assert "is damaged" in result.stderr
    assert len(list_usage(root)) == 3


def test_verify_fails_once_on_a_damaged_kernel_and_heals(run: Run, root: Path) -> None:
    assert run("verify").exit_code == 0
    (folder_of(root, key_of(SOURCES[0])) / "kernel.cu").write_text("// edited")
    result = run("verify")
    assert result.exit_code == 1
    assert "kernel.cu has another SHA-256" in result.stdout
    assert "kernels: 2 sound, 1 damaged and healed by removal" in result.stdout
    again = run("verify")
    assert again.exit_code == 0
    assert again.stdout.startswith("kernels: 2 sound, 0 damaged")


def test_gc_takes_the_cap_from_the_option_or_the_environment(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = list_usage(root)[0].num_bytes
    assert run("gc").stdout.startswith("kernels: 0 evicted (0.0 MiB), 3 left")
    assert run("gc", "--max-bytes", 2 * size).stdout.startswith("kernels: 1 evicted")
    monkeypatch.setenv("JITGEN_CACHE_MAX_BYTES", str(size))
    assert run("gc").stdout.startswith("kernels: 1 evicted")
    assert [usage.path.name for usage in list_usage(root)] == [key_of(SOURCES[2]).digest]


def test_gc_keeps_what_was_just_used(run: Run, root: Path) -> None:
    then = time.time() - IN_USE_S + 60
    os.utime(folder_of(root, key_of(SOURCES[0])), (then, then))
    assert run("gc", "--max-bytes", 1).stdout.startswith("kernels: 2 evicted")


def test_clear_asks_first(run: Run, root: Path) -> None:
    assert run("clear", input="n\n").exit_code == 1
    assert len(list_usage(root)) == 3
    assert run("clear", input="y\n").exit_code == 0
    assert list_usage(root) == []


def test_clear_does_not_ask_with_yes(run: Run, root: Path) -> None:
    assert run("clear", "--yes").stdout == f"kernels: 3 removed, {root}\n"
    assert list_usage(root) == []


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("gc",), ("clear", "--yes")])
def test_cache_rejects_a_bad_cap_in_one_line(
    command: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_MAX_BYTES", "2G")
    result = run(*command)
    assert result.exit_code == 1
    assert result.stderr == "error: JITGEN_CACHE_MAX_BYTES is '2G': give bytes, or 0 for no cap\n"


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("gc",), ("clear", "--yes")])
def test_cache_rejects_a_store_that_is_not_on_disk(
    command: tuple[str, ...], run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(root / "file"))
    (root / "file").write_bytes(b"")
    result = run(*command)
    assert result.exit_code == 1
    assert "error: there is no kernel store on disk: name a folder" in result.stderr


def test_stats_are_those_of_all_stores_that_are_gone(run: Run, root: Path) -> None:
    for source in SOURCES[:2]:
        store = KernelStore(root)
        put(store, source)
        put(store, source)
        del store
    with (root / "stats.jsonl").open("a") as file:
        file.write('{"compiles": 1e9\n[1]\n{"unknown": 1}\n{"compiles": "1"}\n')
    rows = dict(line.split() for line in run("stats").stdout.splitlines())
    assert rows["compiles"] == "3"
    assert rows["compile_seconds"] == "0.75"
    assert (rows["disk_hits"], rows["memory_hits"], rows["misses"]) == ("2", "2", "3")
    assert rows["kernels"] == "3"
    assert int(rows["bytes"]) == sum(usage.num_bytes for usage in list_usage(root))


def test_stats_stay_short(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_BYTES", 500)
    for _ in range(40):
        put(KernelStore(root), SOURCES[0])
    assert (root / "stats.jsonl").stat().st_size < 1000
    assert "disk_hits       40\n" in run("stats").stdout


def test_stats_of_a_forked_child_are_its_own(root: Path) -> None:
    store = KernelStore(root)
    put(store, SOURCES[0])
    before = (root / "stats.jsonl").read_bytes()
    child = os.fork()
    if not child:
        try:
            del store
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (root / "stats.jsonl").read_bytes() == before
