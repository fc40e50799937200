"""Tuning records: the fastest schedule measured, by GPU, problem and M bucket; as files.

    <folder>/<GPU's name in lower case, with dashes>/gemm-n7168-k2048.json
    <folder>/<...>/grouped-gemm-g32-n4096-k7168.json
    <folder>/<...>/grouped-gemm-g32-n7168-by-k.json
    <folder>/<...>/mla-h16-q1-d576x512-p64-fp8.json

tuning/records/README.md describes the files. A user's folder goes before the one shipped here.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import platformdirs

from ..errors import JitgenError, StoreError
from ..schedule import Schedule
from ..schedule_mla import MlaSchedule
from ..target import Gpu
from .keys import (
    TunedProblem,
    TunedSchedule,
    entry_fields,
    entry_json,
    file_stem,
    head_fields,
    head_json,
    place,
    place_in_file,
    read_problem,
)

FORMAT_VERSION = 1
FOLDER_VARIABLE = "JITGEN_RECORDS_DIR"
DATE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


Key = tuple[Gpu, TunedProblem, int]


@dataclass(frozen=True)
class Provenance:
    """The versions that a record was measured with.

    fingerprint : of the kernels' source, see `codegen.fingerprint`
    """

    driver: str
    nvrtc: str
    jitgen: str
    fingerprint: str

    @property
    def kernels(self) -> tuple[str, str]:
        """Times with the same are times of the same kernels."""
        return self.fingerprint, self.nvrtc


@dataclass(frozen=True)
class Record:
    """The fastest schedule that was found for one M bucket of a problem on one GPU.

    problem : from `keys.tuned`
    m : the bucket, and the extent that was measured: rows of all groups, if rows have groups; of
        MLA decode sequences
    kernel_us : device time of a call, median of `num_calls`; of MLA decode and of k_grouped its
        geometric mean over the lengths that are measured
    spread_us : standard deviation over these calls
    num_candidates : schedules that were measured
    sm_clock_mhz : right after the measurement; None if it could not be read
    date : of the measurement, in UTC, in DATE_FORMAT
    """

    gpu: Gpu
    problem: TunedProblem
    m: int
    schedule: TunedSchedule
    kernel_us: float
    spread_us: float
    num_calls: int
    num_candidates: int
    sm_clock_mhz: int | None
    date: str
    provenance: Provenance

    @property
    def key(self) -> Key:
        """What the record is the answer to."""
        return self.gpu, self.problem, self.m


# --- folders --------------------------------------------------------------------------------------


def user_folder() -> Path:
    """$JITGEN_RECORDS_DIR or, without it, `records` in the user's configuration folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else Path(platformdirs.user_config_dir("jitgen")) / "records"


def shipped_folder() -> Path:
    """The records that come with jitgen."""
    return Path(__file__).parent / "records"


def file_of(folder: Path, gpu: Gpu, problem: TunedProblem) -> Path:
    """Where the records of a problem are, for every type and epilogue of D and number of SMs."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return folder / name / f"{file_stem(problem)}.json"


def read_folder(folder: Path) -> list[Record]:
    """Every record under `folder`.

    Raises
    ------
    StoreError : there is no such folder, or a file breaks the format
    """
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}")
    return [record for path in sorted(folder.glob("*/*.json")) for record in read_file(path)]


def save(folder: Path, records: Iterable[Record]) -> None:
    """Merge `records` into the files of `folder`; each file is replaced in one step.

    Raises
    ------
    StoreError : a file there breaks the format (it is left as it is), or cannot be written
    """
    by_file: dict[Path, list[Record]] = {}
    for record in records:
        by_file.setdefault(file_of(folder, record.gpu, record.problem), []).append(record)
    for path, new in by_file.items():
        merged = merge([*read_file(path), *new])
        text = json.dumps(_file_json(merged), indent=1, allow_nan=False) + "\n"
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from None


def merge(records: Iterable[Record]) -> list[Record]:
    """One record a key, in a fixed order: of those of the newest kernels, the fastest.

    The order of `records` does not matter.
    """
    by_key: dict[Key, list[Record]] = {}
    for record in records:
        by_key.setdefault(record.key, []).append(record)
    return sorted(map(_best, by_key.values()), key=_place)


def _best(records: list[Record]) -> Record:
    kernels = max((record.date, record.provenance.kernels) for record in records)[1]
    same = (record for record in records if record.provenance.kernels == kernels)
    return min(same, key=lambda record: (record.kernel_us, record.date, repr(record)))


def _place(record: Record) -> tuple[object, ...]:
    gpu, problem = record.gpu, record.problem
    return gpu.name, *place(problem), gpu.num_sms, *place_in_file(problem), record.m


# --- to JSON --------------------------------------------------------------------------------------


def _file_json(records: list[Record]) -> dict[str, Any]:
    """The content of the file that holds `records`, of one GPU model and one head."""
    return {
        "format_version": FORMAT_VERSION,
        "gpu": records[0].gpu.name,
        **head_json(records[0].problem),
        "records": [_record_json(record) for record in records],
    }


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "num_sms": record.gpu.num_sms,
        **entry_json(record.problem),
        "m": record.m,
        "schedule": schedule_json(record.schedule),
        "kernel_us": record.kernel_us,
        "spread_us": record.spread_us,
        "num_calls": record.num_calls,
        "num_candidates": record.num_candidates,
        "sm_clock_mhz": record.sm_clock_mhz,
        "date": record.date,
        **asdict(record.provenance),
    }


def schedule_json(schedule: TunedSchedule) -> dict[str, Any]:
    """The fields of a schedule that differ from their defaults."""
    return {
        field.name: getattr(schedule, field.name)
        for field in fields(schedule)
        if getattr(schedule, field.name) != field.default
    }


# --- from JSON ------------------------------------------------------------------------------------


def read_file(path: Path) -> list[Record]:
    """The records of one file; none if there is no such file.

    Raises
    ------
    StoreError : the file cannot be read, or breaks the format; names file, record and field
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise StoreError(f"{path} is not JSON: {error}") from None
    try:
        records = _read_records(data)
        if records and file_of(path.parents[1], records[0].gpu, records[0].problem) != path:
            raise StoreError("is not named after its gpu and problem")
    except JitgenError as error:
        raise StoreError(f"{path}: {error}") from None
    return records


def _read_records(data: object) -> list[Record]:
    of_problem, optional = head_fields(data)
    head = _check_fields(data, {"format_version", "gpu", "records", *of_problem}, optional)
    if head["format_version"] != FORMAT_VERSION:
        raise StoreError(
            f"format_version is {head['format_version']!r}, this jitgen reads {FORMAT_VERSION}"
        )
    if not isinstance(head["gpu"], str) or not isinstance(head["records"], list):
        raise StoreError("gpu must be a text, and records a list")
    found: dict[Key, Record] = {}
    for i, entry in enumerate(head["records"]):
        try:
            record = _read_record(head, entry)
            if found.setdefault(record.key, record) is not record:
                raise StoreError(
                    "num_sms, out_dtype, gated, b_scale and m are those of a record before"
                )
        except JitgenError as error:
            raise StoreError(f"record {i}: {error}") from None
    return list(found.values())


def _read_record(head: dict[str, Any], entry: object) -> Record:
    of_problem, optional = entry_fields(head)
    values = _check_fields(entry, {"schedule", *_RULES, *of_problem}, optional)
    for name, (is_legal, rule) in _RULES.items():
        if not is_legal(values[name]):
            raise StoreError(f"{name} must be {rule}, got {values[name]!r:.80}")
    return Record(
        gpu=Gpu(head["gpu"], values["num_sms"]),
        problem=read_problem(head, values),
        schedule=read_schedule(values["schedule"], MlaSchedule if "mla" in head else Schedule),
        provenance=Provenance(**{field.name: values[field.name] for field in fields(Provenance)}),
        **{name: values[name] for name in _MEASURED},
    )


def read_schedule(
    data: object, kind: type[Schedule] | type[MlaSchedule] = Schedule
) -> TunedSchedule:
    """The schedule that `schedule_json` wrote; whether it can run a problem is not checked.

    Raises
    ------
    StoreError : a field is missing, unknown, or neither an int nor a bool nor a text
    """
    known = {field.name: field.default is MISSING for field in fields(kind)}
    required = {name for name, is_required in known.items() if is_required}
    values = _check_fields(data, required, optional=set(known), what="schedule")
    for name, value in values.items():
        if type(value) not in (int, bool, str):
            raise StoreError(f"schedule: {name} must be an int, bool or text, got {value!r:.80}")
    return kind(**values)


def _check_fields(
    data: object, required: set[str], optional: AbstractSet[str] = frozenset(), what: str = ""
) -> dict[str, Any]:
    """`data`, an object with these fields and no others."""
    prefix = f"{what}: " if what else ""
    if not isinstance(data, dict):
        raise StoreError(f"{prefix}must be an object, got {data!r:.80}")
    if missing := required - set(data):
        raise StoreError(f"{prefix}field {min(missing)} is missing")
    if unknown := set(data) - required - optional:
        raise StoreError(f"{prefix}field {min(unknown)} is unknown")
    return data


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _is_date(value: object) -> bool:
    try:
        return bool(datetime.strptime(str(value), DATE_FORMAT))
    except ValueError:
        return False


Rule = tuple[Callable[[Any], bool], str]
_TEXT: Rule = (lambda value: isinstance(value, str) and value != "", "a text, not empty")
_COUNT: Rule = (lambda value: type(value) is int and value > 0, "an int above 0")
_MEASURED: dict[str, Rule] = {
    "m": _COUNT,
    "kernel_us": (lambda value: _is_time(value) and value > 0, "a number above 0"),
    "spread_us": (_is_time, "a number, 0 or above"),
    "num_calls": _COUNT,
    "num_candidates": _COUNT,
    "sm_clock_mhz": (lambda value: value is None or _COUNT[0](value), "an int above 0, or null"),
    "date": (_is_date, f"a time like {DATE_FORMAT}"),
}
_RULES: dict[str, Rule] = {
    "num_sms": _COUNT,
    **_MEASURED,
    **{field.name: _TEXT for field in fields(Provenance)},
}
