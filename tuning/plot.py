"""Pictures of benchmarks, of the cost model and of compile times, as SVG; None without matplotlib.

The same figures give the same text.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..problem import tuned_name
from .bench import FLOOR_BYTES_PER_US, FLOOR_FLOPS_PER_US, Row
from .regret import Regret
from .report import TITLES, summarize

# Colour and marker by name: the markers tell apart what some eyes take for one colour.
STYLES = {
    "jitgen": ("#d1495b", "o"),
    "deepgemm": ("#2e6fb7", "s"),
    "cublaslt": ("#2f8f6b", "^"),
    "cublaslt_blockwise": ("#b8860b", "D"),
    "cutlass": ("#7a5aa6", "v"),
}
OURS = STYLES["jitgen"][0]
SIZE = (7.5, 4.2)  # inches


def series(rows: Sequence[Row]) -> tuple[list[str], Mapping[str, list[float | None]]]:
    """Each M, and by name the geometric means of time / floor; None where a peer is missing."""
    summaries = summarize(rows)[:-1]  # the last one is of all rows
    lines = {name: [summary.over_floor[name] for summary in summaries] for name in STYLES}
    known = {name: line for name, line in lines.items() if any(v is not None for v in line)}
    return [summary.label for summary in summaries], known


def over_floor_svg(rows: Sequence[Row]) -> str | None:
    """Time over floor by M, of jitgen and its peers."""
    extents, lines = series(rows)
    positions = range(len(extents))

    def paint(axes: Any) -> None:
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
        axes.legend(frameon=False)

    return _draw(paint)


def roofline_svg(rows: Sequence[Row]) -> str | None:
    """TFLOPS by operations a byte, of every shape, below the bandwidth and the tensor cores."""
    ridge = FLOOR_FLOPS_PER_US / FLOOR_BYTES_PER_US
    found = [ridge, *(row.shape.flops_per_byte for row in rows)]
    ends = (min(found) / 2, ridge, max(found) * 2)

    def paint(axes: Any) -> None:
        roof = [min(x * FLOOR_BYTES_PER_US, FLOOR_FLOPS_PER_US) / 1e6 for x in ends]
        axes.loglog(ends, roof, color="#444444", linewidth=1.5)
        for i, m in enumerate(sorted({row.shape.m for row in rows})):
            group = [row for row in rows if row.shape.m == m]
            axes.plot(
                [row.shape.flops_per_byte for row in group],
                [row.tflops for row in group],
                linestyle="none",
                marker="osD^vPX*"[i % 8],
                label=f"M = {m}",
            )
        axes.set_xlabel("floating-point operations a byte")
        axes.set_ylabel("TFLOPS")
        axes.legend(frameon=False, ncols=2)

    return _draw(paint)


def regret_svg(found: Sequence[Regret]) -> str | None:
    """What the cost model's choice loses to the fastest schedule measured, by M."""
    extents = sorted({regret.m for regret in found})
    shapes = list(dict.fromkeys(tuned_name(regret.problem) for regret in found))

    def paint(axes: Any) -> None:
        for i, shape in enumerate(shapes):
            group = [r for r in found if tuned_name(r.problem) == shape]
            axes.plot(
                [extents.index(r.m) for r in group],
                [100 * (r.ratio - 1) for r in group],
                linestyle="none",
                marker="osD^vPX*"[i % 8],
                label=shape,
            )
        axes.set_xticks(range(len(extents)), map(str, extents))
        axes.set_xlabel("M")
        axes.set_ylabel("slower than the fastest measured, %")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return _draw(paint)


def predicted_svg(found: Sequence[Regret]) -> str | None:
    """Every schedule's predicted time by its measured one."""
    points = [(t.kernel_us, us) for regret in found for t, us in regret.trials]
    ends = [min(map(min, points)), max(map(max, points))]

    def paint(axes: Any) -> None:
        axes.loglog(ends, ends, color="#444444", linewidth=1)
        measured, predicted = zip(*points, strict=True)
        axes.plot(measured, predicted, linestyle="none", marker=".", alpha=0.5, color=OURS)
        axes.set_xlabel("measured us")
        axes.set_ylabel("predicted us")

    return _draw(paint)


def compile_svg(seconds: Sequence[float]) -> str | None:
    """How many kernels took how long to compile."""

    def paint(axes: Any) -> None:
        axes.hist(seconds, bins=24, color=OURS)
        axes.set_xlabel("seconds of NVRTC for a kernel")
        axes.set_ylabel("kernels")
        axes.set_xlim(left=0)

    return _draw(paint)


def _draw(paint: Callable[[Any], None]) -> str | None:
    """What `paint` puts on the axes it is given."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    with matplotlib.rc_context({"svg.hashsalt": "jitgen", "svg.fonttype": "none"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        paint(axes)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
