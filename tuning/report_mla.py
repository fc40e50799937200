"""The report of `jitgen bench mla`: geometric means and tables, for a terminal and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .bench_mla import (
    FORMS,
    SPARSE_KEYS,
    MlaRow,
    known_geomean,
    mla_baseline_meta,
)
from .operands_mla import ABSOLUTE_ERROR, COSINE_ERROR, LSE_ERROR, RELATIVE_ERROR
from .report import Cell, Meta, common_meta, figure_cell, reading, section, table
from .timing import REPEAT_MS, WARMUP_MS

if TYPE_CHECKING:
    from rich.console import Console

FAMILY = "mla"  # that a file of results names
METHOD = (
    "Times: the median between two CUDA events around a call, as `triton.testing.do_bench` takes"
    f" it, of as many as {REPEAT_MS:g} ms have room for, after {WARMUP_MS:g} ms of others: more"
    " than the kernel's own by a launch. Before each call a buffer of 256 MB is overwritten, which"
    " flushes L2. Head dims 576 and 512, a cache of the shape's pages alone, 64 keys each, in"
    " random order, as FlashMLA's own tests have it, causal where s_q > 1, random normal data."
    " Before a call is timed, its result for two of the sequences is compared with float64, within"
    " the bounds of FlashMLA's own tests: each output by"
    f" {ABSOLUTE_ERROR:g} or {RELATIVE_ERROR:.3g} of itself, all by a cosine difference of"
    f" {COSINE_ERROR:g}, lse by {LSE_ERROR:.2g} of itself. TFLOPS count all keys, masked or not;"
    " GB/s each key, query and output once."
)
NOTES = {
    "bf16": "",
    "fp8": "FlashMLA has no dense decode over an FP8 cache: its times are those over BF16.",
    "sparse": f"Lists of `top` random tokens among the {SPARSE_KEYS} of each sequence.",
}
TITLES = {"bf16": "BF16 cache", "fp8": "FP8 cache", "sparse": "Sparse, FP8 cache"}
COLUMNS = (
    *("b", "s_q", "h", "keys", "jitgen us", "FlashMLA us"),
    *("FlashMLA / jitgen", "TFLOPS", "GB/s"),
)
SUMMARY_COLUMNS = ("rows", "number", "FlashMLA / jitgen", "slower", "least")


@dataclass(frozen=True)
class MlaResult:
    """A benchmark run."""

    meta: Meta
    rows: tuple[MlaRow, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields and the figures derived of them, as JSON values."""
        rows = [row.to_json() for row in self.rows]
        return {"family": FAMILY, "meta": asdict(self.meta), "rows": rows}

    @classmethod
    def from_json(cls, *results: Any) -> MlaResult:
        """What `to_json` wrote, of one run or of several on GPUs of one name.

        Raises
        ------
        ProblemError : a field is missing, or another than this version writes; the GPUs differ
        """
        with reading("bench mla"):
            found = [
                cls(Meta(**data["meta"]), tuple(map(MlaRow.from_json, data["rows"])))
                for data in results
            ]
        rows = {row.shape: row for result in found for row in result.rows}
        return cls(common_meta([result.meta for result in found]), tuple(rows.values()))

    def of_form(self, form: str) -> list[MlaRow]:
        """The rows of one of FORMS."""
        return [row for row in self.rows if row.shape.form == form]


def row_cells(row: MlaRow) -> list[Cell]:
    """A row's figures, in the order of COLUMNS."""
    shape = row.shape
    keys = f"top {shape.topk}" if shape.topk else str(shape.s_k)
    return [
        *(Cell(str(extent)) for extent in (shape.b, shape.s_q, shape.h)),
        Cell(keys),
        Cell(f"{row.us:.2f}"),
        figure_cell(row.flashmla_us, loss_below=row.us),
        figure_cell(row.ratio),
        Cell(f"{row.tflops:.0f}"),
        Cell(f"{row.gb_per_s:.0f}"),
    ]


def summary_cells(rows: Sequence[MlaRow]) -> list[list[Cell]]:
    """In the order of SUMMARY_COLUMNS: of all rows, of each b, h and s_q, and of all keys."""
    kinds: dict[str, list[MlaRow]] = {"all": list(rows)}
    for name in ("b", "h", "s_q", "num_keys"):
        for value in sorted({getattr(row.shape, name) for row in rows}):
            label = f"{'keys' if name == 'num_keys' else name} = {value}"
            kinds[label] = [row for row in rows if getattr(row.shape, name) == value]
    return [_summary(label, found) for label, found in kinds.items()]


def _summary(label: str, rows: Sequence[MlaRow]) -> list[Cell]:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    losses = sum(ratio < 1 for ratio in ratios)
    return [
        Cell(label),
        Cell(str(len(rows))),
        figure_cell(known_geomean(ratios)),
        Cell(str(losses) if ratios else "-", losses > 0),
        figure_cell(min(ratios, default=None)),
    ]


def _forms(result: MlaResult) -> Iterator[tuple[str, list[MlaRow]]]:
    for form in FORMS:
        if rows := result.of_form(form):
            yield form, rows


def render_markdown(result: MlaResult) -> str:
    """The report of `result`; where FlashMLA is faster, in bold."""
    meta, baseline = result.meta, mla_baseline_meta()
    lines = [
        "# Performance of MLA decode",
        "",
        f"Measured by `{meta.command}`; written by it and by `jitgen bench report`, not by hand.",
        "",
        f"{meta.gpu}, driver {meta.driver}, NVRTC {meta.nvrtc}, torch {meta.torch},"
        f" jitgen {meta.jitgen}, {meta.date}.",
        "",
        meta.method,
        "",
        f"FlashMLA {baseline['flashmla']}: from a file, measured in the same way on an"
        f" {baseline['gpu']}, driver {baseline['driver']}, {baseline['measured']}, and shown for"
        " that GPU model only. Above 1, jitgen is faster; **bold**: FlashMLA is.",
    ]
    for form, rows in _forms(result):
        note = ["", NOTES[form]] if NOTES[form] else []
        means = section(f"{TITLES[form]}: geometric means", SUMMARY_COLUMNS, summary_cells(rows))
        lines += [*means, *note]
    for form, rows in _forms(result):
        lines += section(f"{TITLES[form]}: every shape", COLUMNS, map(row_cells, rows))
    return "\n".join(lines) + "\n"


def print_result(console: Console, result: MlaResult) -> None:
    """Print every shape and the geometric means; where FlashMLA is faster, in red."""
    for form, rows in _forms(result):
        console.print(table(COLUMNS, map(row_cells, rows), title=TITLES[form]))
        console.print(table(SUMMARY_COLUMNS, summary_cells(rows), title="Geometric means"))
