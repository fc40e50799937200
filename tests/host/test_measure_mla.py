"""MLA decode in the tuner's measurer, with the interpreter in place of the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402

from jitgen import BF16, MlaDecode, MlaSchedule, api_mla  # noqa: E402
from jitgen.errors import CandidateError, VerifyError  # noqa: E402
from jitgen.schedule_mla import select_mla  # noqa: E402
from jitgen.tuning import measure, measure_mla, operands_mla  # noqa: E402
from jitgen.tuning.bench import to_numpy  # noqa: E402
from jitgen.tuning.measure import GpuMeasurer  # noqa: E402
from jitgen.tuning.operands_mla import MlaOperands, make_cache  # noqa: E402
from jitgen.tuning.space_mla import mla_candidates  # noqa: E402

PROBLEM = MlaDecode(3, 2, causal=False, cache="fp8", sparse=True)
DENSE = [MlaDecode(3, 2, 320, 256), MlaDecode(3, 2, cache="fp8")]
BATCH = 2
Decode = Callable[..., Any]


class OnHost(TorchFunctionMode):
    """What is made for a GPU is made on the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("device") == "cuda":
            given["device"] = "cpu"
        return func(*args, **given)


class Played:
    """Runs MLA decode on the interpreter; `spoil` may alter o of a schedule."""

    def __init__(self) -> None:
        self.launched: list[MlaSchedule] = []
        self.spoil: Callable[[Any, MlaSchedule], None] = lambda o, schedule: None

    def play(self, decode: Decode) -> Decode:
        def run(*tensors: Any, out: Any, schedule: MlaSchedule, **options: Any) -> Any:
            self.launched.append(schedule)
            host = [to_numpy(t, BF16) if t.dtype == torch.bfloat16 else t.numpy() for t in tensors]
            o = to_numpy(out, BF16)  # shares the tensor's memory
            _, lse = decode(*host, out=o, schedule=schedule, **options)
            self.spoil(out, schedule)
            return out, torch.from_numpy(lse)

        return run


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    played, generator = Played(), torch.Generator
    for name in ("mla_decode", "mla_decode_sparse"):
        monkeypatch.setattr(operands_mla, name, played.play(getattr(api_mla, name)))
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))
    monkeypatch.setattr(measure_mla, "LENGTHS", (64, 90))
    monkeypatch.setattr(measure_mla, "TOPK", 20)
    monkeypatch.setattr(measure, "check_machine", lambda: None)
    with OnHost():
        yield played


def schedules() -> list[MlaSchedule]:
    return mla_candidates(PROBLEM, select_mla(PROBLEM, batch=BATCH))[:3]


def test_check_runs_each_length_and_finds_what_is_wrong(played: Played) -> None:
    measurer, (first, second, wrong) = GpuMeasurer(), schedules()
    for schedule in (first, second):
        measurer.check(PROBLEM, BATCH, schedule)
    assert played.launched == [first] * 2 + [second] * 2

    def spoil(o: Any, schedule: MlaSchedule) -> None:
        if schedule == wrong:
            o[-1, -1, 2, 200] += 0.5

    played.spoil = spoil
    measurer.check(PROBLEM, BATCH, first)
    with pytest.raises(CandidateError, match=r"b = 2, .* 1 of \d+ outputs are off"):
        measurer.check(PROBLEM, BATCH, wrong)


@pytest.mark.parametrize("problem", DENSE, ids=str)
@pytest.mark.parametrize("num_keys", [5, 64, 70])
def test_operands_of_dense_decode_find_what_is_wrong(
    played: Played, problem: MlaDecode, num_keys: int
) -> None:
    """Those of the benchmark."""
    cache = make_cache(problem, BATCH * -(-num_keys // problem.page))
    operands = MlaOperands(problem, BATCH, num_keys, cache)
    operands.run()
    operands.check()
    operands.o[-1, -1, 2, 200] += 0.5
    with pytest.raises(VerifyError, match=r"b = 2, .* 1 of \d+ outputs are off"):
        operands.check()


def test_a_time_is_the_geometric_mean_of_the_lengths(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_in_turns(calls: Sequence[Decode], num_calls: int) -> list[list[float]]:
        return [[2.0**i, 3 * 2.0**i][:num_calls] for i, _ in enumerate(calls)]

    monkeypatch.setattr(measure, "time_in_turns", time_in_turns)
    times = GpuMeasurer().time(PROBLEM, BATCH, schedules()[:2], 2)
    assert times == [pytest.approx([mean, 3 * mean]) for mean in (2**0.5, 2**2.5)]
