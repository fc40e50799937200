"""What a tuning run remembers: its records, and its journal."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from jitgen.errors import StoreError
from jitgen.problem import Gemm
from jitgen.schedule import Schedule
from jitgen.target import H100, Gpu
from jitgen.tuning.records import DATE_FORMAT, Provenance, file_of, read_folder
from jitgen.tuning.session import JOURNAL, Session
from jitgen.tuning.tune import Job, Outcome, Trial

PROVENANCE = Provenance("580.95.05", "13.0.88", "0.1.0", "0123456789abcdef")
FAST, SLOW, BAD = (Schedule(64, columns, 4, 1) for columns in (64, 32, 48))
JOB = Job(Gemm(2112, 7168), 64, (SLOW, FAST, BAD))
OTHER_JOB = replace(JOB, m=128)
TRIALS = (Trial(SLOW, 12.5, 0.25, 6), Trial(FAST, 10.0, 0.125, 40))
MEASURED = Outcome(JOB, "measured", "", TRIALS[1], TRIALS, {BAD: "it died"})
UNSTABLE = Outcome(OTHER_JOB, "unstable", "it moved", None, TRIALS)


def open_session(folder: Path, **changes: Any) -> Session:
    gpu = changes.pop("gpu", H100)
    return Session(folder, gpu, replace(PROVENANCE, **changes), lambda: 1755)


def test_add_records_the_winner_with_all_that_is_known(tmp_path: Path) -> None:
    open_session(tmp_path / "new").add(MEASURED)
    (record,) = read_folder(tmp_path / "new")
    assert (record.gpu, record.problem, record.m) == (H100, JOB.problem, 64)
    assert record.schedule == FAST
    assert (record.kernel_us, record.spread_us, record.num_calls) == (10.0, 0.125, 40)
    assert (record.num_candidates, record.sm_clock_mhz) == (2, 1755)
    assert record.provenance == PROVENANCE
    assert datetime.strptime(record.date, DATE_FORMAT)


@pytest.mark.parametrize("outcome", [UNSTABLE, Outcome(JOB, "failed", "nothing works")], ids=str)
def test_add_records_nothing_without_a_winner(tmp_path: Path, outcome: Outcome) -> None:
    open_session(tmp_path).add(outcome)
    assert read_folder(tmp_path) == []
    assert (tmp_path / JOURNAL).is_file()


def test_journal_holds_every_time_and_error(tmp_path: Path) -> None:
    session = open_session(tmp_path)
    for outcome in (MEASURED, UNSTABLE):
        session.add(outcome)
    first, second = map(json.loads, (tmp_path / JOURNAL).read_text().splitlines())
    assert (first["job"], first["status"]) == ("m64-n2112-k7168-bf16", "measured")
    assert [trial["kernel_us"] for trial in first["trials"]] == [12.5, 10.0]
    assert first["errors"][0]["error"] == "it died"
    assert first["errors"][0]["schedule"]["block_n"] == 48
    assert (second["status"], second["reason"]) == ("unstable", "it moved")
    assert (first["name"], first["num_sms"]) == (H100.name, 132)


def test_remaining_leaves_out_what_has_a_record(tmp_path: Path) -> None:
    session = open_session(tmp_path)
    assert session.remaining([JOB, OTHER_JOB]) == [JOB, OTHER_JOB]
    for outcome in (MEASURED, UNSTABLE):
        session.add(outcome)
    assert open_session(tmp_path).remaining([JOB, OTHER_JOB]) == [OTHER_JOB]


@pytest.mark.parametrize(
    "changes",
    [{"fingerprint": "f" * 16}, {"nvrtc": "13.1"}, {"gpu": Gpu(H100.name, 60)}],
    ids=["kernels", "compiler", "gpu"],
)
def test_remaining_measures_again_with_other_kernels_or_on_another_gpu(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    open_session(tmp_path).add(MEASURED)
    assert open_session(tmp_path, **changes).remaining([JOB]) == [JOB]


def test_remaining_measures_again_with_another_driver_only_if_asked(tmp_path: Path) -> None:
    open_session(tmp_path).add(MEASURED)
    assert open_session(tmp_path, driver="590.1").remaining([JOB]) == []


def test_remaining_leaves_out_schedules_that_failed(tmp_path: Path) -> None:
    open_session(tmp_path).add(replace(UNSTABLE, errors={BAD: "it hung"}))
    assert open_session(tmp_path).remaining([JOB, OTHER_JOB]) == [
        JOB,
        replace(OTHER_JOB, schedules=(SLOW, FAST)),
    ]


def test_remaining_reads_a_journal_that_was_cut_off(tmp_path: Path) -> None:
    session = open_session(tmp_path)
    session.add(replace(UNSTABLE, errors={BAD: "it hung"}))
    text = (tmp_path / JOURNAL).read_text()
    lines = ["7", "{}", '{"job": 1}', text.replace("block_n", "block_x"), text, text[:-30]]
    (tmp_path / JOURNAL).write_text("\n".join(lines))
    assert session.remaining([OTHER_JOB])[0].schedules == (SLOW, FAST)


def test_remaining_rejects_a_records_file_that_could_not_be_added_to(tmp_path: Path) -> None:
    path = file_of(tmp_path, H100, JOB.problem)
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        open_session(tmp_path).remaining([JOB])


def test_add_rejects_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*journal.jsonl"):
        open_session(tmp_path / "file").add(MEASURED)
