"""`jitgen bench linear` without a GPU: the steps that it times, the turns, its table and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen.cli import app
from jitgen.runtime.driver import Device
from jitgen.tuning import bench, bench_linear
from jitgen.tuning.bench_linear import ROUNDS, STEPS, LinearShape, make_steps, take_turns

torch = pytest.importorskip("torch")

SMALL = LinearShape(20, 64, 32)


def test_steps_are_close_to_bfloat16_and_kept_codes_change_no_bit() -> None:
    torch.manual_seed(0)
    steps = make_steps(SMALL, "cpu")
    assert list(steps) == ["bf16", "fp8", "kept"]
    dx, dw = steps["fp8"]()
    assert (dx.shape, dw.shape) == ((20, 64), (32, 64))
    for got, want in zip(steps["kept"](), (dx, dw), strict=True):
        assert torch.equal(got, want)
    usual_dw = steps["bf16"]()[1]  # of the same x and dy
    assert (dw - usual_dw).norm() < 0.06 * usual_dw.norm()


def test_turns_give_microseconds_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(bench_linear, "_finished_at", lambda: now[0])

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            now[0] += seconds * (100 if len(order) <= 2 else 1)  # the first round warms

        return run

    found = take_turns({"a": call("a", 1e-3), "b": call("b", 2e-3)})
    assert found == pytest.approx({"a": 1e3 / STEPS, "b": 2e3 / STEPS})
    assert order == ["a", "b"] * (1 + ROUNDS)


def test_command_writes_a_table_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def captured(step: Callable[[], Any]) -> Callable[[], Any]:
        return bench_linear._repeated(step)

    monkeypatch.setattr(bench_linear, "_captured", captured)
    real = bench_linear.bench_linear
    monkeypatch.setattr(bench_linear, "bench_linear", lambda shapes: real(shapes, "cpu"))
    monkeypatch.setattr(bench_linear, "STEPS", 1)
    monkeypatch.setattr(bench, "check_machine", lambda: Device(0, "a GPU", (9, 0), 132))
    file = tmp_path / "linear.json"
    arguments = ["bench", "linear", "--tokens", "20", "--in-features", "64"]
    arguments += ["--out-features", "32", "--json", str(file)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "[20, 64] x 32" in result.output
    found = json.loads(file.read_text())
    assert found["meta"]["gpu"] == "a GPU"
    (row,) = found["rows"]
    assert row["derived"]["speedups"]["fp8"] == pytest.approx(row["bf16"] / row["fp8"])
