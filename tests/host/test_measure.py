"""The GPU's measurer with the GPU's part played on the CPU: what it proves, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jitgen import api
from jitgen.dtypes import E4M3, F32
from jitgen.errors import CandidateError, DeviceError, ProblemError, ScheduleError, VerifyError
from jitgen.expr import gate, up
from jitgen.layouts import Ragged
from jitgen.problem import Gemm, GroupedGemm
from jitgen.schedule import Schedule
from jitgen.tuning import bench, measure, timing
from jitgen.tuning.measure import GpuMeasurer, time_in_turns
from jitgen.tuning.timing import NUM_PROFILES, DeviceEvent

torch = pytest.importorskip("torch")

PROBLEM, M = Gemm(136, 256), 70
FIRST, SECOND, THIRD = (Schedule(64, columns, 4, 1) for columns in (64, 32, 48))


class Played:
    """Runs gemm on the interpreter; `spoil` may alter the result of a schedule."""

    def __init__(self) -> None:
        self.launched: list[Schedule] = []
        self.num_interpreted = 0
        self.spoil: Callable[[Any, Schedule], None] = lambda d, schedule: None

    def gemm(self, *operands: Any, out: Any, **options: Any) -> None:
        self.run(api.gemm, *operands, out=out, **options)

    def grouped_gemm(self, *operands: Any, layout: Any, **options: Any) -> None:
        on_host = Ragged(layout.offsets.numpy())
        self.run(api.grouped_gemm, *operands, layout=on_host, **options)

    def run(self, function: Any, a: Any, b: Any, scales: Any, *, out: Any, **options: Any) -> None:
        self.launched.append(options["schedule"])
        numpy_a, numpy_b = (bench.to_numpy(tensor, E4M3) for tensor in (a, b))
        host_scales = tuple(bench.to_numpy(tensor, F32) for tensor in scales)
        outputs = out if isinstance(out, tuple) else (out,)
        dtype = str(outputs[0].dtype).removeprefix("torch.")
        made = function(numpy_a, numpy_b, host_scales, out_dtype=dtype, **options)
        for tensor, array in zip(outputs, made if isinstance(out, tuple) else (made,), strict=True):
            word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]
            kind = "u" if tensor.itemsize == 1 else "i"
            tensor.view(word).copy_(torch.from_numpy(array.view(f"{kind}{tensor.itemsize}")))
        self.spoil(outputs[0], options["schedule"])


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    sample_tiles = measure.sample_tiles

    def counted(*arguments: Any) -> list[tuple[int, int]]:
        played.num_interpreted += 1
        return sample_tiles(*arguments)

    monkeypatch.setattr(measure, "gemm", played.gemm)
    monkeypatch.setattr(measure, "grouped_gemm", played.grouped_gemm)
    monkeypatch.setattr(measure, "sample_tiles", counted)
    monkeypatch.setattr(measure, "check_machine", lambda: None)
    return played


@pytest.fixture
def measurer(played: Played) -> GpuMeasurer:
    return GpuMeasurer("cpu")


@pytest.mark.parametrize("problem", [PROBLEM, Gemm(136, 256, F32)], ids=["bf16", "f32"])
def test_check_proves_one_schedule_and_compares_the_others_with_it(
    played: Played, measurer: GpuMeasurer, problem: Gemm
) -> None:
    for schedule in (FIRST, SECOND, THIRD, FIRST):
        measurer.check(problem, M, schedule)
    assert played.launched == [FIRST, SECOND, THIRD, FIRST]
    assert played.num_interpreted == 1


def test_check_proves_one_schedule_of_each_numerics_class(
    played: Played, measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "numerics_class", lambda schedule: (schedule.block_n == 32,))
    for schedule in (FIRST, SECOND, THIRD):
        measurer.check(PROBLEM, M, schedule)
    assert played.num_interpreted == 2


def test_check_compares_numerics_classes_with_each_other(
    played: Played, measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(d: Any, schedule: Schedule) -> None:
        if schedule == SECOND:
            d[40, 50] *= 1.1

    monkeypatch.setattr(measure, "numerics_class", lambda schedule: (schedule.block_n,))
    monkeypatch.setattr(measure, "sample_tiles", lambda *a: [(64, 0)])  # which misses it
    played.spoil = spoil
    measurer.check(PROBLEM, M, FIRST)
    measurer.check(PROBLEM, M, THIRD)
    with pytest.raises(CandidateError, match=r"in the rows from 0: .* the first, \[40, 50\]"):
        measurer.check(PROBLEM, M, SECOND)


@pytest.mark.parametrize("k", [512, 16384])
def test_check_takes_results_that_add_up_k_in_another_order(
    played: Played, measurer: GpuMeasurer, k: int
) -> None:
    for split_k in (1, 2, 4):
        measurer.check(Gemm(136, k), 5, Schedule(64, 16, 4, 1, split_k=split_k))
    assert played.num_interpreted == 3


GROUPED = {
    "bf16": GroupedGemm(136, 256, num_groups=5),
    "gated-e4m3": GroupedGemm(512, 256, E4M3, gate * up, num_groups=5),
}


@pytest.mark.parametrize("problem", GROUPED.values(), ids=GROUPED)
def test_check_of_groups_proves_one_schedule_in_tiles_of_three_groups(
    played: Played, measurer: GpuMeasurer, problem: GroupedGemm
) -> None:
    gated = problem.num_halves > 1
    schedules = (Schedule(64, 256, 3, 1), Schedule(128, 256, 2)) if gated else (FIRST, SECOND)
    for schedule in schedules:
        measurer.check(problem, 90, schedule)
    assert played.launched == list(schedules)
    assert played.num_interpreted == 3


@pytest.mark.parametrize("problem", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("row", [0, 17, 89])
def test_check_of_groups_rejects_one_wrong_bit(
    played: Played, measurer: GpuMeasurer, problem: GroupedGemm, row: int
) -> None:
    gated = problem.num_halves > 1
    right, wrong = (Schedule(64, 256, 3, 1), Schedule(128, 256, 2)) if gated else (FIRST, SECOND)

    def spoil(d: Any, schedule: Schedule) -> None:
        if schedule == wrong:
            d.view(torch.uint8)[row, 100] ^= 1

    played.spoil = spoil
    measurer.check(problem, 90, right)
    with pytest.raises(CandidateError, match="differs from the interpreter's in 1 of"):
        measurer.check(problem, 90, wrong)


@pytest.mark.parametrize("problem", GROUPED.values(), ids=GROUPED)
def test_check_of_groups_rejects_what_is_not_written(
    played: Played, measurer: GpuMeasurer, problem: GroupedGemm
) -> None:
    played.spoil = lambda d, schedule: measure._poison(d[40:42])
    schedule = Schedule(64, 256, 3, 1) if problem.num_halves > 1 else FIRST
    with pytest.raises(CandidateError, match=f"{2 * problem.columns} elements of D are NaN"):
        measurer.check(problem, 90, schedule)


def test_check_proves_again_for_another_m(played: Played, measurer: GpuMeasurer) -> None:
    for m in (M, 5, M):
        measurer.check(PROBLEM, m, FIRST)
    assert played.num_interpreted == 3


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((0, 0), r"in the rows from 0: .* in 1 of 2048 elements; the first, \[0, 0\]"),
        ((33, 77), r"in the rows from 0: .* in 1 of 2048 elements; the first, \[33, 77\]"),
        ((69, 135), r"in the rows from 64: .* in 1 of 48 elements; the first, \[5, 135\]"),
    ],
    ids=str,
)
def test_check_rejects_one_wrong_bit_anywhere(
    played: Played, measurer: GpuMeasurer, at: tuple[int, int], message: str
) -> None:
    def spoil(d: Any, schedule: Schedule) -> None:
        if schedule == SECOND:
            d.view(torch.int16)[at] ^= 1

    played.spoil = spoil
    measurer.check(PROBLEM, M, FIRST)
    with pytest.raises(CandidateError, match=message):
        measurer.check(PROBLEM, M, SECOND)
    measurer.check(PROBLEM, M, THIRD)


def test_check_rejects_elements_that_are_not_written(played: Played, measurer: GpuMeasurer) -> None:
    def spoil(d: Any, schedule: Schedule) -> None:
        if schedule != THIRD:
            d[30, 70] = np.nan  # what the buffer held before

    played.spoil = spoil
    with pytest.raises(CandidateError, match="1 elements of D are NaN"):
        measurer.check(PROBLEM, M, FIRST)
    measurer.check(PROBLEM, M, THIRD)
    with pytest.raises(CandidateError, match="differs from the interpreter's"):
        measurer.check(PROBLEM, M, SECOND)


def test_check_finds_out_that_the_proven_schedule_is_wrong(
    played: Played, measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "sample_tiles", lambda *a: [(64, 64)])  # which misses it

    def spoil(d: Any, schedule: Schedule) -> None:
        if schedule == FIRST:
            d[1, 2] += 1

    played.spoil = spoil
    measurer.check(PROBLEM, M, FIRST)
    with pytest.raises(VerifyError, match=rf"{FIRST} is wrong at \[1, 2\]"):
        measurer.check(PROBLEM, M, SECOND)


def test_check_rejects_a_schedule_that_is_refused(
    measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ScheduleError("too much shared memory")

    monkeypatch.setattr(measure, "gemm", refuse)
    with pytest.raises(CandidateError, match="too much shared memory"):
        measurer.check(PROBLEM, M, FIRST)


def test_check_rejects_a_problem_that_does_not_fit(
    measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 200 GiB")

    monkeypatch.setattr(measure, "quantize", fill_up)
    with pytest.raises(ProblemError, match="m = 70 does not fit into the GPU's memory"):
        measurer.check(PROBLEM, M, FIRST)


def test_measurer_rejects_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="needs a Hopper GPU"):
        GpuMeasurer()


# --- timing ---------------------------------------------------------------------------------------


def profile(monkeypatch: pytest.MonkeyPatch, lost: list[bool]) -> None:
    """Each call runs the kernels that it returns; a profile that is lost raises."""

    def profile_calls(calls: list[Callable[[], Any]]) -> list[list[DeviceEvent]]:
        if lost.pop(0):
            raise DeviceError("records are missing")
        return [[DeviceEvent(name, 0.0, us) for name, us in call()] for call in calls]

    monkeypatch.setattr(timing, "profile_calls", profile_calls)


def test_time_in_turns_sums_the_kernels_of_each_call_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile(monkeypatch, [True, False])
    order: list[str] = []

    def call(name: str) -> list[tuple[str, float]]:
        order.append(name)
        return [(name, len(order)), ("reduce", 100.0)]

    times = time_in_turns([lambda: call("a"), lambda: call("b")], 2)
    assert order == ["a", "b"] * 3
    assert times == [[103.0, 105.0], [104.0, 106.0]]


def test_time_in_turns_rejects_profiles_that_stay_incomplete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile(monkeypatch, [True] * NUM_PROFILES)
    with pytest.raises(DeviceError, match="records are missing"):
        time_in_turns([lambda: [("a", 1.0)]], 2)


def test_time_in_turns_rejects_calls_that_run_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile(monkeypatch, [False] * NUM_PROFILES)
    names = iter("abcdefghi")
    with pytest.raises(DeviceError, match="must run the same kernels"):
        time_in_turns([lambda: [(next(names), 1.0)]], 2)


def test_time_launches_every_schedule_before_it_profiles(
    played: Played, measurer: GpuMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def in_turns(calls: list[Callable[[], None]], num_calls: int) -> list[list[float]]:
        seen.append(len(played.launched))
        for call in calls:
            call()
        return [[1.0] * num_calls for _ in calls]

    monkeypatch.setattr(measure, "time_in_turns", in_turns)
    assert measurer.time(PROBLEM, M, [FIRST, SECOND], 3) == [[1.0] * 3] * 2
    assert seen == [2]
    assert played.launched == [FIRST, SECOND] * 2
