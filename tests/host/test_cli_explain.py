"""`jitgen cache explain` on a store whose kernels were never compiled."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import cli
from jitgen.build import key_of
from jitgen.codegen import render
from jitgen.expr import acc, silu, vector
from jitgen.lower import lower
from jitgen.problem import Gemm
from jitgen.runtime.eviction import list_usage
from jitgen.runtime.key import KernelKey
from jitgen.runtime.store import KernelStore
from jitgen.schedule import Schedule
from jitgen.schedule_text import schedule_for
from jitgen.tuning.select import named_gpu

from .test_store import Compiler

ROOT = Path(__file__).parents[2]
KERNEL = lower(Gemm(256, 512), Schedule(64, 64, 4, 1))
OTHER = lower(Gemm(264, 512), Schedule(64, 64, 4, 1))
ASK = ("--n", 256, "--k", 512, "--schedule", "64x64 stages=4 math_warpgroups=1")
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's store."""
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(
        cli.app, ["cache", "explain", *map(str, arguments)]
    )


def put(kernel: Any = KERNEL, **changes: Any) -> KernelKey:
    """Store a kernel as if it had been compiled with `changes` in its key."""
    key = replace(key_of(kernel), **changes)
    KernelStore().get_or_compile(key, Compiler(), name=kernel.name, source=render(kernel))
    return key


def rows(text: str) -> list[list[str]]:
    """Each line's words."""
    return [line.split() for line in text.splitlines()]


def test_explain_prints_the_key_of_what_is_there(run: Run, root: Path) -> None:
    key = put()
    put(OTHER)
    result = run(*ASK)
    assert result.exit_code == 0, result.output
    first, *lines = rows(result.stdout)
    assert first == ["in", "the", "store:", KERNEL.name]
    (usage,) = (usage for usage in list_usage(root) if usage.path.name == key.digest)
    for row in (
        ["key", key.digest],
        ["source_sha256", key.source_sha256],
        *([f"headers[{name}]", sha256] for name, sha256 in key.headers),
        ["options", *key.options],
        ["compiler_version", key.compiler_version],
        ["arch", "sm_90a"],
        ["size", str(usage.num_bytes), "B"],
        ["path", str(usage.path)],
    ):
        assert row in lines
    assert len(lines[-3]) == 4  # last use, date, time


def test_explain_does_not_count_as_a_use(run: Run, root: Path) -> None:
    key = put()
    folder = root / key.digest[:2] / key.digest
    os.utime(folder, (1e9, 1e9))
    assert "2001-09-" in run(*ASK).stdout
    assert folder.stat().st_mtime == 1e9


def test_explain_selects_as_show_does(run: Run) -> None:
    problem = Gemm(256, 512)
    kernel = lower(problem, schedule_for(problem, 300, named_gpu()))
    put(kernel)
    assert run("--n", 256, "--k", 512, "--m", 300).exit_code == 0
    assert run("--n", 256, "--k", 512, "--m", 300, "--out-dtype", "f32").exit_code == 1


@pytest.mark.parametrize("length", [1, 12, 64])
def test_explain_finds_a_key_by_how_it_begins(run: Run, length: int) -> None:
    key = put()
    result = run(key.digest[:length])
    assert result.exit_code == 0, result.output
    assert key.digest in result.stdout


def test_explain_says_no_of_an_unknown_key(run: Run) -> None:
    key = put()
    unknown = "0" if key.digest[0] != "0" else "1"
    result = run(unknown)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"not in the store: {unknown}, ")
    assert "give --n, --k and --m" in result.stdout


CHANGED_HEADER = ("jitgen/tma.cuh", "0" * 64)


@pytest.mark.parametrize(
    ("field", "change", "wanted", "stored"),
    [
        ("compiler_version", "12.9.86", [key_of(KERNEL).compiler_version], ["12.9.86"]),
        ("arch", "sm_90", ["sm_90a"], ["sm_90"]),
        ("options", (*key_of(KERNEL).options, "-G"), ["none"], ["-G"]),
        (
            "headers",
            tuple(sorted({**dict(key_of(KERNEL).headers), **dict([CHANGED_HEADER])}.items())),
            [dict(key_of(KERNEL).headers)["jitgen/tma.cuh"]],
            ["0" * 64],
        ),
    ],
    ids=["compiler_version", "arch", "options", "headers"],
)
def test_explain_names_the_field_that_differs(
    run: Run, field: str, change: Any, wanted: list[str], stored: list[str]
) -> None:
    key = put(**{field: change})
    put(OTHER)
    result = run(*ASK)
    assert result.exit_code == 1
    lines = rows(result.stdout)
    assert lines[0][:4] == ["not", "in", "the", "store:"]
    start = lines.index(["nearest:", KERNEL.name])
    name = "headers[jitgen/tma.cuh]" if field == "headers" else field
    assert lines[start + 1 : -1] == [
        ["key", key.digest],
        ["differs:", name],
        ["wanted", *wanted],
        ["stored", *stored],
    ]


def test_explain_takes_the_name_before_the_number_of_equal_fields(run: Run) -> None:
    put(OTHER)  # differs in its source only
    put(arch="sm_90", compiler_version="12.9.86", options=("-G",))
    assert f"nearest: {KERNEL.name}\n" in run(*ASK).stdout


def test_explain_takes_the_most_equal_fields_of_other_names(run: Run) -> None:
    put(OTHER, arch="sm_90")
    nearest = put(OTHER)
    lines = rows(run(*ASK).stdout)
    assert lines[lines.index(["nearest:", OTHER.name]) + 1] == ["key", nearest.digest]
    assert [line[1] for line in lines if line[0] == "differs:"] == ["source_sha256"]


def test_explain_takes_the_most_alike_of_other_names(run: Run) -> None:
    alike = lower(KERNEL.problem, Schedule(64, 32, 4, 1))  # one word of it differs, the tile
    for kernel in (
        alike,
        lower(OTHER.problem, Schedule(64, 32, 4, 1)),
        lower(Gemm(8, 256), KERNEL.schedule),
    ):
        put(kernel)
    assert f"nearest: {alike.name}\n" in run(*ASK).stdout


def test_explain_prints_the_command_that_makes_it(run: Run, root: Path) -> None:
    result = run(*ASK)
    assert result.exit_code == 1
    assert "nearest: none, the store is empty" in result.stdout
    command = result.stdout.splitlines()[-1].removeprefix("make it: ")
    program = f"{shlex.quote(sys.executable)} -m jitgen "
    subprocess.run(command.replace("jitgen ", program, 1), shell=True, check=True, cwd=ROOT)
    assert run(*ASK).exit_code == 0


def test_explain_takes_a_damaged_kernel_for_none(run: Run, root: Path) -> None:
    key = put()
    (root / key.digest[:2] / key.digest / "kernel.cubin").write_bytes(b"")
    result = run(*ASK)
    assert result.exit_code == 1
    assert "is damaged" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a key, or --n and --k"),
        (["0", *ASK], "give either a key, or --n and --k"),
        (["--n", 256], "give either a key, or --n and --k"),
        (["--k", 256], "give either a key, or --n and --k"),
        (["xyz"], "key is 'xyz': give its hex digits"),
    ],
)
def test_explain_rejects_what_names_no_kernel(
    run: Run, arguments: list[object], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_explain_rejects_a_beginning_of_many_keys(run: Run) -> None:
    digests = {put(arch=f"sm_{idx}").digest for idx in range(17)}
    first = next(d[0] for d in digests if sum(o[0] == d[0] for o in digests) > 1)
    result = run(first)
    assert result.exit_code == 2
    assert f"keys begin with {first}: give more of its digits" in result.stderr


def test_explain_rejects_an_illegal_problem_in_one_line(run: Run) -> None:
    result = run("--n", 100, "--k", 512)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: n = 100 must be")


def test_explain_knows_epilogues_by_name(run: Run) -> None:
    fused = lower(Gemm(256, 512, epilogue=silu(acc + vector("bias"))), KERNEL.schedule)
    put(KERNEL)
    missing = run(*ASK, "--epilogue", "bias-silu")
    assert missing.exit_code == 1
    assert f"nearest: {KERNEL.name}\n" in missing.stdout
    assert f"whose epilogue is {fused.problem.epilogue}: " in missing.stdout.splitlines()[-1]
    put(fused)
    assert f"in the store: {fused.name}\n" in run(*ASK, "--epilogue", "bias-silu").stdout
