"""A tuning run's memory: records of what was measured, and a journal of everything tried.

The journal is `journal.jsonl` in the records' folder: a JSON line an outcome, with every time and
error. An interrupted run goes on by both: what has a record of the same kernels is not measured
again, and a schedule that failed is not tried again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..target import Gpu
from .keys import TunedSchedule, schedule_type
from .records import (
    DATE_FORMAT,
    Provenance,
    Record,
    file_of,
    read_file,
    read_schedule,
    save,
    schedule_json,
)
from .tune import Job, Outcome, Trial

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class JournalLine:
    """What the journal says of an outcome: the fields of `Outcome`, its job as text.

    kernels : of the provenance
    """

    gpu: Gpu
    kernels: tuple[str, str]
    job: str
    status: str
    trials: tuple[Trial, ...]
    errors: dict[TunedSchedule, str]


def read_journal(folder: Path) -> list[JournalLine]:
    """The outcomes in the journal of a records' folder, oldest first; none without a journal.

    A line that cannot be read is left out: the last one may be half written, and others another
    version's.
    """
    path = folder / JOURNAL
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, StoreError):
            lines.append(_read_line(json.loads(text)))
    return lines


def _read_line(line: dict[str, Any]) -> JournalLine:
    fingerprint, nvrtc = line["kernels"]
    kind = schedule_type(line["job"])
    return JournalLine(
        Gpu(line["name"], line["num_sms"]),
        (fingerprint, nvrtc),
        line["job"],
        line["status"],
        tuple(
            Trial(**(trial | {"schedule": read_schedule(trial["schedule"], kind)}))
            for trial in line["trials"]
        ),
        {read_schedule(error["schedule"], kind): error["error"] for error in line["errors"]},
    )


class Session:
    """Where the outcomes of one run on one GPU go.

    Parameters
    ----------
    folder : of the records, made if missing
    provenance : of the records
    read_clock_mhz : the SM clock now, None if unknown
    """

    def __init__(
        self,
        folder: Path,
        gpu: Gpu,
        provenance: Provenance,
        read_clock_mhz: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._gpu = gpu
        self._provenance = provenance
        self._read_clock_mhz = read_clock_mhz

    def remaining(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs without a record of today's kernels, and without schedules known to fail.

        Raises
        ------
        StoreError : a records file that a job would be added to breaks the format
        """
        failed = self._failed()
        kernels = self._provenance.kernels
        left = []
        for job in jobs:
            key = self._gpu, job.problem, job.m
            records = read_file(file_of(self._folder, self._gpu, job.problem))
            if any(
                record.key == key and record.provenance.kernels == kernels for record in records
            ):
                continue
            known = failed.get(str(job), set())
            schedules = tuple(s for s in job.schedules if s not in known)
            left.append(replace(job, schedules=schedules))
        return left

    def add(self, outcome: Outcome) -> None:
        """Write the outcome to the journal and, if it has a winner, to the records.

        Raises
        ------
        StoreError : a file cannot be written, or the records file breaks the format
        """
        head = asdict(self._gpu) | {"kernels": self._provenance.kernels}
        line = json.dumps(head | _outcome_json(outcome), allow_nan=False)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / JOURNAL).open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StoreError(f"cannot write {self._folder / JOURNAL}: {error.strerror}") from None
        if winner := outcome.winner:
            record = Record(
                gpu=self._gpu,
                problem=outcome.job.problem,
                m=outcome.job.m,
                num_candidates=len(outcome.trials),
                sm_clock_mhz=self._read_clock_mhz(),
                date=datetime.now(timezone.utc).strftime(DATE_FORMAT),
                provenance=self._provenance,
                **vars(winner),
            )
            save(self._folder, [record])

    def _failed(self) -> dict[str, set[TunedSchedule]]:
        """The schedules that the journal says cannot be measured, by job."""
        failed: dict[str, set[TunedSchedule]] = {}
        for line in read_journal(self._folder):
            if (line.gpu, line.kernels) == (self._gpu, self._provenance.kernels):
                failed.setdefault(line.job, set()).update(line.errors)
        return failed


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "job": str(outcome.job),
        "status": outcome.status,
        "reason": outcome.reason,
        "trials": [
            {**vars(trial), "schedule": schedule_json(trial.schedule)} for trial in outcome.trials
        ],
        "errors": [
            {"schedule": schedule_json(schedule), "error": error}
            for schedule, error in outcome.errors.items()
        ],
    }
