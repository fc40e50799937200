"""The command line's part that keeps the kernel store: `jitgen cache`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import make_console
from .errors import StoreError

if TYPE_CHECKING:
    from .runtime.store import KernelStore

cache_app = typer.Typer(help="The kernel store on disk.", no_args_is_help=True)


@cache_app.command("ls")
def list_entries() -> None:
    """Key, size in bytes, last use, compiler and name of each kernel, least recently used first.

    Not on a terminal: whole keys, and a tab between the columns.
    """
    from rich.table import Table
    from rich.text import Text

    store, root = _open_store()
    rows = _rows(store, root)
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


def _rows(store: KernelStore, root: Path) -> list[tuple[str, ...]]:
    from .runtime.eviction import list_usage

    entries = {entry.path: entry for entry in store.entries()}
    rows: list[tuple[str, ...]] = []
    for usage in list_usage(root):
        if entry := entries.get(usage.path):
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(usage.last_use))
            version = entry.key.compiler_version
            rows.append((entry.key.digest, str(usage.num_bytes), used, version, entry.name))
    return rows


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


def _open_store() -> tuple[KernelStore, Path]:
    from .runtime.store import KernelStore

    store = KernelStore()
    if store.root is None:
        raise StoreError("there is no kernel store on disk: name a folder in JITGEN_CACHE_DIR")
    return store, store.root


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
