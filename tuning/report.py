"""Reports of benchmarks: where and how they were measured, geometric means, tables, Markdown."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..runtime import driver
from ..runtime.nvrtc import compiler_version
from .bench import (
    FLOOR_BYTES_PER_US,
    FLOOR_FLOPS_PER_US,
    FLOOR_LAUNCH_US,
    FLUSH_BYTES,
    NUM_CALLS,
    NUM_WARMUP_CALLS,
    Row,
    baseline_meta,
)
from .machine import driver_release

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
    " Before a call is timed, a sample of the tiles of its result is compared with the"
    " interpreter's, bit for bit. cuBLASLt: `torch._scaled_mm` with per-tensor scales (less work"
    " than jitgen's), use_fast_accum=True and BF16 output, live in the same run. Floor:"
    f" max(bytes / {FLOOR_BYTES_PER_US / 1e6} TB/s, flops / {FLOOR_FLOPS_PER_US / 1e6:.0f} TFLOPS)"
    f" + {FLOOR_LAUNCH_US:.0f} us; bytes: each input once, each output once."
)


@dataclass(frozen=True)
class Meta:
    """Where, when and how a result was measured."""

    gpu: str
    driver: str
    nvrtc: str
    torch: str
    jitgen: str
    date: str
    method: str
    command: str


@dataclass(frozen=True)
class Result:
    """A benchmark run."""

    meta: Meta
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields and the figures derived of them, as JSON values."""
        return {"meta": asdict(self.meta), "rows": [_row_json(row) for row in self.rows]}


def _row_json(row: Row) -> dict[str, Any]:
    data = asdict(row)
    for name in ("jitgen", "cublaslt"):
        data[name]["num_kernels"] = getattr(row, name).num_kernels
    derived = ("over_floor", "tflops", "gb_per_s", "vs_deepgemm", "vs_cublaslt")
    return data | {"floor_us": row.shape.floor_us} | {name: getattr(row, name) for name in derived}


def collect_meta(device: driver.Device, *, version: str, command: str) -> Meta:
    """What a result must say of this machine. `version` is jitgen's, `command` what was typed."""
    import torch

    return Meta(
        gpu=device.name,
        driver=driver_release(),
        nvrtc=compiler_version(),
        torch=str(torch.__version__),
        jitgen=version,
        date=datetime.now(timezone.utc).date().isoformat(),
        method=METHOD,
        command=command,
    )


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Geometric means over some rows; those against the baselines are None if a row has none."""

    label: str
    num_shapes: int
    over_floor: float
    vs_cublaslt: float
    vs_deepgemm: float | None
    num_losses: int | None  # shapes on which DeepGEMM is faster
    live_over_baseline: float | None  # cuBLASLt's times now, over those in the file


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """A summary of each m, then one of all rows."""
    extents = sorted({row.shape.m for row in rows})
    groups = [(str(m), [row for row in rows if row.shape.m == m]) for m in extents]
    return [_summary(label, group) for label, group in (*groups, ("all", rows)) if group]


def _summary(label: str, rows: Sequence[Row]) -> Summary:
    ratios = [row.vs_deepgemm for row in rows if row.vs_deepgemm is not None]
    live = [row.cublaslt.kernel_us / row.baseline.cublaslt_us for row in rows if row.baseline]
    is_complete = len(ratios) == len(rows)
    return Summary(
        label,
        len(rows),
        over_floor=geomean(row.over_floor for row in rows),
        vs_cublaslt=geomean(row.vs_cublaslt for row in rows),
        vs_deepgemm=geomean(ratios) if is_complete else None,
        num_losses=sum(ratio < 1 for ratio in ratios) if is_complete else None,
        live_over_baseline=geomean(live) if is_complete else None,
    )


def num_launches(rows: Iterable[Row]) -> list[int]:
    """How many kernels one call of jitgen launches: each number that occurs."""
    return sorted({row.jitgen.num_kernels for row in rows})


def geomean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers, at least one."""
    return statistics.geometric_mean(values)


COLUMNS = (
    *("M", "N", "K", "schedule", "jitgen us", "spread", "cuBLASLt us", "DeepGEMM us"),
    *("DeepGEMM / jitgen", "time / floor", "TFLOPS", "GB/s"),
)
SUMMARY_COLUMNS = (
    *("M", "shapes", "DeepGEMM / jitgen", "slower than DeepGEMM", "cuBLASLt / jitgen"),
    *("time / floor", "cuBLASLt live / file"),
)


@dataclass(frozen=True)
class Cell:
    """A figure of a table; `is_loss` if it is a peer's that beats jitgen's."""

    text: str
    is_loss: bool = False


def row_cells(row: Row) -> list[Cell]:
    """A row's figures, in the order of COLUMNS."""
    shape, ours, theirs, ratio = row.shape, row.jitgen, row.cublaslt, row.vs_deepgemm
    return [
        *(Cell(str(extent)) for extent in (shape.m, shape.n, shape.k)),
        Cell(str(row.schedule)),
        Cell(f"{ours.kernel_us:.2f}"),
        Cell(f"{ours.std_us / ours.kernel_us:.1%}"),
        Cell(f"{theirs.kernel_us:.2f}", row.vs_cublaslt < 1),
        Cell(f"{row.baseline.deepgemm_us:.2f}" if row.baseline else "-", bool(ratio and ratio < 1)),
        _ratio_cell(ratio),
        Cell(f"{row.over_floor:.2f}"),
        Cell(f"{row.tflops:.0f}"),
        Cell(f"{row.gb_per_s:.0f}"),
    ]


def summary_cells(summary: Summary) -> list[Cell]:
    """A summary's figures, in the order of SUMMARY_COLUMNS."""
    live = summary.live_over_baseline
    return [
        Cell(summary.label),
        Cell(str(summary.num_shapes)),
        _ratio_cell(summary.vs_deepgemm),
        Cell(
            "-" if summary.num_losses is None else str(summary.num_losses), bool(summary.num_losses)
        ),
        _ratio_cell(summary.vs_cublaslt),
        Cell(f"{summary.over_floor:.2f}"),
        Cell("-" if live is None else f"{live:.2f}"),
    ]


def _ratio_cell(ratio: float | None) -> Cell:
    return Cell("-") if ratio is None else Cell(f"{ratio:.2f}", ratio < 1)


# --- Markdown -------------------------------------------------------------------------------------


def render_markdown(result: Result) -> str:
    """The report of `result`: geometric means, then every shape; where a peer wins, in bold."""
    meta, baseline, rows = result.meta, baseline_meta(), result.rows
    lines = [
        "# Performance of the FP8 GEMM",
        "",
        f"Written by `{meta.command}`; not by hand.",
        "",
        f"{meta.gpu}, driver {meta.driver}, NVRTC {meta.nvrtc}, torch {meta.torch},"
        f" jitgen {meta.jitgen}, {meta.date}.",
        "",
        f"{meta.method}",
        "",
        f"DeepGEMM {baseline['peers']['deepgemm']}: from a file, measured in the same way on an"
        f" {baseline['gpu']}, driver {baseline['driver']}, torch {baseline['torch']},"
        f" {baseline['measured']}, and shown for that GPU model only. `cuBLASLt live / file` near 1"
        " says that both machines behave alike. Where peer / jitgen is above 1, jitgen is faster;"
        " **bold**: the peer is. Kernels that one call of jitgen launches:"
        f" {' or '.join(map(str, num_launches(rows)))}.",
        "",
        "## Geometric means",
        "",
        *_markdown_table(SUMMARY_COLUMNS, [summary_cells(summary) for summary in summarize(rows)]),
    ]
    for m in sorted({row.shape.m for row in rows}):
        cells = [row_cells(row)[1:] for row in rows if row.shape.m == m]
        lines += ["", f"## M = {m}", "", *_markdown_table(COLUMNS[1:], cells)]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Iterator[str]:
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
    console.print(_table(COLUMNS, [row_cells(row) for row in result.rows]))
    console.print("* the peer is faster\n\nGeometric means")
    console.print(_table(SUMMARY_COLUMNS, [summary_cells(summary) for summary in summaries]))
    live = summaries[-1].live_over_baseline
    if live is not None and abs(live - 1) > LIVE_TOLERANCE:
        warnings.warn(
            f"cuBLASLt takes {live:.2f} of its time in the file: this machine is not like that one,"
            " and ratios to DeepGEMM mislead",
            stacklevel=2,
        )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"[red]{cell.text}*[/]" if cell.is_loss else cell.text for cell in row))
    return table
