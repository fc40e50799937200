"""`jitgen tune` and `jitgen records`, with a measuring process that needs no GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import build, cli
from jitgen.dtypes import BF16, E4M3
from jitgen.errors import CompileError
from jitgen.expr import gate, silu, up
from jitgen.problem import Gemm, GroupedGemm, ScaleBlock, of_k_groups
from jitgen.problem_mla import MlaDecode
from jitgen.runtime import driver
from jitgen.runtime.driver import Device
from jitgen.schedule import Schedule
from jitgen.tuning import machine, measure, select, worker
from jitgen.tuning.keys import job_name, read_gemm_job
from jitgen.tuning.records import read_folder, save
from jitgen.tuning.session import JOURNAL
from jitgen.tuning.tune import NUM_CANDIDATES, make_jobs

from .test_records import OTHERS, RECORD

GPU = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
SHAPE = ("--n", 256, "--k", 512)
PROBLEM = Gemm(256, 512)
Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(cli.app, [str(part) for part in arguments])


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's records of this test."""
    monkeypatch.setenv("JITGEN_RECORDS_DIR", str(tmp_path / "records"))
    select.reload_records()
    yield tmp_path / "records"
    select.reload_records()


Fake = Callable[..., None]


@pytest.fixture
def fake(records: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A machine with a GPU, whose measurer has these faults; kernels are not compiled."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("fake_measurer")
    monkeypatch.setattr(driver, "num_devices", lambda: 1)
    monkeypatch.setattr(driver, "device", lambda ordinal: GPU)
    monkeypatch.setattr(machine, "driver_release", lambda: "580.95.05")
    monkeypatch.setattr(machine, "sm_clock_mhz", lambda: 1755)
    monkeypatch.setattr(build, "prebuild", lambda kernels, **options: [])

    def install(**faults: object) -> None:
        maker = functools.partial(module.make_fake, **faults)
        monkeypatch.setattr(measure, "GpuMeasurer", maker)

    install()
    return install


def schedules(m: int = 64, count: int = NUM_CANDIDATES) -> tuple[Schedule, ...]:
    (job,) = make_jobs([(PROBLEM, m)], GPU.gpu, count)
    return job.schedules


def test_tune_records_what_gemm_then_chooses(run: Run, fake: Fake, records: Path) -> None:
    best = schedules()[5]
    fake(times_us={best: 50.0})
    result = run("tune", *SHAPE, "--m", 64)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("shapes: 1 measured, 0 unstable, 0 failed, 0 not reached, ")
    assert str(records) in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith("kernels: 0 compiled")
    assert lines[1].startswith("m64-n256-k512-bf16: ")
    assert "2.0" in lines[1]
    assert "x as fast as before" in lines[1]
    assert str(best) in lines[1]
    select.reload_records()
    assert select.select(PROBLEM, 50) == best
    (record,) = read_folder(records)
    assert (record.m, record.sm_clock_mhz, record.num_candidates) == (64, 1755, NUM_CANDIDATES)
    assert record.provenance.driver == "580.95.05"


def test_tune_covers_a_range_and_goes_on_where_it_was(run: Run, fake: Fake, records: Path) -> None:
    first = run("tune", *SHAPE, "--m", "1..64", "--candidates", 4)
    assert first.stdout.startswith("shapes: 3 measured")
    assert sorted(record.m for record in read_folder(records)) == [16, 32, 64]
    second = run("tune", *SHAPE, "--m", "1..128", "--candidates", 4)
    assert "3 shapes are recorded already: see --no-resume" in second.stderr
    assert second.stdout.startswith("shapes: 2 measured")
    assert len((records / JOURNAL).read_text().splitlines()) == 5
    third = run("tune", *SHAPE, "--m", "1..128", "--candidates", 4, "--no-resume")
    assert third.stdout.startswith("shapes: 5 measured")


def test_tune_survives_a_death_and_a_hang(
    run: Run, fake: Fake, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly, hanging, best = schedules()[1:4]
    measurer = functools.partial(worker.IsolatedMeasurer, call_timeout_s=2)
    monkeypatch.setattr(worker, "IsolatedMeasurer", measurer)
    fake(deadly=(deadly,), hanging=(hanging,), times_us={best: 60.0})
    result = run("tune", *SHAPE, "--m", 64)
    assert result.exit_code == 0, result.output
    assert "; 2 schedules failed, see the journal" in result.stderr
    assert read_folder(records)[0].schedule == best
    (line,) = map(json.loads, (records / JOURNAL).read_text().splitlines())
    errors = {error["schedule"]["block_n"]: error["error"] for error in line["errors"]}
    assert len(line["errors"]) == 2
    assert any("did not answer for 2 s" in error for error in errors.values())


def test_tune_stops_at_its_time_limit(run: Run, fake: Fake, records: Path) -> None:
    result = run("tune", *SHAPE, "--m", "1..64", "--time-limit", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("shapes: 0 measured, 0 unstable, 0 failed, 3 not reached")


def test_tune_does_not_record_what_is_unstable(run: Run, fake: Fake, records: Path) -> None:
    fake(noise=0.4)
    result = run("tune", *SHAPE, "--m", 64, "--candidates", 3)
    assert result.exit_code == 0
    assert "m64-n256-k512-bf16: unstable: the time" in result.stderr
    assert read_folder(records) == []


def test_tune_fails_if_a_shape_fails(run: Run, fake: Fake, records: Path) -> None:
    fake(wrong=schedules(64, 3))
    result = run("tune", *SHAPE, "--m", 64, "--candidates", 3, "--output", records.parent / "new")
    assert result.exit_code == 1
    assert "failed: no schedule can be measured; 3 schedules failed" in result.stderr
    assert (records.parent / "new" / JOURNAL).is_file()
    assert not records.exists()


def test_tune_goes_on_without_kernels_that_cannot_be_compiled(
    run: Run, fake: Fake, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = schedules(64, 3)[1]

    def prebuild(kernels: list[Any], *, on_error: Callable[..., None], **options: Any) -> list[Any]:
        on_error((PROBLEM, refused), CompileError("it spills", "a long log"))
        return [build.Prebuilt("gemm", i == 0, 0.1) for i in range(len(kernels) - 1)]

    monkeypatch.setattr(build, "prebuild", prebuild)
    fake(times_us={refused: 10.0})
    result = run("tune", *SHAPE, "--m", 64, "--candidates", 3)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("kernels: 1 compiled, 1 already there, 1 refused, ")
    assert f"refused: {refused}: it spills\n" in result.stderr
    (record,) = read_folder(records)
    assert record.schedule != refused
    assert record.num_candidates == 2


def test_tune_grid_dense_has_a_job_for_each_bucket(run: Run, fake: Fake, records: Path) -> None:
    result = run("tune", "--grid", "dense", "--time-limit", 0)
    assert "42 not reached" in result.stdout  # m = 1 and 16 share a bucket


def test_tune_grid_grouped_has_a_job_for_each_bucket(run: Run, fake: Fake, records: Path) -> None:
    result = run("tune", "--grid", "grouped", "--time-limit", 0, "--candidates", 1)
    assert result.exit_code == 0, result.output
    # Contiguous rows and ragged ones share buckets, and so do (32, 192) masked and (32, 256).
    assert "40 not reached" in result.stdout


def test_tune_records_groups_for_every_layout(run: Run, fake: Fake, records: Path) -> None:
    options = ("--num-groups", 4, "--gated", "--out-dtype", "e4m3", "--m", 100)
    result = run("tune", *SHAPE, *options, "--candidates", 3)
    assert result.exit_code == 0, result.output
    assert "m96-g4-n256-k512-e4m3-gated: 100." in result.stderr.replace("99.", "100.")
    (record,) = read_folder(records)
    select.reload_records()
    for layout in ("ragged", "masked", "group_of_row"):
        problem = GroupedGemm(256, 512, E4M3, silu(gate) * up, num_groups=4, layout=layout)  # type: ignore[arg-type]
        assert select.select(problem, 90) == record.schedule


def test_tune_takes_every_family_of_a_list(run: Run, fake: Fake, records: Path) -> None:
    path = records.parent / "list.json"
    sparse: dict[str, Any] = {"cache": "fp8", "sparse": True, "causal": False}
    entries = [
        {"n": 256, "k": 512, "m": [16], "num_groups": 3, "layout": "masked"},
        {"n": 256, "k": 512, "m": [16]},
        {"n": 256, "m": [16], "num_groups": 3, "layout": "k_grouped"},
        {"num_heads": 16, "b": [1, 5, 9]} | sparse,
    ]
    path.write_text(json.dumps(entries))
    result = run("tune", "--problems", path, "--candidates", 2)
    assert "left out: 1 shapes that are not tuned" in result.stderr
    assert result.stdout.startswith("shapes: 5 measured")
    found = read_folder(records)
    (gradient,) = (r for r in found if r.problem == of_k_groups(256, 3))
    assert gradient.m == 64
    select.reload_records()
    assert select.select(of_k_groups(256, 3), 16) == gradient.schedule
    attention = [r for r in found if isinstance(r.problem, MlaDecode)]
    assert [(r.problem, r.m) for r in attention] == [(MlaDecode(16, **sparse), b) for b in (8, 16)]


def test_tune_of_weight_gradients_goes_on_where_it_was(run: Run, fake: Fake, records: Path) -> None:
    path = records.parent / "list.json"
    entry = {"n": 7168, "m": [2112, 4096], "num_groups": 1, "layout": "k_grouped"}
    path.write_text(json.dumps([entry, entry | {"out_dtype": "bf16", "b_scale": "128x128"}]))
    arguments = ("tune", "--problems", path, "--candidates", 2)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("shapes: 4 measured")
    lines = map(json.loads, (records / JOURNAL).read_text().splitlines())
    assert {line["job"] for line in lines} == {
        f"m{m}-g1-n7168-by-k-{rest}" for m in (2112, 4096) for rest in ("f32", "bf16-b128x128")
    }
    problems = of_k_groups(7168, 1), of_k_groups(7168, 1, BF16, ScaleBlock(128, 128))
    found = {(record.problem, record.m) for record in read_folder(records)}
    assert found == {(problem, m) for problem in problems for m in (2112, 4096)}
    again = run(*arguments)
    assert "4 shapes are recorded already" in again.stderr
    assert again.stdout.startswith("shapes: 0 measured")


def test_tune_of_groups_without_k_is_k_grouped(run: Run, fake: Fake, records: Path) -> None:
    result = run("tune", "--n", 256, "--num-groups", 3, "--m", "1..128", "--candidates", 1)
    assert result.exit_code == 0, result.output
    found = [(record.problem, record.m) for record in read_folder(records)]
    assert found == [(of_k_groups(256, 3), 64), (of_k_groups(256, 3), 128)]
    result = run("tune", "--n", 256, "--num-groups", 3, "--m", 64, "--gated")
    assert result.exit_code != 0
    assert "k_grouped adds to D" in " ".join(result.stderr.split())


@pytest.mark.parametrize("problem", [record.problem for record in (RECORD, *OTHERS)], ids=str)
def test_job_names_are_read_back(problem: Gemm) -> None:
    assert read_gemm_job(job_name(problem, 192)) == (problem, 192)
    assert read_gemm_job(f"{job_name(problem, 192)}-x") is None
    assert read_gemm_job(job_name(MlaDecode(16), 4)) is None


def test_tune_compile_only_needs_no_gpu(
    run: Run, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "cache"))
    build.default_store.cache_clear()
    options = ("--candidates", 2, "--compile-only", "--gpu", "NVIDIA H800", "--processes", 1)
    result = run("tune", *SHAPE, "--m", 64, *options)
    build.default_store.cache_clear()
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("kernels: 2 compiled, 0 already there, 0 refused")
    assert len(list((tmp_path / "cache" / "kernels").glob("??/*/kernel.cubin"))) == 2
    assert not records.exists()


def test_tune_without_gpu_is_one_error_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "device", lambda ordinal: replace(GPU, compute_capability=(8, 0)))
    result = run("tune", *SHAPE)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: NVIDIA H100 80GB HBM3 (cuda:0) is sm_80")


def test_tune_without_torch_is_one_error_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("tune", *SHAPE)
    assert result.exit_code == 1
    assert "pip install 'jitgen[bench]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --grid, --problems, or --n with --k"),
        (["--n", 256], "give one of --grid, --problems, or --n with --k"),
        (["--k", 256, "--num-groups", 4], "give one of --grid, --problems, or --n with --k"),
        (["--grid", "dense", *SHAPE], "give one of --grid, --problems, or --n with --k"),
        (["--grid", "dense", "--num-groups", 4], "--num-groups and --gated go with --n"),
        ([*SHAPE, "--gpu", "NVIDIA H200"], "--gpu and --num-sms go with --compile-only"),
    ],
)
def test_tune_rejects_options(run: Run, arguments: list[object], message: str) -> None:
    result = run("tune", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", 100, "--k", 512], "n = 100 must be a positive multiple of 8"),
        ([*SHAPE, "--m", "1-64"], "m has '1-64'"),
        (["--problems", "none.json"], "none.json: No such file"),
    ],
)
def test_tune_rejects_in_one_line(run: Run, arguments: list[object], message: str) -> None:
    result = run("tune", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


# --- records --------------------------------------------------------------------------------------


def test_records_merge_puts_folders_together(run: Run, tmp_path: Path) -> None:
    faster = replace(RECORD, kernel_us=9.0)
    save(tmp_path / "a", [RECORD, *OTHERS[:2]])
    save(tmp_path / "b", [faster, *OTHERS[2:]])
    result = run("records", "merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c")
    assert result.exit_code == 0, result.output
    counts = f"{len(OTHERS) + 2} read, {len(OTHERS) + 1} in {tmp_path / 'c'}"
    assert result.stdout == f"records: {counts}\n"
    assert set(read_folder(tmp_path / "c")) == {faster, *OTHERS}


def test_records_merge_rejects_a_broken_file(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a", [RECORD])
    (path,) = (tmp_path / "a").glob("*/*.json")
    path.write_text("[]")
    result = run("records", "merge", tmp_path / "a", "-o", tmp_path / "c")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}: must be an object")
    assert not (tmp_path / "c").exists()
