"""The tile IR: the traversal covers D once, and the program prints as it runs."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgen import BF16, F32, Gemm, Schedule, matrix, scalar, silu, vector
from jitgen.ir import Buffer, Dim, ForK, Load, Reduce, Store, Tensor, Window, walk
from jitgen.kernel import (
    ExtentParameter,
    Kernel,
    PointerParameter,
    StrideParameter,
    TensorMapParameter,
)
from jitgen.lower import lower
from jitgen.traversal import Traversal

traversals = st.builds(
    Traversal,
    block_m=st.sampled_from([64, 128, 192, 256]),
    block_n=st.sampled_from([16, 48, 64, 128, 160, 256]),
    cluster_m=st.sampled_from([1, 2, 4]),
    cluster_n=st.sampled_from([1, 2, 4]),
    group=st.integers(1, 11) | st.just(1024),
)


# --- traversal ----------------------------------------------------------------------------------


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Traversal, int, int]:
    """A traversal and an output of up to 13 cluster rows by 7 cluster columns, even or ragged."""
    t = draw(traversals)
    rows, columns = draw(st.integers(0, 13)), draw(st.integers(1, 7))
    m = rows * t.block_m * t.cluster_m - draw(st.integers(0, t.block_m * t.cluster_m - 1))
    n = columns * t.block_n * t.cluster_n - 8 * draw(
        st.integers(0, t.block_n * t.cluster_n // 8 - 1)
    )
    return t, max(m, 0), n


@settings(max_examples=400)
@given(outputs())
def test_traversal_covers_every_tile_once(output: tuple[Traversal, int, int]) -> None:
    t, m, n = output
    seen = Counter(t.tiles(m, n))
    assert all(count == 1 for count in seen.values())
    inside = {(row, column) for row, column in seen if row < m and column < n}
    assert inside == {
        (row, column) for row in range(0, m, t.block_m) for column in range(0, n, t.block_n)
    }
    rows, columns = t.grid(m, n)
    assert len(seen) == rows * columns * t.cluster_m * t.cluster_n


@settings(max_examples=200)
@given(outputs())
def test_traversal_leaves_d_only_inside_the_last_clusters(
    output: tuple[Traversal, int, int],
) -> None:
    t, m, n = output
    rows, columns = t.grid(m, n)
    height, width = t.block_m * t.cluster_m, t.block_n * t.cluster_n
    assert (rows - 1) * height < m <= rows * height
    assert (columns - 1) * width < n <= columns * width
    for row, column in t.tiles(m, n):
        # Every cluster has a block inside, so no cluster of an idle grid position is launched.
        assert row // height * height < m
        assert column // width * width < n


@settings(max_examples=200)
@given(outputs())
def test_traversal_walks_groups_of_rows_column_by_column(
    output: tuple[Traversal, int, int],
) -> None:
    t, m, n = output
    rows, columns = t.grid(m, n)
    walked = [t.cluster_tile(index, m, n) for index in range(rows * columns)]
    want = [
        (row, column)
        for first in range(0, rows, t.group)
        for column in range(columns)
        for row in range(first, min(first + t.group, rows))
    ]
    assert walked == want


@settings(max_examples=100)
@given(outputs())
def test_traversal_places_the_blocks_of_a_cluster_together(
    output: tuple[Traversal, int, int],
) -> None:
    t, m, n = output
    tiles = list(t.tiles(m, n))
    size = t.cluster_m * t.cluster_n
    for index in range(len(tiles) // size):
        tile_m, tile_n = t.cluster_tile(index, m, n)
        want = [
            ((tile_m * t.cluster_m + i) * t.block_m, (tile_n * t.cluster_n + j) * t.block_n)
            for j in range(t.cluster_n)
            for i in range(t.cluster_m)
        ]
        assert tiles[index * size : (index + 1) * size] == want


def test_traversal_of_no_rows_is_empty() -> None:
    t = Traversal(128, 128, 2, 1, 8)
    assert t.grid(0, 72) == (0, 1)
    assert list(t.tiles(0, 72)) == []


# --- dimensions and windows ---------------------------------------------------------------------


@given(st.integers(1, 2**31), st.sampled_from([1, 16, 128]))
def test_dim_counts_partial_blocks(extent: int, block: int) -> None:
    num_elements = Dim("k", extent, block).num_elements
    assert num_elements is not None
    assert (num_elements - 1) * block < extent <= num_elements * block


def test_dim_of_run_time_extent_has_no_count() -> None:
    assert Dim("m", None).num_elements is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Dim("m", None), "m"),
        (Dim("m", None, 128), "m/128"),
        (Dim("n", 2112), "2112"),
        (Dim("k", 576, 128), "5"),
        (Window("m", 64), "m:+64"),
        (Window("k", 128, 128), "k:+128/128"),
        (Tensor("sfb", F32, (Dim("n", 2112, 128), Dim("k", 576, 128))), "sfb: f32[17, 5]"),
        (Tensor("bias", BF16, (Dim("n", 72),)), "bias: bf16[72]"),
        (Buffer("acc", F32, (64, 128), "registers"), "acc: f32[64x128] in registers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ir_prints_extents_and_blocks(value: object, text: str) -> None:
    assert str(value) == text


def test_buffer_counts_bytes_of_one_stage() -> None:
    assert Buffer("d", BF16, (64, 128), "smem").num_bytes == 64 * 128 * 2
    assert Buffer("sfa", F32, (64, 1), "smem", pipelined=True).num_bytes == 256


# --- kernel -------------------------------------------------------------------------------------

EPILOGUE = silu(vector("bias", F32)) * scalar("alpha") + matrix("residual")
KERNEL = lower(Gemm(2112, 7168, BF16, EPILOGUE), Schedule(128, 96, 3, 2, 2, 1))
SPLIT = lower(Gemm(2112, 7168, BF16, EPILOGUE), Schedule(128, 96, 3, 2, split_k=3))


@pytest.mark.parametrize("kernel", [KERNEL, SPLIT], ids=["whole", "split"])
def test_walk_gives_loops_before_their_bodies(kernel: Kernel) -> None:
    stmts = list(walk(kernel.body.body))
    for position, stmt in enumerate(stmts):
        if isinstance(stmt, ForK):
            assert stmts[position + 1 : position + 1 + len(list(walk(stmt.body)))] == list(
                walk(stmt.body)
            )
    names = Counter(type(stmt).__name__ for stmt in stmts)
    assert (names["Zero"], names["Mma"], names["Promote"], names["Evaluate"], names["Store"]) == (
        1,
    ) * 5
    assert names["Load"] == 4
    assert names["Reduce"] == (kernel is SPLIT)
    assert names["ForK"] == 2 + (kernel is SPLIT)


@pytest.mark.parametrize("kernel", [KERNEL, SPLIT], ids=["whole", "split"])
def test_kernel_prints_every_tensor_and_statement(kernel: Kernel) -> None:
    text = str(kernel)
    for tensor in kernel.tensors:
        assert str(tensor) in text
    positions = [
        text.index(str(stmt)) for stmt in walk(kernel.body.body) if not isinstance(stmt, ForK)
    ]
    assert positions == sorted(positions)
    assert str(kernel.schedule) in text
    assert str(kernel.smem.total_bytes) in text


def test_kernel_prints_the_loop_that_blocks_share_and_their_sum() -> None:
    lines = str(SPLIT).splitlines()
    loop = lines.index("    for 7168 of k by 2432 on 3 blocks of a cluster:")
    assert lines[loop + 1 : loop + 3] == ["      acc = 0", "      for 2432 of k by 1024:"]
    reduce = lines.index("      total = total + acc via smem_inbox")
    assert lines[reduce + 1].startswith("    smem_d = ")
    assert "blocks of a cluster" not in str(KERNEL)


def test_kernel_prints_turns_and_swapped_operands() -> None:
    assert "part = mma(smem_a, smem_b)\n" in str(KERNEL)
    assert "in turns" not in str(KERNEL)
    schedule = Schedule(24, 64, 3, 2, swap_ab=True, pingpong=True)
    kernel = lower(Gemm(2112, 7168, BF16, EPILOGUE), schedule)
    (tiles,) = (line for line in str(kernel).splitlines() if line.startswith("  for tile"))
    assert tiles == "  for tile m:24 n:64 cluster 1x1 in groups of 8 rows, 2 in turns:"
    (mma,) = (line.strip() for line in str(kernel).splitlines() if "mma(" in line)
    assert mma == "part = mma(smem_b, smem_a)^T"


def test_reduce_prints_where_sums_are_received() -> None:
    src, dst = (Buffer(name, F32, (64, 32), "registers") for name in ("acc", "total"))
    inbox = Buffer("smem_inbox", F32, (1, 64, 16), "smem")
    assert str(Reduce(dst, src, inbox)) == "total = total + acc via smem_inbox"
    assert inbox.num_bytes == 64 * 16 * 4


def test_kernel_has_threads_for_the_math_and_the_producer() -> None:
    assert KERNEL.num_threads == 384
    assert lower(Gemm(72, 144), Schedule(64, 64, 4, 1)).num_threads == 256
    assert lower(Gemm(72, 144), Schedule(192, 64, 3, 3)).num_threads == 512


@pytest.mark.parametrize(
    ("m", "num_sms", "blocks"),
    [
        (1, 132, 44),
        (256, 132, 44),
        (257, 132, 88),
        (768, 132, 132),
        (4096, 132, 132),
        (768, 17, 16),
    ],
    ids=lambda v: str(v),
)
def test_num_blocks_of_persistent_clusters_are_at_most_what_the_gpu_holds(
    m: int, num_sms: int, blocks: int
) -> None:
    # 22 clusters along n, one for every 256 rows, of 2 blocks each.
    assert KERNEL.num_blocks(m, num_sms) == blocks


@pytest.mark.parametrize("num_sms", [17, 132])
@pytest.mark.parametrize(("m", "tiles"), [(1, 22), (128, 22), (129, 44), (4096, 32 * 22)])
def test_num_blocks_of_split_clusters_are_one_cluster_a_tile(
    m: int, tiles: int, num_sms: int
) -> None:
    assert SPLIT.num_blocks(m, num_sms) == 3 * tiles


def test_kernel_parameters_are_maps_then_scales_then_extents_then_operands() -> None:
    parameters = KERNEL.parameters
    kinds = [type(parameter) for parameter in parameters]
    names = [parameter.name for parameter in parameters]
    maps = [p.tensor.name for p in parameters if isinstance(p, TensorMapParameter)]
    assert kinds[:3] == [TensorMapParameter] * 3
    assert maps == ["a", "b", "d"]
    assert names[3:] == [
        "sfa",
        "sfa_stride_m",
        "sfa_stride_k",
        "sfb",
        "m",
        "operand_bias",
        "operand_alpha",
        "operand_residual",
        "operand_residual_stride",
    ]
    assert [p.name for p in parameters if isinstance(p, ExtentParameter)] == ["m"]
    pointers = {p.tensor.name for p in parameters if isinstance(p, PointerParameter)}
    assert pointers == {"sfa", "sfb", "bias", "alpha", "residual"}
    strides = [(p.tensor.name, p.dim) for p in parameters if isinstance(p, StrideParameter)]
    assert strides == [("sfa", 0), ("sfa", 1), ("residual", 0)]


def test_kernel_maps_have_the_boxes_of_their_loads_and_stores() -> None:
    maps = {p.tensor.name: p for p in KERNEL.parameters if isinstance(p, TensorMapParameter)}
    # Blocks of a 2 x 1 cluster share B: each loads half of its rows. 128 e4m3 fill an SW128 span.
    assert (maps["a"].box, maps["a"].swizzle_bytes) == ((128, 128), 128)
    assert (maps["b"].box, maps["b"].swizzle_bytes) == ((48, 128), 128)
    # 96 bf16 are 192 bytes: spans of 64 bytes. Each of two warpgroups stores its 64 rows.
    assert (maps["d"].box, maps["d"].swizzle_bytes) == ((64, 32), 64)


def test_kernel_maps_of_a_split_are_those_of_whole_tiles() -> None:
    maps = {p.tensor.name: p for p in SPLIT.parameters if isinstance(p, TensorMapParameter)}
    boxes = {name: (p.box, p.swizzle_bytes) for name, p in maps.items()}
    # Blocks that share k share no tiles. Each stores its 32 of the 96 columns: one box.
    assert boxes == {"a": ((128, 128), 128), "b": ((96, 128), 128), "d": ((64, 32), 64)}


def test_kernel_parameter_names_are_distinct() -> None:
    epilogue = matrix("x") + vector("x_stride")
    kernel = lower(Gemm(72, 144, BF16, epilogue), Schedule(64, 64, 4, 1))
    names = [parameter.name for parameter in kernel.parameters]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z_]\w*", name) for name in names)


def test_kernel_is_frozen_and_equal_to_its_copy() -> None:
    assert dataclasses.replace(KERNEL) == KERNEL
    assert hash(dataclasses.replace(KERNEL)) == hash(KERNEL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        KERNEL.name = "x"  # type: ignore[misc]


def test_load_box_is_this_blocks_share_of_the_tile() -> None:
    loads = {s.src.name: s for s in walk(KERNEL.body.body) if isinstance(s, Load)}
    for name in ("a", "b"):
        load = loads[name]
        assert load.box[0] * load.multicast == load.dst.shape[0]
        assert load.box[1:] == load.dst.shape[1:]
    assert loads["a"].multicast == 1
    assert loads["b"].multicast == 2
    stores = [s for s in walk(KERNEL.body.body) if isinstance(s, Store)]
    assert [s.dst.name for s in stores] == ["d"]
