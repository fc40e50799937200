"""Tuning records: what is written is read back, what is broken is named, what is merged stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgen.dtypes import BF16, E4M3, F32
from jitgen.errors import StoreError
from jitgen.expr import gate, up
from jitgen.problem import Gemm, GroupedGemm, ScaleBlock, of_k_groups
from jitgen.schedule import Schedule
from jitgen.target import H100, Gpu
from jitgen.tuning import records
from jitgen.tuning.keys import is_tunable
from jitgen.tuning.model import m_bucket
from jitgen.tuning.records import Provenance, Record, file_of, merge, read_file, read_folder, save
from jitgen.tuning.space import is_legal

RECORD = Record(
    gpu=H100,
    problem=Gemm(2112, 7168),
    m=64,
    schedule=Schedule(64, 32, 12, 1, promotion="serial"),
    kernel_us=11.25,
    spread_us=0.125,
    num_calls=40,
    num_candidates=24,
    sm_clock_mhz=1755,
    date="2026-11-22T18:30:00Z",
    provenance=Provenance("580.95.05", "13.0.88", "0.1.0", "0123456789abcdef"),
)
OTHERS = (
    replace(RECORD, m=16, sm_clock_mhz=None),
    replace(RECORD, problem=Gemm(2112, 7168, F32)),
    replace(RECORD, gpu=Gpu(H100.name, 60), schedule=Schedule(128, 256, 4, cluster_m=2)),
    replace(RECORD, problem=Gemm(576, 7168)),
    replace(RECORD, gpu=Gpu("NVIDIA H200", 132)),
    replace(RECORD, problem=Gemm(4096, 7168, E4M3, gate * up)),
    replace(RECORD, problem=GroupedGemm(4096, 7168, num_groups=32)),
    replace(RECORD, problem=GroupedGemm(4096, 7168, E4M3, gate * up, num_groups=32)),
    replace(RECORD, problem=GroupedGemm(4096, 7168, num_groups=8)),
    replace(RECORD, problem=Gemm(2112, 7168, b_scale=ScaleBlock(1, 128))),
    replace(RECORD, problem=of_k_groups(7168, 4)),
    replace(RECORD, problem=of_k_groups(7168, 4, BF16, ScaleBlock(128, 128))),
    replace(RECORD, problem=of_k_groups(7168, 4), m=2112),
    replace(RECORD, problem=of_k_groups(7168, 1)),
)


def path_of(folder: Path, record: Record = RECORD) -> Path:
    return file_of(folder, record.gpu, record.problem)


# --- files ----------------------------------------------------------------------------------------


def test_save_writes_what_read_folder_reads(tmp_path: Path) -> None:
    save(tmp_path, [RECORD, *OTHERS])
    assert set(read_folder(tmp_path)) == {RECORD, *OTHERS}
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")}
    assert names == {
        "nvidia-h100-80gb-hbm3/gemm-n2112-k7168.json",
        "nvidia-h100-80gb-hbm3/gemm-n576-k7168.json",
        "nvidia-h200/gemm-n2112-k7168.json",
        "nvidia-h100-80gb-hbm3/gemm-n4096-k7168.json",
        "nvidia-h100-80gb-hbm3/grouped-gemm-g32-n4096-k7168.json",
        "nvidia-h100-80gb-hbm3/grouped-gemm-g8-n4096-k7168.json",
        "nvidia-h100-80gb-hbm3/grouped-gemm-g4-n7168-by-k.json",
        "nvidia-h100-80gb-hbm3/grouped-gemm-g1-n7168-by-k.json",
    }
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".json"}  # nothing temporary is left


def test_save_writes_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    save(tmp_path / "a", [RECORD, *OTHERS])
    for record in (*OTHERS[::-1], RECORD):
        save(tmp_path / "b", [record])
    assert path_of(tmp_path / "a").read_bytes() == path_of(tmp_path / "b").read_bytes()


def test_file_shows_every_field_and_the_schedule_without_its_defaults(tmp_path: Path) -> None:
    save(tmp_path, [RECORD])
    data = json.loads(path_of(tmp_path).read_text())
    (shown,) = data.pop("records")
    assert data == {"format_version": 1, "gpu": H100.name, "n": 2112, "k": 7168}
    assert shown["schedule"] == {
        "block_m": 64,
        "block_n": 32,
        "num_stages": 12,
        "num_math_warpgroups": 1,
        "promotion": "serial",
    }
    assert (shown["m"], shown["out_dtype"], shown["num_sms"]) == (64, "bfloat16", 132)
    readme = (records.shipped_folder() / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*data, *shown))


def test_file_of_groups_shows_what_the_problem_has_more(tmp_path: Path) -> None:
    record = replace(RECORD, problem=GroupedGemm(4096, 7168, E4M3, gate * up, num_groups=32))
    save(tmp_path, [record])
    data = json.loads(path_of(tmp_path, record).read_text())
    (shown,) = data.pop("records")
    assert data["num_groups"] == 32
    assert (shown["gated"], shown["out_dtype"]) == (True, "float8_e4m3fn")
    readme = (records.shipped_folder() / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*data, *shown))


def test_file_of_k_grouped_has_no_k_and_shows_scales_that_are_not_the_usual(tmp_path: Path) -> None:
    usual = replace(RECORD, problem=of_k_groups(7168, 4, F32))
    save(
        tmp_path, [usual, replace(usual, problem=of_k_groups(7168, 4, BF16, ScaleBlock(128, 128)))]
    )
    data = json.loads(path_of(tmp_path, usual).read_text())
    shown = data.pop("records")
    head = {"n": 7168, "num_groups": 4, "layout": "k_grouped"}
    assert data == {"format_version": 1, "gpu": H100.name, **head}
    named = [(record["out_dtype"], record.get("b_scale")) for record in shown]
    assert named == [("bfloat16", "128x128"), ("float32", None)]
    readme = (records.shipped_folder() / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*data, *shown[0]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(layout="ragged"), "layout must be k_grouped or left out"),
        (lambda data: data.update(k=128), "field k is unknown"),
        (lambda data: data["records"][0].update(b_scale="64x128"), "a 64x128 block, must be 1x128"),
        (lambda data: data["records"][0].update(b_scale=1), "b_scale must be a text such as"),
        (lambda data: data["records"][0].update(gated=True), "k_grouped adds to D"),
        (lambda data: data["records"][0].update(out_dtype="e4m3"), "k_grouped adds to D"),
    ],
)
def test_read_file_of_k_grouped_rejects(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    record = replace(RECORD, problem=of_k_groups(7168, 4))
    save(tmp_path, [record])
    path = path_of(tmp_path, record)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match=message):
        read_file(path)


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [
        (Schedule(8, 64, 12, 1, split_k=4, swap_ab=True), {"swap_ab": True}),
        (Schedule(64, 128, 5, 2, pingpong=True), {"pingpong": True}),
        (Schedule(64, 128, 5, 2), {}),
    ],
    ids=str,
)
def test_file_keeps_how_a_tile_is_computed(
    tmp_path: Path, schedule: Schedule, shown: dict[str, bool]
) -> None:
    record = replace(RECORD, schedule=schedule)
    save(tmp_path, [record])
    assert read_file(path_of(tmp_path)) == [record]
    (saved,) = json.loads(path_of(tmp_path).read_text())["records"]
    fields = {name: saved["schedule"].get(name) for name in ("swap_ab", "pingpong")}
    assert {name: value for name, value in fields.items() if value is not None} == shown


def test_read_file_of_none_is_empty(tmp_path: Path) -> None:
    assert read_file(path_of(tmp_path)) == []


def test_read_folder_rejects_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no folder"):
        read_folder(tmp_path / "none")


def test_shipped_records_are_sound() -> None:
    for record in read_folder(records.shipped_folder()):
        assert is_legal(record.problem, record.schedule), record
        assert is_tunable(record.problem, record.m)
        assert record.m == m_bucket(record.m, record.problem)


def test_user_folder_is_that_of_the_variable_or_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JITGEN_RECORDS_DIR", str(tmp_path))
    assert records.user_folder() == tmp_path
    monkeypatch.delenv("JITGEN_RECORDS_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert records.user_folder() == tmp_path / "jitgen" / "records"


# --- broken files ---------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], object]


def edit_record(**values: object) -> Edit:
    return lambda data: data["records"][1].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.pop("gpu"), "field gpu is missing"),
        (lambda data: data.update(author="me"), "field author is unknown"),
        (lambda data: data.update(format_version=2), "format_version is 2, this jitgen reads 1"),
        (lambda data: data.update(gpu=7), "gpu must be a text"),
        (lambda data: data.update(records={}), "records a list"),
        (
            lambda data: data.update(gpu="NVIDIA H200"),
            "not named after its gpu and problem",
        ),
        (lambda data: data.update(num_groups=4), "not named after its gpu and problem"),
        (lambda data: data.update(num_groups=0), "record 0: num_groups = 0 must be"),
        (edit_record(gated="yes"), "record 1: gated must be a bool, got 'yes'"),
        (lambda data: data.update(k=512), "not named after its gpu and problem"),
        (lambda data: data.update(n=100), "record 0: n = 100 must be a positive multiple of 8"),
        (lambda data: data["records"].append(7), "record 2: must be an object, got 7"),
        (lambda data: data["records"][1].pop("m"), "record 1: field m is missing"),
        (lambda data: data["records"][1]["schedule"].pop("block_m"), "schedule: field block_m is"),
        (
            edit_record(m=64),
            "record 1: num_sms, out_dtype, gated, b_scale and m are",
        ),
        (edit_record(m=0), "record 1: m must be an int above 0, got 0"),
        (edit_record(m=True), "record 1: m must be an int above 0, got True"),
        (edit_record(kernel_us="fast"), "record 1: kernel_us must be a number above 0, got 'fast'"),
        (edit_record(kernel_us=0), "record 1: kernel_us must be a number above 0"),
        (edit_record(spread_us=float("nan")), "record 1: spread_us must be a number"),
        (edit_record(sm_clock_mhz="1755"), "record 1: sm_clock_mhz must be an int above 0, or"),
        (edit_record(driver=""), "record 1: driver must be a text, not empty, got ''"),
        (edit_record(date="yesterday"), "record 1: date must be a time like %Y-%m-%dT"),
        (edit_record(out_dtype="int8"), "record 1: dtype int8 is not supported"),
        (edit_record(out_dtype="e4m3"), "record 1: n = 2112 must be a positive multiple of 128"),
        (edit_record(schedule=[64, 64]), "record 1: schedule: must be an object"),
        (edit_record(schedule={"block_x": 3}), "schedule: field block_m is missing"),
        (
            lambda data: data["records"][0]["schedule"].update(color="red"),
            "record 0: schedule: field color is unknown",
        ),
        (
            lambda data: data["records"][0]["schedule"].update(block_m=[64]),
            r"record 0: schedule: block_m must be an int, bool or text, got \[64\]",
        ),
    ],
)
def test_read_file_rejects(tmp_path: Path, edit: Edit, message: str) -> None:
    save(tmp_path, [RECORD, replace(RECORD, m=128)])
    path = path_of(tmp_path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match=message) as caught:
        read_file(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must be an object")])
def test_read_file_rejects_what_is_no_json_object(tmp_path: Path, text: str, message: str) -> None:
    path = path_of(tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(StoreError, match=message):
        read_file(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="cannot read"):
        read_file(path)


def test_save_leaves_a_broken_file_as_it_is(tmp_path: Path) -> None:
    path = path_of(tmp_path)
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        save(tmp_path, [RECORD])
    assert path.read_text() == "{"


def test_save_rejects_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "nvidia-h100-80gb-hbm3").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(StoreError, match="cannot write"):
        save(tmp_path, [RECORD])


# --- merging --------------------------------------------------------------------------------------


def variant(us: float, day: int, fingerprint: str = "a", nvrtc: str = "13.0.88") -> Record:
    provenance = replace(RECORD.provenance, fingerprint=fingerprint, nvrtc=nvrtc)
    return replace(RECORD, kernel_us=us, date=f"2026-11-{day:02}T00:00:00Z", provenance=provenance)


def test_merge_keeps_the_fastest_of_the_same_kernels() -> None:
    fast, slow = variant(10.0, 1), variant(11.0, 2)
    assert merge([slow, fast]) == [fast]


@pytest.mark.parametrize("other", [{"fingerprint": "b"}, {"nvrtc": "13.1"}], ids=str)
def test_merge_keeps_the_newer_of_different_kernels(other: dict[str, str]) -> None:
    old, new = variant(10.0, 1), variant(11.0, 2, **other)
    assert merge([new, old]) == [new]


def test_merge_keeps_records_that_answer_different_questions() -> None:
    merged = merge([*OTHERS, RECORD])
    assert set(merged) == {RECORD, *OTHERS}
    assert [record.m for record in merged if record.problem == RECORD.problem][:3] == [64, 16, 64]


variants = st.builds(
    variant, st.sampled_from([9.0, 10.0, 11.0]), st.integers(1, 4), st.sampled_from("abc")
)


@given(st.lists(variants, min_size=1), st.randoms())
def test_merge_does_not_depend_on_the_order_and_is_idempotent(
    found: list[Record], random: Any
) -> None:
    merged = merge(found)
    assert len(merged) == 1
    assert merged[0] in found
    shuffled = list(found)
    random.shuffle(shuffled)
    assert merge(shuffled) == merged
    assert merge([*merged, *merged]) == merged
    assert merged[0].provenance.kernels in {
        r.provenance.kernels for r in found if r.date == max(record.date for record in found)
    }


def test_save_merges_with_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, [variant(10.0, 1)])
    save(tmp_path, [variant(11.0, 2)])
    assert read_folder(tmp_path) == [variant(10.0, 1)]
    save(tmp_path, [variant(11.0, 2, "b")])
    assert read_folder(tmp_path) == [variant(11.0, 2, "b")]


def test_records_of_a_problem_are_in_the_order_of_sms_dtype_and_m(tmp_path: Path) -> None:
    save(tmp_path, [RECORD, *OTHERS])
    found = read_file(path_of(tmp_path))
    keys = [(r.gpu.num_sms, r.problem.d_dtype, r.m) for r in found]
    rows = [(60, BF16, 64), (132, BF16, 16), (132, BF16, 64), (132, BF16, 64), (132, F32, 64)]
    assert keys == rows
    assert [r.problem.b_scale.rows for r in found] == [128, 128, 128, 1, 128]
