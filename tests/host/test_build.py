"""prebuild where things go wrong: in its caller, in a worker, in the store."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jitgen.build
from jitgen.build import Prebuilt, build, check_register_split, open_shared_store, prebuild
from jitgen.codegen import headers, render
from jitgen.errors import CompileError, JitgenError, ScheduleError, StoreError
from jitgen.lower import kernel_name, lower
from jitgen.problem import Gemm
from jitgen.runtime.nvrtc import compile_cubin
from jitgen.runtime.store import KernelStore
from jitgen.schedule import Schedule

SMALL = Gemm(256, 512), Schedule(64, 64, 4, 1)


class Deadly(Gemm):
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_prebuild_passes_on_what_on_done_raises(tmp_path: Path) -> None:
    def fail(_: Prebuilt) -> None:
        raise KeyError("the caller's")

    with pytest.raises(KeyError, match="the caller's"):
        prebuild([SMALL], root=tmp_path / "kernels", num_processes=1, on_done=fail)


def test_prebuild_hands_over_what_cannot_be_built_and_builds_the_rest(tmp_path: Path) -> None:
    illegal = SMALL[0], Schedule(64, 100, 4, 1)
    errors: dict[Any, JitgenError] = {}
    built = prebuild(
        [illegal, SMALL],
        root=tmp_path / "kernels",
        num_processes=1,
        on_error=errors.__setitem__,
    )
    assert [prebuilt.name for prebuilt in built] == [kernel_name(*SMALL)]
    assert list(errors) == [illegal]
    assert isinstance(errors[illegal], ScheduleError)


def test_prebuild_starts_no_process_where_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "kernels"
    first = prebuild([SMALL], root=root, num_processes=1)
    monkeypatch.setattr(jitgen.build, "_compile_in_processes", None)
    seen: list[Prebuilt] = []
    assert prebuild([SMALL], root=root, on_done=seen.append) == seen
    assert seen == [replace(first[0], compiled=False)]


def test_prebuild_compiles_a_damaged_kernel_again(tmp_path: Path) -> None:
    root = tmp_path / "kernels"
    prebuild([SMALL], root=root, num_processes=1)
    next(root.glob("??/*/kernel.cubin")).write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="is damaged.*compiling it again") as caught:
        (again,) = prebuild([SMALL], root=root, num_processes=1)
    assert len(caught) == 1
    assert again.compiled
    assert KernelStore(root).verify().num_sound == 1


def test_prebuild_names_what_a_dead_process_left_unfinished(tmp_path: Path) -> None:
    deadly = Deadly(264, 512), SMALL[1]
    with pytest.raises(CompileError, match="a compile process died") as caught:
        prebuild([deadly, SMALL], root=tmp_path / "kernels", num_processes=1)
    for kernel in (deadly, SMALL):
        assert kernel_name(*kernel) in str(caught.value)


def test_prebuild_rejects_a_store_that_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be written.*JITGEN_CACHE_DIR"):
        prebuild([SMALL], root=tmp_path / "file" / "kernels")


def test_open_shared_store_rejects_a_folder_without_write_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(StoreError, match=r"kernels cannot be written: .*JITGEN_CACHE_DIR"):
        open_shared_store(tmp_path / "kernels")


def test_check_register_split_rejects_a_block_that_would_hang() -> None:
    kernel = lower(*SMALL)
    compiled = compile_cubin(render(kernel), name="small.cu", headers=headers())
    check_register_split(kernel, compiled)
    fewer = replace(compiled, resources=replace(compiled.resources, registers=128))
    with pytest.raises(CompileError, match=r"asks for 37888 registers a block, ptxas gave 32768"):
        check_register_split(kernel, fewer)


def test_build_compiles_a_traversal_of_more_tiles_than_an_index_counts(tmp_path: Path) -> None:
    problem = Gemm(2**31 - 8, 16)
    schedule = Schedule(64, 16, 4, 1, raster_group=64)
    entry = build(lower(problem, schedule), KernelStore(tmp_path / "kernels"))
    assert entry.resources.spill_bytes == 0
