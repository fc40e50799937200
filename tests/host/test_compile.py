"""NVRTC takes a broad sample of the schedules, with no advisory, no spill and no stack frame.

`build` refuses any of them (jitgen.runtime.nvrtc), so a kernel that is built is clean.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitgen import (
    BF16,
    F32,
    DType,
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
from jitgen.schedule import accumulator_registers, num_parts, part_columns
from jitgen.tuning.model import choose
from jitgen.tuning.space import CLUSTERS, COLUMN_TILES, PROMOTIONS, ROW_TILES, candidates

EPILOGUES = {
    "none": acc,
    "bias": acc + vector("bias"),
    "residual": relu(acc * scalar("alpha")) + matrix("residual"),
    "silu": silu(acc * vector("gain", F32)) + matrix("wide", F32),
    "gelu": gelu(acc + vector("bias")),
    "all": cast(maximum(gelu(acc * scalar("alpha") + vector("bias")), 0.5), BF16)
    * vector("gain", F32)
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
            f"-k{s.split_k}-{s.promotion}-n{p.n}-k{p.k}-{p.d_dtype}-{self.epilogue}"
        )


# Row tile, block_n, (cluster_m, cluster_n, split_k), promotion.
Tile = tuple[tuple[int, int], int, tuple[int, int, int], str]
WHOLE = [cluster for cluster in CLUSTERS if cluster[2] == 1]
SPLITS = [cluster for cluster in CLUSTERS if cluster[2] > 1]


@functools.cache
def tiles(n: int, k: int, d_dtype: DType) -> dict[Tile, Schedule]:
    """The candidates of a problem; the epilogue has no say in them."""
    return {
        (
            (s.block_m, s.num_math_warpgroups),
            s.block_n,
            (s.cluster_m, s.cluster_n, s.split_k),
            s.promotion,
        ): s
        for s in candidates(Gemm(n, k, d_dtype))
    }


def of_every_tile() -> Iterator[Sample]:
    """Every tile shape of some problem, with extents, clusters, types and epilogues in turn."""
    names = (
        "none",
        "bias",
        "none",
        "residual",
        "none",
        "silu",
        "gelu",
    )  # half of them quick to compile
    settings = list(itertools.product(names, PROMOTIONS, DTYPES, WHOLE, KS, NS))
    start = 0
    for row_tile, block_n in itertools.product(ROW_TILES, COLUMN_TILES):
        # 53 is prime to the number of settings, so the walk visits all of them.
        for step in range(len(settings)):
            name, promotion, d_dtype, cluster, k, n = settings[(start + 53 * step) % len(settings)]
            if block_n == 16 and n != 8:
                continue  # the only width that n = 8 takes
            if schedule := tiles(n, k, d_dtype).get((row_tile, block_n, cluster, promotion)):
                start += 53 * (step + 1)
                yield Sample(Gemm(n, k, d_dtype, EPILOGUES[name]), schedule, name)
                break


def of_every_split() -> Iterator[Sample]:
    """Every split of every row tile, with widths, extents, types and epilogues in turn."""
    settings = list(itertools.product(EPILOGUES, PROMOTIONS, DTYPES, KS, NS, COLUMN_TILES))
    start = 0
    for row_tile, split in itertools.product(ROW_TILES, SPLITS):
        # 53 is prime to the number of settings here too.
        for step in range(len(settings)):
            name, promotion, d_dtype, k, n, block_n = settings[(start + 53 * step) % len(settings)]
            if schedule := tiles(n, k, d_dtype).get((row_tile, block_n, split, promotion)):
                start += 53 * (step + 1)
                yield Sample(Gemm(n, k, d_dtype, EPILOGUES[name]), schedule, name)
                break


def of_most_registers() -> Iterator[Sample]:
    """The widest tile of each row tile, heaviest epilogue: where registers run out first."""
    for row_tile, (promotion, d_dtype), split_k in itertools.product(
        ROW_TILES, zip(PROMOTIONS, DTYPES, strict=True), (1, 3)
    ):
        legal = tiles(2112, 7168, d_dtype)
        widest = max(
            tile
            for tile in legal
            if tile[0] == row_tile and tile[2:] == ((1, 1, split_k), promotion)
        )
        yield Sample(Gemm(2112, 7168, d_dtype, EPILOGUES["all"]), legal[widest], "all")


def of_large_clusters() -> Iterator[Sample]:
    """Legal clusters that are no candidates."""
    for cluster_m, cluster_n in ((2, 2), (4, 1), (1, 4)):
        for problem in (Gemm(2112, 7168), Gemm(576, 576, F32, EPILOGUES["residual"])):
            name = "none" if problem.epilogue == acc else "residual"
            yield Sample(problem, Schedule(128, 128, 2, 2, cluster_m, cluster_n), name)


def of_tightest() -> Iterator[Sample]:
    """The tiles that come closest to their accumulator budget, with float32 D and a residual."""
    problem = Gemm(2112, 7168, F32, EPILOGUES["residual"])

    def free_registers(schedule: Schedule) -> int:
        sums = schedule.num_waves * schedule.block_n // 2
        parts = num_parts(schedule) * (part_columns(problem, schedule) or 0) // 2
        return accumulator_registers(problem, schedule) - sums - parts

    for row_tile, promotion, split_k in itertools.product(ROW_TILES, PROMOTIONS, (1, 2)):
        of_kind = [
            schedule
            for tile, schedule in tiles(2112, 7168, F32).items()
            if tile[0] == row_tile and tile[2:] == ((1, 1, split_k), promotion)
        ]
        # Of equally tight ones the widest.
        tightest = min(of_kind, key=lambda s: (free_registers(s), -s.block_n))
        yield Sample(problem, tightest, "residual")


def of_choice() -> Iterator[Sample]:
    """What `gemm` takes for small and large m, under an epilogue that `choose` ignores."""
    calls = [(n, k, m, BF16) for n, k in ((4096, 7168), (576, 7168)) for m in (1, 128, 1024, 8192)]
    for n, k, m, d_dtype in (*calls, (1536, 384, 8192, BF16), (2112, 7168, 4096, F32)):
        problem = Gemm(n, k, d_dtype, EPILOGUES["gelu"])
        yield Sample(problem, choose(problem, m), "gelu")


SAMPLES = list(
    dict.fromkeys(
        [
            *of_every_tile(),
            *of_every_split(),
            *of_most_registers(),
            *of_large_clusters(),
            *of_tightest(),
            *of_choice(),
        ]
    )
)


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
    widths = {tile[1] for n, k, d in itertools.product(NS, KS, DTYPES) for tile in tiles(n, k, d)}
    assert {(s.block_m, s.num_math_warpgroups) for s in schedules} == set(ROW_TILES)
    assert {s.block_n for s in schedules} == widths
    assert {s.promotion for s in schedules} == set(PROMOTIONS)
    assert {(s.cluster_m, s.cluster_n, s.split_k) for s in schedules} == {
        *CLUSTERS,
        *((2, 2, 1), (4, 1, 1), (1, 4, 1)),
    }
    assert {(s.block_m, s.num_math_warpgroups, s.split_k) for s in schedules} == {
        (*row_tile, split_k) for row_tile in ROW_TILES for split_k in range(1, 9)
    }
    assert {p.n for p in problems} >= set(NS)
    assert {p.k for p in problems} >= set(KS)
    assert {
        (p.d_dtype, sample.epilogue) for p, sample in zip(problems, SAMPLES, strict=True)
    } == set(itertools.product(DTYPES, EPILOGUES))
    assert 60 <= len(SAMPLES) <= 140  # broad, and yet compiled within minutes


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
