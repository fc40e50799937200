"""One HTML page of all that was measured: benchmark, tuning records, cost model, kernel store.

It needs nothing beside itself: pictures are in it, and there is no script.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from ..problem import Gemm, tuned_name
from ..runtime.entry import Entry
from ..runtime.eviction import Usage
from ..target import Gpu
from . import plot
from .bench import Shape
from .records import Record
from .regret import Regret
from .report import (
    COLUMNS,
    CONFIG_COLUMNS,
    FLOOR_COLUMNS,
    SUMMARY_COLUMNS,
    Cell,
    Result,
    config_cells,
    floor_cells,
    geomean,
    missing,
    row_cells,
    summarize,
    summary_cells,
)

HOTTEST = 3.0  # time over floor that gets the full colour
OPEN_ROWS = 16  # a longer table is folded


@dataclass(frozen=True)
class Table:
    """A table of the page; figures are on the right, the first `num_texts` columns on the left."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    num_texts: int = 0

    @property
    def is_folded(self) -> bool:
        return len(self.rows) > OPEN_ROWS


@dataclass(frozen=True)
class Picture:
    """An SVG and what it shows."""

    title: str
    svg: str

    @property
    def source(self) -> str:
        """A URL that holds the picture; as an element, its ids would meet those of the others."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def render_page(sections: Sequence[Section], *, version: str) -> str:
    """The page with these sections, by this version of jitgen."""
    import jinja2

    text = (resources.files("jitgen.tuning") / "page.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(text).render(sections=sections, version=version)
    return f"{page}\n"


def bench_section(result: Result) -> Section:
    """A run of `jitgen bench gemm`: time over floor by shape and M, roofline, peers, schedules."""
    meta, rows = result.meta, result.rows
    summaries = summarize(rows)
    return Section(
        "FP8 GEMM beside its peers",
        (
            f"Measured by: {meta.command}",
            f"{meta.gpu}, driver {meta.driver}, NVRTC {meta.nvrtc}, torch {meta.torch},"
            f" CUTLASS {meta.cutlass}, jitgen {meta.jitgen}, {meta.date}.",
            meta.method,
            "Ratios above 1: jitgen is faster. Bold: a peer is.",
            *(f"Not measured: {line}" for line in missing(rows)),
        ),
        _pictures(
            ("Time over floor by M", plot.over_floor_svg(rows)),
            ("Roofline: bandwidth and tensor cores of an H100", plot.roofline_svg(rows)),
        ),
        (
            over_floor_table({row.shape: row.over_floor for row in rows}),
            Table("Geometric means", SUMMARY_COLUMNS, list(map(summary_cells, summaries))),
            Table("Time over floor by M", FLOOR_COLUMNS, list(map(floor_cells, summaries))),
            Table("Every shape", COLUMNS, list(map(row_cells, rows))),
            Table("Schedules", CONFIG_COLUMNS, list(map(config_cells, rows))),
        ),
    )


def over_floor_table(ratios: Mapping[Shape, float]) -> Table:
    """Time over floor by n, k (rows) and m (columns)."""
    extents = sorted({shape.m for shape in ratios})
    pairs = dict.fromkeys((shape.n, shape.k) for shape in ratios)
    rows = [
        [
            Cell(f"n{n}-k{k}"),
            *(_over_floor_cell(ratios.get(Shape(m, n, k))) for m in extents),
        ]
        for n, k in pairs
    ]
    columns = ("N, K", *(f"M = {m}" for m in extents))
    return Table("Time over floor by shape", columns, rows)


def _over_floor_cell(ratio: float | None) -> Cell:
    if ratio is None:
        return Cell("-")
    heat = (min(max(ratio, 1.0), HOTTEST) - 1) / (HOTTEST - 1)
    return Cell(f"{ratio:.2f}", heat=heat)


def records_section(gpu: Gpu, records: Sequence[Record]) -> Section:
    """The tuning records of one GPU: time over floor, every schedule."""
    shapes = {r: Shape(r.m, r.problem.n, r.problem.k) for r in records if type(r.problem) is Gemm}
    floors = {shape: r for r, shape in shapes.items() if r.problem == shape.problem}
    columns = ("problem", "schedule", "M", "us", "spread us", "measured", "date", "driver", "NVRTC")
    rows = [
        [
            *(Cell(str(r.problem)), Cell(str(r.schedule)), Cell(str(r.m))),
            *(Cell(f"{us:.2f}") for us in (r.kernel_us, r.spread_us)),
            *(Cell(str(r.num_candidates)), Cell(r.date)),
            *(Cell(r.provenance.driver), Cell(r.provenance.nvrtc)),
        ]
        for r in records
    ]
    return Section(
        f"Tuning records of {gpu.name}, {gpu.num_sms} SMs",
        (
            "The fastest schedule for each M bucket, its median time with L2 cold. The floor is"
            " that of an H100 SXM.",
        ),
        tables=(
            over_floor_table({s: r.kernel_us / s.floor_us for s, r in floors.items()}),
            Table("Records", columns, rows, num_texts=2),
        ),
    )


def regret_section(found: Sequence[Regret]) -> Section:
    """What the cost model's choice loses, by the tuner's journal."""
    columns = (
        *("fastest schedule", "the model's choice", "shape", "M", "D", "measured"),
        *("fastest us", "choice us", "predicted us", "choice / fastest"),
    )
    rows = [
        [
            *(Cell(str(r.fastest.schedule)), Cell(str(r.picked.schedule))),
            *(Cell(str(value)) for value in (tuned_name(r.problem), r.m, r.problem.d_dtype)),
            Cell(str(len(r.trials))),
            *(Cell(f"{us:.2f}") for us in (r.fastest.kernel_us, r.picked.kernel_us)),
            *(Cell(f"{dict(r.trials)[r.picked]:.2f}"), Cell(f"{r.ratio:.3f}")),
        ]
        for r in found
    ]
    ratios = [regret.ratio for regret in found]
    num_best = sum(ratio == 1 for ratio in ratios)
    return Section(
        "Regret of the cost model",
        (
            f"Among the {sum(len(r.trials) for r in found)} schedules that the tuner measured for"
            f" {len(found)} shapes, the one that this version's model predicts to be fastest takes"
            f" {geomean(ratios):.3f} of the fastest one's time (geometric mean), {max(ratios):.3f}"
            f" at worst; it is the fastest for {num_best}.",
        ),
        _pictures(
            ("What the model's choice loses, by M", plot.regret_svg(found)),
            ("Predicted time by measured time, every schedule", plot.predicted_svg(found)),
        ),
        (Table("Choices", columns, rows, num_texts=2),),
    )


def store_section(kernels: Sequence[tuple[Usage, Entry]]) -> Section:
    """What is in the kernel store, and how long it took to compile."""
    seconds = [entry.resources.compile_seconds for _, entry in kernels]
    rows = [
        [
            *(Cell(entry.name), Cell(entry.key.digest[:12]), Cell(str(usage.num_bytes))),
            *(Cell(f"{entry.resources.compile_seconds:.3f}"), Cell(str(entry.resources.registers))),
            *(Cell(entry.key.compiler_version), Cell(usage.last_used)),
        ]
        for usage, entry in kernels
    ]
    size = sum(usage.num_bytes for usage, _ in kernels)
    columns = ("kernel", "key", "bytes", "compile s", "registers", "NVRTC", "last use")
    return Section(
        "Kernel store and compile times",
        (
            f"{len(kernels)} kernels, {size / 2**20:.1f} MiB. NVRTC took {sum(seconds):.1f} s for"
            f" all of them, {statistics.median(seconds):.3f} s for one (median),"
            f" {max(seconds):.3f} s at most.",
        ),
        _pictures(("Compile times", plot.compile_svg(seconds))),
        (Table("Kernels, least recently used first", columns, rows, num_texts=2),),
    )


def _pictures(*found: tuple[str, str | None]) -> tuple[Picture, ...]:
    """Those that could be drawn."""
    return tuple(Picture(title, svg) for title, svg in found if svg)
