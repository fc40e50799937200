"""Selection: user's record, shipped record, cost model, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgen.dtypes import BF16, F32
from jitgen.expr import acc, vector
from jitgen.problem import Gemm, ScaleBlock, of_k_groups
from jitgen.runtime import driver
from jitgen.runtime.driver import Device
from jitgen.schedule import Schedule
from jitgen.target import H100, Gpu
from jitgen.tuning import select as selection
from jitgen.tuning.model import M_BUCKETS, choose, m_bucket
from jitgen.tuning.records import file_of, save
from jitgen.tuning.select import named_gpu, reload_records, select

from .test_records import RECORD

PROBLEM, M = RECORD.problem, RECORD.m
MINE, SHIPPED = Schedule(64, 48, 4, 1), Schedule(64, 96, 4, 1)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Empty folders in place of the user's and the shipped one."""
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    monkeypatch.setenv("JITGEN_RECORDS_DIR", str(mine))
    monkeypatch.setattr(selection, "shipped_folder", lambda: shipped)
    reload_records()
    yield mine, shipped
    reload_records()


Folders = tuple[Path, Path]


def test_select_without_records_is_the_cost_models_choice() -> None:
    for m in (1, 64, 100, 5000):
        assert select(PROBLEM, m) == choose(PROBLEM, m)
    assert select(PROBLEM, 1000, Gpu("NVIDIA H100 PCIe", 114)) == choose(PROBLEM, 1000, 114)


def test_select_prefers_the_users_record_to_the_shipped_one(folders: Folders) -> None:
    mine, shipped = folders
    save(shipped, [replace(RECORD, schedule=SHIPPED)])
    assert select(PROBLEM, M) == SHIPPED
    save(mine, [replace(RECORD, schedule=MINE)])
    assert select(PROBLEM, M) == SHIPPED  # read once
    reload_records()
    assert select(PROBLEM, M) == MINE


def test_select_takes_a_record_for_its_bucket_only(folders: Folders) -> None:
    save(folders[0], [replace(RECORD, schedule=MINE)])
    assert {select(PROBLEM, m) for m in range(33, 65)} == {MINE}
    assert select(PROBLEM, 32) == choose(PROBLEM, 32)
    assert select(PROBLEM, 65) == choose(PROBLEM, 65)


@pytest.mark.parametrize(
    ("problem", "gpu"),
    [
        (Gemm(2112, 7168, F32), H100),
        (Gemm(2112, 1024), H100),
        (PROBLEM, Gpu("NVIDIA H200", 132)),
        (PROBLEM, Gpu(H100.name, 60)),
    ],
    ids=["dtype", "k", "gpu", "sms"],
)
def test_select_takes_no_record_of_another_question(
    folders: Folders, problem: Gemm, gpu: Gpu
) -> None:
    save(folders[0], [replace(RECORD, schedule=MINE)])
    assert select(problem, M, gpu) == choose(problem, M, gpu.num_sms)


def test_select_takes_a_record_under_any_epilogue_that_it_can_run(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folders[0], [replace(RECORD, schedule=MINE)])
    biased = replace(PROBLEM, epilogue=acc + vector("bias"))
    assert select(biased, M) == MINE
    reload_records()
    legal = selection.is_legal
    monkeypatch.setattr(selection, "is_legal", lambda p, s: p.epilogue == acc and legal(p, s))
    assert select(biased, M) == choose(PROBLEM, M)
    assert select(PROBLEM, M) == MINE


def test_select_takes_a_record_of_k_groups_for_its_problem_and_rows_only(folders: Folders) -> None:
    problem = of_k_groups(7168, 4)
    save(folders[1], [replace(RECORD, problem=problem, m=2112, schedule=SHIPPED)])
    assert {select(problem, m) for m in (2049, 2100, 2112)} == {SHIPPED}
    assert select(problem, 2048) == choose(problem, 2048)
    assert select(problem, 2113) == choose(problem, 2113)
    others = (
        of_k_groups(7168, 8),
        of_k_groups(7168, 4, BF16),
        of_k_groups(7168, 4, b_scale=ScaleBlock(128, 128)),
    )
    for other in others:
        assert select(other, 2112) == choose(other, 2112)
    save(folders[0], [replace(RECORD, problem=problem, m=2112, schedule=MINE)])
    reload_records()
    assert select(problem, 2112) == MINE
    assert select(problem, 2112, batch_invariant=True) != MINE


def test_select_ignores_a_record_that_breaks_todays_rules(folders: Folders) -> None:
    save(folders[0], [replace(RECORD, schedule=Schedule(64, 48, 31, 1))])
    save(folders[1], [replace(RECORD, schedule=SHIPPED)])
    assert select(PROBLEM, M) == SHIPPED


def test_select_warns_once_of_a_broken_file_and_goes_on(folders: Folders) -> None:
    mine, shipped = folders
    save(shipped, [replace(RECORD, schedule=SHIPPED)])
    path = file_of(mine, H100, PROBLEM)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="tuning records ignored: .*gemm-n2112-k7168.json is not"):
        assert select(PROBLEM, M) == SHIPPED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(PROBLEM, 4096) == choose(PROBLEM, 4096)
    assert path.read_text() == "{"


@given(st.integers(0, 10**6))
def test_select_is_one_for_a_bucket(m: int) -> None:
    assert select(PROBLEM, m) == select(PROBLEM, m_bucket(m))


def test_select_batch_invariant_is_one_for_every_m(folders: Folders) -> None:
    save(folders[0], [replace(RECORD, schedule=MINE)])
    chosen = {select(PROBLEM, m, batch_invariant=True) for m in (0, 1, *M_BUCKETS, 10**6)}
    assert len(chosen) == 1
    assert chosen != {MINE}


# --- GPUs by name ---------------------------------------------------------------------------------

A100 = Device(0, "NVIDIA A100-SXM4-80GB", (8, 0), 108)
H200 = Device(1, "NVIDIA H200", (9, 0), 130)


@pytest.mark.parametrize(
    ("present", "arguments", "expected"),
    [
        ([], {}, H100),
        ([A100], {}, H100),
        ([A100, H200], {}, Gpu("NVIDIA H200", 130)),
        ([A100, H200], {"name": "NVIDIA H200"}, Gpu("NVIDIA H200", 130)),
        ([A100, H200], {"name": "NVIDIA H800"}, Gpu("NVIDIA H800", 132)),
        ([A100, H200], {"num_sms": 60}, Gpu("NVIDIA H200", 60)),
        ([], {"name": "NVIDIA H20", "num_sms": 78}, Gpu("NVIDIA H20", 78)),
    ],
)
def test_named_gpu(
    monkeypatch: pytest.MonkeyPatch,
    present: list[Device],
    arguments: dict[str, object],
    expected: Gpu,
) -> None:
    monkeypatch.setattr(driver, "num_devices", lambda: len(present))
    monkeypatch.setattr(driver, "device", present.__getitem__)
    assert named_gpu(**arguments) == expected  # type: ignore[arg-type]
