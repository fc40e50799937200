"""Prebuild on a Ray cluster: a task a kernel, on whatever node is free; the bytes come back.

A task that is lost, with its process or with its node, runs again elsewhere. What a node returns is
checked as if it came from disk, and must be of the key that this machine looks for; so nodes need
the same jitgen and NVRTC, and nothing else: no GPU, no shared folder.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .build import Prebuilt, build, key_of, open_shared_store, slowest_first, take_present
from .errors import CompileError, JitgenError
from .lower import AnyProblem, AnySchedule, lower_any
from .runtime.entry import DamagedError, entry_files, parse_entry
from .runtime.store import KernelStore

CONNECT_TIMEOUT_S = 10.0
MAX_RETRIES = 5  # of a kernel whose process or node died


def prebuild_on_ray(
    kernels: Sequence[tuple[AnyProblem, AnySchedule]],
    address: str,
    *,
    on_done: Callable[[Prebuilt], None] = lambda _: None,
) -> list[Prebuilt]:
    """Compile kernels on a Ray cluster into the store of this machine.

    Parameters
    ----------
    kernels : problems with their schedules; duplicates are built once, and what is in the store is
        not compiled again
    address : of the cluster, as `ray.init` takes it: "auto", "host:6379", "ray://host:10001"
    on_done : called with each result as it comes

    Raises
    ------
    StoreError : the store cannot be trusted or written; nothing is compiled then
    CompileError : Ray is missing or cannot be reached; a node has another jitgen or NVRTC; kernels
        could not be compiled; the others are in the store
    ProblemError, ScheduleError, VerifyError : of the first kernel that is illegal; as above
    """
    store = open_shared_store()
    unfinished = dict.fromkeys(kernels)
    results = take_present(unfinished, store, on_done)
    if not unfinished:
        return results
    failure: JitgenError | None = None
    with _connected(address) as ray:
        compile = ray.remote(_compile).options(
            num_cpus=1, max_retries=MAX_RETRIES, name="jitgen prebuild"
        )
        pending = {compile.remote(*kernel): kernel for kernel in slowest_first(unfinished)}
        try:
            while pending:
                (ref,), _ = ray.wait(list(pending), num_returns=1)
                kernel = pending.pop(ref)
                try:
                    prebuilt = _keep(_wait_for(ray, ref), kernel, store)
                except JitgenError as error:
                    failure = failure or error
                else:
                    results.append(prebuilt)
                    on_done(prebuilt)
        finally:
            for ref in pending:
                ray.cancel(ref)
    if failure:
        raise failure
    return results


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster; a connection that was there stays."""
    try:
        import ray
    except ImportError:
        raise CompileError("ray is missing: pip install 'jitgen[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (Exception, SystemExit) as error:  # of many kinds
        reason = str(error).strip().partition("\n")[0]
        raise CompileError(
            f"no Ray cluster at {address} ({reason}): start one with `ray start --head`, or give"
            " its address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError if nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


@dataclass(frozen=True)
class _Made:
    """What a node sends: the result, and the files of the entry."""

    prebuilt: Prebuilt
    digest: str
    files: dict[str, bytes]


def _compile(problem: AnyProblem, schedule: AnySchedule) -> _Made | JitgenError:
    """On a node: the kernel, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a node without a store compiles all the same
        try:
            store = _node_store()
            before = store.stats.compiles
            entry = build(lower_any(problem, schedule), store)
        except JitgenError as error:
            return error
    compiled = store.stats.compiles > before
    prebuilt = Prebuilt(entry.name, compiled, entry.resources.compile_seconds)
    return _Made(prebuilt, entry.key.digest, entry_files(entry))


@functools.cache
def _node_store() -> KernelStore:
    return KernelStore()


def _wait_for(ray: Any, ref: Any) -> _Made:
    """What a task made; CompileError if it could not run, or what it failed with."""
    try:
        outcome: _Made | JitgenError = ray.get(ref)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[-300:]
        raise CompileError(f"a Ray task failed, {MAX_RETRIES} retries included: {reason}") from None
    if isinstance(outcome, JitgenError):
        raise outcome
    return outcome


def _keep(made: _Made, kernel: tuple[AnyProblem, AnySchedule], store: KernelStore) -> Prebuilt:
    """Put what a node made into the store, if it is what this machine would have made."""
    wanted = key_of(lower_any(*kernel))
    try:
        key = parse_entry(made.digest, made.files).key
        if differences := wanted.differences(key):
            field, (here, there) = next(iter(differences.items()))
            raise CompileError(
                f"a node made {made.prebuilt.name} with {field} {there}, here it is {here}:"
                " install the same jitgen and nvidia-cuda-nvrtc on all nodes"
            )
        store.add(made.digest, made.files)
    except DamagedError as damage:
        raise CompileError(
            f"kernel {lower_any(*kernel).name} came back damaged: {damage}"
        ) from None
    return made.prebuilt
