"""Schedules: every rule of check_schedule, the shared-memory plan, candidates and their choice."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgen import BF16, F32, Gemm, GroupedGemm, Schedule, acc, matrix, vector
from jitgen.errors import ScheduleError
from jitgen.schedule import (
    MIN_PART_COLUMNS,
    REGISTER_SPLIT,
    SCALE_BLOCKS,
    Promotion,
    accumulator_registers,
    max_stages,
    num_barriers,
    num_k_blocks,
    num_parts,
    num_scale_stages,
    num_sfb_rows,
    part_columns,
    part_registers,
    slice_columns,
    smem_plan,
    split_blocks,
)
from jitgen.schedule_rules import check_schedule
from jitgen.target import SM90A
from jitgen.tuning.model import M_BUCKETS, choose, choose_for_all, m_bucket, predict_us
from jitgen.tuning.space import (
    CLUSTERS,
    MAX_STAGES,
    PINGPONG_ROW_TILES,
    ROW_TILES,
    SWAPPED_COLUMN_TILES,
    VARIANTS,
    candidates,
    is_legal,
    numerics_class,
)

SMEM_BYTES = 227 * 1024  # HOPPER.md section 7 and the CUDA programming guide: 227 KiB a block
PROBLEM = Gemm(2112, 7168)
LEGAL = Schedule(128, 128, 4)
PROMOTIONS: tuple[Promotion, ...] = get_args(Promotion)
PROBLEMS = [
    Gemm(n, k, d_dtype)
    for n in (8, 24, 72, 128, 136, 240, 256, 576, 2112, 7168)
    for k in (16, 128, 576, 7168)
    for d_dtype in (BF16, F32)
]

problems = st.builds(
    Gemm,
    st.integers(1, 600).map(lambda i: 8 * i),
    st.integers(1, 600).map(lambda i: 16 * i),
    st.sampled_from([BF16, F32]),
)
schedules = st.builds(
    Schedule,
    block_m=st.sampled_from([8, 24, 64, 128, 192, 256]),
    block_n=st.sampled_from(range(16, 257, 16)),
    num_stages=st.integers(2, 32),
    num_math_warpgroups=st.integers(1, 3),
    cluster_m=st.sampled_from([1, 2, 4]),
    cluster_n=st.sampled_from([1, 2, 4]),
    split_k=st.just(1) | st.integers(1, 8),
    promotion=st.sampled_from(PROMOTIONS),
    swap_ab=st.booleans(),
    pingpong=st.booleans(),
)


def name_of(problem: Gemm) -> str:
    return f"n{problem.n}-k{problem.k}-{problem.d_dtype}"


def changed(**fields: Any) -> Schedule:
    return dataclasses.replace(LEGAL, **fields)


# --- legal schedules ----------------------------------------------------------------------------


def test_schedule_is_frozen_and_hashable() -> None:
    assert hash(LEGAL) == hash(Schedule(128, 128, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        LEGAL.block_m = 64  # type: ignore[misc]


def test_schedule_prints_every_field() -> None:
    schedule = Schedule(192, 160, 5, 3, 2, 1, 11, 7, "serial")
    assert str(schedule) == (
        "192x160x128 stages=5 math_warpgroups=3 cluster=2x1 raster_group=11 split_k=7"
        " promotion=serial swap_ab=0 pingpong=0"
    )
    assert str(changed(swap_ab=True)).endswith(" promotion=overlapped swap_ab=1 pingpong=0")
    assert str(changed(pingpong=True)).endswith(" promotion=overlapped swap_ab=0 pingpong=1")


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(64, 16, 2, 1),
        Schedule(64, 192, 4, 1),
        Schedule(128, 128, 2, 1),
        Schedule(128, 192, 2, 2),
        Schedule(192, 96, 2, 3),
        Schedule(256, 128, 2, 2),
        Schedule(64, 16, 16, 1),
        Schedule(128, 128, 2, 2, 2, 2),
        Schedule(128, 128, 2, 2, 4, 1),
        Schedule(128, 128, 2, 2, 1, 4),
        Schedule(128, 128, 2, 2, raster_group=1),
        Schedule(128, 128, 2, 2, raster_group=1024),
        *(Schedule(rows, 64, 2, 1, swap_ab=True) for rows in (8, 16, 24, 72, 128)),
        Schedule(8, 128, 2, 1, swap_ab=True),
        Schedule(48, 128, 2, 2, swap_ab=True),
        Schedule(16, 192, 2, 3, swap_ab=True),
        Schedule(96, 256, 2, 2, swap_ab=True),
        Schedule(16, 128, 2, 2, 2, 2, swap_ab=True),
        Schedule(64, 128, 2, 2, pingpong=True),
        Schedule(128, 64, 2, 2, pingpong=True),
        Schedule(64, 96, 2, 3, pingpong=True),
        Schedule(64, 64, 2, 2, 2, 1, pingpong=True),
        Schedule(8, 64, 2, 2, swap_ab=True, pingpong=True),
        Schedule(40, 128, 2, 2, swap_ab=True, pingpong=True),
        Schedule(16, 64, 2, 3, swap_ab=True, pingpong=True),
    ],
    ids=str,
)
def test_check_schedule_accepts(schedule: Schedule) -> None:
    check_schedule(Gemm(72, 128), schedule)


@pytest.mark.parametrize("split_k", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("tile", [(64, 16, 1), (128, 128, 2), (192, 96, 3), (256, 32, 2)], ids=str)
def test_check_schedule_accepts_split(tile: tuple[int, int, int], split_k: int) -> None:
    block_m, block_n, warpgroups = tile
    # 22 K blocks and a partial one: in every number of parts the last is shorter.
    schedule = Schedule(block_m, block_n, 2, warpgroups, split_k=split_k)
    check_schedule(Gemm(72, 22 * 128 + 16), schedule)


@pytest.mark.parametrize("split_k", [2, 3, 5, 8])
@pytest.mark.parametrize("tile", [(8, 64, 1), (24, 128, 1), (64, 256, 2), (16, 192, 3)], ids=str)
def test_check_schedule_accepts_split_of_swapped(tile: tuple[int, int, int], split_k: int) -> None:
    block_m, block_n, warpgroups = tile
    schedule = Schedule(block_m, block_n, 2, warpgroups, split_k=split_k, swap_ab=True)
    check_schedule(Gemm(72, 22 * 128 + 16), schedule)


@pytest.mark.parametrize(
    ("schedule", "tile", "waves", "turns", "sharing"),
    [
        (Schedule(128, 96, 2, 2), (128, 96), 1, 1, 2),
        (Schedule(256, 96, 2, 2), (256, 96), 2, 1, 2),
        (Schedule(24, 128, 2, 2, swap_ab=True), (128, 24), 1, 1, 2),
        (Schedule(24, 128, 2, 1, swap_ab=True), (128, 24), 2, 1, 1),
        (Schedule(128, 96, 2, 2, pingpong=True), (128, 96), 2, 2, 1),
        (Schedule(64, 96, 2, 3, pingpong=True), (64, 96), 1, 3, 1),
        (Schedule(8, 64, 2, 2, swap_ab=True, pingpong=True), (64, 8), 1, 2, 1),
    ],
    ids=str,
)
def test_schedule_shares_the_tile_as_wgmma_sees_it(
    schedule: Schedule, tile: tuple[int, int], waves: int, turns: int, sharing: int
) -> None:
    assert schedule.mma_tile == tile
    assert (schedule.num_waves, schedule.num_turns, schedule.tile_warpgroups) == (
        waves,
        turns,
        sharing,
    )


@pytest.mark.parametrize("split_k", range(1, 9))
def test_cluster_size_counts_the_blocks_that_share_k(split_k: int) -> None:
    assert changed(split_k=split_k).cluster_size == split_k
    assert changed(cluster_m=2, cluster_n=2).cluster_size == 4


def test_check_schedule_does_not_depend_on_the_epilogue() -> None:
    epilogue = (acc + vector("bias")) + matrix("residual")
    for schedule in candidates(PROBLEM):
        check_schedule(dataclasses.replace(PROBLEM, epilogue=epilogue), schedule)


# --- ranges -------------------------------------------------------------------------------------

RANGES = {
    "block_m": (8, 256, 8, [0, -64, -8, 4, 12, 63, 100, 264, 512]),
    "block_n": (16, 256, 16, [0, -16, 8, 24, 100, 272, 512]),
    "num_stages": (2, 32, 1, [-1, 0, 1, 33]),
    "num_math_warpgroups": (1, 3, 1, [-1, 0, 4]),
    "cluster_m": (1, 4, 1, [-1, 0, 5, 8]),
    "cluster_n": (1, 4, 1, [-1, 0, 5, 8]),
    "raster_group": (1, 1024, 1, [-1, 0, 1025]),
    "split_k": (1, 8, 1, [-1, 0, 9, 16]),
}
OUT_OF_RANGE = [(name, value) for name, (*_, bad) in RANGES.items() for value in bad]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda v: str(v))
def test_check_schedule_rejects_value_out_of_range(name: str, value: int) -> None:
    low, high, step, _ = RANGES[name]
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, changed(**{name: value}))
    assert str(caught.value) == f"{name} = {value} must be in {low}..{high} in steps of {step}"


@pytest.mark.parametrize("value", [True, 2.0, "2", None], ids=repr)
@pytest.mark.parametrize("name", RANGES)
def test_check_schedule_rejects_value_that_is_no_int(name: str, value: Any) -> None:
    with pytest.raises(ScheduleError, match=rf"^{name} must be an int, got"):
        check_schedule(PROBLEM, changed(**{name: value}))


@pytest.mark.parametrize("value", [0, 1, "1", "True", None], ids=repr)
@pytest.mark.parametrize("name", ["swap_ab", "pingpong"])
def test_check_schedule_rejects_value_that_is_no_bool(name: str, value: Any) -> None:
    with pytest.raises(ScheduleError, match=rf"^{name} must be a bool, got {value!r}$"):
        check_schedule(PROBLEM, changed(**{name: value}))


# --- warpgroups and registers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_m", "num_math_warpgroups"),
    [
        *((8, 1), (32, 1), (72, 1), (96, 1), (64, 2), (64, 3), (128, 3)),
        *((192, 1), (192, 2), (256, 1), (256, 3)),
    ],
    ids=lambda v: str(v),
)
def test_check_schedule_rejects_rows_that_do_not_fit_the_warpgroups(
    block_m: int, num_math_warpgroups: int
) -> None:
    schedule = changed(block_m=block_m, block_n=16, num_math_warpgroups=num_math_warpgroups)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, schedule)
    assert str(caught.value) == (
        f"block_m = {block_m} must be 64 or 128 for each of the {num_math_warpgroups} math"
        " warpgroups that share a tile"
    )


@pytest.mark.parametrize("block_m", [8, 64, 128])
@pytest.mark.parametrize(
    ("block_n", "num_math_warpgroups"),
    [
        *((16, 1), (32, 1), (96, 1), (192, 1), (256, 1)),
        *((64, 2), (96, 2), (192, 2), (64, 3), (128, 3), (256, 3)),
    ],
    ids=lambda v: str(v),
)
def test_check_schedule_rejects_swapped_columns_that_do_not_fit_the_warpgroups(
    block_n: int, num_math_warpgroups: int, block_m: int
) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, Schedule(block_m, block_n, 2, num_math_warpgroups, swap_ab=True))
    assert str(caught.value) == (
        f"block_n = {block_n} must be 64 or 128 for each of the {num_math_warpgroups} math"
        " warpgroups that share a tile"
    )


@pytest.mark.parametrize(
    ("tile", "swap_ab", "name"),
    [
        *(((rows, 64), False, "block_m") for rows in (8, 96, 192, 256)),
        *(((64, columns), True, "block_n") for columns in (32, 96, 192, 256)),
    ],
    ids=lambda v: str(v),
)
@pytest.mark.parametrize("num_math_warpgroups", [2, 3])
def test_check_schedule_rejects_turns_of_tiles_that_do_not_fit_one_warpgroup(
    tile: tuple[int, int], swap_ab: bool, name: str, num_math_warpgroups: int
) -> None:
    schedule = Schedule(*tile, 2, num_math_warpgroups, swap_ab=swap_ab, pingpong=True)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, schedule)
    assert str(caught.value) == (
        f"{name} = {tile[swap_ab]} must be 64 or 128 for each of the 1 math warpgroups that share"
        " a tile"
    )


@pytest.mark.parametrize("swap_ab", [False, True])
def test_check_schedule_rejects_turns_of_one_warpgroup(swap_ab: bool) -> None:
    schedule = Schedule(64, 64, 2, 1, swap_ab=swap_ab, pingpong=True)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, schedule)
    assert str(caught.value) == ("pingpong takes turns: num_math_warpgroups must be 2 or 3, not 1")
    check_schedule(PROBLEM, dataclasses.replace(schedule, num_math_warpgroups=2))


@pytest.mark.parametrize("swap_ab", [False, True])
@pytest.mark.parametrize("split_k", [2, 8])
def test_check_schedule_rejects_turns_of_a_split(split_k: int, swap_ab: bool) -> None:
    schedule = Schedule(64, 128, 2, split_k=split_k, swap_ab=swap_ab, pingpong=True)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, schedule)
    assert str(caught.value) == (
        f"split_k = {split_k} gives a block one tile, so there are no turns to take: pingpong must"
        " be False"
    )
    check_schedule(PROBLEM, dataclasses.replace(schedule, split_k=1))


@pytest.mark.parametrize("promotion", PROMOTIONS)
@pytest.mark.parametrize(
    "tile",
    [(128, 256, 1), (256, 192, 2), (256, 256, 2), (192, 256, 3)],
    ids=lambda t: "x".join(map(str, t)),
)
def test_check_schedule_rejects_accumulators_beyond_the_registers(
    tile: tuple[int, int, int], promotion: Promotion
) -> None:
    block_m, block_n, warpgroups = tile
    schedule = Schedule(block_m, block_n, 2, warpgroups, promotion=promotion)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, schedule)
    message = str(caught.value)
    assert "registers" in message
    assert f"{64 * schedule.num_waves}x{block_n}" in message
    assert f"lower block_n ({block_n})" in message
    # More warpgroups would take the second wave of each.
    assert (f"raise num_math_warpgroups ({warpgroups})" in message) == (schedule.num_waves > 1)
    # The remedy works: some smaller block_n is legal.
    smaller = range(16, schedule.block_n, 16)
    assert any(is_legal(PROBLEM, dataclasses.replace(schedule, block_n=n)) for n in smaller)


@pytest.mark.parametrize("value", ["", "eager", None, 1], ids=repr)
def test_check_schedule_rejects_unknown_promotion(value: Any) -> None:
    with pytest.raises(ScheduleError, match=r"promotion = .*overlapped.*serial"):
        check_schedule(PROBLEM, changed(promotion=value))


@pytest.mark.parametrize("promotion", PROMOTIONS)
@pytest.mark.parametrize("row_tile", ROW_TILES, ids=lambda t: f"{t[0]}-w{t[1]}")
def test_part_columns_is_the_widest_slice_that_the_registers_hold(
    row_tile: tuple[int, int], promotion: Promotion
) -> None:
    for n, block_n in itertools.product((8, 576, 2112), range(16, 257, 16)):
        problem = Gemm(n, 7168)
        schedule = Schedule(row_tile[0], block_n, 2, row_tile[1], promotion=promotion)
        # 64 rows of float32 over the 128 threads of a warpgroup: half a register a column. The sums
        # of all columns and rows stay; of the slices num_parts are alive at a time.
        rows_of_64 = row_tile[0] // (64 * row_tile[1])
        free = accumulator_registers(problem, schedule) - rows_of_64 * block_n // 2
        legal = [
            columns
            for columns in range(8, block_n + 1, 8)
            if block_n % columns == 0
            and num_parts(schedule) * columns // 2 <= free
            and (columns >= MIN_PART_COLUMNS or columns == block_n)
        ]
        assert part_columns(problem, schedule) == max(legal, default=None), (n, block_n)


@pytest.mark.parametrize("promotion", PROMOTIONS)
@pytest.mark.parametrize("pingpong", [False, True])
@pytest.mark.parametrize("row_tile", ROW_TILES, ids=lambda t: f"{t[0]}-w{t[1]}")
def test_part_columns_of_swapped_leave_registers_for_the_scales_of_their_rows(
    row_tile: tuple[int, int], pingpong: bool, promotion: Promotion
) -> None:
    if pingpong and row_tile not in PINGPONG_ROW_TILES:
        row_tile = (64, 3)  # turns of three
    for n, block_m in itertools.product((8, 576, 2112), range(8, 257, 8)):
        problem = Gemm(n, 7168)
        schedule = Schedule(
            *(block_m, row_tile[0], 2, row_tile[1]),
            promotion=promotion,
            swap_ab=True,
            pingpong=pingpong,
        )
        rows_of_64 = row_tile[0] // (64 * (1 if pingpong else row_tile[1]))
        free = accumulator_registers(problem, schedule) - rows_of_64 * block_m // 2
        # A thread holds 2 of each 8 rows of A, and the scale of each.
        need = {
            columns: num_parts(schedule) * columns // 2 + columns // 4
            for columns in range(8, block_m + 1, 8)
            if block_m % columns == 0 and (columns >= MIN_PART_COLUMNS or columns == block_m)
        }
        for columns, registers in need.items():
            assert part_registers(problem, schedule, columns) == registers
        legal = [columns for columns in need if need[columns] <= free]
        assert part_columns(problem, schedule) == max(legal, default=None), (n, block_m)


def test_accumulator_registers_of_swapped_ignore_the_rows_of_sfb() -> None:
    """A wave of 64 columns of D has one scale of B: no second row to choose from."""
    for d_dtype in (BF16, F32):
        problem = Gemm(2112, 7168, d_dtype)
        swapped = Schedule(64, 192, 2, 3, swap_ab=True)
        assert num_sfb_rows(problem, swapped.block_n) == 2
        one_row = Schedule(192, 64, 2, 3)
        assert num_sfb_rows(problem, one_row.block_n) == 1
        assert accumulator_registers(problem, swapped) == accumulator_registers(problem, one_row)


@pytest.mark.parametrize("block_n", [64, 192])
@pytest.mark.parametrize("row_tile", ROW_TILES, ids=lambda t: f"{t[0]}-w{t[1]}")
def test_accumulator_registers_leave_some_for_addresses(
    row_tile: tuple[int, int], block_n: int
) -> None:
    schedule = Schedule(row_tile[0], block_n, 2, row_tile[1])
    assert accumulator_registers(PROBLEM, schedule) <= REGISTER_SPLIT[row_tile[1]][1] - 24


@pytest.mark.parametrize(
    "cluster", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 8)], ids=str
)
def test_accumulator_registers_shrink_for_f32_and_for_two_rows_of_sfb_in_any_cluster(
    cluster: tuple[int, int, int],
) -> None:
    cluster_m, cluster_n, split_k = cluster
    # By rows of a warpgroup, block_n (64 touches one row of sfb, 96 two) and dtype of D.
    for (block_m, block_n, d_dtype), want in {
        (64, 64, BF16): 192,
        (64, 64, F32): 192,
        (64, 96, BF16): 192,
        (64, 96, F32): 136,
        (128, 64, BF16): 192,
        (128, 64, F32): 128,
        (128, 96, BF16): 152,
        (128, 96, F32): 128,
    }.items():
        schedule = Schedule(
            block_m, block_n, 2, 1, cluster_m=cluster_m, cluster_n=cluster_n, split_k=split_k
        )
        assert accumulator_registers(Gemm(2112, 7168, d_dtype), schedule) == want


def test_num_parts_is_two_where_promotion_overlaps() -> None:
    assert [num_parts(changed(promotion=p)) for p in ("overlapped", "serial")] == [2, 1]


@pytest.mark.parametrize("num_math_warpgroups", REGISTER_SPLIT)
def test_register_split_fits_the_register_file(num_math_warpgroups: int) -> None:
    producer, math = REGISTER_SPLIT[num_math_warpgroups]
    assert 128 * producer + 128 * num_math_warpgroups * math <= SM90A.registers_per_sm == 65536
    for registers in (producer, math):
        # PTX ISA, setmaxnreg: 24 to 256 in steps of 8.
        assert 24 <= registers <= SM90A.max_registers_per_thread
        assert registers % 8 == 0
    assert producer < math


# --- clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster_m", "cluster_n"),
    [(3, 1), (1, 3), (4, 2), (2, 4), (4, 4), (3, 3)],
    ids=lambda v: str(v),
)
def test_check_schedule_rejects_cluster_size(cluster_m: int, cluster_n: int) -> None:
    with pytest.raises(
        ScheduleError, match=rf"cluster = {cluster_m}x{cluster_n}.*1, 2 or 4 blocks"
    ):
        check_schedule(PROBLEM, changed(cluster_m=cluster_m, cluster_n=cluster_n))


@pytest.mark.parametrize("block_n", [16, 48, 80, 112])
def test_check_schedule_rejects_columns_that_the_cluster_cannot_split(block_n: int) -> None:
    with pytest.raises(ScheduleError, match=rf"block_n = {block_n}.*4 parts.*multiple of 32"):
        check_schedule(PROBLEM, changed(block_n=block_n, cluster_m=4))


# --- split --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster_m", "cluster_n"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)], ids=lambda v: str(v)
)
def test_check_schedule_rejects_split_in_a_cluster_of_tiles(cluster_m: int, cluster_n: int) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, changed(cluster_m=cluster_m, cluster_n=cluster_n, split_k=2))
    assert str(caught.value) == (
        f"split_k = 2 takes the whole cluster: cluster_m = {cluster_m} and cluster_n = {cluster_n}"
        " must be 1"
    )


@pytest.mark.parametrize(
    ("k", "split_k", "used"),
    [(16, 8, 1), (128, 2, 1), (576, 4, 3), (1152, 7, 5), (1168, 6, 5), (1280, 8, 5)],
    ids=lambda v: str(v),
)
def test_check_schedule_rejects_split_that_leaves_a_block_without_k(
    k: int, split_k: int, used: int
) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(Gemm(72, k), changed(num_stages=2, split_k=split_k))
    assert str(caught.value) == (
        f"split_k = {split_k} leaves blocks without any of the {-(-k // 128)} K blocks:"
        f" choose {used}"
    )
    check_schedule(Gemm(72, k), changed(num_stages=2, split_k=used))  # the remedy works


@given(problems, st.integers(1, 8))
def test_split_blocks_cover_k_once_with_no_part_empty(problem: Gemm, split_k: int) -> None:
    schedule = Schedule(64, 16, 2, 1, split_k=split_k)
    size, count = split_blocks(problem, schedule), num_k_blocks(problem)
    assert (count - 1) * 128 < problem.k <= count * 128
    parts = [range(count)[i * size : (i + 1) * size] for i in range(split_k)]
    assert [block for part in parts for block in part] == list(range(count))
    assert size == -(-count // split_k)  # no smaller size covers k
    # Legal exactly if every block has something to add.
    assert is_legal(problem, schedule) == all(parts)
    if not all(parts):
        used = sum(map(bool, parts))
        with pytest.raises(ScheduleError, match=rf"choose {used}$"):
            check_schedule(problem, schedule)
        assert is_legal(problem, dataclasses.replace(schedule, split_k=used))


@given(st.sampled_from(range(16, 257, 16)), st.integers(1, 8))
def test_slice_columns_cover_block_n_once(block_n: int, split_k: int) -> None:
    size = slice_columns(changed(block_n=block_n, split_k=split_k))
    slices = [range(block_n)[i * size : (i + 1) * size] for i in range(split_k)]
    assert [column for part in slices for column in part] == list(range(block_n))
    # Whole groups of the 16 columns that a warp writes at once, and as few as will do.
    assert all(len(part) % 16 == 0 for part in slices)
    assert (size - 16) * split_k < block_n
    # A slice is short or empty only because those before it took all.
    assert [len(part) for part in slices] == sorted(map(len, slices), reverse=True)


@given(st.sampled_from(range(8, 257, 8)), st.integers(1, 8))
def test_slice_columns_of_swapped_cover_block_m_once(block_m: int, split_k: int) -> None:
    """The rows of the tile are wgmma's columns, of which a warp writes 8 at once."""
    size = slice_columns(Schedule(block_m, 64, 2, 1, split_k=split_k, swap_ab=True))
    slices = [range(block_m)[i * size : (i + 1) * size] for i in range(split_k)]
    assert [row for part in slices for row in part] == list(range(block_m))
    assert all(len(part) % 8 == 0 for part in slices)
    assert (size - 8) * split_k < block_m
    assert [len(part) for part in slices] == sorted(map(len, slices), reverse=True)


@pytest.mark.parametrize(
    ("k", "split_k", "block_n", "blocks", "columns"),
    [
        (7168, 1, 128, 56, 128),
        (7168, 2, 128, 28, 64),
        (7168, 3, 128, 19, 48),
        (7168, 8, 16, 7, 16),
        (2192, 4, 96, 5, 32),
        (144, 2, 80, 1, 48),
    ],
    ids=lambda v: str(v),
)
def test_split_of_k_and_columns(
    k: int, split_k: int, block_n: int, blocks: int, columns: int
) -> None:
    schedule = Schedule(64, block_n, 2, 1, split_k=split_k)
    assert split_blocks(Gemm(72, k), schedule) == blocks
    assert slice_columns(schedule) == columns


# --- scales -------------------------------------------------------------------------------------


@given(problems, st.sampled_from(range(16, 257, 16)))
def test_num_sfb_rows_is_that_of_the_worst_tile(problem: Gemm, block_n: int) -> None:
    rows = [
        len({column // 128 for column in range(start, min(start + block_n, problem.n))})
        for start in range(0, problem.n, block_n)
    ]
    assert num_sfb_rows(problem, block_n) == max(rows)


def test_check_schedule_rejects_tiles_that_touch_three_rows_of_sfb() -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, Schedule(64, 176, 2, 1))
    message = str(caught.value)
    assert re.search(r"block_n = 176 touches 3 rows of sfb", message)
    for block_n in map(int, re.findall(r"\d+", message.partition("choose")[2])):
        assert num_sfb_rows(PROBLEM, block_n) <= 2


# --- shared memory ------------------------------------------------------------------------------


@given(problems, schedules)
def test_smem_plan_keeps_buffers_apart_and_aligned(problem: Gemm, schedule: Schedule) -> None:
    plan = smem_plan(problem, schedule)
    stages = schedule.num_stages
    scales = SCALE_BLOCKS * (schedule.block_m + num_sfb_rows(problem, schedule.block_n)) * 4
    regions = [
        (plan.a, stages * schedule.block_m * 128, 1024),
        (plan.b, stages * schedule.block_n * 128, 1024),
        # One result for each tile at work.
        (
            plan.d,
            schedule.num_turns * schedule.block_m * schedule.block_n * problem.d_dtype.size_bytes,
            1024,
        ),
        # From every other block, float32 sums of this block's slice of columns, 16 bytes a store.
        (
            plan.inbox,
            (schedule.split_k - 1)
            * (schedule.block_n if schedule.swap_ab else schedule.block_m)
            * slice_columns(schedule)
            * 4,
            16,
        ),
        (plan.scales, num_scale_stages(schedule) * scales, 16),
        (
            plan.barriers,
            ((stages + num_scale_stages(schedule)) * 2 + (schedule.split_k > 1)) * 8,
            8,
        ),
    ]
    assert all(offset % alignment == 0 for offset, _, alignment in regions)
    regions.sort()
    for (offset, size, _), (following, _, _) in itertools.pairwise(regions):
        assert offset + size <= following
    assert regions[0][0] >= 0
    assert regions[-1][0] + regions[-1][1] <= plan.total_bytes


def test_smem_plan_gives_the_inbox_of_a_split_block_its_place() -> None:
    whole = smem_plan(PROBLEM, Schedule(128, 96, 3))
    plan = smem_plan(PROBLEM, Schedule(128, 96, 3, split_k=4))
    # Three senders, 128 rows, 32 of the 96 columns; and one barrier.
    assert plan.inbox == plan.d + 128 * 96 * 2
    assert plan.scales - plan.inbox == 3 * 128 * 32 * 4
    assert plan.total_bytes - whole.total_bytes == 3 * 128 * 32 * 4 + 8
    assert whole.scales == whole.inbox
    assert num_barriers(Schedule(128, 96, 3)) == 2 * (3 + 4)
    assert num_barriers(Schedule(128, 96, 3, split_k=4)) == 2 * (3 + 4) + 1


def test_smem_plan_gives_each_turn_a_result_of_its_own() -> None:
    for turns in (2, 3):
        together = smem_plan(PROBLEM, Schedule(64, 96, 3, turns))
        in_turns = smem_plan(PROBLEM, Schedule(64, 96, 3, turns, pingpong=True))
        assert in_turns.d == together.d
        assert in_turns.total_bytes - together.total_bytes == (turns - 1) * 64 * 96 * 2


def test_smem_plan_of_swapped_receives_slices_of_rows() -> None:
    plan = smem_plan(PROBLEM, Schedule(24, 128, 3, 1, split_k=2, swap_ab=True))
    # One sender, 128 columns, 16 of the 24 rows.
    assert plan.inbox == plan.d + 24 * 128 * 2
    assert plan.scales - plan.inbox == 128 * 16 * 4


@given(problems, schedules)
def test_check_schedule_never_allows_more_than_227_kib(problem: Gemm, schedule: Schedule) -> None:
    if is_legal(problem, schedule):
        assert smem_plan(problem, schedule).total_bytes <= SMEM_BYTES


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_smem_plan_of_every_candidate_fits_227_kib(problem: Gemm) -> None:
    plans = [smem_plan(problem, schedule).total_bytes for schedule in candidates(problem)]
    assert plans
    assert max(plans) <= SMEM_BYTES


@settings(max_examples=300)
@given(problems, schedules)
def test_max_stages_is_the_deepest_pipeline_that_fits(problem: Gemm, schedule: Schedule) -> None:
    deepest = max_stages(problem, schedule)

    def total(num_stages: int) -> int:
        return smem_plan(problem, dataclasses.replace(schedule, num_stages=num_stages)).total_bytes

    if deepest > 0:
        assert total(deepest) <= SMEM_BYTES
    assert total(max(deepest, 0) + 1) > SMEM_BYTES


def test_check_schedule_rejects_too_much_shared_memory_and_says_what_fits() -> None:
    schedule = Schedule(128, 128, 7)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(PROBLEM, schedule)
    message = str(caught.value)
    need, limit = map(
        int, re.findall(r"needs (\d+) B of shared memory, sm_90a allows (\d+)", message)[0]
    )
    assert need == smem_plan(PROBLEM, schedule).total_bytes > limit == SMEM_BYTES
    given_stages, fit = map(int, re.findall(r"lower num_stages \((\d+); (\d+) fit\)", message)[0])
    assert given_stages == 7
    assert "block_n (128)" in message
    assert is_legal(PROBLEM, dataclasses.replace(schedule, num_stages=fit))
    assert not is_legal(PROBLEM, dataclasses.replace(schedule, num_stages=fit + 1))


@settings(max_examples=200)
@given(problems, schedules)
def test_check_schedule_says_how_many_stages_fit(problem: Gemm, schedule: Schedule) -> None:
    try:
        check_schedule(problem, schedule)
    except ScheduleError as error:
        if found := re.findall(r"; (-?\d+) fit\)", str(error)):
            fit = int(found[0])
            assert 0 <= fit < schedule.num_stages
            if fit >= 2:
                check_schedule(problem, dataclasses.replace(schedule, num_stages=fit))
    else:
        assert schedule.num_stages <= max_stages(problem, schedule)


def test_check_schedule_reads_the_limit_from_the_target() -> None:
    small = dataclasses.replace(SM90A, smem_per_block_bytes=99 * 1024)
    check_schedule(PROBLEM, LEGAL)
    with pytest.raises(ScheduleError, match=rf"allows {99 * 1024}"):
        check_schedule(PROBLEM, LEGAL, small)


# --- candidates and choice ----------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_candidates_are_legal_distinct_and_deepest(problem: Gemm) -> None:
    found = list(candidates(problem))
    assert found
    assert len(set(found)) == len(found)
    for schedule in found:
        check_schedule(problem, schedule)
        deeper = dataclasses.replace(schedule, num_stages=schedule.num_stages + 1)
        assert schedule.num_stages == MAX_STAGES or not is_legal(problem, deeper), schedule


def test_candidates_cover_row_tiles_clusters_and_widths() -> None:
    found = list(candidates(PROBLEM))
    assert {(s.swap_ab, s.pingpong) for s in found} == set(VARIANTS)
    assert set(VARIANTS) == set(itertools.product((False, True), repeat=2))
    for swap_ab, pingpong in VARIANTS:
        of_variant = [s for s in found if (s.swap_ab, s.pingpong) == (swap_ab, pingpong)]
        row_tiles = PINGPONG_ROW_TILES if pingpong else ROW_TILES
        widths = SWAPPED_COLUMN_TILES if swap_ab else range(16, 257, 16)
        promotions = PROMOTIONS if not (swap_ab or pingpong) else ("overlapped",)
        assert {(s.mma_tile[0], s.num_math_warpgroups) for s in of_variant} == set(row_tiles)
        clusters = {(s.cluster_m, s.cluster_n, s.split_k) for s in of_variant}
        assert clusters == {c for c in CLUSTERS if c[2] == 1 or not pingpong}
        assert {s.promotion for s in of_variant} == set(promotions)
        for cluster in CLUSTERS:
            legal = {
                (m, w, n, p)
                for n, (m, w), p in itertools.product(widths, row_tiles, promotions)
                if is_legal(
                    PROBLEM,
                    Schedule(
                        *((n, m) if swap_ab else (m, n)),
                        *(2, w, *cluster[:2]),
                        split_k=cluster[2],
                        promotion=p,
                        swap_ab=swap_ab,
                        pingpong=pingpong,
                    ),
                )
                and (w < 3 or n <= 128)  # wider ones spill with some epilogues
            }
            tiles = {
                (s.mma_tile[0], s.num_math_warpgroups, s.mma_tile[1], s.promotion)
                for s in of_variant
                if (s.cluster_m, s.cluster_n, s.split_k) == cluster
            }
            assert tiles == legal, f"cluster = {cluster}, {swap_ab = }, {pingpong = }"


def test_clusters_are_one_block_two_and_every_split() -> None:
    assert set(CLUSTERS) == {
        *((1, 1, 1), (2, 1, 1), (1, 2, 1)),
        *((1, 1, parts) for parts in range(2, 9)),
    }


def test_numerics_class_is_the_split_alone() -> None:
    """How a tile is computed changes no bit: what is swapped or in turns is of the plain class."""
    classes: dict[int, set[tuple[object, ...]]] = {}
    for schedule in candidates(PROBLEM):
        classes.setdefault(schedule.split_k, set()).add(numerics_class(schedule))
    assert set(classes) == set(range(1, 9))
    assert all(len(of_split) == 1 for of_split in classes.values())
    assert len(set().union(*classes.values())) == 8


@pytest.mark.parametrize(
    ("k", "splits"),
    [
        (16, {1}),
        (128, {1}),
        (144, {1, 2}),
        (576, {1, 2, 3, 5}),
        (1152, {1, 2, 3, 5}),
        (1168, {1, 2, 3, 4, 5}),
        (1792, {1, 2, 3, 4, 5, 7}),
    ],
    ids=lambda v: str(v),
)
def test_candidates_split_only_into_parts_that_none_is_empty(k: int, splits: set[int]) -> None:
    assert {s.split_k for s in candidates(Gemm(2112, k))} == splits


@given(problems)
def test_candidates_exist_for_every_problem(problem: Gemm) -> None:
    assert next(candidates(problem), None) is not None


@settings(max_examples=40)
@given(problems, st.integers(0, 10**6))
def test_choose_gives_a_candidate_of_least_predicted_time(problem: Gemm, m: int) -> None:
    schedule = choose(problem, m)
    found = list(candidates(problem))
    assert schedule in found
    times = [predict_us(problem, s, m_bucket(m)) for s in found]
    assert predict_us(problem, schedule, m_bucket(m)) == min(times)
    assert choose(problem, m) == schedule


def test_choose_does_not_depend_on_the_epilogue() -> None:
    with_bias = dataclasses.replace(PROBLEM, epilogue=acc + vector("bias"))
    assert all(choose(with_bias, m) == choose(PROBLEM, m) for m in (0, 1, 100, 4096))


@pytest.mark.parametrize("num_sms", [2, 78, 114, 132])
def test_choose_works_for_any_number_of_sms(num_sms: int) -> None:
    check_schedule(PROBLEM, choose(PROBLEM, 4096, num_sms))


@settings(max_examples=5)
@given(problems)
def test_choose_for_all_loses_least_over_all_buckets(problem: Gemm) -> None:
    def loss(schedule: Schedule) -> float:
        return math.prod(predict_us(problem, schedule, m) / best[m] for m in M_BUCKETS)

    best = {m: predict_us(problem, choose(problem, m), m) for m in M_BUCKETS}
    losses = [loss(schedule) for schedule in candidates(problem)]
    assert loss(choose_for_all(problem)) == pytest.approx(min(losses))


@pytest.mark.parametrize("problem", [PROBLEM, Gemm(72, 144, F32)], ids=name_of)
def test_predict_us_is_finite_and_positive(problem: Gemm) -> None:
    for schedule, m in itertools.product(candidates(problem), (1, 64, 4096)):
        assert 0 < predict_us(problem, schedule, m) < math.inf, (schedule, m)


def test_predict_us_hides_the_end_of_a_tile_under_the_next_turn() -> None:
    """Two warpgroups in turns beat one alone on the same tile, where there are many tiles."""
    alone = Schedule(64, 128, 4, 1)
    in_turns = dataclasses.replace(alone, num_math_warpgroups=2, pingpong=True)
    assert predict_us(PROBLEM, in_turns, 8192) < predict_us(PROBLEM, alone, 8192)


def test_predict_us_of_a_few_rows_wastes_nothing_if_swapped() -> None:
    """Eight rows of D are a full tile if swapped, and an eighth of one if not."""
    compute_bound = Gemm(2112, 7168)
    times = [
        predict_us(compute_bound, Schedule(rows, 64, 8, 1, swap_ab=swap_ab), 8)
        for rows, swap_ab in ((8, True), (64, False))
    ]
    assert times[0] < times[1]


@given(st.integers(0, 65536))
def test_m_bucket_is_the_least_extent_at_or_above_m(m: int) -> None:
    extents = sorted({16, 32} | {64 * 2**i for i in range(12)} | {96 * 2**i for i in range(12)})
    assert m_bucket(m) == next(extent for extent in extents if extent >= m)


@given(st.integers(65536, 2**31 - 1))
def test_m_bucket_is_one_for_all_large_m(m: int) -> None:
    assert m_bucket(m) == m_bucket(65536)
    assert choose(PROBLEM, m) == choose(PROBLEM, 65536)


def test_predict_us_of_groups_counts_the_tile_rows_that_they_make() -> None:
    """32 groups of about 20 rows: one tile of 32 rows each; tiles of 16 make B come twice."""
    problem = GroupedGemm(4096, 2048, num_groups=32)
    once, twice = (Schedule(rows, 128, 8, swap_ab=True) for rows in (32, 16))
    assert predict_us(problem, once, 640) < predict_us(problem, twice, 640)
    few_groups = dataclasses.replace(problem, num_groups=4)
    assert predict_us(few_groups, once, 640) < predict_us(problem, once, 640)


def test_predict_us_of_groups_leaves_out_warpgroups_without_rows() -> None:
    """Of 64 rows a group, a tile of 128 has one math warpgroup with rows; of 100, two."""
    problem, schedule = GroupedGemm(4096, 7168, num_groups=256), Schedule(128, 256, 3)
    few, many = (predict_us(problem, schedule, 256 * rows) for rows in (49, 98))
    assert few < 0.98 * many  # memory bounds both


@given(st.integers(0, 70_000))
def test_m_bucket_of_groups_is_the_nearest(m: int) -> None:
    problem = GroupedGemm(4096, 2048, num_groups=32)
    found = m_bucket(m, problem)
    ratio = max(found, m) / max(min(found, m), 1)
    assert all(ratio <= max(b, m) / max(min(b, m), 1) * 1.001 for b in M_BUCKETS if m >= 16)
    assert choose(problem, m) == choose(problem, found)
