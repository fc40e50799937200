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
from jitgen.schedule import accumulator_registers, part_columns, part_registers
from jitgen.tuning.model import choose
from jitgen.tuning.space import (
    CLUSTERS,
    COLUMN_TILES,
    PINGPONG_ROW_TILES,
    PROMOTIONS,
    ROW_TILES,
    SWAPPED_COLUMN_TILES,
    VARIANTS,
    candidates,
)

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
            f"-k{s.split_k}-{s.promotion}{'-swap' * s.swap_ab}{'-pingpong' * s.pingpong}"
            f"-n{p.n}-k{p.k}-{p.d_dtype}-{self.epilogue}"
        )


# (swap_ab, pingpong), (rows of wgmma's, math warpgroups)
Kind = tuple[tuple[bool, bool], tuple[int, int]]
# Kind, columns of wgmma's, (cluster_m, cluster_n, split_k), promotion.
Tile = tuple[Kind, int, tuple[int, int, int], str]
KINDS: list[Kind] = [
    (variant, row_tile)
    for variant in VARIANTS
    for row_tile in (PINGPONG_ROW_TILES if variant[1] else ROW_TILES)
]
WHOLE = [cluster for cluster in CLUSTERS if cluster[2] == 1]
SPLITS = [cluster for cluster in CLUSTERS if cluster[2] > 1]


def kind_of(schedule: Schedule) -> Kind:
    s = schedule
    return (s.swap_ab, s.pingpong), (s.mma_tile[0], s.num_math_warpgroups)


def widths_of(kind: Kind) -> tuple[int, ...]:
    return SWAPPED_COLUMN_TILES if kind[0][0] else COLUMN_TILES


def promotions_of(kind: Kind) -> tuple[str, ...]:
    return PROMOTIONS if kind[0] == (False, False) else ("overlapped",)


@functools.cache
def tiles(n: int, k: int, d_dtype: DType) -> dict[Tile, Schedule]:
    """The candidates of a problem; the epilogue has no say in them."""
    return {
        (
            kind_of(s),
            s.mma_tile[1],
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
    for kind, width in [(of_tile, width) for of_tile in KINDS for width in widths_of(of_tile)]:
        # 53 is prime to the number of settings, so the walk visits all of them.
        for step in range(len(settings)):
            name, promotion, d_dtype, cluster, k, n = settings[(start + 53 * step) % len(settings)]
            if width == 16 and n != 8 and not kind[0][0]:
                continue  # the only width that n = 8 takes
            if schedule := tiles(n, k, d_dtype).get((kind, width, cluster, promotion)):
                start += 53 * (step + 1)
                yield Sample(Gemm(n, k, d_dtype, EPILOGUES[name]), schedule, name)
                break


def of_every_split() -> Iterator[Sample]:
    """Every split of every row tile, with widths, extents, types and epilogues in turn."""
    all_widths = sorted({*COLUMN_TILES, *SWAPPED_COLUMN_TILES})
    settings = list(itertools.product(EPILOGUES, PROMOTIONS, DTYPES, KS, NS, all_widths))
    start = 0
    for kind, split in itertools.product(KINDS, SPLITS):
        # 53 is prime to the number of settings here too.
        for step in range(len(settings)):
            name, promotion, d_dtype, k, n, width = settings[(start + 53 * step) % len(settings)]
            if schedule := tiles(n, k, d_dtype).get((kind, width, split, promotion)):
                start += 53 * (step + 1)
                yield Sample(Gemm(n, k, d_dtype, EPILOGUES[name]), schedule, name)
                break


def of_most_registers() -> Iterator[Sample]:
    """The widest tile of each row tile, heaviest epilogue: where registers run out first."""
    for kind, split_k in itertools.product(KINDS, (1, 3)):
        if split_k > 1 and kind[0][1]:
            continue  # no turns to take
        # Overlapped promotion of bf16; serial, where there is that, of float32.
        yield from _of_most_registers(kind, split_k)


def _of_most_registers(kind: Kind, split_k: int) -> Iterator[Sample]:
    for promotion, d_dtype in zip(promotions_of(kind), DTYPES, strict=False):
        legal = tiles(2112, 7168, d_dtype)
        widest = max(
            tile for tile in legal if tile[0] == kind and tile[2:] == ((1, 1, split_k), promotion)
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
        sums = schedule.num_waves * schedule.mma_tile[1] // 2
        parts = part_registers(problem, schedule, part_columns(problem, schedule) or 0)
        return accumulator_registers(problem, schedule) - sums - parts

    for kind, promotion, split_k in itertools.product(KINDS, PROMOTIONS, (1, 2)):
        of_kind = [
            schedule
            for tile, schedule in tiles(2112, 7168, F32).items()
            if tile[0] == kind and tile[2:] == ((1, 1, split_k), promotion)
        ]
        if not of_kind:
            continue  # a variant that does not split, or is always overlapped
        # Of equally tight ones the widest.
        tightest = min(of_kind, key=lambda s: (free_registers(s), -s.mma_tile[1]))
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
    shapes = {tile[:2] for n, k, d in itertools.product(NS, KS, DTYPES) for tile in tiles(n, k, d)}
    assert {(kind_of(s), s.mma_tile[1]) for s in schedules} == shapes
    assert {kind for kind, _ in shapes} == set(KINDS)
    assert {width for (variant, _), width in shapes if variant[0]} == set(SWAPPED_COLUMN_TILES)
    assert {s.promotion for s in schedules} == set(PROMOTIONS)
    assert {(s.cluster_m, s.cluster_n, s.split_k) for s in schedules} == {
        *CLUSTERS,
        *((2, 2, 1), (4, 1, 1), (1, 4, 1)),
    }
    assert {(kind_of(s), s.split_k) for s in schedules} == {
        (kind, split_k)
        for kind, split_k in itertools.product(KINDS, range(1, 9))
        if split_k == 1 or not kind[0][1]
    }
    assert {p.n for p in problems} >= set(NS)
    assert {p.k for p in problems} >= set(KS)
    assert {
        (p.d_dtype, sample.epilogue) for p, sample in zip(problems, SAMPLES, strict=True)
    } == set(itertools.product(DTYPES, EPILOGUES))
    assert 60 <= len(SAMPLES) <= 300  # broad, and yet compiled within minutes


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
