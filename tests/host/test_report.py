"""Reports: figures, Markdown, JSON, plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jitgen.errors import ProblemError
from jitgen.runtime.driver import Device
from jitgen.schedule import Schedule
from jitgen.tuning import plot, report
from jitgen.tuning.bench import GRID_DENSE, Baseline, PeerTime, Row, Shape
from jitgen.tuning.report import Meta, Result
from jitgen.tuning.timing import Measurement

SCHEDULE = Schedule(64, 64, 4, num_math_warpgroups=1)
SMALL = Shape(70, 136, 256)
H100 = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
META = Meta(
    gpu=H100.name,
    driver="580.1",
    nvrtc="13.0.88",
    torch="2.11",
    cutlass="4.2.0 (nvcc 13.0.88)",
    jitgen="0.1.0",
    date="2026-11-22",
    method="Method.",
    peers={"cuBLASLt": "per tensor."},
    command="jitgen bench",
)
WIN, LOSS = GRID_DENSE[0], GRID_DENSE[-1]


def measured(kernel_us: float) -> Measurement:
    return Measurement(kernel_us, 0.1, kernel_us - 0.2, kernel_us + 0.2, 12, ("gemm",))


def row(shape: Shape, us: float, cublaslt_us: float, baseline: Baseline | None) -> Row:
    """A row without CUTLASS, which takes half as long again with blockwise scales."""
    times = {
        "cublaslt": PeerTime("", measured(cublaslt_us)),
        "cublaslt_blockwise": PeerTime("", measured(1.5 * cublaslt_us)),
    }
    return Row(shape, SCHEDULE, measured(us), times, {"CUTLASS": "no nvcc"}, baseline)


@pytest.fixture
def result() -> Result:
    """One shape that beats the peers and one that loses to two."""
    rows = (
        row(WIN, 10.0, 20.0, Baseline(40.0, 20.0)),
        row(LOSS, 100.0, 90.0, Baseline(81.0, 45.0)),
    )
    return Result(META, rows)


def test_geomean_is_the_root_of_the_product() -> None:
    assert report.geomean([1, 8]) == pytest.approx(8**0.5)


def test_summarize_gives_each_m_and_all(result: Result) -> None:
    first, second, total = report.summarize(result.rows)
    assert [first.label, second.label, total.label] == ["1", "4096", "all"]
    ratios = {"deepgemm": 4, "cublaslt": 2, "cublaslt_blockwise": 3, "cutlass": None, "best": 2}
    assert first.ratios == pytest.approx(ratios)
    assert set(first.num_losses.values()) == {0, None}
    assert list(second.num_losses.values()) == [1, 1, 0, None, 1]
    assert (total.num_losses["best"], total.num_shapes) == (1, 2)
    assert total.ratios["best"] == pytest.approx((2 * 0.81) ** 0.5)
    assert total.live_over_baseline == pytest.approx(2**0.5)
    assert first.over_floor["jitgen"] == pytest.approx(10 / WIN.floor_us)
    assert first.over_floor["cublaslt_blockwise"] == pytest.approx(30 / WIN.floor_us)
    assert first.over_floor["cutlass"] is None


def test_summarize_compares_with_no_partial_baseline(result: Result) -> None:
    rows = (*result.rows, row(SMALL, 5.0, 6.0, None))
    total = report.summarize(rows)[-1]
    for name in ("deepgemm", "best"):
        figures = total.ratios[name], total.num_losses[name], total.over_floor[name]
        assert figures == (None, None, None)
    assert total.live_over_baseline is None
    assert total.ratios["cublaslt"] == pytest.approx((2 * 0.9 * 1.2) ** (1 / 3))
    assert report.summarize([]) == []


def table(text: str, title: str) -> list[dict[str, str]]:
    """The rows of the Markdown table below a heading, by column."""
    lines = text.split(f"\n## {title}\n\n")[1].split("\n\n")[0].splitlines()
    columns, _, *rows = (line.strip("| ").split(" | ") for line in lines)
    return [dict(zip(columns, cells, strict=True)) for cells in rows]


def test_render_markdown_shows_losses_in_bold(result: Result) -> None:
    text = report.render_markdown(result)
    (won,), (lost,) = table(text, "M = 1"), table(text, "M = 4096")
    assert not any("**" in cell for cell in won.values())
    assert (won["jitgen us"], won["spread"], won["DeepGEMM us"]) == ("10.00", "1.0%", "40.00")
    assert (won["CUTLASS us"], won["best peer / jitgen"]) == ("-", "2.00")
    assert (lost["DeepGEMM us"], lost["cuBLASLt us"]) == ("**81.00**", "**90.00**")
    assert (lost["cuBLASLt blockwise us"], lost["best peer / jitgen"]) == ("135.00", "**0.81**")
    total = table(text, "Geometric means")[-1]
    assert (total["best peer / jitgen"], total["slower than best peer"]) == ("1.27", "**1**")
    assert (total["cuBLASLt / jitgen"], total["cuBLASLt live / file"]) == ("1.34", "1.41")
    floors = table(text, "Time over floor, geometric means")
    assert [cells["M"] for cells in floors] == ["1", "4096", "all"]
    assert floors[1]["DeepGEMM"].startswith("**")
    assert floors[0]["CUTLASS"] == "-"


def test_render_markdown_says_where_and_how(result: Result) -> None:
    text = report.render_markdown(result)
    for part in (*vars(META).values(), "## M = 1", "## M = 4096", "DeepGEMM 2.6.1", "launches: 1."):
        assert part is META.peers or part in text
    assert "- cuBLASLt, live in the same run: per tensor.\n" in text
    assert "Not measured:\n\n- CUTLASS, every shape: no nvcc\n" in text
    configs = table(text, "Schedules")
    assert [cells["jitgen"] for cells in configs] == [str(SCHEDULE)] * 2
    assert "![" not in text
    assert "(plot.svg)" in report.render_markdown(result, plot="plot.svg")


def test_render_markdown_names_the_shapes_that_a_peer_lacks(result: Result) -> None:
    rows = (result.rows[0], replace(result.rows[1], missing={}))
    text = report.render_markdown(replace(result, rows=rows))
    assert f"- CUTLASS, {WIN}: no nvcc\n" in text


def test_result_json_holds_all_figures_and_reads_back(result: Result) -> None:
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["meta"] == vars(META)
    one = data["rows"][1]
    assert one["shape"] == {"m": 4096, "n": 7168, "k": 2048}
    assert one["schedule"]["num_stages"] == SCHEDULE.num_stages
    assert (one["jitgen"]["kernel_us"], one["jitgen"]["kernels"]) == (100.0, ["gemm"])
    assert one["peers"]["cublaslt"]["measurement"]["kernel_us"] == 90.0
    derived = one["derived"]
    assert derived["ratios"]["deepgemm"] == pytest.approx(0.81)
    assert (derived["num_kernels"], derived["floor_us"]) == (1, pytest.approx(LOSS.floor_us))
    assert Result.from_json(data) == result


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data.pop("rows"), "KeyError 'rows'"),
        (lambda data: data["meta"].pop("date"), "TypeError .*date"),
        (lambda data: data["rows"][0].pop("peers"), "KeyError 'peers'"),
        (lambda data: data["rows"][0]["schedule"].update(block_q=1), "TypeError .*block_q"),
    ],
    ids=["rows", "meta", "peers", "schedule"],
)
def test_result_rejects_json_of_another_version(
    result: Result, spoil: Callable[[Any], object], message: str
) -> None:
    data = json.loads(json.dumps(result.to_json()))
    spoil(data)
    with pytest.raises(ProblemError, match=message):
        Result.from_json(data)


def test_collect_meta_keeps_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(report, "driver_release", lambda: "580.1")
    monkeypatch.setattr(report, "describe", lambda: "4.2.0 (nvcc 13.0.88)")
    arguments = ["bench", "gemm", "--json", "/tmp/out/a b.json", "--markdown=/srv/docs/p.md"]
    meta = report.collect_meta(H100, version="0.1.0", arguments=arguments)
    assert meta.command == "jitgen bench gemm --json 'a b.json' --markdown=p.md"
    assert list(meta.peers) == ["cuBLASLt", "cuBLASLt blockwise", "CUTLASS"]


# --- the plot -------------------------------------------------------------------------------------


def test_plot_has_a_style_for_everything_compared() -> None:
    assert set(plot.STYLES) | {"best"} == {"jitgen", *report.TITLES}


def test_series_are_geometric_means_by_m_without_missing_peers(result: Result) -> None:
    rows = (*result.rows, row(SMALL, 5.0, 6.0, None))
    extents, lines = plot.series(rows)
    assert extents == ["1", "70", "4096"]
    assert list(lines) == ["jitgen", "deepgemm", "cublaslt", "cublaslt_blockwise"]
    assert lines["deepgemm"] == [
        pytest.approx(40 / WIN.floor_us),
        None,
        pytest.approx(81 / LOSS.floor_us),
    ]


def test_over_floor_svg_draws_each_series_and_is_reproducible(result: Result) -> None:
    pytest.importorskip("matplotlib")
    svg = plot.over_floor_svg(result.rows)
    assert svg is not None
    assert svg == plot.over_floor_svg(result.rows)
    assert "DeepGEMM" in svg
    assert "CUTLASS" not in svg


def test_over_floor_svg_without_matplotlib_is_none(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.over_floor_svg(result.rows) is None
