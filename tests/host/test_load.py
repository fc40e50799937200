"""Load times without a GPU: what is timed, what is printed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from jitgen import Gemm, Schedule
from jitgen.build import key_of
from jitgen.codegen import render
from jitgen.errors import StoreError
from jitgen.ir import Kernel
from jitgen.lower import lower
from jitgen.runtime.entry import Entry
from jitgen.runtime.stats import Stats
from jitgen.runtime.store import KernelStore
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
