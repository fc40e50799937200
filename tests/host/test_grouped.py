"""Grouped GEMM on the interpreter: against float64, against the dense GEMM of each group, and what
is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import jitgen
from jitgen import (
    BF16,
    F32,
    Contiguous,
    GroupedGemm,
    Masked,
    ProblemError,
    Ragged,
    Schedule,
    ScheduleError,
    VerifyError,
    acc,
    matrix,
    vector,
)
from jitgen.build import build
from jitgen.codegen import headers
from jitgen.expr import Expr
from jitgen.groups import rows_of_groups
from jitgen.ir import Store, Tile
from jitgen.layouts import GroupLayout
from jitgen.lower import lower
from jitgen.runtime.nvrtc import compile_cubin
from jitgen.runtime.store import KernelStore
from jitgen.schedule import TILE_SLOTS, group_table_bytes
from jitgen.tuning.space import candidates
from jitgen.verify import verify

Array = NDArray[Any]
SameBits = Callable[..., None]

BFLOAT = np.dtype(ml_dtypes.bfloat16)
N, K, UNTOUCHED = 136, 272, 77.0
LAYOUTS = ("ragged", "group_ends", "group_of_row", "masked")
COUNTS = {
    "mixed": (3, 0, 1, 70, 0, 129),
    "all-empty": (0, 0, 0),
    "one-giant": (0, 300, 0, 0),
    "single": (65,),
    "ones": (1,) * 9,
}


@dataclass(frozen=True)
class Call:
    """Arrays of a grouped call, and the rows of D that each group owns."""

    arrays: dict[str, Array]
    layout: GroupLayout
    rows: list[tuple[Any, ...]]  # an index into A and D for each group

    def run(self, **options: Any) -> Array:
        a, b, sfa, sfb = (self.arrays[name] for name in ("a", "b", "sfa", "sfb"))
        result: Array = jitgen.grouped_gemm(a, b, (sfa, sfb), layout=self.layout, **options)
        return result


def make_call(rng: np.random.Generator, layout: str, counts: tuple[int, ...]) -> Call:
    """Rows of the groups, with rows of no group between and behind them where the layout can."""
    groups = len(counts)
    chosen: GroupLayout
    if layout == "masked":
        shape: tuple[int, ...] = (groups, max(counts) + 2)
        rows: list[tuple[Any, ...]] = [(g, slice(0, count)) for g, count in enumerate(counts)]
        chosen = Masked(np.array(counts, np.int32))
    else:
        unit = {"ragged": 1, "group_ends": 64, "group_of_row": 1}[layout]
        begins, end = [], 3 if layout == "ragged" else 0
        for count in counts:
            begins.append(-(-end // unit) * unit)
            end = begins[-1] + count
        shape = (end + 5,)
        rows = [(slice(begin, begin + n),) for begin, n in zip(begins, counts, strict=True)]
        ends = np.array([r[0].stop for r in rows], np.int32)
        if layout == "ragged":
            chosen = Ragged(np.array([begins[0], *ends], np.int32))
        elif layout == "group_ends":
            chosen = Contiguous(group_ends=ends, alignment=64)
        else:
            of_row = np.full(shape[0], -1, np.int32)
            for group, where in enumerate(rows):
                of_row[where] = group
            chosen = Contiguous(group_of_row=of_row)
    a, sfa = jitgen.quantize(rng.standard_normal((int(np.prod(shape)), K)).astype(np.float32))
    b, sfb = zip(
        *(
            jitgen.quantize(rng.standard_normal((N, K)).astype(np.float32), (128, 128))
            for _ in range(groups)
        ),
        strict=True,
    )
    arrays = {"a": a.reshape(*shape, K), "sfa": sfa.reshape(*shape, -1)}
    arrays |= {"b": np.stack(b), "sfb": np.stack(sfb)}
    # What a group does not own must not reach a result.
    owned = np.zeros(shape, bool)
    for where in rows:
        owned[where] = True
    arrays["a"].view(np.uint8)[~owned] = 0x7F
    arrays["sfa"][~owned] = np.nan
    return Call(arrays, chosen, rows)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_gemm_equals_the_dense_gemm_of_each_group(
    rng: np.random.Generator, same_bits: SameBits, layout: str, counts: tuple[int, ...]
) -> None:
    call = make_call(rng, layout, counts)
    schedule = Schedule(64, 48, 4, 1, *((2, 1) if counts[0] == 3 else (1, 2)), raster_group=2)
    out = np.full((*call.arrays["a"].shape[:-1], N), UNTOUCHED, BFLOAT)
    assert call.run(out=out, schedule=schedule) is out
    owned = np.zeros(out.shape[:-1], bool)
    for group, where in enumerate(call.rows):
        a, sfa = call.arrays["a"][where], call.arrays["sfa"][where]
        b, sfb = call.arrays["b"][group], call.arrays["sfb"][group]
        if len(a):
            same_bits(out[where], jitgen.gemm(a, b, (sfa, sfb)), f"group {group}")
        owned[where] = True
    assert owned.sum() == sum(counts)
    assert (out[~owned] == UNTOUCHED).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_gemm_is_close_to_float64(rng: np.random.Generator, layout: str) -> None:
    call = make_call(rng, layout, COUNTS["mixed"])
    d = call.run(out_dtype="float32")
    for group, where in enumerate(call.rows):
        scale_a = np.repeat(call.arrays["sfa"][where].astype(np.float64), 128, -1)[:, :K]
        scale_b = np.repeat(
            np.repeat(call.arrays["sfb"][group].astype(np.float64), 128, 0)[:N], 128, 1
        )[:, :K]
        a = call.arrays["a"][where].astype(np.float64) * scale_a
        b = call.arrays["b"][group].astype(np.float64) * scale_b
        # A k32 step truncates 33 terms by less than 2^-13 of the largest, and their sum by as much,
        # which is below the sum of all their magnitudes; so does each of the 4 steps of a block.
        bound = 4 * 34 * 2.0**-13 * (np.abs(a) @ np.abs(b).T)
        assert (np.abs(d[where] - a @ b.T) <= bound).all()


def test_grouped_gemm_gives_rows_of_a_group_in_many_places(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    call = make_call(rng, "group_of_row", (130, 70))
    of_row = rng.integers(-1, 2, len(call.arrays["a"])).astype(np.int32)
    a = call.arrays["a"]
    a.view(np.uint8)[...] = rng.integers(0, 0x7E, a.shape)
    call.arrays["sfa"][...] = 1.0
    out = np.full((len(of_row), N), UNTOUCHED, np.float32)
    replace(call, layout=Contiguous(group_of_row=of_row)).run(out=out)
    for group in range(2):
        rows = of_row == group
        scales = call.arrays["sfa"][rows], call.arrays["sfb"][group]
        same_bits(out[rows], jitgen.gemm(a[rows], call.arrays["b"][group], scales, out_dtype="f32"))
    assert (out[of_row == -1] == UNTOUCHED).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_gemm_has_a_bias_for_each_group_and_a_residual_for_each_row(
    rng: np.random.Generator, same_bits: SameBits, layout: str
) -> None:
    call = make_call(rng, layout, (5, 0, 66))
    bias = rng.standard_normal((3, N)).astype(np.float32)
    residual = rng.standard_normal((*call.arrays["a"].shape[:-1], N)).astype(BFLOAT)
    epilogue = acc + vector("bias", F32) + matrix("residual")
    d = call.run(epilogue=epilogue.bind(bias=bias, residual=residual))
    for group, where in enumerate(call.rows):
        a, sfa = call.arrays["a"][where], call.arrays["sfa"][where]
        b, sfb = call.arrays["b"][group], call.arrays["sfb"][group]
        if len(a):
            bound = epilogue.bind(bias=bias[group], residual=residual[where])
            same_bits(d[where], jitgen.gemm(a, b, (sfa, sfb), epilogue=bound))


def test_grouped_gemm_of_scales_in_any_layout(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    for layout in LAYOUTS:
        call = make_call(rng, layout, (5, 66))
        want = call.run()
        sfa = call.arrays["sfa"]
        m_major = np.ascontiguousarray(np.swapaxes(sfa, -1, -2))
        moved = replace(call, arrays=call.arrays | {"sfa": np.swapaxes(m_major, -1, -2)})
        got = moved.run()
        for where in call.rows:
            same_bits(got[where], want[where])


def test_bind_of_a_layout_reads_it_at_every_call(rng: np.random.Generator) -> None:
    call = make_call(rng, "masked", (64, 64))
    rows = call.layout.tensor
    out = np.full((2, 66, N), UNTOUCHED, BFLOAT)
    arrays = call.arrays
    run = jitgen.bind(
        arrays["a"], arrays["b"], (arrays["sfa"], arrays["sfb"]), out=out, layout=call.layout
    )
    rows[:] = 0, 3
    assert run() is out
    assert ((out != UNTOUCHED).any(-1).sum(1) == [0, 3]).all()
    rows[:] = 64, -9
    run()
    assert ((out != UNTOUCHED).any(-1).sum(1) == [64, 3]).all()


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_walk_one_group_after_the_other_and_cover_each(layout: str) -> None:
    problem = GroupedGemm(N, K, num_groups=4, layout=layout)  # type: ignore[arg-type]
    kernel = lower(problem, Schedule(64, 48, 4, 1, 2, 1, raster_group=3))
    m = 700
    values = {
        "ragged": [0, 200, 200, 201, 700],
        "group_ends": [200, 200, 201, 700],
        "group_of_row": np.repeat([2, 0, 1], (200, 1, 499)),
        "masked": [200, 0, 1, 700],
    }[layout]
    rows = rows_of_groups(problem, np.array(values, np.int32), m)
    tiles = list(kernel.body.tiles(N, rows))
    assert [t.group for t in tiles] == sorted(t.group for t in tiles)
    for group, (begin, end) in enumerate(rows):
        inside = [t for t in tiles if t.group == group and t.row < end and t.column < N]
        assert all(tile.end == end for tile in inside)
        assert sorted((t.row, t.column) for t in inside) == [
            (row, column) for row in range(begin, end, 64) for column in range(0, N, 48)
        ]
    assert all(isinstance(tile, Tile) for tile in tiles)


# --- rejections ---------------------------------------------------------------------------------


def test_supports_names_what_a_grouped_problem_breaks() -> None:
    assert jitgen.supports(GroupedGemm(64, 128, num_groups=512))
    for fields, message in (
        ({"num_groups": 0}, "num_groups = 0 must be an int in 1..512"),
        ({"num_groups": 513}, "num_groups = 513"),
        ({"layout": "sorted"}, "layout 'sorted' must be one of"),
        ({"alignment": 64}, "alignment = 64 of ragged must be one of"),
        ({"layout": "group_ends", "alignment": 32}, r"alignment = 32 of group_ends must be one of"),
    ):
        found = jitgen.supports(GroupedGemm(64, 128, **fields))  # type: ignore[arg-type]
        assert not found
        assert message in found.reason


def test_grouped_schedule_rejects_split_k() -> None:
    with pytest.raises(ScheduleError, match="counted on the device"):
        lower(GroupedGemm(128, 1024), Schedule(64, 64, 4, 1, split_k=2))


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "no layout": ({"layout": None}, "must be jitgen.Ragged"),
    "offsets of int64": (
        {"layout": Ragged(np.zeros(4, np.int64))},
        r"groups is int64.*takes int32\[4\]",
    ),
    "offsets too few": ({"layout": Ragged(np.zeros(3, np.int32))}, r"takes int32\[4\]"),
    "offsets with gaps": (
        {"layout": Ragged(np.zeros(8, np.int32)[::2])},
        "must be contiguous",
    ),
    "rows of no masked A": ({"layout": Masked(np.zeros(3, np.int32))}, "a matrix for each group"),
    "b of two dimensions": ({"b": np.zeros((N, K), np.uint8)}, "b is .*must be a matrix for each"),
    "sfb of two dimensions": ({"sfb": np.zeros((2, 3), np.float32)}, "sfb is .*one scale a 128x12"),
    "out of three dimensions": ({"out": np.zeros((1, 79, N), BFLOAT)}, r"must be bfloat16\[79"),
    "bias for one group": (
        {"epilogue": (acc + vector("bias")).bind(bias=np.zeros(N, BFLOAT))},
        r"the epilogue declares bfloat16\[3, 136\]",
    ),
}


@pytest.mark.parametrize(("changed", "message"), REJECTED.values(), ids=REJECTED)
def test_grouped_gemm_rejects(
    rng: np.random.Generator, changed: dict[str, Any], message: str
) -> None:
    call = make_call(rng, "ragged", (5, 0, 66))
    arrays = call.arrays | {name: changed[name] for name in ("b", "sfb") if name in changed}
    options = {name: changed[name] for name in ("out", "epilogue") if name in changed}
    layout = changed.get("layout", call.layout)
    with pytest.raises(ProblemError, match=message):
        jitgen.grouped_gemm(
            arrays["a"], arrays["b"], (arrays["sfa"], arrays["sfb"]), layout=layout, **options
        )


def test_grouped_gemm_reports_faulty_offsets_in_debug_mode_only(
    rng: np.random.Generator,
) -> None:
    call = make_call(rng, "ragged", (5, 3))
    call.layout.tensor[1] = 99
    call.run()
    with pytest.raises(ProblemError, match=r"groups\[1\] = 99 .*0\.\.16"):
        call.run(debug=True)


@pytest.mark.parametrize("given", [{}, {"group_ends": 1, "group_of_row": 1}], ids=["none", "both"])
def test_contiguous_takes_one_tensor(given: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match="either group_of_row or group_ends"):
        Contiguous(**given)


@pytest.mark.parametrize("expected", [-1, 2.5, True])
def test_masked_rejects_expected_rows(expected: Any) -> None:
    with pytest.raises(ProblemError, match="expected_rows must be"):
        Masked(np.zeros(3, np.int32), expected)


# --- the program and its source -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_accepts_grouped_candidates(layout: str) -> None:
    problem = GroupedGemm(2112, 7168, num_groups=32, layout=layout)  # type: ignore[arg-type]
    found = list(candidates(problem))
    assert all(schedule.split_k == 1 for schedule in found)
    assert len(found) > 100
    for schedule in found:
        verify(lower(problem, schedule))


def test_verify_rejects_a_store_over_a_groups_end_and_groups_of_none() -> None:
    kernel = lower(GroupedGemm(N, K, num_groups=3), Schedule(64, 48, 4, 1))
    *body, store = kernel.body.body
    assert isinstance(store, Store)
    whole = replace(kernel.body, body=(*body, replace(store, by_row=False)))
    with pytest.raises(VerifyError, match="must write by row at a group's end"):
        verify(replace(kernel, body=whole))
    with pytest.raises(VerifyError, match="walks the groups of None"):
        verify(replace(kernel, body=replace(kernel.body, groups=None)))


def of_compile() -> list[tuple[GroupedGemm, Schedule]]:
    """A spread of the candidates, with layouts, types and epilogues in turn."""
    epilogues: tuple[Expr, ...] = (acc, acc + vector("bias") + matrix("residual"))
    samples = []
    for i, layout in enumerate(LAYOUTS):
        problem = GroupedGemm(
            *(2112, 7168, (BF16, F32)[i % 2], epilogues[i // 2]),
            num_groups=(1, 8, 33, 512)[i],
            layout=layout,  # type: ignore[arg-type]
            alignment=128 if layout == "group_ends" else 1,
        )
        samples += [(problem, schedule) for schedule in list(candidates(problem))[i::31]]
    return samples


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return KernelStore(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(
    "sample", of_compile(), ids=lambda sample: f"{sample[0].layout}-{sample[1]}"
)
def test_build_compiles_grouped(sample: tuple[GroupedGemm, Schedule], store: KernelStore) -> None:
    resources = build(lower(*sample), store).resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)


@pytest.mark.parametrize("num_groups", [1, 3, 512])
def test_smem_plan_reserves_what_the_device_keeps_of_groups(num_groups: int) -> None:
    """The compiler checks it; 16-byte alignment may pad the table's end."""
    planned = group_table_bytes(GroupedGemm(N, K, num_groups=num_groups))
    source = (
        '#include "jitgen/groups.cuh"\nusing namespace jitgen;\n'
        f"static_assert(sizeof(GroupTable<{num_groups}>) == round_up({planned}, 16));\n"
        f"static_assert(kTileSlots == {TILE_SLOTS});\n"
        'extern "C" __global__ void nothing() {}\n'
    )
    compile_cubin(source, name="table.cu", headers=headers())
