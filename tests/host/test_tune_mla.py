"""MLA decode in the tuner: candidates, records, selection, plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jitgen import F16, MlaDecode, MlaSchedule, ProblemError, plan
from jitgen.errors import StoreError
from jitgen.problem_mla import HEAD_DIMS
from jitgen.schedule_mla import select_mla
from jitgen.target import H100
from jitgen.tuning import select as selection
from jitgen.tuning.keys import is_tunable
from jitgen.tuning.model import m_bucket, m_buckets
from jitgen.tuning.records import Record, file_of, read_file, save
from jitgen.tuning.select import reload_records, select
from jitgen.tuning.session import Session, read_journal
from jitgen.tuning.space import is_legal
from jitgen.tuning.space_mla import (
    BATCHES,
    VALUES,
    mla_as_tuned,
    mla_candidates,
    mla_name,
)
from jitgen.tuning.tune import make_jobs, tune

from .fake_measurer import FakeMeasurer
from .test_records import RECORD

PROBLEMS = [
    MlaDecode(16),
    MlaDecode(128, 2),
    MlaDecode(8, 4, *HEAD_DIMS[2], page=16, dtype=F16),
    MlaDecode(64, cache="fp8"),
    MlaDecode(128, 2, causal=False, cache="fp8", sparse=True, sink=True),
]
PROBLEM = mla_as_tuned(MlaDecode(64))
FASTER = MlaSchedule(prefetch=1)


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


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_are_legal_and_begin_with_the_choice_without_records(
    problem: MlaDecode,
) -> None:
    for batch in (1, 64):
        first = select_mla(problem, batch=batch)
        found = mla_candidates(problem, first)
        assert found[0] == first
        assert len(set(found)) == len(found) > 1
        assert all(is_legal(problem, schedule) for schedule in found)
        differ = [sum(getattr(s, n) != getattr(first, n) for n in VALUES) for s in found]
        assert differ == sorted(differ)


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
    assert select(replace(PROBLEM, dtype=F16, causal=False), 16) == FASTER
    assert select(PROBLEM, 17) == select_mla(PROBLEM, batch=32)
    assert select(PROBLEM, 1, max_keys=9) == select_mla(PROBLEM, batch=1, max_keys=9)
    whole = select(PROBLEM, 16, batch_invariant=True)
    assert whole == select_mla(PROBLEM, batch_invariant=True)


def test_records_have_no_say_for_one_sequence(folder: Path) -> None:
    save(folder, [record(m=1)])
    reload_records()
    assert [is_tunable(PROBLEM, b) for b in (1, 2)] == [False, True]
    assert select(PROBLEM, 1) == select_mla(PROBLEM, batch=1) != FASTER


def test_select_ignores_a_record_that_cannot_run_the_problem(folder: Path) -> None:
    save(folder, [replace(record(), schedule=MlaSchedule(cluster=2))])  # 64 rows are one tile
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
    (job,) = make_jobs([(MlaDecode(64, causal=False), 13)], H100, num_candidates=6)
    assert (job.problem, job.m, len(job.schedules)) == (PROBLEM, 16, 6)
    assert job.schedules[0] == select_mla(PROBLEM, batch=16)
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
