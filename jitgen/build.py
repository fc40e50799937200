"""Building: a Kernel to a compiled entry of the kernel store. Needs no GPU."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .codegen import headers, render
from .errors import CompileError, JitgenError, StoreError
from .ir_mla import MlaKernel
from .lower import AnyKernel, AnyProblem, AnySchedule, lower_any
from .merge import MergeKernel, MergeSchedule
from .quantization import QuantizationKernel, QuantizationSchedule
from .runtime.entry import Entry
from .runtime.key import KernelKey, make_key
from .runtime.nvrtc import Compiled, compile_cubin, compile_options, compiler_version
from .runtime.store import KernelStore
from .runtime.tiers import Tiers
from .schedule import REGISTER_SPLIT, WARPGROUP_THREADS
from .schedule_mla import MlaSchedule, registers
from .verify import verify


@dataclass(frozen=True)
class Prebuilt:
    """A kernel's name, whether it was compiled now, and how long compiling it takes."""

    name: str
    compiled: bool
    compile_seconds: float


_configured: Tiers | None = None


def configure_store(tiers: Tiers) -> None:
    """Have `default_store` and `open_shared_store` open these tiers from now on."""
    global _configured
    _configured = tiers
    default_store.cache_clear()


def store_tiers() -> Tiers:
    """The tiers of `configure_store`, or else those of the environment.

    Raises
    ------
    StoreError : an environment variable is not understood
    """
    return _configured or Tiers.of()


@functools.cache
def default_store() -> KernelStore:
    """The store that `gemm` and the command line share."""
    return KernelStore(store_tiers())


def open_shared_store(tiers: Tiers | None = None) -> KernelStore:
    """A store on disk, where other processes find what this one compiles.

    Parameters
    ----------
    tiers : default `store_tiers()`

    Raises
    ------
    StoreError : a folder cannot be trusted, or new kernels cannot be written to the own one
    """
    with warnings.catch_warnings(record=True) as problems:
        warnings.simplefilter("always")
        store = KernelStore(tiers or store_tiers())
    if store.root is None:  # the first problem is that of the own folder
        raise StoreError(str(problems[0].message))
    if not os.access(store.root, os.W_OK):
        raise StoreError(f"{store.root} cannot be written: name a folder in JITGEN_CACHE_DIR")
    _warn_again(str(problem.message) for problem in problems)
    return store


def _warn_again(messages: Iterable[str]) -> None:
    """Pass warnings on, each once."""
    for message in dict.fromkeys(messages):
        warnings.warn(message, RuntimeWarning, stacklevel=3)


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
    if isinstance(kernel, (MergeKernel, QuantizationKernel)):
        return  # they have no setmaxnreg
    if isinstance(kernel, MlaKernel):
        need = WARPGROUP_THREADS * sum(registers(kernel.problem))
    else:
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
    root : folder of a store without other tiers, default: the tiers of `store_tiers()`
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
    tiers = Tiers(root.absolute()) if root else store_tiers()
    results = take_present(unfinished, open_shared_store(tiers), on_done)
    if not unfinished:
        return results
    workers = min(num_processes or os.cpu_count() or 1, len(unfinished))
    failure: BaseException | None = None
    warned: dict[str, None] = {}
    with contextlib.closing(_compile_in_processes(list(unfinished), tiers, workers)) as outcomes:
        for kernel, outcome in outcomes:
            del unfinished[kernel]
            if isinstance(outcome, _Made):
                _warn_again(message for message in outcome.messages if message not in warned)
                warned |= dict.fromkeys(outcome.messages)
                results.append(outcome.prebuilt)
                on_done(outcome.prebuilt)
            elif on_error and isinstance(outcome, JitgenError):
                on_error(kernel, outcome)
            else:
                failure = failure or outcome
    if unfinished:
        names = ", ".join(lower_any(*kernel).name for kernel in unfinished)
        raise CompileError(
            f"a compile process died, one of {workers}: out of memory (prebuild again with fewer"
            " processes), or started by a script that does not guard what it does with"
            f' `if __name__ == "__main__":`; unfinished: {names}'
        ) from failure
    if failure:
        raise failure
    return results


@dataclass(frozen=True)
class _Made:
    """What a process sends: the result, and the warnings on the way to it."""

    prebuilt: Prebuilt
    messages: tuple[str, ...]


def _compile_in_processes(
    kernels: Sequence[tuple[AnyProblem, AnySchedule]], tiers: Tiers, num_processes: int
) -> Generator[tuple[tuple[AnyProblem, AnySchedule], _Made | BaseException]]:
    """Each kernel with what became of it, as it comes; ends early if a process dies."""
    # Imported here: most who import jitgen start no process.
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures: dict[Future[_Made], tuple[AnyProblem, AnySchedule]] = {}
        with contextlib.suppress(BrokenProcessPool):  # one may die before all are submitted
            for kernel in slowest_first(kernels):
                futures[pool.submit(_compile_one, *kernel, tiers)] = kernel
        for future in as_completed(futures):
            error = future.exception()
            if not isinstance(error, BrokenProcessPool):
                yield futures[future], error or future.result()


def take_present(
    unfinished: dict[tuple[AnyProblem, AnySchedule], None],
    store: KernelStore,
    on_done: Callable[[Prebuilt], None],
) -> list[Prebuilt]:
    """Take out of `unfinished` what is near (see `KernelStore.peek`), and say what that was.

    So a second run starts no process. A kernel that cannot be made stays.
    """
    results = []
    for kernel in list(unfinished):
        try:
            key = key_of(lower_any(*kernel))
        except JitgenError:
            continue
        if entry := store.peek(key):
            del unfinished[kernel]
            results.append(Prebuilt(entry.name, False, entry.resources.compile_seconds))
            on_done(results[-1])
    return results


def slowest_first(
    kernels: Iterable[tuple[AnyProblem, AnySchedule]],
) -> list[tuple[AnyProblem, AnySchedule]]:
    """The kernels in an order in which no process is left with a slow one at the end."""

    def size(schedule: AnySchedule) -> int:
        if isinstance(schedule, MlaSchedule):
            return 256 * 256  # as slow to compile as the largest GEMM
        if isinstance(schedule, (MergeSchedule, QuantizationSchedule)):
            return 0
        return schedule.block_m * schedule.block_n

    return sorted(kernels, key=lambda kernel: -size(kernel[1]))


def _compile_one(problem: AnyProblem, schedule: AnySchedule, tiers: Tiers) -> _Made:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = _worker_store(tiers)
        before = store.stats.compiles
        entry = build(lower_any(problem, schedule), store)
    compiled = store.stats.compiles > before
    prebuilt = Prebuilt(entry.name, compiled, entry.resources.compile_seconds)
    return _Made(prebuilt, tuple(str(warning.message) for warning in caught))


@functools.cache
def _worker_store(tiers: Tiers) -> KernelStore:
    return KernelStore(tiers)
