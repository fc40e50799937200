"""`jitgen cache explain`: whether a kernel is in the store, and if not, why not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from .dtypes import BF16, dtype_of
from .epilogues import EPILOGUE_HELP, Epilogue
from .expr import acc
from .problem import Gemm, check_problem
from .schedule_text import SCHEDULE_HELP, schedule_for

if TYPE_CHECKING:
    from .runtime.entry import Entry
    from .runtime.key import KernelKey
    from .runtime.store import KernelStore
    from .schedule import Schedule


def explain(
    key: Annotated[
        str | None, typer.Argument(help="As `jitgen cache ls` prints it, or how it begins.")
    ] = None,
    n: Annotated[int | None, typer.Option(help="Columns of D, with --k, instead of a key.")] = None,
    k: Annotated[int | None, typer.Option(help="Columns of A and of B.")] = None,
    m: Annotated[int, typer.Option(min=1, help="Rows that the schedule is chosen for.")] = 128,
    out_dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = BF16.name,
    epilogue: Annotated[Epilogue, typer.Option(help=EPILOGUE_HELP)] = Epilogue.none,
    schedule: Annotated[str | None, typer.Option(help=SCHEDULE_HELP)] = None,
) -> None:
    """Whether a kernel is in the store; if not, the nearest that is, and what differs in its key.

    The store is all that a call looks in: the own folder, lower ones, the shared one, the remote.

    Exit code 0 if it is there, 1 if not.
    """
    from .runtime.store import KernelStore
    from .tuning.select import named_gpu

    if (key is None) == (n is None) or (n is None) != (k is None):
        raise typer.BadParameter("give either a key, or --n and --k")
    store = KernelStore()
    if key is not None:
        entry = _find(store, key)
        if entry is None:
            typer.echo(f"not in the store: {key}, {store.root or 'in memory only'}")
            typer.echo("A key alone does not tell which kernel it is of: give --n, --k and --m.")
    else:
        problem = Gemm(n or 0, k or 0, dtype_of(out_dtype), epilogue.expr)
        check_problem(problem)
        entry = _look_up(store, problem, schedule_for(problem, m, named_gpu(), schedule))
    if entry is None:
        raise typer.Exit(1)
    _print_entry(entry)


def _find(store: KernelStore, prefix: str) -> Entry | None:
    """The entry whose key begins so."""
    if not re.fullmatch(r"[0-9a-f]{1,64}", prefix):
        raise typer.BadParameter(f"key is {prefix!r}: give its hex digits, at most 64")
    found = [entry for entry in store.entries() if entry.key.digest.startswith(prefix)]
    if len(found) > 1:
        raise typer.BadParameter(f"{len(found)} keys begin with {prefix}: give more of its digits")
    return found[0] if found else None


def _look_up(store: KernelStore, problem: Gemm, schedule: Schedule) -> Entry | None:
    """The entry of a kernel; without one, prints why there is none."""
    from .build import key_of
    from .control import prebuild_command, remedy
    from .lower import lower

    kernel = lower(problem, schedule)
    key = key_of(kernel)
    entries = list(store.entries())
    for entry in entries:  # which does not count as a use
        if entry.key == key:
            return entry
    if fetched := store.get(key):  # from the remote store
        return fetched
    typer.echo(f"not in the store: {kernel.name}, {store.root or 'in memory only'}")
    _print_row("key", key.digest)
    if entries:
        _print_nearest(entries, kernel.name, key)
    else:
        typer.echo("nearest: none, the store is empty")
    command = prebuild_command if problem.epilogue == acc else remedy
    typer.echo(f"make it: {command(problem, schedule)}")
    return None


def _print_nearest(entries: list[Entry], name: str, key: KernelKey) -> None:
    """The entry of the same name, or else of the most equal fields, and what differs."""

    def distance(entry: Entry) -> tuple[bool, int, int]:
        num_words = len(set(name.split("_")) & set(entry.name.split("_")))
        return entry.name != name, len(key.differences(entry.key)), -num_words

    nearest = min(entries, key=distance)
    typer.echo(f"nearest: {nearest.name}")
    _print_row("key", nearest.key.digest)
    for field, (wanted, stored) in key.differences(nearest.key).items():
        typer.echo(f"differs: {field}")
        _print_row("wanted", wanted)
        _print_row("stored", stored)


def _print_entry(entry: Entry) -> None:
    from .runtime.eviction import usage_of

    typer.echo(f"in the store: {entry.name}")
    _print_row("key", entry.key.digest)
    _print_row("source_sha256", entry.key.source_sha256)
    for name, sha256 in entry.key.headers:
        _print_row(f"headers[{name}]", sha256)
    _print_row("options", " ".join(entry.key.options))
    _print_row("compiler_version", entry.key.compiler_version)
    _print_row("arch", entry.key.arch)
    if entry.path:
        usage = usage_of(entry.path)
        _print_row("last use", usage.last_used)
        _print_row("size", f"{usage.num_bytes} B")
        _print_row("path", str(usage.path))


def _print_row(name: str, value: str) -> None:
    typer.echo(f"  {name:<30}{value}")
