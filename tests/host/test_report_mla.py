"""The report of MLA decode's benchmark without a GPU: figures, files, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jitgen.cli import app
from jitgen.errors import ProblemError
from jitgen.runtime.driver import Device
from jitgen.tuning import bench, bench_mla, report, report_mla
from jitgen.tuning.bench_mla import MlaRow, MlaShape, mla_baselines

META = report.Meta("GPU", "1", "13", "2", "4", "0", "2026-01-01", "Method.", {}, "jitgen bench mla")
ROWS = (
    MlaRow(MlaShape(1, 1, 16, 1024), 10.0, 16.0),
    MlaRow(MlaShape(16, 2, 128, 1024), 50.0, 40.0),
    MlaRow(MlaShape(1, 1, 16, 1024, "fp8"), 10.0, 16.0),
    MlaRow(MlaShape(2, 2, 128, 32768, "fp8", 2048), 20.0, None),
)
RESULT = report_mla.MlaResult(META, ROWS)


def test_report_marks_losses_and_gives_geometric_means_of_each_form() -> None:
    text = report_mla.render_markdown(RESULT)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        *("## BF16 cache: geometric means", "## FP8 cache: geometric means"),
        *("## Sparse, FP8 cache: geometric means", "## BF16 cache: every shape"),
        *("## FP8 cache: every shape", "## Sparse, FP8 cache: every shape"),
    ]
    assert "| all | 2 | 1.13 | **1** | **0.80** |" in text
    assert "| h = 16 | 1 | 1.60 | 0 | 1.60 |" in text
    assert "| keys = 2048 | 1 | - | - | - |" in text
    assert "| 16 | 2 | 128 | 1024 | 50.00 | **40.00** | **0.80** | 183 | 556 |" in text
    assert "| 2 | 2 | 128 | top 2048 | 20.00 | - | - |" in text


def test_result_is_read_again_from_one_file_or_several() -> None:
    text = json.dumps(RESULT.to_json())
    assert report_mla.MlaResult.from_json(json.loads(text)) == RESULT
    other = replace(META, command="jitgen bench mla --format fp8")
    parts = replace(RESULT, rows=ROWS[:2]), report_mla.MlaResult(other, ROWS[2:])
    both = report_mla.MlaResult.from_json(*(part.to_json() for part in parts))
    assert both.rows == ROWS
    assert both.meta.command == f"{META.command}; {other.command}"


def test_result_rejects_other_fields_and_several_gpus() -> None:
    data = RESULT.to_json()
    with pytest.raises(ProblemError, match="this version's `jitgen bench mla --json`"):
        report_mla.MlaResult.from_json({"meta": data["meta"], "rows": [{}]})
    other = replace(RESULT, meta=replace(META, gpu="Another")).to_json()
    with pytest.raises(ProblemError, match="Another and GPU: report each alone"):
        report_mla.MlaResult.from_json(data, other)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench mla` takes 20 us for every shape."""

    def bench_rows(shapes: Iterable[MlaShape], device: Device) -> Iterator[MlaRow]:
        times = mla_baselines() | mla_baselines("fp8") | mla_baselines("sparse")
        return (MlaRow(shape, 20.0, times[shape]) for shape in shapes)

    gpu = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
    monkeypatch.setattr(bench, "check_machine", lambda: gpu)
    monkeypatch.setattr(report, "collect_meta", lambda device, version, arguments: META)
    monkeypatch.setattr(bench_mla, "bench_mla", bench_rows)


def test_bench_mla_writes_a_report_and_bench_report_writes_it_again(
    measured: None, tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("out.json", "first.md", "again.md")]
    command = ["bench", "mla", "--json", files[0], "--markdown", files[1]]
    for form in ("bf16", "fp8", "sparse"):
        command += ["--format", form]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(app, ["bench", "report", files[0], "--markdown", files[2]])
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    text = Path(files[1]).read_text()
    assert text == Path(files[2]).read_text()
    assert "100 ms have room for" in text
    assert "| all | 144 |" in text
    assert "| 1 | 1 | 16 | 1024 | 20.00 | **15.90** | **0.80** | 2 | 61 |" in text


def test_bench_report_takes_several_files_of_mla_only(tmp_path: Path) -> None:
    paths = tmp_path / "mla.json", tmp_path / "gemm.json"
    paths[0].write_text(json.dumps(RESULT.to_json()))
    paths[1].write_text("{}")
    result = CliRunner().invoke(app, ["bench", "report", *map(str, paths)])
    assert result.exit_code == 2
    assert "only results of `bench grouped` or" in result.output
