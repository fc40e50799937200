"""`jitgen report`: one HTML page of what was measured."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_cache import stored_kernels
from .files import read_json, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .tuning.page import Section


def report(
    page: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    bench: Annotated[Path | None, typer.Option(help="What `bench gemm --json` wrote.")] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            help="Folder of records and the tuner's journal; default: yours or, with no records in"
            " it, those that come with jitgen."
        ),
    ] = None,
) -> None:
    """One HTML page, with nothing beside it, of a benchmark, tuning and the kernel store.

    Tables and plots: time over floor by shape and M, roofline, peers, records, what the cost
    model's choice loses, compile times, the store's kernels. Needs no GPU.
    """
    from . import __version__
    from .tuning.page import render_page

    sections = [*_bench(bench), *_tuning(records), *_store()]
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn("no plots without matplotlib: pip install 'jitgen[bench]'", stacklevel=2)
    text = render_page(sections, version=__version__)
    write_text(page, text)
    titles = ", ".join(section.title for section in sections) or "nothing was found"
    typer.echo(f"{page}: {len(text) / 1024:.0f} KiB: {titles}")


def _bench(path: Path | None) -> Iterator[Section]:
    from .tuning.page import bench_section
    from .tuning.report import Result

    if path:
        yield bench_section(Result.from_json(read_json(path)))


def _tuning(folder: Path | None) -> Iterator[Section]:
    """A section a GPU of the records, and one of the journal beside them."""
    from .tuning.page import records_section, regret_section
    from .tuning.records import read_folder, shipped_folder, user_folder
    from .tuning.regret import regrets
    from .tuning.session import read_journal

    if folder is None:
        folder = user_folder() if any(user_folder().glob("*/*.json")) else shipped_folder()
    found = read_folder(folder)
    for gpu in dict.fromkeys(record.gpu for record in found):
        yield records_section(gpu, [record for record in found if record.gpu == gpu])
    if regretted := regrets(read_journal(folder)):
        yield regret_section(regretted)


def _store() -> Iterator[Section]:
    """The kernels of the store, if there are any."""
    from .runtime.store import KernelStore
    from .tuning.page import store_section

    if kernels := stored_kernels(KernelStore()):
        yield store_section(kernels)
