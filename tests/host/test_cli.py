"""The command line, without a GPU: what it prints, what it refuses, its exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import Quantization, QuantizationSchedule, build, cli, doctor
from jitgen.errors import CompileError, JitgenError, ScheduleError, StoreError
from jitgen.problem import Gemm
from jitgen.problem_list import read_problems
from jitgen.runtime import nvrtc
from jitgen.runtime.driver import Device
from jitgen.schedule import Schedule
from jitgen.schedule_rules import check_schedule
from jitgen.schedule_text import parse_schedule
from jitgen.tuning import bench, host, plot, report
from jitgen.tuning.select import named_gpu, select
from jitgen.tuning.timing import Measurement

ROOT = Path(__file__).parents[2]
PROBLEM = Gemm(256, 512)
Run = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the kernel store of this test."""
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "cache"))
    build.default_store.cache_clear()
    yield tmp_path / "cache" / "kernels"
    build.default_store.cache_clear()


@pytest.fixture
def run(store: Path) -> Run:
    """Runs a command line; the result has exit_code, stdout and stderr."""
    return lambda *arguments: CliRunner().invoke(cli.app, [str(part) for part in arguments])


def error_line(result: Any) -> str:
    """The one line that a refused command prints."""
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


# --- show -----------------------------------------------------------------------------------------


def test_show_prints_every_step(run: Run, store: Path) -> None:
    result = run("show", "--n", 256, "--k", 512, "--m", 64)
    assert result.exit_code == 0, result.stderr
    schedule = select(PROBLEM, 64, named_gpu())
    operands = "(smem_b, smem_a)^T" if schedule.swap_ab else "(smem_a, smem_b)"
    for part in (str(PROBLEM), str(schedule), f"mma{operands}", "__global__", "B spilled"):
        assert part in result.stdout
    assert str(store) in result.stdout
    assert len(list(store.glob("??/*/kernel.cubin"))) == 1


def test_show_omits_the_source(run: Run) -> None:
    result = run("show", "--n", 256, "--k", 512, "--no-source")
    assert result.exit_code == 0
    assert "registers a thread" in result.stdout
    assert "__global__" not in result.stdout


@pytest.mark.parametrize(
    ("epilogue", "shown"),
    [
        ("none", "-> f32[m, 256]\n"),
        ("bias", "-> f32[m, 256], add(acc, bias[n])\n"),
        ("bias-relu", "relu(add(acc, bias[n]))"),
        ("bias-gelu", "gelu(add(acc, bias[n]))"),
        ("bias-silu", "silu(add(acc, bias[n]))"),
        ("residual", "add(acc, residual[m, n])"),
    ],
)
def test_show_fuses_the_epilogue(run: Run, epilogue: str, shown: str) -> None:
    pinned = ("--schedule", "64x64 stages=4 math_warpgroups=1", "--no-source")
    result = run(
        *("show", "--n", 256, "--k", 512, "--out-dtype", "f32", "--epilogue", epilogue), *pinned
    )
    assert result.exit_code == 0, result.stderr
    assert shown in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", 100], "n = 100 must be a positive multiple of 8"),
        (["--out-dtype", "int8"], "dtype int8 is not supported"),
        (["--schedule", "128"], "'128' where two numbers are due"),
        (["--schedule", ""], "where two numbers are due"),
        (["--schedule", "128x128 stage=4"], "after the tile, use stages="),
        (["--schedule", "128x128 stages=four"], "stages must be a number"),
        (["--schedule", "128x128 cluster=2"], "'2' where two numbers are due"),
        (["--schedule", "128x128 promotion=late"], "use overlapped or serial"),
        (["--schedule", "128x128 split_k=two"], "split_k must be a number"),
        (["--schedule", "128x128 swap_ab=2"], "'swap_ab=2': use 0 or 1"),
        (["--schedule", "128x128 swap_ab"], "'swap_ab': use 0 or 1"),
        (["--schedule", "128x128 pingpong=True"], "'pingpong=True': use 0 or 1"),
        (["--schedule", "16x32 math_warpgroups=1 swap_ab=1"], "block_n = 32 must be 64 or 128"),
        (["--schedule", "64x128 math_warpgroups=1 pingpong=1"], "must be 2 or 3, not 1"),
        (["--schedule", "64x128 split_k=2 pingpong=1"], "pingpong must be False"),
        (["--schedule", "128x128 stages=31"], "lower num_stages (31"),
        (["--schedule", "0x0"], "block_m = 0 must be in 8..256 in steps of 8"),
        (["--schedule", "128x128 split_k=0"], "split_k = 0 must be in 1..8"),
        (["--schedule", "128x128 split_k=9"], "split_k = 9 must be in 1..8"),
        (["--schedule", "128x128 split_k=5"], "without any of the 4 K blocks: choose 4"),
        (["--schedule", "128x128 cluster=2x1 split_k=2"], "split_k = 2 takes the whole cluster"),
    ],
)
def test_show_rejects_in_one_line(run: Run, arguments: list[object], message: str) -> None:
    assert message in error_line(run("show", "--n", 256, "--k", 512, *arguments))


def test_parse_schedule_reads_what_str_prints() -> None:
    for schedule in (
        Schedule(128, 192, 4, 2, 2, 1, 16, promotion="serial"),
        Schedule(64, 16, 12, 1, 1, 2),
        Schedule(64, 80, 5, 1, raster_group=3, split_k=4),
        Schedule(8, 64, 12, 1, split_k=2, swap_ab=True),
        Schedule(64, 96, 5, 2, pingpong=True),
        Schedule(24, 128, 5, 2, swap_ab=True, pingpong=True),
    ):
        assert parse_schedule(str(schedule), PROBLEM) == schedule


@pytest.mark.parametrize(
    "tile",
    [
        *("128x128", "64x32 math_warpgroups=1", "256x128", "128x128 split_k=4"),
        *("8x128 swap_ab=1", "64x128 pingpong=1", "48x64 swap_ab=1 pingpong=1"),
    ],
)
def test_parse_schedule_takes_the_stages_that_fit(tile: str) -> None:
    check_schedule(PROBLEM, parse_schedule(tile, PROBLEM))


def test_parse_schedule_rejects_words_in_any_case() -> None:
    with pytest.raises(ScheduleError, match="STAGES=4"):
        parse_schedule("128x128 STAGES=4", PROBLEM)


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_passes_where_kernels_can_be_interpreted_and_compiled(run: Run, store: Path) -> None:
    run("show", "--n", 256, "--k", 512, "--no-source")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert f"{store}, writable, kernels: 1" in result.stdout
    assert f"{nvrtc.compiler_version()}, cuda-bindings" in result.stdout
    assert "interpret: yes, compile: yes" in result.stdout


def test_doctor_counts_damaged_entries(run: Run, store: Path) -> None:
    run("show", "--n", 256, "--k", 512, "--no-source")
    next(store.glob("??/*/kernel.cubin")).write_bytes(b"")
    assert "kernels: 0, damaged: 1" in run("doctor").stdout


def test_doctor_fails_and_says_what_to_install_with_nothing_of_cuda(store: Path) -> None:
    code = (
        "import sys; sys.modules.update({'cuda': None, 'torch': None}); sys.argv[1:] = ['doctor'];"
        "from jitgen.cli import main; main()"
    )
    env = {**os.environ, "JITGEN_CACHE_DIR": str(store.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert "interpret: yes, compile: no, launch: no" in done.stdout
    for remedy in ("pip install nvidia-cuda-nvrtc cuda-bindings", "driver 580", "jitgen[torch]"):
        assert remedy in done.stdout


def test_doctor_shows_the_remedy_behind_a_long_message_of_the_loader(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("Failure finding libnvrtc.so\n  searched /a\n  searched /b")

    bindings = SimpleNamespace(nvrtc=SimpleNamespace(nvrtcVersion=fail))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    nvrtc.compiler_version.cache_clear()
    line = next(line for line in run("doctor").stdout.splitlines() if "NVRTC" in line)
    assert "(Failure finding libnvrtc.so): pip install nvidia-cuda-nvrtc" in line


@pytest.mark.parametrize(
    ("capability", "cuda", "ok", "text"),
    [
        ((9, 0), "13.0", "ok", "NVIDIA H100, compute capability 9.0, 132 SMs"),
        ((8, 0), "13.0", "no", "is sm_80, jitgen's kernels need sm_90a"),
        ((9, 0), "12.8", "ok", "runs CUDA 12.8, kernels are of 13.0"),
    ],
    ids=["h100", "a100", "old driver"],
)
def test_doctor_shows_each_gpu(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cuda: str,
    ok: str,
    text: str,
) -> None:
    from jitgen.runtime import driver

    gpu = Device(0, "NVIDIA H100", capability, 132)
    monkeypatch.setattr(driver, "num_devices", lambda: 1)
    monkeypatch.setattr(driver, "device", lambda ordinal: gpu)
    monkeypatch.setattr(driver, "driver_version", lambda: cuda)
    lines = run("doctor").stdout.splitlines()
    assert any(text in line for line in lines)
    assert next(line for line in lines if "GPU 0" in line).startswith(ok)


@pytest.mark.parametrize(
    ("version", "cuda", "expected", "is_ok"),
    [
        ("2.11.0+cu130", "'13.0'", "2.11.0+cu130, CUDA 13.0", True),
        ("2.11.0+cpu", "None", "2.11.0+cpu is without CUDA", False),
    ],
)
def test_doctor_reads_torchs_version(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cuda: str,
    expected: str,
    is_ok: bool,
) -> None:
    text = f"__all__ = ['cuda']\n__version__ = '{version}'\ncuda: Optional[str] = {cuda}\n"
    (tmp_path / "version.py").write_text(text)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    finding = doctor._find("torch", doctor._look_at_torch)
    assert finding.is_ok is is_ok
    assert finding.detail.startswith(expected)


# --- prebuild -------------------------------------------------------------------------------------


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_prebuild_compiles_once(run: Run, store: Path, tmp_path: Path) -> None:
    problems = write(tmp_path / "problems.json", [{"n": 256, "k": 512, "m": [1, 3]}])
    first = run("prebuild", "--problems", problems, "--processes", 1)
    assert first.exit_code == 0, first.stderr
    # That of the GEMM, and that of `jitgen.quantize` for its activations.
    assert first.stdout.startswith("kernels: 2 compiled, 0 already there, ")
    assert str(store) in first.stdout
    second = run("prebuild", "--problems", problems, "--processes", 1)
    assert second.stdout.startswith("kernels: 0 compiled, 2 already there, ")
    # What gemm would choose for these m is there.
    shown = run("show", "--n", 256, "--k", 512, "--m", 3, "--no-source")
    assert shown.exit_code == 0
    assert len(list(store.glob("??/*/kernel.cubin"))) == 2


def test_prebuild_grid_dense_hands_every_kernel_over(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(build, "prebuild", lambda kernels, **options: seen.extend(kernels))
    result = run("prebuild", "--grid", "dense")
    assert result.exit_code == 0, result.output
    expected = {
        (shape.problem, select(shape.problem, shape.m, named_gpu())) for shape in bench.GRID_DENSE
    } | {(Quantization(), QuantizationSchedule())}
    assert len(seen) == len(expected)
    assert set(seen) == expected


def test_prebuild_reports_what_was_built_before_an_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kernels: Any, *, num_processes: Any, on_done: Callable[..., None]) -> None:
        on_done(build.Prebuilt("gemm", True, 0.1))
        raise CompileError("kernel refused", "line 1\nline 2")

    monkeypatch.setattr(build, "prebuild", fail)
    problems = write(tmp_path / "problems.json", [{"n": 256, "k": 512, "m": [1]}])
    result = run("prebuild", "--problems", problems)
    assert result.exit_code == 1
    assert result.stdout.startswith("kernels: 1 compiled")
    assert result.stderr == "error: kernel refused\nline 1\nline 2\n"


def test_read_problems_with_m_max_covers_every_m(tmp_path: Path) -> None:
    entry = {"name": "o_proj", "n": 256, "k": 512, "m_max": 700, "out_dtype": "f32"}
    pairs = read_problems(write(tmp_path / "problems.json", [entry]))
    (problem,) = {problem for problem, _ in pairs}
    assert (problem.n, problem.k, problem.d_dtype.short) == (256, 512, "f32")
    planned = {select(problem, m, named_gpu()) for _, m in pairs}
    assert planned == {select(problem, m, named_gpu()) for m in range(1, 701)}


GOOD = {"n": 256, "k": 512, "m": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ({"n": 256}, "must hold a list of problems"),
        ([], "must hold a list of problems"),
        ([GOOD, 7], "entry 1: must be an object"),
        ([GOOD, {"n": 256, "m": [1]}], "entry 1: field k is missing"),
        ([GOOD | {"M": 3}], "entry 0: unknown field M"),
        ([GOOD | {"name": 7}], "entry 0: name must be a string, got 7"),
        ([GOOD | {"n": 100}], "entry 0: n = 100 must be a positive multiple of 8"),
        ([GOOD | {"k": "512"}], "entry 0: k must be an int"),
        ([GOOD | {"m": []}], "entry 0: m must be a list"),
        ([GOOD | {"m": 5}], "entry 0: m must be a list"),
        ([GOOD | {"m": [1, 0]}], "entry 0: m[1] must be an int in 1.."),
        ([GOOD | {"m": [True]}], "entry 0: m[0] must be an int in 1.."),
        ([GOOD | {"m_max": 4}], "entry 0: give either m, a list, or m_max"),
        ([{"n": 256, "k": 512}], "entry 0: give either m, a list, or m_max"),
        ([{"n": 256, "k": 512, "m_max": 1.5}], "entry 0: m_max must be an int"),
        ([GOOD | {"out_dtype": "int8"}], "entry 0: dtype int8 is not supported"),
        ([GOOD | {"out_dtype": 16}], "entry 0: out_dtype must be a name"),
    ],
)
def test_prebuild_rejects_problems_file(
    run: Run, tmp_path: Path, content: object, message: str
) -> None:
    path = write(tmp_path / "problems.json", content)
    line = error_line(run("prebuild", "--problems", path))
    assert str(path) in line
    assert message in line


def test_prebuild_rejects_missing_file(run: Run, tmp_path: Path) -> None:
    line = error_line(run("prebuild", "--problems", tmp_path / "none.json"))
    assert "none.json: No such file" in line


def test_prebuild_rejects_store_that_keeps_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(write(tmp_path / "file", "")))
    problems = write(tmp_path / "problems.json", [GOOD])
    assert "cannot be written" in error_line(run("prebuild", "--problems", problems))


# --- bench, demo ----------------------------------------------------------------------------------


def test_bench_without_gpu_is_one_error_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("gemm", "host"):
        assert "a benchmark needs a Hopper GPU" in error_line(run("bench", command))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[bench.Shape]:
    """Plays the GPU: each shape takes twice its floor. Returns the shapes that were measured."""
    shapes: list[bench.Shape] = []

    def bench_gemm(asked: list[bench.Shape], device: Device) -> Any:
        for shape in asked:
            shapes.append(shape)
            times = [2 * shape.floor_us, 1.5 * shape.floor_us]
            ours, theirs = (Measurement(us, 0.1, us, us, 12, ("k",)) for us in times)
            schedule = select(shape.problem, shape.m)
            peers = {"cublaslt": bench.PeerTime("", theirs)}
            yield bench.Row(shape, schedule, ours, peers, {}, bench.baseline_dense().get(shape))

    gpu = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
    names = (field.name for field in fields(report.Meta))
    meta = report.Meta(**{name: name for name in names} | {"gpu": gpu.name, "peers": {}})
    monkeypatch.setattr(bench, "check_machine", lambda: gpu)
    monkeypatch.setattr(report, "collect_meta", lambda device, version, arguments: meta)
    monkeypatch.setattr(bench, "bench_gemm", bench_gemm)
    return shapes


def test_bench_measures_the_grid_and_writes_reports(
    run: Run, measured: list[bench.Shape], tmp_path: Path
) -> None:
    files = tmp_path / "new" / "out.json", tmp_path / "report.md"
    result = run("bench", "gemm", "--json", files[0], "--markdown", files[1])
    assert result.exit_code == 0, result.output
    assert tuple(measured) == bench.GRID_DENSE
    data = json.loads(files[0].read_text())
    assert len(data["rows"]) == 49
    assert data["rows"][0]["derived"]["over_floor"] == pytest.approx(2)
    assert "## M = 4096" in files[1].read_text()
    assert "NVIDIA H100 80GB HBM3: 1 kernel launched by a call" in result.stdout
    assert "│  all │     49 │" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "count", "extents"),
    [
        (["--quick"], 6, {1, 128, 4096}),
        (["--m", 1, "--m", 7], 14, {1, 7}),
        (["--quick", "--m", 7], 2, {7}),
    ],
)
def test_bench_measures_the_shapes_asked_for(
    run: Run, measured: list[bench.Shape], arguments: list[object], count: int, extents: set[int]
) -> None:
    assert run("bench", "gemm", *arguments).exit_code == 0
    assert len(measured) == count
    assert {shape.m for shape in measured} == extents


def test_bench_warns_if_the_machine_is_not_like_the_baselines(
    run: Run, measured: list[bench.Shape]
) -> None:
    result = run("bench", "gemm", "--quick")
    assert result.stderr.count(" us\n") == 6  # one line a shape
    assert "\nwarning: cuBLASLt takes " in result.stderr


def test_bench_report_writes_the_same_report_again(
    run: Run, measured: list[bench.Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "over_floor_svg", lambda rows: f"<svg>{len(rows)}</svg>")
    files = tmp_path / "out.json", tmp_path / "first.md", tmp_path / "again.md"
    first = run("bench", "gemm", "--json", files[0], "--markdown", files[1])
    again = run("bench", "report", files[0], "--markdown", files[2])
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert again.stdout == first.stdout
    assert files[2].read_text() == files[1].read_text().replace("(first.svg)", "(again.svg)")
    assert "(again.svg)" in files[2].read_text()
    assert (tmp_path / "again.svg").read_text() == "<svg>49</svg>"


def test_bench_report_without_matplotlib_has_no_plot_and_says_so(
    run: Run, measured: list[bench.Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "over_floor_svg", lambda rows: None)
    result = run("bench", "gemm", "--quick", "--markdown", tmp_path / "report.md")
    assert result.exit_code == 0
    assert "warning: no plot without matplotlib" in result.stderr
    assert "![" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "report.svg").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("{}", "not a result that this version's"),
        ("[]", "not a result that this version's"),
    ],
)
def test_bench_report_rejects_what_is_no_result(
    run: Run, tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "out.json"
    if text is not None:
        path.write_text(text)
    assert message in error_line(run("bench", "report", path))


def test_bench_rejects_report_that_cannot_be_written(
    run: Run, measured: list[bench.Shape], tmp_path: Path
) -> None:
    folder = write(tmp_path / "file", "") / "out.json"
    assert f"cannot write {folder}" in error_line(run("bench", "gemm", "--json", folder))
    assert len(measured) == 1


@pytest.fixture
def host_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bench.Shape, int]]:
    """Plays the GPU: a call takes 9 us of host time. Returns what was measured."""
    measured: list[tuple[bench.Shape, int]] = []

    def bench_host(
        shape: bench.Shape, device: Device, *, num_calls: int, version: str, command: str
    ) -> host.HostResult:
        measured.append((shape, num_calls))
        times = (host.HostTime(host.GEMM_OUT, 9.0, 8.5, 9.5, num_calls),)
        where = (device.name, "Xeon", "3.12", "2.11", version, "2026-11-22", command)
        return host.HostResult(shape, times, *where)

    gpu = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
    monkeypatch.setattr(bench, "check_machine", lambda: gpu)
    monkeypatch.setattr(host, "bench_host", bench_host)
    return measured


def test_bench_host_prints_and_writes_what_it_measured(
    run: Run, host_calls: list[tuple[bench.Shape, int]], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "host.json"
    result = run("bench", "host", "--n", 576, "--k", 1536, "--m", 8, "--calls", 500, "--json", file)
    assert result.exit_code == 0, result.output
    assert host_calls == [(bench.Shape(8, 576, 1536), 500)]
    assert "m8-n576-k1536 on NVIDIA H100 80GB HBM3, Xeon" in result.stdout
    assert "gemm(out=out)" in result.stdout
    assert json.loads(file.read_text())["times"][0]["median_us"] == 9.0


def test_bench_host_has_defaults(run: Run, host_calls: list[tuple[bench.Shape, int]]) -> None:
    assert run("bench", "host").exit_code == 0
    assert host_calls == [(bench.Shape(64, 2112, 7168), 10_000)]


def test_bench_host_rejects_report_that_cannot_be_written(
    run: Run, host_calls: list[tuple[bench.Shape, int]], tmp_path: Path
) -> None:
    folder = write(tmp_path / "file", "") / "out.json"
    assert f"cannot write {folder}" in error_line(run("bench", "host", "--json", folder))


@pytest.mark.parametrize("code", [0, 1])
def test_demo_passes_its_exit_code_on(run: Run, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    from jitgen import demo

    monkeypatch.setattr(demo, "main", lambda: code)
    assert run("demo").exit_code == code


def test_demo_without_its_model_is_one_error_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jitgen import minilm

    monkeypatch.setattr(minilm, "MODEL_PACKAGE", "jitgen_no_such_package")
    assert "pip install 'jitgen[demo]'" in error_line(run("demo"))


# --- all commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "stderr"),
    [
        (StoreError("locked\nby 7"), "error: locked by 7\n"),
        (CompileError("refused", "log 1\nlog 2"), "error: refused\nlog 1\nlog 2\n"),
        (CompileError("NVRTC is missing (a\nb): pip"), "error: NVRTC is missing (a b): pip\n"),
    ],
    ids=["two lines", "log", "two lines and no log"],
)
def test_error_is_one_line_and_a_log(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: JitgenError, stderr: str
) -> None:
    def fail(kernel: object) -> None:
        raise error

    monkeypatch.setattr(build, "build", fail)
    result = run("show", "--n", 256, "--k", 512)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", stderr)


def test_warnings_are_one_line_each(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(write(tmp_path / "file", "")))
    result = run("show", "--n", 256, "--k", 512, "--no-source")
    assert result.exit_code == 0
    assert "in memory only" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: kernel store cannot be written")


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from jitgen.cli import app; app(['bench', 'gemm', '--help'],"
        " standalone_mode=False); heavy = {'torch', 'cuda', 'jinja2', 'jitgen.demo',"
        " 'jitgen.tuning.bench'}; print('loaded:', *heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_python_m_jitgen_is_the_command_line(store: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jitgen", "show", "--n", "100", "--k", "512"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: n = 100")
