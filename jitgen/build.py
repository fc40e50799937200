"""Building: a Kernel to a compiled entry of the kernel store. Needs no GPU."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from .codegen import headers, render
from .ir import Kernel
from .lower import lower
from .problem import Gemm
from .runtime.key import make_key
from .runtime.nvrtc import Compiled, compile_cubin, compile_options, compiler_version
from .runtime.store import Entry, KernelStore, Stats
from .schedule import Schedule
from .verify import verify


@dataclass(frozen=True)
class Prebuilt:
    """What one prebuilt kernel cost: its name, whether it was compiled now, and for how long in seconds."""

    name: str
    compiled: bool
    compile_seconds: float


@functools.cache
def default_store() -> KernelStore:
    """The store that `gemm` and the command line share."""
    return KernelStore()


def build(kernel: Kernel, store: KernelStore | None = None) -> Entry:
    """The compiled entry of `kernel`, from the store or compiled now.

    Raises
    ------
    VerifyError : the kernel is unsound
    CompileError : NVRTC is missing or refuses the source
    StoreError : the store cannot be trusted or locked
    """
    verify(kernel)
    source = render(kernel)
    options = compile_options(kernel.target)
    key = make_key(source, headers(), options, compiler_version(), kernel.target.arch)

    def compile_now() -> Compiled:
        return compile_cubin(source, name=f"{kernel.name}.cu", headers=headers(), target=kernel.target)

    return (store or default_store()).get_or_compile(key, compile_now, name=kernel.name, source=source)


def prebuild(
    kernels: Sequence[tuple[Gemm, Schedule]],
    *,
    root: Path | None = None,
    num_processes: int | None = None,
    on_done: Callable[[Prebuilt], None] = lambda _: None,
) -> list[Prebuilt]:
    """Compile kernels into the store, in parallel processes and without a GPU; what is there is not compiled again.

    Parameters
    ----------
    kernels : problems with their schedules; duplicates are built once
    root : folder of the store, default as for KernelStore
    num_processes : default one a core, at most one a kernel
    on_done : called with each result as it comes

    Raises
    ------
    ProblemError, ScheduleError, CompileError, StoreError : as lower and build; the other kernels are finished first
    """
    todo = list(dict.fromkeys(kernels))
    workers = min(num_processes or os.cpu_count() or 1, len(todo))
    results: list[Prebuilt] = []
    if not todo:
        return results
    failure: Exception | None = None
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_prebuild_one, *item, root) for item in todo]):
            try:
                results.append(future.result())
                on_done(results[-1])
            except Exception as error:  # reported once the rest is done: one bad kernel must not lose the others
                failure = failure or error
    if failure:
        raise failure
    return results


def _prebuild_one(problem: Gemm, schedule: Schedule, root: Path | None) -> Prebuilt:
    store = _worker_store(root)
    before: Stats = store.stats
    entry = build(lower(problem, schedule), store)
    return Prebuilt(entry.name, store.stats.compiles > before.compiles, entry.resources.compile_seconds)


@functools.cache
def _worker_store(root: Path | None) -> KernelStore:
    return KernelStore(root)
