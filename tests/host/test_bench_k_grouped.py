"""K-grouped benchmarks and measurements without a GPU: shapes, operands, checks, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jitgen import KGrouped, ScaleBlock, Schedule, api
from jitgen.cli import app
from jitgen.dtypes import BF16, E4M3, F32
from jitgen.errors import CandidateError, VerifyError
from jitgen.problem import GroupedGemm, of_k_groups
from jitgen.problem_list import Grid
from jitgen.tuning import bench_k_grouped as bench
from jitgen.tuning import measure, measure_k_grouped, operands_k_grouped, report_grouped
from jitgen.tuning.bench import to_numpy
from jitgen.tuning.measure import GpuMeasurer
from jitgen.tuning.operands_k_grouped import KGroupedOperands, KTile, deal_k
from jitgen.tuning.report import Meta
from jitgen.tuning.timing import Measurement

torch = pytest.importorskip("torch")

FIRST, SECOND, THIRD = Schedule(64, 64, 4, 1), Schedule(128, 96, 3), Schedule(64, 96, 4, 1)
PROBLEMS = [
    of_k_groups(136, 5),
    of_k_groups(136, 1),
    of_k_groups(200, 5, BF16, ScaleBlock(128, 128)),
    of_k_groups(200, 5, F32, ScaleBlock(128, 128)),
]
M = 70


class Played:
    """Runs the GEMM on the interpreter; `spoil` may alter the result of a schedule."""

    def __init__(self) -> None:
        self.launched: list[Schedule] = []
        self.spoil: Any = lambda d, schedule: None

    def grouped_gemm(
        self, a: Any, b: Any, scales: Any, *, layout: Any, out: Any, schedule: Schedule
    ) -> None:
        self.launched.append(schedule)
        host = [to_numpy(tensor, E4M3) for tensor in (a, b)]
        host_scales = tuple(to_numpy(tensor, F32) for tensor in scales)
        d = to_numpy(out, F32 if out.dtype == torch.float32 else BF16)  # shares the tensor's memory
        on_host = KGrouped(layout.offsets.numpy())
        api.grouped_gemm(*host, host_scales, layout=on_host, out=d, schedule=schedule)
        self.spoil(out, schedule)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(operands_k_grouped, "grouped_gemm", played.grouped_gemm)
    monkeypatch.setattr(measure_k_grouped, "LENGTHS", (128, 384))
    monkeypatch.setattr(measure, "check_machine", lambda: None)
    return played


@pytest.fixture
def measurer(played: Played) -> GpuMeasurer:
    return GpuMeasurer("cpu")


# --- the tuner's check ----------------------------------------------------------------------------


def test_deal_k_is_uneven_whole_blocks_and_always_the_same() -> None:
    ks = deal_k(32, 1024, some_empty=True)
    assert ks == deal_k(32, 1024, some_empty=True)
    assert [i for i, k in enumerate(ks) if k == 0] == [3, 11, 19, 27]
    filled = [k for k in ks if k]
    assert all(k % 128 == 0 and 640 <= k <= 1408 for k in filled)
    assert len(set(filled)) > 3
    assert all(deal_k(32, 128))
    assert deal_k(1, 4096, some_empty=True) == (4096,)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_check_proves_one_schedule_at_each_length_and_compares_the_others(
    played: Played, measurer: GpuMeasurer, problem: GroupedGemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[KTile] = []
    check_tile = KGroupedOperands.check_tile

    def counted(self: KGroupedOperands, tile: KTile, *parts: Any) -> None:
        seen.append(tile)
        check_tile(self, tile, *parts)

    monkeypatch.setattr(KGroupedOperands, "check_tile", counted)
    for schedule in (FIRST, SECOND, FIRST):
        measurer.check(problem, M, schedule)
    assert played.launched == [FIRST, FIRST, SECOND, SECOND, FIRST, FIRST]
    assert KTile(0, 0, 0) in seen
    last = KTile(problem.num_groups - 1, 64, (problem.n - 1) // 64 * 64)
    assert seen.count(last) == 2  # by the interpreter, once a length
    if problem.num_groups == 5:
        assert seen.count(KTile(3, 0, 0)) == 2  # the group without k


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("at", [(0, 0, 0), (-1, 69, 130), (0, 33, 77)], ids=str)
def test_check_rejects_one_wrong_bit_anywhere(
    played: Played, measurer: GpuMeasurer, problem: GroupedGemm, at: tuple[int, int, int]
) -> None:
    def spoil(d: Any, schedule: Schedule) -> None:
        if schedule == SECOND:
            d.view(torch.int16 if d.itemsize == 2 else torch.int32)[at] ^= 1

    played.spoil = spoil
    measurer.check(problem, M, FIRST)
    with pytest.raises(CandidateError, match=rf"in 1 of .*the first, \[{at[1]}, {at[2]}\], is"):
        measurer.check(problem, M, SECOND)
    measurer.check(problem, M, THIRD)


def test_check_rejects_what_is_set_where_it_must_be_added(
    played: Played, measurer: GpuMeasurer
) -> None:
    before = torch.empty(5, M, 136).normal_(generator=torch.Generator().manual_seed(1))
    played.spoil = lambda d, schedule: d.sub_(before)
    with pytest.raises(CandidateError, match="differs from the interpreter's"):
        measurer.check(PROBLEMS[0], M, FIRST)


def test_check_rejects_a_result_in_a_group_without_k(played: Played, measurer: GpuMeasurer) -> None:
    played.spoil = lambda d, schedule: d[3].zero_()
    with pytest.raises(CandidateError, match=r"in the tile at \[3, 0, 0\]"):
        measurer.check(PROBLEMS[0], M, FIRST)


def test_check_finds_out_that_the_proven_schedule_is_wrong(
    played: Played, measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(d: Any, schedule: Schedule) -> None:
        if schedule == FIRST:
            d[2, 1, 2] += 1

    monkeypatch.setattr(KGroupedOperands, "_sample", lambda self: [KTile(4, 64, 128)])  # misses it
    played.spoil = spoil
    measurer.check(PROBLEMS[0], M, FIRST)
    with pytest.raises(VerifyError, match=r"is wrong at \[2, 1, 2\], where"):
        measurer.check(PROBLEMS[0], M, SECOND)


def test_time_is_the_mean_over_the_lengths(
    played: Played, measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "time_in_turns", lambda calls, n: [[i + 1.0] * n for i in range(4)]
    )
    times = measurer.time(PROBLEMS[0], M, [FIRST, SECOND], 2)
    assert times == [[pytest.approx(2**0.5)] * 2, [pytest.approx(12**0.5)] * 2]
    assert played.launched == [FIRST, FIRST, SECOND, SECOND]


# --- the benchmark --------------------------------------------------------------------------------


def test_shapes_are_deepgemms_and_those_of_experts() -> None:
    shapes = [(s.num_groups, s.m, s.n, s.expected) for s in bench.K_GROUPED_SHAPES]
    assert shapes[:4] == [
        (4, 4096, 7168, 8192),
        (4, 7168, 2048, 8192),
        (8, 4096, 7168, 4096),
        (8, 7168, 2048, 4096),
    ]
    assert len(shapes) == len(set(shapes)) == 24
    assert {(32, 4096, 7168, 1024), (48, 7168, 2048, 640), (16, 3072, 4096, 2048)} < set(shapes)
    assert Grid.k_grouped.problems() == [(of_k_groups(n, g), m) for g, m, n, _ in shapes]


def test_floor_counts_d_read_and_written() -> None:
    shape = bench.KGroupedShape(4, 256, 512, 128)
    k = sum(shape.ks)
    assert shape.num_bytes == (256 + 512) * (k + k // 32) + 8 * 4 * 256 * 512
    assert shape.flops == 2 * 256 * 512 * k
    assert shape.floor_us == pytest.approx(shape.num_bytes / 3e6 + 2)


def test_measure_times_a_result_that_is_checked(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = bench.KGroupedShape(3, 72, 136, 256)
    measured = Measurement(100.0, 1.0, 99.0, 101.0, 12, ("grouped",))
    monkeypatch.setattr(bench, "measure_kernel_us", lambda call: call() or measured)
    assert bench.measure(shape, FIRST, "cpu") == measured
    assert played.launched == [FIRST, FIRST]
    played.spoil = lambda d, schedule: d[2, 71, 135].add_(1)
    with pytest.raises(VerifyError, match=r"\[71, 135\]"):
        bench.measure(shape, FIRST, "cpu")


@pytest.mark.parametrize("name", bench.PEERS)
def test_peers_multiply_each_group_or_say_why_not(name: str) -> None:
    shape = bench.KGroupedShape(3, 64, 48, 128)
    peer = bench.PEERS[name]
    given = bench.make_inputs(shape, "cpu", is_fp8=peer.is_fp8)
    try:
        d = peer.prepare(given)()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"not on a CPU: {error!s:.80}")
    bench.check_peer(d, given)
    with pytest.raises(VerifyError, match="rows are wrong"):
        bench.check_peer(d * 1.1, given)


def row(shape: bench.KGroupedShape) -> bench.KGroupedRow:
    measured = Measurement(100.0, 1.0, 99.0, 101.0, 12, ("grouped",))
    peers = {"addmm": replace(measured, kernel_us=150.0), "mm": replace(measured, kernel_us=80.0)}
    return bench.KGroupedRow(shape, FIRST, measured, peers, {"BF16 grouped_mm": "no such thing"})


META = Meta("GPU", "1", "13", "2", "4", "0", "2026-01-01", "Method.", {}, "jitgen bench grouped")


def test_report_has_a_table_of_weight_gradients(tmp_path: Path) -> None:
    shape = bench.DEEPGEMM_SHAPES[0]
    result = report_grouped.GroupedResult(META, (), None, (), (row(shape),))
    text = report_grouped.render_markdown(result)
    over, tflops = 100 / shape.floor_us, shape.flops / 1e8
    head = f"| 4 | 8192 | {sum(shape.ks)} | 4096 | 7168 | 100.00 | 1.0% | {over:.2f}"
    assert f"{head} | {tflops:.0f} | 1.50 | **0.80** | - | - | - | {FIRST} |" in text
    assert f"| all |  |  |  |  |  |  | {over:.2f} |  | 1.50 | **0.80** | - | - | - |  |" in text
    assert "- BF16 grouped_mm: no such thing" in text
    path, page = tmp_path / "k.json", tmp_path / "k.md"
    path.write_text(json.dumps(result.to_json()))
    assert report_grouped.GroupedResult.from_json(json.loads(path.read_text())) == result
    done = CliRunner().invoke(app, ["bench", "report", str(path), "--markdown", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text() == text


def test_results_of_an_earlier_run_go_with_weight_gradients() -> None:
    shapes = bench.DEEPGEMM_SHAPES
    result = report_grouped.GroupedResult(META, (), 1.0, (), tuple(map(row, shapes[:2])))
    older = report_grouped.GroupedResult(META, (), 1.0).to_json()
    del older["k_grouped"]  # what was written before there were any
    merged = report_grouped.GroupedResult.from_json(older, result.to_json())
    assert merged.k_grouped == result.k_grouped
    assert np.isclose(merged.k_grouped[0].to_json()["derived"]["ratios"]["addmm"], 1.5)
