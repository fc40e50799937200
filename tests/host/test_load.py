"""Load times without a GPU: what is timed, what is printed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jitgen import Gemm, Schedule, cli
from jitgen.build import key_of
from jitgen.codegen import render
from jitgen.errors import StoreError
from jitgen.kernel import Kernel
from jitgen.lower import lower
from jitgen.plans import plan
from jitgen.runtime import driver
from jitgen.runtime.entry import Entry
from jitgen.runtime.stats import Stats
from jitgen.runtime.store import KernelStore
from jitgen.tuning import bench
from jitgen.tuning.load import FIND, LOAD, MISS, LoadTime, measure_loads, print_load_times

from .test_store import CUBIN, Compiler

KERNELS = [(Gemm(256, k), Schedule(64, 32, 4, 1)) for k in (512, 640)]


def test_measure_loads_takes_every_kernel_from_disk_in_every_round(tmp_path: Path) -> None:
    for problem, schedule in KERNELS:
        kernel = lower(problem, schedule)
        KernelStore(tmp_path).get_or_compile(
            key_of(kernel), Compiler(), name=kernel.name, source=render(kernel)
        )
    stores: list[KernelStore] = []
    loaded: list[str] = []

    def open_store() -> KernelStore:
        stores.append(KernelStore(tmp_path))
        return stores[-1]

    def load(entry: Entry, kernel: Kernel) -> None:
        assert (entry.cubin, entry.name) == (CUBIN, kernel.name)
        loaded.append(kernel.name)

    times = measure_loads(KERNELS, open_store, load, num_rounds=3)
    assert [store.stats for store in stores] == [Stats(disk_hits=2, misses=2)] * 4
    assert len(loaded) == 8
    assert [time.name for time in times] == [LOAD, FIND, MISS]
    for time in times:
        assert time.count == 6
        assert 0 < time.median_ms <= time.p90_ms <= time.max_ms


def test_measure_loads_rejects_what_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not in the store: prebuild it first"):
        measure_loads(KERNELS, lambda: KernelStore(tmp_path), lambda *_: None, num_rounds=1)


def test_print_load_times_marks_what_is_over_its_bar() -> None:
    stream = io.StringIO()
    times = [LoadTime(LOAD, 3.5, 4, 5, 6), LoadTime(FIND, 9, 9, 9, 6), LoadTime(MISS, 0.4, 2, 3, 6)]
    print_load_times(Console(file=stream, width=100), times)
    text = stream.getvalue()
    assert "3.500*" in text
    assert "9.000 " in text
    assert "0.400 " in text
    assert "6 loads" in text


def test_cli_compiles_and_loads_the_kernels_of_every_m(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[bytes, str]] = []

    def load(cubin: bytes, name: str, *, smem_bytes: int, ordinal: int) -> None:
        assert (smem_bytes > 0, ordinal) == (True, 0)
        loaded.append((cubin[:4], name))

    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path))
    h100 = driver.Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
    monkeypatch.setattr(bench, "check_machine", lambda: h100)
    monkeypatch.setattr(driver, "make_current", lambda ordinal: None)
    monkeypatch.setattr(driver, "load", load)
    result = CliRunner().invoke(
        cli.app, ["bench", "load", "--n", "256", "--k", "128", "--rounds", "2"]
    )
    assert result.exit_code == 0, result.output
    kernels = plan(Gemm(256, 128), range(1, 8193), gpu=h100.name, num_sms=132).kernels
    assert f"{len(kernels)} kernels on NVIDIA H100" in result.output
    assert f"{2 * len(kernels)} loads" in result.output
    assert loaded == [(b"\x7fELF", lower(*kernel).name) for kernel in kernels] * 3
