"""Reports of benchmarks: where and how they were measured, geometric means, tables, Markdown."""

from __future__ import annotations

import contextlib
import shlex
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..errors import ProblemError
from ..runtime import driver
from ..runtime.nvrtc import compiler_version
from .bench import (
    FLOOR_BYTES_PER_US,
    FLOOR_FLOPS_PER_US,
    FLOOR_LAUNCH_US,
    Row,
    Shape,
    baseline_meta,
)
from .cutlass import describe
from .machine import driver_release
from .peers import PEERS, TOLERANCE
from .timing import FLUSH_BYTES, NUM_CALLS, NUM_WARMUP_CALLS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LIVE_TOLERANCE = 0.05  # by which cuBLASLt's times, live and in the file, agree on like machines

METHOD = (
    "Kernel time: sum of the device time of all kernels, copies and fills that one call launches"
    f" (CUPTI, through torch.profiler), mean of {NUM_CALLS} calls after {NUM_WARMUP_CALLS} others."
    " Before each call a buffer of"
    f" {FLUSH_BYTES // 2**20} MB is overwritten, which flushes L2 and is not counted. Spread:"
    " standard deviation over the calls. Data: random normal, quantized 1x128 (A) and 128x128 (B)."
    " Before a call of jitgen is timed, a sample of the tiles of its result is compared with the"
    " interpreter's, bit for bit; before a peer's, its result with the float64 product of its"
    f" operands, every row within {TOLERANCE:.1e} of its norm. Floor:"
    f" max(bytes / {FLOOR_BYTES_PER_US / 1e6} TB/s, flops / {FLOOR_FLOPS_PER_US / 1e6:.0f} TFLOPS)"
    f" + {FLOOR_LAUNCH_US:.0f} us; bytes: each input once, each output once."
)

# What is compared with jitgen, by the name that `Row.us` takes.
TITLES = {
    "deepgemm": "DeepGEMM",
    **{peer.name: peer.title for peer in PEERS},
    "best": "best peer",
}


@dataclass(frozen=True)
class Meta:
    """Where, when and how a result was measured."""

    gpu: str
    driver: str
    nvrtc: str
    torch: str
    cutlass: str
    jitgen: str
    date: str
    method: str
    peers: Mapping[str, str]  # title: method
    command: str


@dataclass(frozen=True)
class Result:
    """A benchmark run."""

    meta: Meta
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields and the figures derived of them, as JSON values."""
        return {"meta": asdict(self.meta), "rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: Any) -> Result:
        """The result that `to_json` wrote.

        Raises
        ------
        ProblemError : a field is missing, or another than this version writes
        """
        with reading("bench gemm"):
            return cls(Meta(**data["meta"]), tuple(map(Row.from_json, data["rows"])))


@contextlib.contextmanager
def reading(command: str) -> Iterator[None]:
    """ProblemError for what is raised where a result is none of this version's `command`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProblemError(
            f"not a result that this version's `jitgen {command} --json` wrote:"
            f" {type(error).__name__} {error}"
        ) from None


def common_meta(metas: Sequence[Meta]) -> Meta:
    """The first of several runs on GPUs of one name, with the commands of all.

    Raises
    ------
    ProblemError : the GPUs differ
    """
    gpus = {meta.gpu for meta in metas}
    if len(gpus) > 1:
        raise ProblemError(f"results of {' and '.join(sorted(gpus))}: report each alone")
    return replace(metas[0], command="; ".join(dict.fromkeys(meta.command for meta in metas)))


def collect_meta(device: driver.Device, *, version: str, arguments: Sequence[str]) -> Meta:
    """What a result must say of this machine.

    Parameters
    ----------
    device : that was measured
    version : of jitgen
    arguments : what was typed after `jitgen`; of a path its last part is kept
    """
    import torch

    return Meta(
        gpu=device.name,
        driver=driver_release(),
        nvrtc=compiler_version(),
        torch=str(torch.__version__),
        cutlass=describe(),
        jitgen=version,
        date=datetime.now(timezone.utc).date().isoformat(),
        method=METHOD,
        peers={peer.title: peer.method for peer in PEERS},
        command=command_line(arguments),
    )


def command_line(arguments: Sequence[str]) -> str:
    """What was typed, given what came after `jitgen`; of a path its last part is kept."""
    return shlex.join(["jitgen", *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    """An argument without the folders that a path in it names: they are this machine's affair."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{PurePath(value).name}" if "/" in value else argument


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Figures over some rows, by name as in TITLES; None for what not every row has.

    over_floor : geometric means of time / floor, of "jitgen" too
    ratios : geometric means of peer / jitgen
    num_losses : shapes on which the peer is faster
    live_over_baseline : cuBLASLt's times now, over those in the file
    """

    label: str
    num_shapes: int
    over_floor: Mapping[str, float | None]
    ratios: Mapping[str, float | None]
    num_losses: Mapping[str, int | None]
    live_over_baseline: float | None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """A summary of each m, then one of all rows."""
    extents = sorted({row.shape.m for row in rows})
    groups = [(str(m), [row for row in rows if row.shape.m == m]) for m in extents]
    return [_summary(label, group) for label, group in (*groups, ("all", rows)) if group]


def _summary(label: str, rows: Sequence[Row]) -> Summary:
    ratios = {name: [row.ratio(name) for row in rows] for name in ("jitgen", *TITLES)}
    complete = {
        name: known
        for name, values in ratios.items()
        if len(known := [value for value in values if value is not None]) == len(rows)
    }
    means = {name: geomean(values) for name, values in complete.items()}
    over_floor = geomean(row.over_floor for row in rows)
    live = [
        us / row.baseline.cublaslt_us
        for row in rows
        if row.baseline and (us := row.us("cublaslt")) is not None
    ]
    return Summary(
        label,
        len(rows),
        {name: over_floor * means[name] if name in means else None for name in ratios},
        {name: means.get(name) for name in TITLES},
        {
            name: sum(ratio < 1 for ratio in complete[name]) if name in complete else None
            for name in TITLES
        },
        geomean(live) if len(live) == len(rows) else None,
    )


def num_launches(rows: Iterable[Row]) -> list[int]:
    """How many kernels one call of jitgen launches: each number that occurs."""
    return sorted({row.jitgen.num_kernels for row in rows})


def geomean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers, at least one."""
    return statistics.geometric_mean(values)


TIMED = tuple(name for name in TITLES if name != "best")
COLUMNS = (
    *("M", "N", "K", "jitgen us", "spread"),
    *(f"{TITLES[name]} us" for name in TIMED),
    *("best peer / jitgen", "time / floor", "TFLOPS", "GB/s"),
)
SUMMARY_COLUMNS = (
    *("M", "shapes", "best peer / jitgen", "slower than best peer", "slower than DeepGEMM"),
    *(f"{TITLES[name]} / jitgen" for name in TIMED),
    "cuBLASLt live / file",
)
FLOOR_COLUMNS = ("M", "jitgen", *TITLES.values())
CONFIG_COLUMNS = ("M", "N", "K", "jitgen", "CUTLASS")


@dataclass(frozen=True)
class Cell:
    """A figure of a table.

    is_loss : it is a peer's that beats jitgen's
    heat : from 0, as good as can be, to 1: how strongly a page colours it
    """

    text: str
    is_loss: bool = False
    heat: float = 0.0


def row_cells(row: Row) -> list[Cell]:
    """A row's figures, in the order of COLUMNS."""
    shape, ours = row.shape, row.jitgen
    return [
        *(Cell(str(extent)) for extent in (shape.m, shape.n, shape.k)),
        Cell(f"{ours.kernel_us:.2f}"),
        Cell(f"{ours.std_us / ours.kernel_us:.1%}"),
        *(figure_cell(row.us(name), loss_below=ours.kernel_us) for name in TIMED),
        figure_cell(row.ratio("best")),
        Cell(f"{row.over_floor:.2f}"),
        Cell(f"{row.tflops:.0f}"),
        Cell(f"{row.gb_per_s:.0f}"),
    ]


def summary_cells(summary: Summary) -> list[Cell]:
    """A summary's figures, in the order of SUMMARY_COLUMNS."""
    losses = (summary.num_losses[name] for name in ("best", "deepgemm"))
    return [
        Cell(summary.label),
        Cell(str(summary.num_shapes)),
        figure_cell(summary.ratios["best"]),
        *(Cell("-" if count is None else str(count), bool(count)) for count in losses),
        *(figure_cell(summary.ratios[name]) for name in TIMED),
        figure_cell(summary.live_over_baseline, loss_below=0),
    ]


def floor_cells(summary: Summary) -> list[Cell]:
    """A summary's times over the floor, in the order of FLOOR_COLUMNS."""
    ours = summary.over_floor["jitgen"]
    cells = (figure_cell(value, loss_below=ours or 0) for value in summary.over_floor.values())
    return [Cell(summary.label), *cells]


def config_cells(row: Row) -> list[Cell]:
    """How a row was computed, in the order of CONFIG_COLUMNS."""
    cutlass = row.peers.get("cutlass")
    extents = (row.shape.m, row.shape.n, row.shape.k)
    texts = (*map(str, extents), str(row.schedule), cutlass.config if cutlass else "-")
    return [Cell(text) for text in texts]


def figure_cell(figure: float | None, *, loss_below: float = 1) -> Cell:
    """A figure, a loss below that; a dash for none."""
    return Cell("-") if figure is None else Cell(f"{figure:.2f}", figure < loss_below)


# --- Markdown -------------------------------------------------------------------------------------


def render_markdown(result: Result, *, plot: str | None = None) -> str:
    """The report of `result`: geometric means, every shape, schedules; where a peer wins, in bold.

    Parameters
    ----------
    result : of `jitgen bench gemm`
    plot : the picture's path from the report, None if there is none
    """
    meta, baseline, rows = result.meta, baseline_meta(), result.rows
    summaries = summarize(rows)
    lines = [
        "# Performance of the FP8 GEMM",
        "",
        f"Measured by `{meta.command}`; written by it and by `jitgen bench report`, not by hand.",
        "",
        f"{meta.gpu}, driver {meta.driver}, NVRTC {meta.nvrtc}, torch {meta.torch},"
        f" CUTLASS {meta.cutlass}, jitgen {meta.jitgen}, {meta.date}.",
        "",
        f"{meta.method}",
        "",
        f"- DeepGEMM {baseline['peers']['deepgemm']}: from a file, measured in the same way on an"
        f" {baseline['gpu']}, driver {baseline['driver']}, torch {baseline['torch']},"
        f" {baseline['measured']}, and shown for that GPU model only. `cuBLASLt live / file` near"
        " 1 says that both machines behave alike.",
        *(f"- {title}, live in the same run: {method}" for title, method in meta.peers.items()),
        "- Best peer: the faster of DeepGEMM and cuBLASLt for each shape.",
        "",
        "Where peer / jitgen is above 1, jitgen is faster; **bold**: the peer is. Kernels that one"
        f" call of jitgen launches: {' or '.join(map(str, num_launches(rows)))}.",
        *_missing_lines(rows),
        *section("Geometric means", SUMMARY_COLUMNS, map(summary_cells, summaries)),
        *section("Time over floor, geometric means", FLOOR_COLUMNS, map(floor_cells, summaries)),
        *(["", f"![Time over floor by M]({plot})"] if plot else []),
    ]
    for m in sorted({row.shape.m for row in rows}):
        cells = (row_cells(row)[1:] for row in rows if row.shape.m == m)
        lines += section(f"M = {m}", COLUMNS[1:], cells)
    lines += section("Schedules", CONFIG_COLUMNS, map(config_cells, rows))
    return "\n".join(lines) + "\n"


def missing(rows: Sequence[Row]) -> list[str]:
    """What was not measured and why, each reason once."""
    shapes: dict[tuple[str, str], list[Shape]] = {}
    for row in rows:
        for title_and_reason in row.missing.items():
            shapes.setdefault(title_and_reason, []).append(row.shape)
    return [
        f"{title}, {_names(found, rows)}: {reason}" for (title, reason), found in shapes.items()
    ]


def _names(shapes: Sequence[Shape], rows: Sequence[Row]) -> str:
    return "every shape" if len(shapes) == len(rows) else ", ".join(map(str, shapes))


def _missing_lines(rows: Sequence[Row]) -> list[str]:
    found = missing(rows)
    return ["", "Not measured:", "", *(f"- {line}" for line in found)] if found else []


def section(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Iterator[str]:
    """The lines of a heading and its table; losses in bold."""
    yield from ("", f"## {title}", "")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---:|' * len(columns)}"
    for row in rows:
        texts = (f"**{cell.text}**" if cell.is_loss else cell.text for cell in row)
        yield f"| {' | '.join(texts)} |"


# --- on a terminal --------------------------------------------------------------------------------


def print_result(console: Console, result: Result) -> None:
    """Print every shape and the geometric means; where a peer wins, in red with an asterisk.

    Warns if cuBLASLt says that this machine is not like the one of the baselines.
    """
    summaries = summarize(result.rows)
    launches = " or ".join(map(str, num_launches(result.rows)))
    console.print(f"{result.meta.gpu}: {launches} kernel launched by a call", highlight=False)
    console.print(table(COLUMNS, map(row_cells, result.rows)))
    console.print("* the peer is faster\n")
    console.print(table(SUMMARY_COLUMNS, map(summary_cells, summaries), title="Geometric means"))
    console.print(table(FLOOR_COLUMNS, map(floor_cells, summaries), title="Time over floor"))
    console.print(table(CONFIG_COLUMNS, map(config_cells, result.rows), title="Schedules"))
    for line in _missing_lines(result.rows):
        console.print(line, markup=False, highlight=False)
    live = summaries[-1].live_over_baseline if summaries else None
    if live is not None and abs(live - 1) > LIVE_TOLERANCE:
        warnings.warn(
            f"cuBLASLt takes {live:.2f} of its time in the file: this machine is not like that one,"
            " and ratios to DeepGEMM mislead",
            stacklevel=2,
        )


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], title: str = "") -> Table:
    """As `section`, for a terminal; losses in red with an asterisk."""
    from rich.table import Table

    found = Table(title=title or None)
    for column in columns:
        found.add_column(column, justify="right")
    for row in rows:
        found.add_row(*(f"[red]{cell.text}*[/]" if cell.is_loss else cell.text for cell in row))
    return found
