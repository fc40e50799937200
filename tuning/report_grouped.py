"""The report of `jitgen bench grouped`: geometric means and tables, for a terminal and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .bench import baseline_meta
from .bench_fused import FusedRow
from .bench_grouped import GroupedRow, GroupedShape
from .bench_k_grouped import PEERS, KGroupedRow
from .report import Cell, Meta, common_meta, figure_cell, geomean, reading, section, table

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = (
    *("layout", "groups", "rows/group", "rows", "N", "K", "jitgen us", "spread", "DeepGEMM us"),
    *("DeepGEMM / jitgen", "time / floor", "TFLOPS", "GB/s", "schedule"),
)
FUSED_COLUMNS = (
    *("groups", "rows/group", "N", "K", "GEMM us", "fused us", "fused / GEMM"),
    *("unfused, torch us", "/ fused", "unfused, torch.compile us", "/ fused", "schedules"),
)
K_GROUPED_COLUMNS = (
    *("groups", "k/group", "k", "M", "N", "jitgen us", "spread", "time / floor", "TFLOPS"),
    *(f"{peer.title} / jitgen" for peer in PEERS.values()),
    "schedule",
)
SUMMARY_COLUMNS = (
    *("layout", "groups", "rows/group", "DeepGEMM / jitgen", "least", "slower", "time / floor"),
    "group_of_row / ragged",
)


@dataclass(frozen=True)
class GroupedResult:
    """A benchmark run.

    live_over_baseline : cuBLASLt's time now over that in the file, for a dense GEMM; near 1 on a
        machine like that of the baselines
    fused : gate and up rows with SwiGLU and quantization, if they were measured
    k_grouped : weight gradients, if they were measured
    """

    meta: Meta
    rows: tuple[GroupedRow, ...]
    live_over_baseline: float | None
    fused: tuple[FusedRow, ...] = ()
    k_grouped: tuple[KGroupedRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields and the figures derived of them, as JSON values."""
        return {
            "meta": asdict(self.meta),
            "live_over_baseline": self.live_over_baseline,
            "rows": [row.to_json() for row in self.rows],
            "fused": [row.to_json() for row in self.fused],
            "k_grouped": [row.to_json() for row in self.k_grouped],
        }

    @classmethod
    def from_json(cls, *results: Any) -> GroupedResult:
        """What `to_json` wrote, of one run or of several on GPUs of one name; of a shape the last.

        Raises
        ------
        ProblemError : a field is missing, or another than this version writes; the GPUs differ
        """
        with reading("bench grouped"):
            found = [
                cls(
                    Meta(**data["meta"]),
                    tuple(map(GroupedRow.from_json, data["rows"])),
                    data["live_over_baseline"],
                    tuple(map(FusedRow.from_json, data["fused"])),
                    tuple(map(KGroupedRow.from_json, data.get("k_grouped", ()))),
                )
                for data in results
            ]
        rows = {row.shape: row for result in found for row in result.rows}
        fused = {row.shape: row for result in found for row in result.fused}
        k_grouped = {row.shape: row for result in found for row in result.k_grouped}
        return cls(
            common_meta([result.meta for result in found]),
            tuple(rows.values()),
            found[0].live_over_baseline,
            tuple(fused.values()),
            tuple(k_grouped.values()),
        )


def row_cells(row: GroupedRow) -> list[Cell]:
    """A row's figures, in the order of COLUMNS."""
    shape, us = row.shape, row.jitgen.kernel_us
    extents = (len(shape.counts), shape.expected, shape.num_rows, shape.n, shape.k)
    return [
        Cell(shape.layout),
        *(Cell(str(extent)) for extent in extents),
        Cell(f"{us:.2f}"),
        Cell(f"{row.jitgen.std_us / us:.1%}"),
        figure_cell(row.deepgemm_us, loss_below=us),
        figure_cell(row.ratio),
        Cell(f"{us / shape.floor_us:.2f}"),
        Cell(f"{shape.flops / us / 1e6:.0f}"),
        Cell(f"{shape.num_bytes / us / 1e3:.0f}"),
        Cell(str(row.schedule)),
    ]


def fused_cells(row: FusedRow) -> list[Cell]:
    """A row's figures, in the order of FUSED_COLUMNS."""
    shape, plain, fused = row.shape, row.plain.kernel_us, row.fused.kernel_us
    cells = [Cell(str(value)) for value in (len(shape.counts), shape.expected, shape.n, shape.k)]
    cells += [Cell(f"{plain:.2f}"), Cell(f"{fused:.2f}"), Cell(f"{row.over_plain:.3f}")]
    for name in ("torch", "torch.compile"):
        cells += [figure_cell(row.unfused_us(name)), figure_cell(row.ratio(name))]
    return [*cells, Cell("; ".join(map(str, row.schedules)))]


def k_grouped_cells(row: KGroupedRow) -> list[Cell]:
    """A row's figures, in the order of K_GROUPED_COLUMNS."""
    shape, us = row.shape, row.jitgen.kernel_us
    extents = shape.num_groups, shape.expected, sum(shape.ks), shape.m, shape.n
    return [
        *(Cell(str(extent)) for extent in extents),
        Cell(f"{us:.2f}"),
        Cell(f"{row.jitgen.std_us / us:.1%}"),
        Cell(f"{us / shape.floor_us:.2f}"),
        Cell(f"{shape.flops / us / 1e6:.0f}"),
        *(figure_cell(row.ratio(name)) for name in PEERS),
        Cell(str(row.schedule)),
    ]


def k_grouped_means(rows: Sequence[KGroupedRow]) -> list[Cell]:
    """Geometric means over all rows, in the order of K_GROUPED_COLUMNS."""
    ratios = ([row.ratio(name) for row in rows] for name in PEERS)
    known = ([ratio for ratio in of_peer if ratio is not None] for of_peer in ratios)
    return [
        *map(Cell, ("all", *("",) * 6)),
        Cell(f"{geomean(row.jitgen.kernel_us / row.shape.floor_us for row in rows):.2f}"),
        Cell(""),
        *(figure_cell(geomean(of) if len(of) == len(rows) else None) for of in known),
        Cell(""),
    ]


def summary_cells(rows: Sequence[GroupedRow]) -> list[list[Cell]]:
    """In the order of SUMMARY_COLUMNS, of each kind of shape, then of each layout."""
    kinds: dict[tuple[str, ...], list[GroupedRow]] = {}
    for row in rows:
        kind = row.shape.layout, str(len(row.shape.counts)), str(row.shape.expected)
        kinds.setdefault(kind, []).append(row)
    for row in rows:
        kinds.setdefault((row.shape.layout, "all", "all"), []).append(row)
    times = {row.shape: row.jitgen.kernel_us for row in rows}
    return [_summary(kind, found, times) for kind, found in kinds.items()]


def _summary(
    kind: tuple[str, ...], rows: Sequence[GroupedRow], times: Mapping[GroupedShape, float]
) -> list[Cell]:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    losses = sum(ratio < 1 for ratio in ratios)
    complete = len(ratios) == len(rows)
    padded = [
        times[same] / row.jitgen.kernel_us
        for row in rows
        if (same := replace(row.shape, layout="group_of_row")) in times
        and row.shape.layout == "ragged"
    ]
    return [
        *map(Cell, kind),
        figure_cell(geomean(ratios) if complete else None),
        figure_cell(min(ratios) if complete else None),
        Cell(f"{losses} of {len(rows)}" if complete else "-", losses > 0),
        Cell(f"{geomean(row.jitgen.kernel_us / row.shape.floor_us for row in rows):.2f}"),
        figure_cell(geomean(padded) if padded else None),
    ]


def render_markdown(result: GroupedResult) -> str:
    """The report of `result`; where DeepGEMM is faster, in bold."""
    meta, baseline, live = result.meta, baseline_meta(), result.live_over_baseline
    lines = [
        "# Performance of the grouped FP8 GEMM",
        "",
        f"Measured by `{meta.command}`, and written by it.",
        "",
        f"{meta.gpu}, driver {meta.driver}, NVRTC {meta.nvrtc}, torch {meta.torch},"
        f" jitgen {meta.jitgen}, {meta.date}.",
        "",
        meta.method,
        "",
        f"DeepGEMM {baseline['peers']['deepgemm']}: from a file, measured in the same way on an"
        f" {baseline['gpu']}, {baseline['measured']}, and shown for that GPU model only. Its"
        " rows are padded to 128 a group, and computed; ours are so in `group_of_row`, where they"
        " are skipped, and not in `ragged`. The counts of a group are drawn as the file's were, and"
        " add up to the same."
        + (f" cuBLASLt takes {live:.2f} of its time in the file." if live is not None else ""),
        *section("Geometric means", SUMMARY_COLUMNS, summary_cells(result.rows)),
        *_fused_section(result.fused),
        *_k_grouped_section(result.k_grouped),
        *section("Every shape", COLUMNS, map(row_cells, result.rows)),
    ]
    return "\n".join(lines) + "\n"


def _fused_section(rows: Sequence[FusedRow]) -> list[str]:
    if not rows:
        return []
    return [
        *section("SwiGLU and requantization", FUSED_COLUMNS, map(fused_cells, rows)),
        "",
        "Gate and up rows in one B, ragged. Fused: silu(gate) * up in E4M3 with a scale a 1x128"
        " block, in the GEMM's kernel. GEMM: its BF16 result alone. Unfused: that GEMM, then SwiGLU"
        " and quantization by torch, op by op or as torch.compile fuses them.",
    ]


def _k_grouped_section(rows: Sequence[KGroupedRow]) -> list[str]:
    if not rows:
        return []
    missing = dict.fromkeys(
        f"{title}: {text}" for row in rows for title, text in row.missing.items()
    )
    return [
        *section(
            "Weight gradients, K-grouped",
            K_GROUPED_COLUMNS,
            [*map(k_grouped_cells, rows), k_grouped_means(rows)],
        ),
        "",
        "D[g] [M, N] += A[:, ks of g] B[:, ks of g]^T, FP8 with a scale a 1x128 block of both,"
        " added to float32. 4 groups of 8192 and 8 of 4096 with N = 7168 and 2048 are the shapes of"
        " DeepGEMM's own test, the others those of experts that 8 to 64 GPUs share. The k of a"
        " group is 0.7 to 1.3 of k/group. The floor counts D read and written. Peers, live in the"
        " same run:"
        f" {'; '.join(f'{peer.title}: {peer.method}' for peer in PEERS.values())}.",
        *(["", "Not measured:", "", *(f"- {line}" for line in missing)] if missing else []),
    ]


def print_result(console: Console, result: GroupedResult) -> None:
    """Print every shape and the geometric means; where DeepGEMM is faster, in red."""
    console.print(table(COLUMNS, map(row_cells, result.rows)))
    if result.fused:
        console.print(table(FUSED_COLUMNS, map(fused_cells, result.fused), title="SwiGLU, E4M3"))
    if result.k_grouped:
        cells = [*map(k_grouped_cells, result.k_grouped), k_grouped_means(result.k_grouped)]
        console.print(table(K_GROUPED_COLUMNS, cells, title="K-grouped"))
    means = summary_cells(result.rows)
    console.print(table(SUMMARY_COLUMNS, means, title="Geometric means"))
    if result.live_over_baseline is not None:
        console.print(f"cuBLASLt live / file: {result.live_over_baseline:.2f}", highlight=False)
