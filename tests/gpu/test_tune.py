"""Tuning, plans and batch invariance on the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

import jitgen  # noqa: E402
from jitgen import Gemm, Schedule, build, cli  # noqa: E402
from jitgen.errors import CandidateError  # noqa: E402
from jitgen.runtime import driver  # noqa: E402
from jitgen.tuning import measure, select  # noqa: E402
from jitgen.tuning.measure import GpuMeasurer  # noqa: E402
from jitgen.tuning.records import read_folder  # noqa: E402
from jitgen.tuning.space_mla import mla_name  # noqa: E402

from . import draws  # noqa: E402

N, K = 264, 1040


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("JITGEN_RECORDS_DIR", str(tmp_path))
    select.reload_records()
    yield tmp_path
    select.reload_records()


def test_tune_records_a_schedule_that_gemm_then_takes(records: Path) -> None:
    shape = ("--n", str(N), "--k", str(K), "--m", "100")
    result = CliRunner().invoke(cli.app, ["tune", *shape, "--candidates", "3"])
    assert result.exit_code == 0, result.output
    (line,) = map(json.loads, (records / "journal.jsonl").read_text().splitlines())
    assert line["errors"] == []
    assert len(line["trials"]) == 3
    if line["status"] == "unstable":
        pytest.skip(f"something else runs on this GPU: {line['reason']}")
    (record,) = read_folder(records)
    assert (record.m, record.num_candidates, record.gpu) == (128, 3, driver.device(0).gpu)
    assert 1 < record.kernel_us < 100
    select.reload_records()
    assert select.select(Gemm(N, K), 100, record.gpu) == record.schedule


def test_measurer_times_schedules_in_turns() -> None:
    schedules = [Schedule(64, 64, 4, 1), Schedule(128, 128, 4)]
    problem = Gemm(4096, 4096)
    measurer = GpuMeasurer()
    for schedule in schedules:
        measurer.check(problem, 64, schedule)
    times = measurer.time(problem, 64, schedules, 5)
    assert [len(some) for some in times] == [5, 5]
    assert all(5 < us < 200 for some in times for us in some)


@pytest.mark.parametrize("layout", ["ragged", "masked"])
def test_tune_records_grouped_gemms_for_every_layout(records: Path, layout: str) -> None:
    shape = ("--n", "512", "--k", str(K), "--num-groups", "5", "--m", "400")
    options = ("--gated", "--out-dtype", "float8_e4m3fn", "--candidates", "3")
    result = CliRunner().invoke(cli.app, ["tune", *shape, *options])
    assert result.exit_code == 0, result.output
    (line,) = map(json.loads, (records / "journal.jsonl").read_text().splitlines())
    assert line["errors"] == []
    assert line["job"] == f"m384-g5-n512-k{K}-e4m3-gated"
    if line["status"] == "unstable":
        pytest.skip(f"something else runs on this GPU: {line['reason']}")
    (record,) = read_folder(records)
    select.reload_records()
    epilogue = jitgen.silu(jitgen.gate) * jitgen.up
    problem = jitgen.GroupedGemm(512, K, jitgen.E4M3, epilogue, num_groups=5, layout=layout)  # type: ignore[arg-type]
    assert select.select(problem, 390, record.gpu) == record.schedule


@pytest.mark.parametrize("entry", [{}, {"out_dtype": "bf16", "b_scale": "128x128"}], ids=str)
def test_tune_records_k_grouped_gemms(records: Path, tmp_path: Path, entry: dict[str, str]) -> None:
    listed = tmp_path / "list.json"
    shape = {"n": 520, "m": [200], "num_groups": 5, "layout": "k_grouped"}
    listed.write_text(json.dumps([shape | entry]))
    options = ("--problems", str(listed), "--candidates", "4")
    result = CliRunner().invoke(cli.app, ["tune", *options])
    assert result.exit_code == 0, result.output
    (line,) = map(json.loads, (records / "journal.jsonl").read_text().splitlines())
    assert line["errors"] == []
    assert line["job"] == f"m256-g5-n520-by-k-{'bf16-b128x128' if entry else 'f32'}"
    if line["status"] == "unstable":
        pytest.skip(f"something else runs on this GPU: {line['reason']}")
    (record,) = read_folder(records)
    select.reload_records()
    assert select.select(record.problem, 200, record.gpu) == record.schedule
    a, sfa = jitgen.quantize(torch.randn(200, 640, device="cuda"))
    b, sfb = jitgen.quantize(torch.randn(520, 640, device="cuda"), (128 if entry else 1, 128))
    layout = jitgen.KGrouped(torch.arange(6, dtype=torch.int32, device="cuda") * 128)
    out = torch.zeros(5, 200, 520, dtype=torch.bfloat16 if entry else torch.float32, device="cuda")
    jitgen.grouped_gemm(a, b, (sfa, sfb), layout=layout, out=out)
    chosen = out.clone()
    out.zero_()
    jitgen.grouped_gemm(a, b, (sfa, sfb), layout=layout, out=out, schedule=record.schedule)
    assert torch.equal(out, chosen)


def test_tune_records_sparse_mla_decode(records: Path, tmp_path: Path) -> None:
    fields = {"num_queries": 2, "cache": "fp8", "sparse": True, "causal": False}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"num_heads": 64, "b": [1, 3]} | fields]))
    result = CliRunner().invoke(cli.app, ["tune", "--problems", str(listed), "--candidates", "3"])
    assert result.exit_code == 0, result.output
    (line,) = map(json.loads, (records / "journal.jsonl").read_text().splitlines())
    assert line["errors"] == []
    problem = jitgen.MlaDecode(64, **fields)
    assert line["job"] == f"b4-mla-{mla_name(problem)}"
    if line["status"] == "unstable":
        pytest.skip(f"something else runs on this GPU: {line['reason']}")
    (record,) = read_folder(records)
    select.reload_records()
    assert select.select(problem, 3, record.gpu) == record.schedule


def test_measurer_rejects_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = Schedule(64, 64, 4, 1), Schedule(64, 96, 4, 1)

    def spoilt(*arguments: Any, out: torch.Tensor, **options: Any) -> None:
        jitgen.gemm(*arguments, out=out, **options)
        if options["schedule"] == wrong:
            out.view(torch.int16)[63, 200] ^= 1

    monkeypatch.setattr(measure, "gemm", spoilt)
    measurer = GpuMeasurer()
    measurer.check(Gemm(N, K), 64, right)
    with pytest.raises(CandidateError, match=r"the first, \[63, 200\]"):
        measurer.check(Gemm(N, K), 64, wrong)


@pytest.mark.parametrize("epilogue", ["plain", "gelu"])
def test_batch_invariant_rows_do_not_depend_on_m(epilogue: str) -> None:
    problem = Gemm(N, K, jitgen.BF16, draws.EPILOGUES[epilogue])
    draw = draws.Draw(300, problem, Schedule(64, 64, 2, 1), "row", epilogue, 7)
    inputs = draws.make_inputs(draw)
    bound = problem.epilogue.bind(**{n: t for n, t in inputs.items() if n == "bias"})

    def rows(begin: int, end: int) -> torch.Tensor:
        a, sfa = inputs["a"][begin:end], inputs["sfa"][begin:end]
        scales = (sfa, inputs["sfb"])
        d = jitgen.gemm(a, inputs["b"], scales, epilogue=bound, batch_invariant=True)
        return draws.bits(d)

    whole = rows(0, 300)
    for m in range(1, 301):
        assert torch.equal(rows(0, m), whole[:m]), m
    for begin in (1, 63, 64, 200, 299):
        assert torch.equal(rows(begin, 300), whole[begin:]), begin


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_plan_leaves_no_compile_to_any_m(batch_invariant: bool) -> None:
    problem = Gemm(N, K)
    jitgen.plan(problem, range(1, 301), batch_invariant=batch_invariant).prebuild()
    x = torch.randn(300, K, device="cuda")
    a, sfa = jitgen.quantize(x)
    b, sfb = jitgen.quantize(torch.randn(N, K, device="cuda"), (128, 128))
    before = build.default_store().stats.compiles
    for m in range(1, 301):
        jitgen.gemm(a[:m], b, (sfa[:m], sfb), batch_invariant=batch_invariant)
    assert build.default_store().stats.compiles == before
