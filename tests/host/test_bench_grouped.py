"""Grouped benchmarks without a GPU: the baselines' shapes, the check of a result, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jitgen
from jitgen import Schedule
from jitgen.cli import app
from jitgen.dtypes import BF16, E4M3, F32
from jitgen.errors import ProblemError, VerifyError
from jitgen.tuning import bench_fused, report_grouped
from jitgen.tuning.bench import to_numpy
from jitgen.tuning.bench_grouped import (
    GroupedRow,
    GroupedShape,
    check,
    deal,
    grid_grouped,
    make_tensors,
    padded,
)
from jitgen.tuning.report import Meta
from jitgen.tuning.timing import Measurement

torch = pytest.importorskip("torch")

SCHEDULE = Schedule(64, 48, 4, 1)
LAYOUTS = ("group_of_row", "ragged", "masked")


def test_grid_has_every_row_of_the_baselines() -> None:
    grid = grid_grouped()
    by_layout = {name: [s for s in grid if s.layout == name] for name in LAYOUTS}
    assert [len(shapes) for shapes in by_layout.values()] == [16, 16, 24]
    assert {s.m for s in by_layout["group_of_row"]} == {34304, 34048, 10624, 12800}
    assert {s.num_rows for s in by_layout["masked"]} == {6559, 6262, 670, 121, 77, 501}
    for contiguous, ragged in zip(by_layout["group_of_row"], by_layout["ragged"], strict=True):
        assert replace(contiguous, layout="ragged") == ragged
        assert ragged.m == ragged.num_rows == contiguous.num_rows
        assert grid[contiguous] == grid[ragged]


def test_deal_stays_near_what_is_expected_and_adds_up() -> None:
    counts = deal(32, 256, 10624, padded)
    assert sum(map(padded, counts)) == 10624
    assert all(100 < count < 400 for count in counts)
    assert sum(deal(32, 20, 670, int, 256)) == 670
    assert deal(32, 20, 670, int, 256) == deal(32, 20, 670, int, 256)


def test_floor_counts_weights_of_groups_with_rows_only() -> None:
    shape = GroupedShape("ragged", (0, 1, 2), 256, 512, 0, 1)
    weights, scales = 2 * 256 * 512, 2 * 4 * 4 * 2 + 3 * 4 * 4
    assert shape.num_bytes == weights + scales + 3 * (512 + 2 * 256)
    assert shape.flops == 2 * 3 * 256 * 512
    assert shape.floor_us == pytest.approx(shape.num_bytes / 3e6 + 2)


def small(layout: Any) -> tuple[GroupedShape, dict[str, Any], Any]:
    """A shape, its tensors on the CPU, and D of the interpreter."""
    shape = GroupedShape(layout, (5, 0, 130), 136, 256, 200 if layout == "masked" else 0, 50)
    tensors = make_tensors(shape, "cpu")
    host = {name: to_numpy(tensors[name], E4M3) for name in ("a", "b")}
    host |= {name: to_numpy(tensors[name], F32) for name in ("sfa", "sfb")}
    groups = tensors["groups"].numpy()
    chosen = {
        "masked": lambda: jitgen.Masked(groups),
        "ragged": lambda: jitgen.Ragged(groups),
        "group_of_row": lambda: jitgen.Contiguous(group_of_row=groups),
    }[layout]()
    d = np.full((*host["a"].shape[:-1], 136), np.nan, BF16.numpy)
    jitgen.grouped_gemm(host["a"], host["b"], (host["sfa"], host["sfb"]), layout=chosen, out=d)
    return shape, tensors, torch.from_numpy(d.view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_accepts_the_interpreter_and_rejects_other_rows_and_bits(layout: str) -> None:
    shape, tensors, d = small(layout)
    check(shape, tensors, d)
    rows = d.view(-1, 136)
    written = ~torch.isnan(rows).any(1)
    wrong = rows.clone()
    wrong[int(written.nonzero()[-1])] = float("nan")
    with pytest.raises(VerifyError, match="other rows than those of groups"):
        check(shape, tensors, wrong.view(d.shape))
    with pytest.raises(VerifyError, match="differs from the interpreter's"):
        check(shape, tensors, d * 2)


def rows_of(deepgemm_us: float | None) -> tuple[GroupedRow, ...]:
    measured = Measurement(100.0, 1.0, 99.0, 101.0, 12, ("grouped",))
    shapes = [GroupedShape("ragged", (5, 9), 256, k, 0, 7) for k in (512, 1024)]
    return tuple(GroupedRow(shape, SCHEDULE, measured, deepgemm_us) for shape in shapes)


META = Meta("GPU", "1", "13", "2", "4", "0", "2026-01-01", "Method.", {}, "jitgen bench grouped")


def test_report_marks_losses_and_gives_geometric_means() -> None:
    rows = (*rows_of(80.0)[:1], *rows_of(180.0)[1:])
    result = report_grouped.GroupedResult(META, rows, 1.01)
    text = report_grouped.render_markdown(result)
    assert "| ragged | 2 | 7 | 1.20 | **0.80** | **1 of 2** |" in text
    assert "| ragged | all | all | 1.20 | **0.80** | **1 of 2** |" in text
    assert "| **80.00** | **0.80** |" in text
    assert "| 180.00 | 1.80 |" in text
    assert "cuBLASLt takes 1.01" in text
    data = json.loads(json.dumps(result.to_json()))
    assert [row["derived"]["ratio"] for row in data["rows"]] == [0.8, 1.8]


def fused_result() -> report_grouped.GroupedResult:
    measured = Measurement(100.0, 1.0, 99.0, 101.0, 12, ("grouped",))
    plain, torch_us = replace(measured, kernel_us=95.0), replace(measured, kernel_us=150.0)
    fused = bench_fused.FusedRow(
        bench_fused.FUSED_SHAPES[1],
        (SCHEDULE, SCHEDULE),
        plain,
        measured,
        {"torch": torch_us},
        {"torch.compile": "there is no Triton"},
    )
    return report_grouped.GroupedResult(META, rows_of(80.0), None, (fused,))


def test_report_of_fused_rows_has_both_bars() -> None:
    result = fused_result()
    text = report_grouped.render_markdown(result)
    assert "| 32 | 192 | 4096 | 7168 | 95.00 | 100.00 | 1.053 | 150.00 | 1.50 | - | - |" in text
    derived = json.loads(json.dumps(result.to_json()))["fused"][0]["derived"]
    assert derived["ratios"] == {"torch": 1.5}
    assert derived["over_plain"] == pytest.approx(100 / 95)


def test_report_compares_ragged_rows_with_the_padded_ones_of_the_same_counts() -> None:
    (row, _) = rows_of(80.0)
    slower = replace(row.jitgen, kernel_us=130.0)
    padded_row = replace(row, shape=replace(row.shape, layout="group_of_row"), jitgen=slower)
    text = report_grouped.render_markdown(report_grouped.GroupedResult(META, (row, padded_row), 1))
    ragged, *_ = (line for line in text.splitlines() if line.startswith("| ragged | 2 | 7 |"))
    assert ragged.endswith(" 1.30 |")


def test_result_is_read_back_from_json_and_reported_without_a_gpu(tmp_path: Path) -> None:
    result = fused_result()
    path, page = tmp_path / "grouped.json", tmp_path / "grouped.md"
    path.write_text(json.dumps(result.to_json()))
    assert report_grouped.GroupedResult.from_json(json.loads(path.read_text())) == result
    done = CliRunner().invoke(app, ["bench", "report", str(path), "--markdown", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text() == report_grouped.render_markdown(result)


def test_results_of_several_runs_are_one_report(tmp_path: Path) -> None:
    whole = fused_result()
    slower = replace(whole.rows[0], jitgen=replace(whole.rows[0].jitgen, kernel_us=200.0))
    parts = replace(whole, fused=()), replace(whole, rows=(slower,))
    stored = [json.loads(json.dumps(part.to_json())) for part in parts]
    read = report_grouped.GroupedResult.from_json(*stored)
    assert read.rows == (slower, whole.rows[1])
    assert read.fused == whole.fused
    other = replace(whole, meta=replace(META, gpu="another GPU"))
    with pytest.raises(ProblemError, match="GPU and another GPU: report each alone"):
        report_grouped.GroupedResult.from_json(whole.to_json(), other.to_json())
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(json.dumps(part.to_json()))
    page = tmp_path / "page.md"
    arguments = ["bench", "report", *map(str, paths), "--markdown", str(page)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert page.read_text() == report_grouped.render_markdown(read)


def test_result_rejects_json_of_another_version() -> None:
    data = json.loads(json.dumps(fused_result().to_json()))
    del data["fused"][0]["plain"]
    with pytest.raises(ProblemError, match="`jitgen bench grouped --json` wrote: KeyError 'plain'"):
        report_grouped.GroupedResult.from_json(data)


def test_swiglu_quantize_is_what_the_fused_epilogue_computes() -> None:
    h = torch.randn(5, 512).bfloat16()
    codes, scale = bench_fused.swiglu_quantize(h)
    gate, up = h.float().chunk(2, 1)
    want = jitgen.quantize((torch.nn.functional.silu(gate) * up).numpy())
    assert np.array_equal(codes.view(torch.uint8).numpy(), want[0].view(np.uint8))
    assert np.array_equal(scale.numpy(), want[1])
    bench_fused._check(bench_fused.FUSED_SHAPES[0], (codes, scale), (codes, scale))
    with pytest.raises(VerifyError, match="differs from torch's by"):
        bench_fused._check(bench_fused.FUSED_SHAPES[0], (codes, scale), (codes, 2 * scale))


def test_report_without_baselines_has_dashes() -> None:
    result = report_grouped.GroupedResult(META, rows_of(None), None)
    text = report_grouped.render_markdown(result)
    assert "| ragged | 2 | 7 | - | - | - |" in text
    assert "cuBLASLt" not in text
