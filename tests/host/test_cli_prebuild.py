"""`jitgen prebuild` of a model, and of a part of a list for each rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import (
    BF16,
    Gemm,
    GroupedGemm,
    MlaDecode,
    Quantization,
    QuantizationSchedule,
    ScaleBlock,
    build,
    cli,
)
from jitgen.models import read_model
from jitgen.plans import plan
from jitgen.problem import of_k_groups
from jitgen.problem_list import Grid
from jitgen.schedule_mla import key_limits
from jitgen.target import H100
from jitgen.tuning.select import named_gpu

CONFIG = Path(__file__).parent / "configs" / "deepseek-v3.json"
MODEL = ("--model", CONFIG, "--tp", 8, "--ep", 8, "--m-max", 300)
Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path))
    return lambda *arguments: CliRunner().invoke(cli.app, ["prebuild", *map(str, arguments)])


@pytest.fixture
def handed_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """The kernels that a command line compiles."""

    def kernels(*arguments: object) -> list[Any]:
        seen: list[Any] = []
        monkeypatch.setattr(build, "prebuild", lambda kernels, **options: seen.extend(kernels))
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        return seen

    return kernels


def test_prebuild_of_a_model_makes_what_its_plans_launch(
    handed_over: Callable[..., list[Any]],
) -> None:
    gpu = named_gpu()
    model = read_model(CONFIG, tp=8, ep=8)
    rows = 300 * model.rows_a_token
    plans = [plan(p, range(1, 301), gpu=gpu.name, num_sms=gpu.num_sms) for p in model.problems]
    plans += [plan(p, range(1, rows + 1), gpu=gpu.name, num_sms=132) for p in model.experts]
    expected: list[Any] = [kernel for plan_ in plans for kernel in plan_.kernels]
    for keys in key_limits():
        batches = (plan(p, range(1, 1025), max_keys=keys) for p in model.attention)
        expected += [kernel for plan_ in batches for kernel in plan_.kernels]
    assert {type(problem) for problem, _ in expected} == {Gemm, GroupedGemm, MlaDecode}
    made = handed_over(*MODEL)
    assert set(made) == {*expected, (Quantization(), QuantizationSchedule())}
    assert len(made) == len(set(made))


def test_prebuild_of_a_model_has_the_defaults_of_problems(
    handed_over: Callable[..., list[Any]],
) -> None:
    given = handed_over("--model", CONFIG, "--tp", 1, "--ep", 1, "--m-max", 8192)
    assert handed_over("--model", CONFIG) == given


def test_prebuild_of_a_model_says_what_is_left_out(
    run: Run, handed_over: Callable[..., list[Any]]
) -> None:
    assert handed_over(*MODEL)
    first, *left_out = run(*MODEL).stderr.splitlines()
    assert first == "DeepseekV3ForCausalLM: problems 13, kinds left out 2"
    assert "left out: mlp.gate (router): BF16 in published FP8 checkpoints" in left_out


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8, 1000])
def test_shards_are_all_disjoint_and_balanced(
    handed_over: Callable[..., list[Any]], num_shards: int
) -> None:
    everything = handed_over(*MODEL)
    assert len(everything) < 150  # so that all further shards are empty
    indices = range(min(num_shards, 150))
    shards = [handed_over(*MODEL, "--shard", f"{idx}/{num_shards}") for idx in indices]
    kernels = [kernel for shard in shards for kernel in shard]
    assert len(kernels) == len(everything)
    assert set(kernels) == set(everything)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_prebuild_of_an_empty_shard_compiles_nothing(run: Run) -> None:
    result = run(*MODEL, "--shard", "999/1000")
    assert result.exit_code == 0
    assert result.stdout.startswith("kernels: 0 compiled, 0 already there")


@pytest.mark.parametrize("shard", ["", "2", "8/8", "0/0", "-1/8", "1/8/2", "a/8", "0.5/8", " 0/8"])
def test_prebuild_rejects_a_shard_that_is_none(run: Run, shard: str) -> None:
    result = run(*MODEL, "--shard", shard)
    assert result.exit_code == 2
    assert f"--shard is {shard!r}: give i/n with 0 <= i < n" in result.stderr


@pytest.mark.parametrize("option", ["--tp", "--ep", "--m-max"])
def test_prebuild_rejects_options_of_a_model_without_one(run: Run, option: str) -> None:
    result = run("--grid", "dense", option, 8)
    assert result.exit_code == 2
    assert "--tp, --ep and --m-max go with --model" in result.stderr


def test_prebuild_rejects_a_config_in_one_line(run: Run) -> None:
    result = run("--model", CONFIG, "--tp", 7)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "tp = 7" in line


@pytest.mark.parametrize(
    "sources",
    [
        (),
        ("--grid", "dense", "--problems", "x.json"),
        ("--grid", "dense", *MODEL),
        ("--problems", "x.json", *MODEL),
    ],
)
def test_prebuild_takes_one_source_of_problems(run: Run, sources: tuple[object, ...]) -> None:
    result = run(*sources)
    assert result.exit_code == 2
    assert "give one of --grid, --problems or --model" in result.stderr


def test_prebuild_of_a_grid_makes_the_kernels_of_that_grid(
    handed_over: Callable[..., list[Any]],
) -> None:
    kinds = {
        grid: {type(problem) for problem, _ in handed_over("--grid", grid)} - {Quantization}
        for grid in ("dense", "grouped", "mla")
    }
    assert kinds == {"dense": {Gemm}, "grouped": {GroupedGemm}, "mla": {MlaDecode}}


def test_prebuild_of_weight_gradients_makes_what_their_plans_launch(
    handed_over: Callable[..., list[Any]], tmp_path: Path
) -> None:
    shapes = Grid.k_grouped.problems()
    found = handed_over("--grid", "k_grouped", "--gpu", H100.name)
    plans = [plan(problem, [m], gpu=H100.name, num_sms=132) for problem, m in shapes]
    expected = [kernel for made in plans for kernel in made.kernels]
    assert found == [*dict.fromkeys(expected), (Quantization(), QuantizationSchedule())]
    entry = {"n": 7168, "m": [2112], "num_groups": 1, "layout": "k_grouped", "out_dtype": "bf16"}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([entry | {"b_scale": "128x128"}]))
    ((problem, schedule),) = handed_over("--problems", listed, "--schedule", "256x128")
    assert problem == of_k_groups(7168, 1, BF16, ScaleBlock(128, 128))
    assert (schedule.block_m, schedule.block_n) == (256, 128)
