"""Lowering: every legal schedule becomes a sound program that says what the schedule says."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgen import BF16, F32, Gemm, Schedule, acc, cast, gelu, matrix, scalar, vector
from jitgen.dtypes import E4M3
from jitgen.errors import ProblemError, ScheduleError
from jitgen.ir import Evaluate, ForK, Load, Mma, Promote, Reduce, Store, walk
from jitgen.kernel import Kernel
from jitgen.lower import kernel_name, lower, store_box
from jitgen.schedule import slice_columns, smem_plan
from jitgen.schedule_rules import check_schedule
from jitgen.target import SM90A
from jitgen.tuning.space import VARIANTS, candidates
from jitgen.verify import verify

EPILOGUES = {
    "none": acc,
    "bias": acc + vector("bias"),
    "all": cast(gelu(acc + vector("bias", F32)), BF16) * scalar("alpha") + matrix("residual"),
}
PROBLEMS = [
    Gemm(n, k, d_dtype, epilogue)
    for n in (8, 24, 72, 128, 136, 176, 240, 256, 576, 2112)
    for k, d_dtype, epilogue in (
        (16, BF16, EPILOGUES["none"]),
        (144, F32, EPILOGUES["bias"]),
        (576, BF16, EPILOGUES["all"]),
        (7168, F32, EPILOGUES["none"]),
    )
]


def name_of(problem: Gemm) -> str:
    return f"n{problem.n}-k{problem.k}-{problem.d_dtype}"


def all_schedules(rng: np.random.Generator, count: int) -> list[Schedule]:
    """Random schedules of the whole space that check_schedule describes, legal or not."""
    return [
        Schedule(
            block_m=int(rng.choice([64 * rng.integers(1, 5), 8 * rng.integers(1, 33)])),
            block_n=16 * int(rng.integers(1, 17)),
            num_stages=int(rng.integers(2, 9)),
            num_math_warpgroups=int(rng.integers(1, 4)),
            cluster_m=int(rng.choice([1, 2, 4])),
            cluster_n=int(rng.choice([1, 2, 4])),
            raster_group=int(rng.integers(1, 20)),
            split_k=int(rng.choice([1, 1, rng.integers(2, 9)])),
            promotion=rng.choice(["overlapped", "serial"]).item(),
            swap_ab=bool(rng.integers(2)),
            pingpong=bool(rng.integers(2)),
        )
        for _ in range(count)
    ]


def ops(kernel: Kernel, kind: type) -> list[Any]:
    return [stmt for stmt in walk(kernel.body.body) if isinstance(stmt, kind)]


# --- every schedule -----------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_lower_makes_a_sound_kernel_of_every_candidate(problem: Gemm) -> None:
    schedules = list(candidates(problem))
    assert schedules
    names = set()
    for schedule in schedules:
        kernel = lower(problem, schedule)
        verify(kernel)
        names.add(kernel.name)
    assert len(names) == len(schedules)


def test_lower_makes_a_sound_kernel_of_every_legal_schedule(rng: np.random.Generator) -> None:
    legal = dict.fromkeys(VARIANTS, 0)
    for schedule in all_schedules(rng, 12000):
        problem = PROBLEMS[rng.integers(len(PROBLEMS))]
        try:
            check_schedule(problem, schedule)
        except ScheduleError:
            with pytest.raises(ScheduleError):
                lower(problem, schedule)
            continue
        verify(lower(problem, schedule))
        legal[schedule.swap_ab, schedule.pingpong] += 1
    assert legal[False, False] > 50, legal
    assert min(legal.values()) > 10, legal


@settings(max_examples=60)
@given(
    n=st.integers(1, 400).map(lambda i: 8 * i),
    k=st.integers(1, 1024).map(lambda i: 16 * i),
    d_dtype=st.sampled_from([BF16, F32]),
    data=st.data(),
)
def test_lower_makes_a_sound_kernel_of_every_problem(
    n: int, k: int, d_dtype: Any, data: st.DataObject
) -> None:
    problem = Gemm(n, k, d_dtype)
    verify(lower(problem, data.draw(st.sampled_from(list(candidates(problem))))))


# --- what the program says ----------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_lower_carries_schedule_and_problem_into_the_program(problem: Gemm) -> None:
    for schedule in candidates(problem):
        kernel = lower(problem, schedule)
        assert (kernel.problem, kernel.schedule, kernel.target) == (problem, schedule, SM90A)
        assert kernel.smem == smem_plan(problem, schedule)
        traversal = kernel.body.traversal
        assert (traversal.block_m, traversal.block_n) == (schedule.block_m, schedule.block_n)
        assert (traversal.cluster_m, traversal.cluster_n) == (
            schedule.cluster_m,
            schedule.cluster_n,
        )
        assert traversal.group == schedule.raster_group
        turns = schedule.num_math_warpgroups if schedule.pingpong else 1
        assert kernel.body.num_turns == turns
        (mma,) = ops(kernel, Mma)
        assert mma.swap_ab == schedule.swap_ab
        (evaluate,) = ops(kernel, Evaluate)
        assert evaluate.expr == problem.epilogue
        assert kernel.body.body[-3].extent == problem.k  # the outermost loop
        assert kernel.body.body[-3].num_blocks == schedule.split_k
        assert min(loop.step for loop in ops(kernel, ForK)) == 128


def test_lower_declares_the_tensors_of_the_gemm() -> None:
    kernel = lower(Gemm(576, 144, F32, EPILOGUES["all"]), Schedule(64, 64, 4, 1))
    got = {tensor.name: (tensor.dtype, tuple(map(str, tensor.dims))) for tensor in kernel.tensors}
    assert got == {
        "a": (E4M3, ("m", "144")),
        "b": (E4M3, ("576", "144")),
        "sfa": (F32, ("m", "2")),
        "sfb": (F32, ("5", "2")),
        "d": (F32, ("m", "576")),
        "bias": (F32, ("576",)),
        "alpha": (F32, ()),
        "residual": (BF16, ("m", "576")),
    }


def test_lower_reads_sfa_with_any_strides_and_sfb_packed() -> None:
    kernel = lower(Gemm(576, 7168), Schedule(128, 128, 4))
    loads = {load.src.name: load for load in ops(kernel, Load)}
    assert (loads["sfa"].any_strides, loads["sfb"].any_strides) == (True, False)
    # TMA needs a row pitch of 16 bytes, which sfa [m, ceil(k / 128)] seldom has.
    assert {name for name, load in loads.items() if load.via == "tma"} == {"a", "b"}


@pytest.mark.parametrize(
    ("cluster_m", "cluster_n"),
    [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)],
    ids=lambda v: str(v),
)
def test_lower_multicasts_a_along_n_and_b_along_m(cluster_m: int, cluster_n: int) -> None:
    schedule = Schedule(128, 128, 2, 2, cluster_m, cluster_n)
    loads = {load.src.name: load for load in ops(lower(Gemm(2112, 7168), schedule), Load)}
    assert loads["a"].multicast == cluster_n  # blocks side by side in a row of D share rows of A
    assert loads["b"].multicast == cluster_m
    assert loads["a"].box == (128 // cluster_n, 128)
    assert loads["b"].box == (128 // cluster_m, 128)
    assert loads["sfa"].multicast == loads["sfb"].multicast == 1


@pytest.mark.parametrize("k", [272, 1168, 7168])
@pytest.mark.parametrize("split_k", [2, 3])
def test_lower_gives_each_block_its_part_of_k_and_sums_them_up(split_k: int, k: int) -> None:
    kernel = lower(Gemm(2112, k, F32), Schedule(64, 96, 3, 1, split_k=split_k))
    split, evaluate, store = kernel.body.body
    part_k = -(-k // 128 // split_k) * 128
    assert isinstance(split, ForK)
    assert (split.extent, split.step, split.num_blocks) == (k, part_k, split_k)
    zero, chunks, reduce = split.body
    # In its part a block does what it does to the whole of k without a split.
    whole = lower(Gemm(2112, k, F32), Schedule(64, 96, 3, 1))
    assert (zero, dataclasses.replace(chunks, extent=k)) == whole.body.body[:2]
    assert (chunks.extent, chunks.num_blocks) == (part_k, 1)
    assert isinstance(reduce, Reduce)
    assert (reduce.src, reduce.dst) == (zero.dst, evaluate.src)
    assert dataclasses.replace(reduce.dst, name=reduce.src.name) == reduce.src
    columns = {2: 48, 3: 32}[split_k]
    inbox = reduce.inbox
    assert (inbox.shape, inbox.dtype, inbox.space) == ((split_k - 1, 64, columns), F32, "smem")
    assert store.src == evaluate.dst
    traversal = dataclasses.replace(kernel.body, body=())
    assert traversal == dataclasses.replace(whole.body, body=())


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        (Schedule(24, 128, 3, 2, split_k=2, swap_ab=True), (1, 128, 16)),
        (Schedule(24, 128, 3, 1, split_k=3, swap_ab=True), (2, 128, 8)),
        (Schedule(8, 64, 3, 1, split_k=8, swap_ab=True), (7, 64, 8)),
        (Schedule(48, 192, 3, 3, split_k=4, swap_ab=True), (3, 192, 16)),
    ],
    ids=lambda v: str(v),
)
def test_lower_receives_rows_of_wgmma_if_swapped(
    schedule: Schedule, shape: tuple[int, int, int]
) -> None:
    kernel = lower(Gemm(2112, 7168), schedule)
    (reduce,) = ops(kernel, Reduce)
    assert (reduce.inbox.shape, reduce.inbox.dtype, reduce.inbox.space) == (shape, F32, "smem")
    assert reduce.dst.shape == (schedule.block_m, schedule.block_n)  # the sums are those of D


@pytest.mark.parametrize("schedule", [Schedule(128, 128, 3), Schedule(64, 64, 3, 1)], ids=str)
def test_lower_swapped_says_the_same_but_for_mma_and_boxes(schedule: Schedule) -> None:
    plain = lower(Gemm(2112, 7168, F32), schedule)
    swapped = lower(Gemm(2112, 7168, F32), dataclasses.replace(schedule, swap_ab=True))

    def without(kernel: Kernel) -> list[Any]:
        neutral: list[Any] = []
        for stmt in walk(kernel.body.body):
            if isinstance(stmt, Mma):
                stmt = dataclasses.replace(stmt, swap_ab=False)
            if isinstance(stmt, Store):
                stmt = dataclasses.replace(stmt, box=(0, 0))
            if not isinstance(stmt, ForK):
                neutral.append(stmt)
        return neutral

    assert plain.body != swapped.body
    assert without(plain) == without(swapped)


def test_lower_in_turns_changes_their_number_alone() -> None:
    plain = lower(Gemm(2112, 7168), Schedule(64, 64, 3, 1))
    in_turns = lower(Gemm(2112, 7168), Schedule(64, 64, 3, 3, pingpong=True))
    assert (plain.body.num_turns, in_turns.body.num_turns) == (1, 3)
    assert in_turns.body == dataclasses.replace(plain.body, num_turns=3)


def test_lower_without_split_has_no_loop_over_blocks() -> None:
    kernel = lower(Gemm(2112, 7168), Schedule(128, 128, 4))
    assert [loop.num_blocks for loop in ops(kernel, ForK)] == [1, 1]
    assert ops(kernel, Reduce) == []


def test_lower_promotes_every_128_of_k_with_both_scales() -> None:
    kernel = lower(Gemm(2112, 7168), Schedule(128, 96, 3))
    (mma,), (promote,) = ops(kernel, Mma), ops(kernel, Promote)
    assert mma.a.shape == (128, 128)
    assert mma.b.shape == (96, 128)
    assert promote.part == mma.dst
    assert [window.block for window in promote.windows] == [1, 128]
    assert [scale.shape[0] for scale in promote.scales] == [128, 2]


@pytest.mark.parametrize(
    ("block_n", "element_bytes", "span"),
    [
        (16, 2, 32),
        (32, 2, 64),
        (48, 2, 32),
        (64, 2, 128),
        (96, 2, 64),
        (160, 2, 64),
        (192, 2, 128),
        (16, 4, 64),
        (32, 4, 128),
        (48, 4, 64),
        (128, 4, 128),
    ],
    ids=lambda v: str(v),
)
def test_store_span_is_the_widest_swizzle_that_divides_a_row(
    block_n: int, element_bytes: int, span: int
) -> None:
    box = store_box(Schedule(64, block_n, 2, 1), element_bytes)
    assert box == (64, span // element_bytes)


@pytest.mark.parametrize(
    ("block_n", "split_k", "element_bytes", "span"),
    [
        (128, 2, 2, 128),  # slices of 64 columns
        (128, 2, 4, 128),
        (128, 3, 2, 32),  # of 48, 48 and 32: boxes of 16
        (128, 3, 4, 64),
        (128, 8, 2, 32),
        (96, 4, 2, 64),  # of 32, and none for the last block
        (96, 4, 4, 128),
        (192, 2, 2, 64),  # 96 of 192
        (16, 8, 2, 32),
    ],
    ids=lambda v: str(v),
)
def test_store_span_divides_what_a_split_block_stores(
    block_n: int, split_k: int, element_bytes: int, span: int
) -> None:
    box = store_box(Schedule(64, block_n, 2, 1, split_k=split_k), element_bytes)
    assert box == (64, span // element_bytes)


@pytest.mark.parametrize(
    ("schedule", "rows", "columns_of"),
    [
        # Every row of the tile, 64 columns of each wgmma: at most 128 bytes.
        (Schedule(8, 64, 2, 1, swap_ab=True), 8, {2: 64, 4: 32}),
        (Schedule(48, 128, 2, 2, swap_ab=True), 48, {2: 64, 4: 32}),
        (Schedule(128, 256, 2, 2, swap_ab=True), 128, {2: 64, 4: 32}),
        (Schedule(16, 64, 2, 2, swap_ab=True, pingpong=True), 16, {2: 64, 4: 32}),
        # Slices of 16 and 8 rows: boxes of 8 belong to one block.
        (Schedule(24, 64, 2, 1, split_k=2, swap_ab=True), 8, {2: 64, 4: 32}),
        (Schedule(32, 128, 2, 1, split_k=2, swap_ab=True), 16, {2: 64, 4: 32}),
        (Schedule(96, 128, 2, 1, split_k=5, swap_ab=True), 24, {2: 64, 4: 32}),
        # Rows of the warpgroups that share a tile: of one if they take turns.
        (Schedule(128, 96, 2, 2), 64, {2: 32, 4: 32}),
        (Schedule(128, 96, 2, 2, pingpong=True), 128, {2: 32, 4: 32}),
        (Schedule(64, 16, 2, 3, pingpong=True), 64, {2: 16, 4: 16}),
    ],
    ids=lambda v: str(v) if isinstance(v, Schedule) else "",
)
def test_store_box_of_swapped_and_in_turns(
    schedule: Schedule, rows: int, columns_of: dict[int, int]
) -> None:
    for element_bytes, columns in columns_of.items():
        assert store_box(schedule, element_bytes) == (rows, columns)


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_lower_stores_the_whole_tile_in_swizzled_boxes(d_dtype: Any) -> None:
    problem = Gemm(2112, 576, d_dtype)
    for schedule in candidates(problem):
        (store,) = ops(lower(problem, schedule), Store)
        rows, columns = store.box
        assert columns * d_dtype.size_bytes == store.src.swizzle_bytes in (32, 64, 128)
        sharing = 1 if schedule.pingpong else schedule.num_math_warpgroups
        # No box belongs to two warpgroups or to two blocks of a split cluster.
        if schedule.swap_ab:
            assert schedule.block_m % rows == slice_columns(schedule) % rows == 0
            assert rows > 0
            assert schedule.block_n // sharing % columns == 0
        else:
            assert rows == schedule.block_m // sharing
            assert schedule.block_n % columns == slice_columns(schedule) % columns == 0


# --- names and equality -------------------------------------------------------------------------


def test_kernel_name_is_a_c_identifier_and_tells_problem_and_schedule() -> None:
    name = kernel_name(Gemm(2112, 7168, F32), Schedule(192, 112, 5, 3, 2, 1, 11, 6, "serial"))
    assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name)
    parts = name.split("_")
    for part in (
        "gemm",
        "e4m3",
        "f32",
        "n2112",
        "k7168",
        "192x112x128",
        "s5",
        "w3",
        "c2x1",
        "g11",
        "k6",
        "serial",
    ):
        assert part in parts


@pytest.mark.parametrize(
    ("swap_ab", "pingpong", "end"),
    [
        (False, False, "_overlapped"),
        (True, False, "_overlapped_swap"),
        (False, True, "_overlapped_pingpong"),
        (True, True, "_overlapped_swap_pingpong"),
    ],
)
def test_kernel_name_ends_with_what_is_swapped_or_in_turns(
    swap_ab: bool, pingpong: bool, end: str
) -> None:
    schedule = Schedule(64, 128, 4, swap_ab=swap_ab, pingpong=pingpong)
    assert kernel_name(Gemm(72, 144), schedule).endswith(end)
    epilogue = EPILOGUES["bias"]
    assert kernel_name(Gemm(72, 144, BF16, epilogue), schedule).endswith(f"{end}_epilogue")


def test_kernel_name_differs_for_every_problem_and_schedule() -> None:
    kernels = [
        (problem, dataclasses.replace(schedule, raster_group=group))
        for problem in (Gemm(72, 144), Gemm(72, 144, F32), Gemm(144, 72 * 2), Gemm(72, 1440))
        for schedule in candidates(problem)
        for group in (1, 8)
    ]
    assert len({kernel_name(*kernel) for kernel in kernels}) == len(set(kernels))


def test_lower_gives_equal_kernels_for_equal_inputs() -> None:
    one = lower(Gemm(72, 144, BF16, EPILOGUES["all"]), Schedule(64, 64, 4, 1))
    other = lower(Gemm(72, 144, BF16, EPILOGUES["all"]), Schedule(64, 64, 4, 1))
    assert one == other
    assert hash(one) == hash(other)


# --- rejections ---------------------------------------------------------------------------------


def test_lower_rejects_illegal_problem() -> None:
    with pytest.raises(ProblemError, match="n = 7"):
        lower(Gemm(7, 128), Schedule(64, 16, 2, 1))


def test_lower_rejects_illegal_schedule() -> None:
    with pytest.raises(ScheduleError, match="block_m = 100"):
        lower(Gemm(72, 128), Schedule(100, 16, 2, 1))


def test_lower_rejects_schedule_beyond_the_target() -> None:
    small = dataclasses.replace(SM90A, smem_per_block_bytes=48 * 1024)
    with pytest.raises(ScheduleError, match="49152"):
        lower(Gemm(72, 128), Schedule(128, 128, 4), small)
