"""MLA decode in the tuner: candidates, records, selection, plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jitgen import BF16, F16, MlaDecode, MlaSchedule, ProblemError, plan
from jitgen.errors import StoreError
from jitgen.problem_list import Grid
from jitgen.problem_mla import HEAD_DIMS
from jitgen.schedule_mla import select_mla
from jitgen.target import H100
from jitgen.tokens_mla import decode_tokens, quantize_tokens
from jitgen.tuning import select as selection
from jitgen.tuning.keys import is_tunable
from jitgen.tuning.model import m_bucket, m_buckets
from jitgen.tuning.operands_mla import decode_rows
from jitgen.tuning.records import Record, file_of, read_file, save
from jitgen.tuning.select import reload_records, select
from jitgen.tuning.session import Session, read_journal
from jitgen.tuning.space import is_legal
from jitgen.tuning.space_mla import (
    BATCHES,
    mla_as_tuned,
    mla_candidates,
    mla_name,
    num_steps,
)
from jitgen.tuning.tune import make_jobs, num_final_calls, num_launches, tune

from .fake_measurer import FakeMeasurer
from .test_records import RECORD

PROBLEMS = [
    MlaDecode(16),
    MlaDecode(128, 2),
    MlaDecode(8, 4, *HEAD_DIMS[2], page=16, dtype=F16),
    MlaDecode(64, cache="fp8"),
    MlaDecode(128, 2, causal=False, cache="fp8", sparse=True, sink=True),
]
SPARSE = [
    MlaDecode(heads, tokens, causal=False, cache="fp8", sparse=True)
    for heads in (16, 64, 128)
    for tokens in (1, 2)
]
PROBLEM = mla_as_tuned(MlaDecode(64, causal=False, cache="fp8", sparse=True))
FASTER = MlaSchedule(tile_rows=16, num_stages=2)


def record(problem: MlaDecode = PROBLEM, m: int = 16, **changes: Any) -> Record:
    return replace(RECORD, problem=problem, m=m, schedule=FASTER, **changes)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of records, empty; nothing is shipped."""
    monkeypatch.setenv("JITGEN_RECORDS_DIR", str(tmp_path))
    monkeypatch.setattr(selection, "shipped_folder", lambda: tmp_path / "none")
    reload_records()
    yield tmp_path
    reload_records()


@pytest.mark.parametrize("problem", SPARSE, ids=str)
def test_candidates_are_legal_and_begin_with_the_choice_without_records(
    problem: MlaDecode,
) -> None:
    for batch in (1, 64):
        first = select_mla(problem, batch=batch)
        found = mla_candidates(problem, first)
        assert found[0] == first
        assert len(set(found)) == len(found) > 1
        assert all(is_legal(problem, schedule) for schedule in found)
        steps = [num_steps(problem, schedule, first) for schedule in found]
        assert steps[0] == 0 < steps[1]
        assert steps == sorted(steps)


def test_candidates_of_sparse_decode_are_tiles_with_all_stages_that_fit() -> None:
    problem = MlaDecode(64, causal=False, cache="fp8", sparse=True)
    found = mla_candidates(problem, select_mla(problem, batch=64))
    tiles = [(schedule.tile_rows, schedule.num_stages) for schedule in found]
    assert tiles[:4] == [(64, 3), (32, 4), (64, 2), (16, 4)]


def test_the_grid_has_every_bucket_of_each_problem() -> None:
    pairs = Grid.mla.problems()
    problems = {mla_as_tuned(problem) for problem, _ in pairs}
    rows = {(p.num_heads, p.num_queries, p.is_fp8, p.sparse) for p in problems}
    assert {(h, q, fp8, False) for h in (16, 64, 128) for q in (1, 2) for fp8 in (0, 1)} <= rows
    assert {(h, q, True, True) for h in (64, 128) for q in (1, 2)} <= rows
    assert len(set(pairs)) == len(pairs) == len(problems) * len(BATCHES)


def test_a_call_of_several_lengths_counts_for_as_many() -> None:
    assert num_launches(PROBLEM) == 2
    assert [num_final_calls(us, 3) for us in (20.0, 250.0, 2000.0)] == [20, 10, 10]
    assert [num_final_calls(us) for us in (20.0, 250.0, 2000.0)] == [60, 24, 10]


def test_rows_of_a_cache_are_decoded_as_the_interpreter_decodes_them() -> None:
    torch = pytest.importorskip("torch")
    keys = np.random.default_rng(6).normal(0, 0.1, (5, 576)).astype(BF16.numpy)
    tokens = quantize_tokens(keys)
    found = decode_rows(torch.from_numpy(tokens))
    np.testing.assert_array_equal(found.numpy(), decode_tokens(tokens))
    plain = torch.from_numpy(keys.astype(np.float32)).bfloat16()
    np.testing.assert_array_equal(decode_rows(plain).numpy(), keys.astype(np.float64))


def test_names_tell_all_tuned_problems_apart() -> None:
    tuned = {mla_as_tuned(problem) for problem in PROBLEMS}
    assert len({mla_name(problem) for problem in tuned}) == len(tuned) == len(PROBLEMS)
    assert mla_as_tuned(PROBLEMS[4]) == replace(PROBLEMS[4], sink=False)
    assert mla_as_tuned(MlaDecode(16, causal=False, dtype=F16)) == MlaDecode(16)


def test_a_bucket_is_the_least_batch_at_or_above() -> None:
    assert [m_bucket(b, PROBLEM) for b in (0, 1, 2, 3, 64, 65, 256, 5000)] == [
        *(1, 1, 2, 4, 64, 128, 256, 256)
    ]
    assert m_buckets(range(3, 40), PROBLEM) == [4, 8, 16, 32, 64]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_record_reads_as_it_was_written(problem: MlaDecode, folder: Path) -> None:
    made = record(mla_as_tuned(problem))
    save(folder, [made, replace(made, m=1, kernel_us=3.0)])
    path = file_of(folder, H100, problem)
    assert path.name == f"mla-{mla_name(problem)}.json"
    assert read_file(path) == [replace(made, m=1, kernel_us=3.0), made]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mla": 7}, "mla must have the fields num_heads"),
        ({"mla": {"num_heads": 64}}, "mla must have the fields num_heads"),
        ({"n": 576}, "field n is unknown"),
    ],
)
def test_a_broken_file_is_named(change: dict[str, Any], message: str, folder: Path) -> None:
    save(folder, [record()])
    path = file_of(folder, H100, PROBLEM)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match=message):
        read_file(path)


def test_a_record_rules_out_heads_beyond_the_limit(folder: Path) -> None:
    save(folder, [record()])
    path = file_of(folder, H100, PROBLEM)
    path.write_text(path.read_text().replace('"num_heads": 64', '"num_heads": 640'))
    with pytest.raises(StoreError, match=r"num_heads = 640 must be in 1\.\.128"):
        read_file(path)


def test_select_takes_the_record_of_the_batch(folder: Path) -> None:
    save(folder, [record()])
    reload_records()
    assert select(PROBLEM, 9) == select(PROBLEM, 16) == FASTER
    assert select(replace(PROBLEM, sink=True), 16) == FASTER
    assert select(PROBLEM, 17) == select_mla(PROBLEM, batch=32)
    assert select(PROBLEM, 1, max_keys=9) == select_mla(PROBLEM, batch=1, max_keys=9)
    whole = select(PROBLEM, 16, batch_invariant=True)
    assert whole == select_mla(PROBLEM, batch_invariant=True)


def test_what_depends_on_keys_is_not_tuned() -> None:
    problems = (MlaDecode(64), MlaDecode(64, cache="fp8"), PROBLEM)
    assert [is_tunable(problem, 16) for problem in problems] == [False, False, True]


def test_records_have_no_say_for_one_sequence(folder: Path) -> None:
    save(folder, [record(m=1)])
    reload_records()
    assert [is_tunable(PROBLEM, b) for b in (1, 2)] == [False, True]
    assert select(PROBLEM, 1) == select_mla(PROBLEM, batch=1) != FASTER


def test_records_of_sparse_decode_are_for_about_as_many_tokens_as_were_measured(
    folder: Path,
) -> None:
    save(folder, [record()])
    reload_records()
    used = [select(PROBLEM, 16, max_keys=n) == FASTER for n in (64, 2048, 4096, 4097)]
    assert used == [True, True, True, False]
    assert select(PROBLEM, 16, max_keys=65536) == select_mla(PROBLEM, batch=16, max_keys=65536)


def test_the_tuner_compares_with_what_a_call_of_sparse_decode_takes() -> None:
    sparse = mla_as_tuned(MlaDecode(128, causal=False, cache="fp8", sparse=True))
    (job,) = make_jobs([(sparse, 2)], H100, 5)
    assert job.schedules[0] == select_mla(sparse, batch=2, max_keys=2048) != select_mla(sparse)


def test_select_ignores_a_record_that_cannot_run_the_problem(folder: Path) -> None:
    save(folder, [replace(record(), schedule=MlaSchedule(meet=2))])  # of BF16
    reload_records()
    assert select(PROBLEM, 16) == select_mla(PROBLEM, batch=16)


def test_plan_has_the_kernels_of_every_batch(folder: Path) -> None:
    save(folder, [record()])
    reload_records()
    made = plan(PROBLEM, range(1, 1001))
    assert dict(made.schedules) == {batch: select(PROBLEM, batch) for batch in BATCHES}
    assert made.schedule(700) == select(PROBLEM, 700)
    assert (PROBLEM, FASTER) in made.kernels
    with pytest.raises(ProblemError, match="num_heads"):
        plan(MlaDecode(0), [1])


def test_tune_records_the_fastest_schedule(folder: Path) -> None:
    (job,) = make_jobs([(replace(PROBLEM, sink=True), 13)], H100, num_candidates=6)
    assert (job.problem, job.m, len(job.schedules)) == (PROBLEM, 16, 6)
    assert job.schedules[0] == select_mla(PROBLEM, batch=16, max_keys=2048)
    fastest = job.schedules[3]
    wrong = job.schedules[1]
    measurer = FakeMeasurer({fastest: 50.0, wrong: 1.0}, wrong=(wrong,))
    session = Session(folder, H100, RECORD.provenance)
    (outcome,) = tune([job], measurer)
    session.add(outcome)
    (found,) = read_file(file_of(folder, H100, PROBLEM))
    assert (found.problem, found.m, found.schedule) == (PROBLEM, 16, fastest)
    assert session.remaining([job]) == []
    (line,) = read_journal(folder)
    assert line.job == f"b16-mla-{mla_name(PROBLEM)}"
    assert set(line.errors) == {wrong}
    assert fastest in {trial.schedule for trial in line.trials}
