"""The command line's part that keeps the kernel store: `jitgen cache`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import make_console
from .errors import StoreError
from .problem_list import GPU_HELP, NUM_SMS_HELP, PROBLEMS_HELP, read_problems, select_kernels

if TYPE_CHECKING:
    from .runtime.bundle import Toolchain
    from .runtime.entry import Entry
    from .runtime.eviction import Usage
    from .runtime.store import KernelStore
    from .target import Gpu

cache_app = typer.Typer(help="The kernel store on disk.", no_args_is_help=True)


@cache_app.command("ls")
def list_entries() -> None:
    """Key, size in bytes, last use, compiler and name of each kernel, least recently used first.

    Not on a terminal: whole keys, and a tab between the columns.
    """
    from rich.table import Table
    from rich.text import Text

    store, root = _open_store()
    rows = _rows(store)
    console = make_console()
    if not console.is_terminal:
        for row in rows:
            typer.echo("\t".join(row))
        return
    table = Table("key", "bytes", "last use", "NVRTC", "kernel")
    table.columns[1].justify = "right"
    for key, *cells in rows:
        table.add_row(key[:12], *map(Text, cells))
    console.print(table)
    typer.echo(f"kernels: {len(rows)}, {_size(sum(int(row[1]) for row in rows))}, {root}")


def stored_kernels(store: KernelStore) -> list[tuple[Usage, Entry]]:
    """The sound kernels of the store on disk, least recently used first; none without a disk."""
    from .runtime.eviction import list_usage

    entries = {entry.path: entry for entry in store.entries()}
    usages = list_usage(store.root) if store.root else []
    return [(usage, entries[usage.path]) for usage in usages if usage.path in entries]


def _rows(store: KernelStore) -> list[tuple[str, ...]]:
    return [
        (e.key.digest, str(usage.num_bytes), usage.last_used, e.key.compiler_version, e.name)
        for usage, e in stored_kernels(store)
    ]


@cache_app.command("stats")
def print_stats() -> None:
    """What all processes did with the store since it was made, and what is in it.

    A process adds its counts when it ends. `jitgen.stats()` has those of a process that runs.
    """
    from dataclasses import asdict

    from .runtime.eviction import list_usage
    from .runtime.history import read

    _, root = _open_store()
    usages = list_usage(root)
    counts = asdict(read(root)) | {"kernels": len(usages)}
    counts["bytes"] = sum(usage.num_bytes for usage in usages)
    for name, count in counts.items():
        typer.echo(f"{name:<16}{count:.2f}" if name.endswith("_seconds") else f"{name:<16}{count}")


@cache_app.command()
def verify() -> None:
    """Read and hash every kernel in the store; damaged ones are removed.

    Exit code 1 if there were any.
    """
    store, root = _open_store()
    verified = store.verify()
    for damage in verified.damages:
        typer.echo(f"{damage}; removed, the next use compiles it again")
    typer.echo(
        f"kernels: {verified.num_sound} sound, {len(verified.damages)} damaged and healed by"
        f" removal, {root}"
    )
    raise typer.Exit(1 if verified.damages else 0)


@cache_app.command()
def gc(
    max_bytes: Annotated[
        int | None,
        typer.Option(min=0, help="0: no cap. Default: $JITGEN_CACHE_MAX_BYTES or 2 GiB."),
    ] = None,
) -> None:
    """Evict the least recently used kernels beyond the cap, and what killed processes left.

    What any process loaded in the last five minutes stays.
    """
    store, root = _open_store()
    collected = store.gc(max_bytes)
    typer.echo(
        f"kernels: {collected.num_evicted} evicted ({_size(collected.evicted_bytes)}),"
        f" {collected.num_left} left ({_size(collected.left_bytes)}); leftovers:"
        f" {collected.num_leftovers} removed, {root}"
    )


@cache_app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove every kernel from the store, in use or not; processes keep what they loaded."""
    store, root = _open_store()
    if not yes:
        typer.confirm(f"Remove all kernels from {root}?", abort=True)
    typer.echo(f"kernels: {store.clear()} removed, {root}")


@cache_app.command("export")
def export_kernels(
    bundle: Annotated[Path, typer.Argument(help="A tar file; replaced if it is there.")],
    problems: Annotated[Path | None, typer.Option(help=PROBLEMS_HELP)] = None,
    gpu: Annotated[str | None, typer.Option(help=GPU_HELP)] = None,
    num_sms: Annotated[int | None, typer.Option(min=1, help=NUM_SMS_HELP)] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="For calls with batch_invariant=True.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="All that this compiler made, not those of problems.")
    ] = False,
) -> None:
    """Write kernels of the store to a bundle: those that `jitgen prebuild` makes, or all.

    Of the same entries it is the same file, byte for byte; nothing in it names this machine. An
    entry that was compiled anew is another: it holds how long that took.
    """
    from .runtime.bundle import export_bundle
    from .tuning.select import named_gpu

    if everything == (problems is not None):
        raise typer.BadParameter("give either --problems or --all")
    store, _ = _open_store()
    toolchain = _toolchain()
    if problems is None:
        version = toolchain.compiler_version
        entries = [e for e in store.entries() if e.key.compiler_version == version]
    else:
        entries = _planned(store, problems, named_gpu(gpu, num_sms), batch_invariant)
    size = export_bundle(bundle, toolchain, entries)
    typer.echo(f"kernels: {len(entries)} exported, {_size(size)}, {bundle}")


@cache_app.command("import")
def import_kernels(
    bundle: Annotated[Path, typer.Argument(help="From `jitgen cache export`.")],
) -> None:
    """Put the kernels of a bundle into the store: all of a sound one, nothing of another.

    It runs on your GPU: take it from those you trust. It must be of the same compiler version and
    templates as this jitgen's.
    """
    from .build import open_shared_store
    from .runtime.bundle import import_bundle

    store = open_shared_store()
    done = import_bundle(bundle, _toolchain(), store)
    typer.echo(f"kernels: {done.num_added} added, {done.num_present} already there, {store.root}")


def _planned(store: KernelStore, problems: Path, gpu: Gpu, batch_invariant: bool) -> list[Entry]:
    """The store's entries of all kernels that the problems need."""
    from .build import key_of
    from .lower import lower_any

    entries = []
    pairs = read_problems(problems)
    for problem, schedule in select_kernels(pairs, gpu, batch_invariant=batch_invariant):
        kernel = lower_any(problem, schedule)
        entry = store.get(key_of(kernel))
        if entry is None:
            options = ["--problems", str(problems), "--gpu", gpu.name, "--num-sms"]
            options += [str(gpu.num_sms), *(["--batch-invariant"] if batch_invariant else [])]
            raise StoreError(
                f"kernel {kernel.name} is not in the store: first `jitgen prebuild"
                f" {shlex.join(options)}`"
            )
        entries.append(entry)
    return entries


def _toolchain() -> Toolchain:
    """This jitgen's, as bundles name it."""
    from . import __version__
    from .codegen import fingerprint
    from .runtime.bundle import Toolchain
    from .runtime.nvrtc import compiler_version
    from .target import SM90A

    return Toolchain(__version__, SM90A.arch, compiler_version(), fingerprint())


def _open_store() -> tuple[KernelStore, Path]:
    from .runtime.store import KernelStore

    store = KernelStore()
    return store, store.require_root()


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
