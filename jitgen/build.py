"""Building: a Kernel to a compiled entry of the kernel store. Needs no GPU."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from .codegen import headers, render
from .errors import CompileError, JitgenError, StoreError
from .lower import AnyKernel, AnyProblem, AnySchedule, lower_any
from .runtime.entry import Entry
from .runtime.key import KernelKey, make_key
from .runtime.nvrtc import Compiled, compile_cubin, compile_options, compiler_version
from .runtime.store import KernelStore
from .schedule import REGISTER_SPLIT, WARPGROUP_THREADS
from .verify import verify


@dataclass(frozen=True)
class Prebuilt:
    """A kernel's name, whether it was compiled now, and how long compiling it takes."""

    name: str
    compiled: bool
    compile_seconds: float


@functools.cache
def default_store() -> KernelStore:
    """The store that `gemm` and the command line share."""
    return KernelStore()


def open_shared_store(root: Path | None = None) -> KernelStore:
    """A store on disk, where other processes find what this one compiles.

    Parameters
    ----------
    root : folder of the store, default as for KernelStore

    Raises
    ------
    StoreError : the folder cannot be trusted, or new kernels cannot be written to it
    """
    with warnings.catch_warnings(record=True) as problems:
        warnings.simplefilter("always")
        store = KernelStore(root)
    if problems:
        raise StoreError(str(problems[0].message))
    if store.root is None or not os.access(store.root, os.W_OK):
        raise StoreError(f"{store.root} cannot be written: name a folder in JITGEN_CACHE_DIR")
    return store


def key_of(kernel: AnyKernel) -> KernelKey:
    """What the compiled entry of `kernel` is found by.

    Raises
    ------
    CompileError : NVRTC is missing
    """
    return _make_key(kernel, render(kernel))


def build(
    kernel: AnyKernel,
    store: KernelStore | None = None,
    *,
    before_compile: Callable[[], None] = lambda: None,
) -> Entry:
    """The compiled entry of `kernel`, from the store or compiled now.

    Parameters
    ----------
    kernel : from `lower`
    store : default `default_store()`
    before_compile : called if the kernel is not in the store; what it raises passes through

    Raises
    ------
    VerifyError : the kernel is unsound
    CompileError : NVRTC is missing or refuses the source
    StoreError : the store cannot be trusted or locked
    """
    verify(kernel)
    source = render(kernel)

    def compile_now() -> Compiled:
        before_compile()
        compiled = compile_cubin(
            source, name=f"{kernel.name}.cu", headers=headers(), target=kernel.target
        )
        check_register_split(kernel, compiled)
        return compiled

    return (store or default_store()).get_or_compile(
        _make_key(kernel, source), compile_now, name=kernel.name, source=source
    )


def _make_key(kernel: AnyKernel, source: str) -> KernelKey:
    options = compile_options(kernel.target)
    return make_key(source, headers(), options, compiler_version(), kernel.target.arch)


def check_register_split(kernel: AnyKernel, compiled: Compiled) -> None:
    """Raise CompileError if `setmaxnreg` asks for more registers than the block has at its launch.

    The kernel would hang: a warpgroup that raises its share waits until the pool has it.
    """
    warpgroups = kernel.schedule.num_math_warpgroups
    producer, math = REGISTER_SPLIT[warpgroups]
    need = WARPGROUP_THREADS * (producer + warpgroups * math)
    have = compiled.resources.registers * kernel.num_threads
    if need > have:
        raise CompileError(
            f"kernel {kernel.name} asks for {need} registers a block, ptxas gave {have}: use NVRTC"
            " 13.0, or report it",
            compiled.log,
        )


def prebuild(
    kernels: Sequence[tuple[AnyProblem, AnySchedule]],
    *,
    root: Path | None = None,
    num_processes: int | None = None,
    on_done: Callable[[Prebuilt], None] = lambda _: None,
    on_error: Callable[[tuple[AnyProblem, AnySchedule], JitgenError], None] | None = None,
) -> list[Prebuilt]:
    """Compile kernels into the store, in parallel processes and without a GPU.

    Parameters
    ----------
    kernels : problems with their schedules; duplicates are built once, and what is in the store is
        not compiled again
    root : folder of the store, default as for KernelStore
    num_processes : default one a core, at most one a kernel
    on_done : called with each result as it comes
    on_error : called with each kernel that cannot be built and why; if None, that is raised

    Raises
    ------
    StoreError : the store cannot be trusted or written; nothing is compiled then
    CompileError : a compile process died; what was finished by then is in the store
    ProblemError, ScheduleError, VerifyError, CompileError, StoreError : as lower and build, if
        on_error is None; the other kernels are finished first
    """
    unfinished = dict.fromkeys(kernels)
    results: list[Prebuilt] = []
    if not unfinished:
        return results
    store = open_shared_store(root)
    for kernel in list(unfinished):  # so that a second run starts no process
        if entry := _find(kernel, store):
            del unfinished[kernel]
            results.append(Prebuilt(entry.name, False, entry.resources.compile_seconds))
            on_done(results[-1])
    if not unfinished:
        return results
    workers = min(num_processes or os.cpu_count() or 1, len(unfinished))
    failure: BaseException | None = None
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: dict[Future[Prebuilt], tuple[AnyProblem, AnySchedule]] = {}
        with contextlib.suppress(BrokenProcessPool):  # one may die before all are submitted
            for kernel in unfinished:
                futures[pool.submit(_prebuild_one, *kernel, root)] = kernel
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                continue
            del unfinished[futures[future]]
            if error is None:
                results.append(future.result())
                on_done(results[-1])
            elif on_error and isinstance(error, JitgenError):
                on_error(futures[future], error)
            else:
                failure = failure or error
    if unfinished:
        names = ", ".join(lower_any(*kernel).name for kernel in unfinished)
        raise CompileError(
            f"a compile process died (out of memory?), one of {workers}: prebuild again with fewer"
            f" processes; unfinished: {names}"
        ) from failure
    if failure:
        raise failure
    return results


def _find(kernel: tuple[AnyProblem, AnySchedule], store: KernelStore) -> Entry | None:
    """The entry in the store; None too for a kernel that cannot be made."""
    try:
        key = key_of(lower_any(*kernel))
    except JitgenError:
        return None
    return store.get(key)


def _prebuild_one(problem: AnyProblem, schedule: AnySchedule, root: Path | None) -> Prebuilt:
    store = _worker_store(root)
    before = store.stats
    entry = build(lower_any(problem, schedule), store)
    return Prebuilt(
        entry.name, store.stats.compiles > before.compiles, entry.resources.compile_seconds
    )


@functools.cache
def _worker_store(root: Path | None) -> KernelStore:
    return KernelStore(root)
