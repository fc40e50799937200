"""NVRTC takes a broad sample of the schedules, with no advisory, no spill and no stack frame.

`build` refuses any of them (jitgen.runtime.nvrtc), so a kernel that is built is clean.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitgen import (
    BF16,
    F32,
    Gemm,
    Schedule,
    acc,
    cast,
    gelu,
    matrix,
    maximum,
    relu,
    scalar,
    silu,
    vector,
)
from jitgen.build import Prebuilt, build, prebuild
from jitgen.codegen import render
from jitgen.errors import ScheduleError, VerifyError
from jitgen.lower import lower
from jitgen.runtime.store import KernelStore
from jitgen.schedule import check_schedule
from jitgen.tuning.space import CLUSTERS, COLUMN_TILES, ROW_TILES, candidates

EPILOGUES = {
    "none": acc,
    "bias": acc + vector("bias"),
    "residual": relu(acc * scalar("alpha")) + matrix("residual"),
    "silu": silu(acc * vector("gain", F32)) + matrix("wide", F32),
    "gelu": gelu(acc + vector("bias")),
    "all": cast(maximum(gelu(acc * scalar("alpha") + vector("bias")), 0.5), BF16) * vector("gain", F32)
    - silu(matrix("residual")),
}
NS, KS = (2112, 576, 72, 8), (7168, 576, 128, 16)
DTYPES = (BF16, F32)


@dataclasses.dataclass(frozen=True)
class Sample:
    problem: Gemm
    schedule: Schedule
    epilogue: str

    def __str__(self) -> str:
        p, s = self.problem, self.schedule
        return (
            f"{s.block_m}x{s.block_n}-w{s.num_math_warpgroups}-c{s.cluster_m}x{s.cluster_n}"
            f"-n{p.n}-k{p.k}-{p.d_dtype}-{self.epilogue}"
        )


def candidate(
    problem: Gemm, row_tile: tuple[int, int], block_n: int, cluster: tuple[int, int]
) -> Schedule | None:
    """The candidate of that tile and cluster, if there is one."""
    for s in candidates(problem):
        shape = (s.block_m, s.num_math_warpgroups), s.block_n, (s.cluster_m, s.cluster_n)
        if shape == (row_tile, block_n, cluster):
            return s
    return None


def of_every_tile() -> Iterator[Sample]:
    """Every tile shape that some problem has, each with other extents, clusters, types and epilogues in turn."""
    settings = list(itertools.product(range(len(EPILOGUES)), DTYPES, CLUSTERS, KS, NS))
    start = 0
    for row_tile, block_n in itertools.product(ROW_TILES, COLUMN_TILES):
        # 53 is prime to the number of settings, so the walk visits all of them.
        for step in range(len(settings)):
            which, d_dtype, cluster, k, n = settings[(start + 53 * step) % len(settings)]
            name = list(EPILOGUES)[which]
            problem = Gemm(n, k, d_dtype, EPILOGUES[name])
            if schedule := candidate(problem, row_tile, block_n, cluster):
                start += 53 * (step + 1)
                yield Sample(problem, schedule, name)
                break


def of_most_registers() -> Iterator[Sample]:
    """The widest tile of each row tile under the heaviest epilogue: where registers would run out first."""
    for row_tile, d_dtype in itertools.product(ROW_TILES, DTYPES):
        problem = Gemm(2112, 7168, d_dtype, EPILOGUES["all"])
        tiles = [s for s in candidates(problem) if (s.block_m, s.num_math_warpgroups) == row_tile]
        yield Sample(problem, max(tiles, key=lambda s: s.block_n), "all")


def of_large_clusters() -> Iterator[Sample]:
    """Legal clusters that are no candidates."""
    for cluster_m, cluster_n in ((2, 2), (4, 1), (1, 4)):
        for problem in (Gemm(2112, 7168), Gemm(576, 576, F32, EPILOGUES["residual"])):
            name = "none" if problem.epilogue == acc else "residual"
            yield Sample(problem, Schedule(128, 128, 2, 2, cluster_m, cluster_n), name)


SAMPLES = list(dict.fromkeys([*of_every_tile(), *of_most_registers(), *of_large_clusters()]))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return KernelStore(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_build_compiles(sample: Sample, store: KernelStore) -> None:
    kernel = lower(sample.problem, sample.schedule)
    entry = build(kernel, store)
    assert entry.cubin.startswith(b"\x7fELF")
    assert kernel.name.encode() in entry.cubin
    resources = entry.resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)
    assert resources.static_smem_bytes == 0  # the plan lays out all of shared memory
    assert 0 < resources.registers * kernel.num_threads <= 65536


def test_samples_cover_the_space() -> None:
    schedules = [sample.schedule for sample in SAMPLES]
    problems = [sample.problem for sample in SAMPLES]
    legal = {
        block_n
        for n, (block_m, warpgroups), block_n in itertools.product(NS, ROW_TILES, COLUMN_TILES)
        if is_legal(Gemm(n, 128), Schedule(block_m, block_n, 2, warpgroups)) and block_n < 2 * n
    }
    assert {(s.block_m, s.num_math_warpgroups) for s in schedules} == set(ROW_TILES)
    assert {s.block_n for s in schedules} >= legal
    assert {(s.cluster_m, s.cluster_n) for s in schedules} == {*CLUSTERS, (2, 2), (4, 1), (1, 4)}
    assert {p.n for p in problems} == set(NS)
    assert {p.k for p in problems} == set(KS)
    assert {(p.d_dtype, sample.epilogue) for p, sample in zip(problems, SAMPLES, strict=True)} == set(
        itertools.product(DTYPES, EPILOGUES)
    )
    assert 60 <= len(SAMPLES) <= 110


def is_legal(problem: Gemm, schedule: Schedule) -> bool:
    try:
        check_schedule(problem, schedule)
    except ScheduleError:
        return False
    return True


# --- build and prebuild -------------------------------------------------------------------------

SMALL = (Gemm(72, 144), Schedule(64, 32, 4, 1))
OTHER = (Gemm(72, 144, F32), Schedule(64, 32, 4, 1))


def test_build_takes_the_second_time_from_the_store(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)
    first = build(lower(*SMALL), store)
    second = build(lower(*SMALL), store)
    assert store.stats.compiles == 1
    assert first.cubin == second.cubin
    again = KernelStore(tmp_path)
    assert build(lower(*SMALL), again).cubin == first.cubin
    assert again.stats.compiles == 0


def test_build_rejects_unsound_kernel_before_it_compiles(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)
    kernel = lower(*SMALL)
    broken = dataclasses.replace(kernel, smem=dataclasses.replace(kernel.smem, b=kernel.smem.a))
    with pytest.raises(VerifyError):
        build(broken, store)
    assert store.stats.compiles == 0


def test_build_names_the_source_after_what_it_renders(tmp_path: Path) -> None:
    kernel = lower(*SMALL)
    entry = build(kernel, KernelStore(tmp_path))
    assert entry.name == kernel.name
    sources = [path.read_text() for path in tmp_path.rglob("*.cu")]
    assert sources == [render(kernel)]


def test_prebuild_compiles_each_kernel_once(tmp_path: Path) -> None:
    seen: list[Prebuilt] = []
    results = prebuild([SMALL, OTHER, SMALL], root=tmp_path, num_processes=2, on_done=seen.append)
    assert results == seen
    assert {result.name for result in results} == {lower(*SMALL).name, lower(*OTHER).name}
    assert all(result.compiled and result.compile_seconds > 0 for result in results)
    again = prebuild([SMALL, OTHER], root=tmp_path, num_processes=1)
    assert len(again) == 2
    assert not any(result.compiled for result in again)


def test_prebuild_finishes_the_others_before_it_reports_a_failure(tmp_path: Path) -> None:
    seen: list[Prebuilt] = []
    bad = (SMALL[0], Schedule(100, 32, 4, 1))
    with pytest.raises(ScheduleError, match="block_m = 100"):
        prebuild([bad, SMALL, OTHER], root=tmp_path, num_processes=1, on_done=seen.append)
    assert {result.name for result in seen} == {lower(*SMALL).name, lower(*OTHER).name}


def test_prebuild_of_nothing_does_nothing(tmp_path: Path) -> None:
    assert prebuild([], root=tmp_path) == []
