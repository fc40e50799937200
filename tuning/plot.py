"""The picture of a benchmark: time over floor by M, of jitgen and its peers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from .bench import Row
from .report import TITLES, summarize

# Colour and marker by name: the markers tell apart what some eyes take for one colour.
STYLES = {
    "jitgen": ("#d1495b", "o"),
    "deepgemm": ("#2e6fb7", "s"),
    "cublaslt": ("#2f8f6b", "^"),
    "cublaslt_blockwise": ("#b8860b", "D"),
    "cutlass": ("#7a5aa6", "v"),
}


def series(rows: Sequence[Row]) -> tuple[list[str], Mapping[str, list[float | None]]]:
    """Each M, and by name the geometric means of time / floor; None where a peer is missing."""
    summaries = summarize(rows)[:-1]  # the last one is of all rows
    lines = {name: [summary.over_floor[name] for summary in summaries] for name in STYLES}
    known = {name: line for name, line in lines.items() if any(v is not None for v in line)}
    return [summary.label for summary in summaries], known


def render_svg(rows: Sequence[Row]) -> str | None:
    """The plot as SVG, the same text for the same rows; None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    extents, lines = series(rows)
    positions = range(len(extents))
    with matplotlib.rc_context({"svg.hashsalt": "jitgen", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, values in lines.items():
            color, marker = STYLES[name]
            axes.plot(
                positions,
                [float("nan") if value is None else value for value in values],
                color=color,
                marker=marker,
                linewidth=2.5 if name == "jitgen" else 1.5,
                zorder=3 if name == "jitgen" else 2,
                label=TITLES.get(name, name),
            )
        axes.set_xticks(positions, extents)
        axes.set_xlabel("M")
        axes.set_ylabel("time / floor, geometric mean (lower is better)")
        axes.set_ylim(bottom=1)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
