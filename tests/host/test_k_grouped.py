"""K-grouped GEMM on the interpreter, and a scale for every row of B: against float64, against the
dense GEMM of each group's part of k, and what is left alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import jitgen
from jitgen import (
    BF16,
    E4M3,
    F32,
    Gemm,
    GroupedGemm,
    KGrouped,
    ProblemError,
    ScaleBlock,
    Schedule,
    ScheduleError,
    VerifyError,
    acc,
    supports,
    vector,
)
from jitgen.build import build
from jitgen.codegen import render
from jitgen.groups import find_fault, rows_of_groups
from jitgen.ir import Store
from jitgen.kernel import ExtentParameter, TensorMapParameter
from jitgen.lower import lower
from jitgen.numerics import sum_f32
from jitgen.problem import of_k_groups
from jitgen.runtime.store import KernelStore
from jitgen.schedule import (
    ACCUMULATOR_REGISTERS,
    part_columns,
    part_registers,
    products_ahead,
)
from jitgen.schedule_rules import check_schedule
from jitgen.tuning.model import rank
from jitgen.tuning.select import select
from jitgen.tuning.space import candidates
from jitgen.verify import verify

from . import fake_gpu

Array = NDArray[Any]
SameBits = Callable[..., None]

M, N = 72, 136
BY_ROW = ScaleBlock(1, 128)
OFFSETS = {
    "mixed": (128, 128, 512, 512, 640),
    "all-empty": (256, 256, 256),
    "one-giant": (0, 0, 1408, 1408),
    "single": (0, 128),
    "faulty": (300, -7, 640, 500, 2**31 - 1),
}
K = 1536


def make_operands(rng: np.random.Generator, k: int = K) -> dict[str, Array]:
    a, sfa = jitgen.quantize(rng.standard_normal((M, k)).astype(np.float32))
    b, sfb = jitgen.quantize(rng.standard_normal((N, k)).astype(np.float32))
    return {"a": a, "b": b, "sfa": sfa, "sfb": sfb}


def run(arrays: dict[str, Array], offsets: tuple[int, ...], **options: Any) -> Array:
    scales, layout = (arrays["sfa"], arrays["sfb"]), KGrouped(np.array(offsets, np.int32))
    d: Array = jitgen.grouped_gemm(arrays["a"], arrays["b"], scales, layout=layout, **options)
    return d


def part_of(arrays: dict[str, Array], begin: int, end: int) -> dict[str, Array]:
    """The operands' columns begin .. end, in memory of their own."""
    of = {"a": slice(begin, end), "sfa": slice(begin // 128, end // 128)}
    of |= {"b": of["a"], "sfb": of["sfa"]}
    return {name: np.ascontiguousarray(array[:, of[name]]) for name, array in arrays.items()}


def product(arrays: dict[str, Array]) -> tuple[Array, Array]:
    """The product in float64, and that of magnitudes."""
    a, b = (
        arrays[name].astype(np.float64) * np.repeat(arrays[scale].astype(np.float64), 128, 1)
        for name, scale in (("a", "sfa"), ("b", "sfb"))
    )
    return a @ b.T, np.abs(a) @ np.abs(b).T


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_k_grouped_adds_the_dense_gemm_of_each_part(
    rng: np.random.Generator, same_bits: SameBits, offsets: tuple[int, ...]
) -> None:
    arrays = make_operands(rng)
    before = rng.standard_normal((len(offsets) - 1, M, N)).astype(np.float32)
    before[:, 0, :4] = np.nan, -0.0, 1e-41, -np.inf
    out = before.copy()
    assert run(arrays, offsets, out=out) is out
    problem = of_k_groups(N, len(offsets) - 1)
    parts = rows_of_groups(problem, np.array(offsets, np.int32), K)
    for group, (begin, end) in enumerate(parts):
        if begin == end:
            same_bits(out[group], before[group])
            continue
        of = part_of(arrays, begin, end)
        dense = jitgen.gemm(of["a"], of["b"], (of["sfa"], of["sfb"]), out_dtype="float32")
        same_bits(out[group], sum_f32(before[group], dense))


@pytest.mark.parametrize("rows", [1, 128])
def test_k_grouped_sets_d_in_bfloat16(
    rng: np.random.Generator, same_bits: SameBits, rows: int
) -> None:
    arrays, offsets = make_operands(rng), OFFSETS["mixed"]
    if rows == 128:
        x = rng.standard_normal((N, K)).astype(np.float32)
        arrays["b"], arrays["sfb"] = jitgen.quantize(x, (128, 128))
    d = run(arrays, offsets, out_dtype="bfloat16")
    out = np.full_like(d, 3.0)
    assert run(arrays, offsets, out=out) is out
    for group, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            assert (out[group] == 3.0).all()
            continue
        of = part_of(arrays, begin, end)
        same_bits(d[group], jitgen.gemm(of["a"], of["b"], (of["sfa"], of["sfb"])))
        same_bits(out[group], d[group])


def test_k_grouped_is_close_to_float64(rng: np.random.Generator) -> None:
    arrays, offsets = make_operands(rng), OFFSETS["mixed"]
    d = run(arrays, offsets)
    assert d.dtype == np.float32
    for group, (begin, end) in enumerate(itertools.pairwise(offsets)):
        exact, magnitudes = product(part_of(arrays, begin, end))
        # As for the other layouts: 4 steps of a block, each truncated by less than 34 * 2^-13.
        assert (np.abs(d[group] - exact) <= 4 * 34 * 2.0**-13 * magnitudes).all()


def test_k_grouped_with_exact_numerics_rounds_twice(rng: np.random.Generator) -> None:
    """Once when the sum becomes float32, once when it is added to D."""
    from jitgen.interpret import interpret

    arrays, offsets = make_operands(rng), np.array(OFFSETS["one-giant"], np.int32)
    kernel = lower(of_k_groups(N, 3), Schedule(64, 96, 3, 1))
    d = interpret(kernel, arrays | {"groups": offsets}, numerics="exact")
    exact, magnitudes = product(part_of(arrays, 0, 1408))
    assert (np.abs(d[1] - exact) <= 2.0**-23 * magnitudes).all()
    assert not d[[0, 2]].any()


@pytest.mark.parametrize("moved", [("sfa",), ("sfb",), ("sfa", "sfb")])
def test_scales_of_rows_lie_in_any_strides(
    rng: np.random.Generator, same_bits: SameBits, moved: tuple[str, ...]
) -> None:
    arrays = make_operands(rng, 640)
    other = arrays | {name: np.ascontiguousarray(arrays[name].T).T for name in moved}
    same_bits(run(other, (0, 384, 640)), run(arrays, (0, 384, 640)))
    dense = [jitgen.gemm(x["a"], x["b"], (x["sfa"], x["sfb"])) for x in (arrays, other)]
    same_bits(*dense)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(64, 48, 4, 1),
        Schedule(128, 96, 3, 2, 2, 1, promotion="serial"),
        Schedule(64, 64, 4, 2, pingpong=True),
        Schedule(32, 64, 4, 1, swap_ab=True),
        Schedule(64, 48, 4, 1, split_k=3),
    ],
    ids=str,
)
def test_gemm_with_a_scale_for_every_row_of_b(
    rng: np.random.Generator, same_bits: SameBits, schedule: Schedule
) -> None:
    arrays = make_operands(rng, 1200 // 16 * 16)
    scales, bias = (arrays["sfa"], arrays["sfb"]), rng.standard_normal(N).astype(np.float32)
    epilogue = (acc + vector("bias", F32)).bind(bias=bias)
    d = jitgen.gemm(
        *(arrays["a"], arrays["b"], scales),
        out_dtype="float32",
        epilogue=epilogue,
        schedule=schedule,
    )
    padded = {name: np.pad(arrays[name], ((0, 0), (0, 80))) for name in ("a", "b")}
    exact, magnitudes = product(arrays | padded)
    assert (np.abs(d - bias - exact) <= 4 * 34 * 2.0**-13 * magnitudes + 1e-6).all()
    if schedule.split_k == 1:
        plain = jitgen.gemm(
            arrays["a"], arrays["b"], scales, out_dtype="float32", epilogue=epilogue
        )
        same_bits(d, plain)


def test_k_grouped_of_nothing(rng: np.random.Generator) -> None:
    arrays = make_operands(rng, 128)
    nothing = {name: array[:, :0] for name, array in arrays.items()}
    assert np.array_equal(run(nothing, (0, 0, 0)), np.zeros((2, M, N), np.float32))
    no_rows = arrays | {"a": arrays["a"][:0], "sfa": arrays["sfa"][:0]}
    assert run(no_rows, (0, 128)).shape == (1, 0, N)


def test_bind_adds_at_every_call(rng: np.random.Generator, same_bits: SameBits) -> None:
    arrays, out = make_operands(rng, 256), np.zeros((1, M, N), np.float32)
    layout = KGrouped(np.array([0, 256], np.int32))
    scales = arrays["sfa"], arrays["sfb"]
    call = jitgen.bind(arrays["a"], arrays["b"], scales, out=out, layout=layout)
    call()
    once = out.copy()
    call()
    same_bits(out, sum_f32(once, once))


# --- adding ---------------------------------------------------------------------------------------


def test_sum_f32_keeps_subnormals_and_has_one_nan() -> None:
    """What an H100 gave when TMA added the second to the first."""
    table = [
        (0x00000001, 0x00000001, 0x00000002),
        (0x8077C786, 0x00800000, 0x0008387A),
        (0x007FFFFF, 0x00000001, 0x00800000),
        (0x80000000, 0x00000000, 0x00000000),
        (0x7F7FC99E, 0x7F7FC99E, 0x7F800000),
        (0x7F800000, 0xFF800000, 0x7FFFFFFF),
        (0x7FC00000, 0x3F800000, 0x7FFFFFFF),
    ]
    x, y, want = (np.array(column, np.uint32) for column in zip(*table, strict=True))
    assert np.array_equal(sum_f32(x.view(np.float32), y.view(np.float32)).view(np.uint32), want)


# --- torch tensors --------------------------------------------------------------------------------


def test_k_grouped_of_torch_tensors_adds_in_place_or_to_zeros(
    rng: np.random.Generator, same_bits: SameBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    gpu = fake_gpu.install(monkeypatch)
    arrays, offsets = make_operands(rng, 640), (0, 384, 384, 640)
    want = run(arrays, offsets)
    codes = {name: torch.from_numpy(arrays[name].view(np.uint8)) for name in ("a", "b")}
    a, b = (codes[name].view(torch.float8_e4m3fn) for name in ("a", "b"))
    scales = torch.from_numpy(arrays["sfa"]), torch.from_numpy(arrays["sfb"].T.copy()).t()
    layout = KGrouped(torch.tensor(offsets, dtype=torch.int32))
    same_bits(jitgen.grouped_gemm(a, b, scales, layout=layout).numpy(), want)
    memory = torch.full((3 * M, N + 8), 3.0)
    out = memory[:, 8:].unflatten(0, (3, M))
    assert jitgen.grouped_gemm(a, b, scales, layout=layout, out=out) is out
    same_bits(out.numpy(), sum_f32(np.full_like(want, 3.0), want))
    assert (memory[:, :8] == 3.0).all()
    assert len(gpu.launches) == 2
    nothing = a[:, :0], b[:, :0], (scales[0][:, :0], scales[1][:, :0])
    assert not jitgen.grouped_gemm(*nothing, layout=layout).any()
    assert len(gpu.launches) == 2


# --- what is rejected, and what is reported -------------------------------------------------------


BROKEN = {
    "k": (replace(of_k_groups(72, 2), k=128), "k = 128 of k_grouped is known at run time only"),
    "d": (replace(of_k_groups(128, 2), d_dtype=E4M3), "must be float32, or sets one of bfl"),
    "epilogue": (
        replace(of_k_groups(72, 2), epilogue=acc + vector("bias")),
        "has no epilogue",
    ),
    "b_scale": (
        replace(of_k_groups(72, 2), b_scale=ScaleBlock(64, 128)),
        "b_scale .*64x128 block, must be 1x128 or 128x128",
    ),
    "alignment": (replace(of_k_groups(72, 2), alignment=1), "alignment = 1 of k_grouped"),
    "groups": (of_k_groups(72, 513), "num_groups = 513"),
    "layout": (GroupedGemm(72, 128, b_scale=BY_ROW, num_groups=2), "must be 128x128"),
}


@pytest.mark.parametrize(("problem", "match"), BROKEN.values(), ids=BROKEN)
def test_supports_names_what_k_grouped_breaks(problem: GroupedGemm, match: str) -> None:
    answer = supports(problem)
    assert not answer
    with pytest.raises(ProblemError, match=match):
        raise ProblemError(answer.reason)
    assert answer.nearest is None or supports(answer.nearest)


CALLS: dict[str, tuple[Callable[[dict[str, Array]], dict[str, Array]], str]] = {
    "k": (
        lambda x: {name: array[:, :100] for name, array in x.items() if array.shape[1] > 9},
        "k = 100 of all groups must be a multiple of 128",
    ),
    "b of groups": (lambda x: {"b": x["b"][None]}, "must be a matrix"),
    "sfb": (lambda x: {"sfb": x["sfb"][:3]}, "1x128 block"),
}


@pytest.mark.parametrize(("change", "match"), CALLS.values(), ids=CALLS)
def test_k_grouped_rejects(
    rng: np.random.Generator, change: Callable[[dict[str, Array]], dict[str, Array]], match: str
) -> None:
    arrays = make_operands(rng)
    with pytest.raises(ProblemError, match=match):
        run(arrays | change(arrays), (0, 128, 256))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"out_dtype": "float8_e4m3fn"}, "must be a positive multiple of 128"),
        ({"epilogue": acc * 2.0}, "has no epilogue"),
        ({"out": np.zeros((3, M, N), np.float32)}, r"must be float32\[2, 72, 136\]"),
        ({"ue8m0": True}, "ue8m0"),
    ],
)
def test_k_grouped_rejects_options(
    rng: np.random.Generator, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ProblemError, match=match):
        run(make_operands(rng, 256), (0, 128, 256), **options)


def test_k_grouped_rejects_offsets_of_another_kind(rng: np.random.Generator) -> None:
    arrays = make_operands(rng, 256)
    scales = arrays["sfa"], arrays["sfb"]
    for offsets in (np.array([0, 256]), np.zeros((2, 2), np.int32)):
        with pytest.raises(ProblemError, match=r"layout k_grouped takes int32"):
            jitgen.grouped_gemm(arrays["a"], arrays["b"], scales, layout=KGrouped(offsets))


def test_k_grouped_reports_faulty_offsets_in_debug_mode_only(rng: np.random.Generator) -> None:
    arrays = make_operands(rng, 256)
    run(arrays, (0, 100, 256))
    with pytest.raises(ProblemError, match=r"groups\[1\] = 100 must be a multiple of 128"):
        run(arrays, (0, 100, 256), debug=True)
    with pytest.raises(ProblemError, match=r"groups\[2\] = 384 .* must be in 0\.\.256"):
        run(arrays, (0, 128, 384), debug=True)
    with pytest.raises(ProblemError, match="is below"):
        run(arrays, (128, 0, 256), debug=True)
    assert not find_fault(of_k_groups(8, 2), np.array([0, 128, 128], np.int32), 256)


def test_schedule_rejects_what_scales_of_rows_or_parts_of_k_cannot_take() -> None:
    with pytest.raises(ScheduleError, match="split_k = 2"):
        lower(of_k_groups(72, 2), Schedule(64, 48, 4, 1, split_k=2))
    with pytest.raises(ScheduleError, match="block_m = 8 must be a multiple of 16"):
        lower(Gemm(72, 128, b_scale=BY_ROW), Schedule(8, 64, 4, 1, swap_ab=True))


# --- the program and its source -------------------------------------------------------------------


PROBLEMS = {
    "k-grouped": of_k_groups(576, 33),
    "k-grouped-bf16": of_k_groups(576, 33, BF16),
    "k-grouped-blocks": of_k_groups(2112, 1, BF16, ScaleBlock(128, 128)),
    "k-grouped-blocks-f32": of_k_groups(576, 33, F32, ScaleBlock(128, 128)),
    "dense-f32": Gemm(2112, 7168, F32, b_scale=BY_ROW),
    "dense-bias": Gemm(576, 576, BF16, acc + vector("bias"), b_scale=BY_ROW),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_verify_accepts_candidates_scaled_by_row(problem: Gemm) -> None:
    found = list(candidates(problem))
    assert len(found) > 100
    for schedule in found:
        verify(lower(problem, schedule))


def test_verify_rejects_a_store_that_does_not_add_or_writes_by_row() -> None:
    kernel = lower(of_k_groups(N, 3), Schedule(64, 48, 4, 1))
    *body, store = kernel.body.body
    assert isinstance(store, Store)
    for wrong, message in (
        ({"adds": False}, "must add to D"),
        ({"by_row": True}, "must write by row"),
    ):
        changed = replace(kernel.body, body=(*body, replace(store, **wrong)))
        with pytest.raises(VerifyError, match=message):
            verify(replace(kernel, body=changed))


def test_k_grouped_takes_k_and_a_map_of_matrices_at_run_time() -> None:
    kernel = lower(of_k_groups(N, 3), Schedule(64, 48, 4, 1))
    extents = [p.name for p in kernel.parameters if isinstance(p, ExtentParameter)]
    assert extents == ["m", "k"]
    apart = [p.name for p in kernel.parameters if isinstance(p, TensorMapParameter) and p.is_apart]
    assert apart == ["map_d"]
    source = render(kernel)
    assert "tma_reduce_add(" in source
    assert "tma_store(map_d" not in source
    assert "ThreadRowScales" in source


def test_k_grouped_in_bfloat16_stores_and_takes_scales_of_blocks() -> None:
    problem = of_k_groups(N, 3, BF16, ScaleBlock(128, 128))
    source = render(lower(problem, Schedule(64, 48, 4, 1)))
    assert "tma_reduce_add(" not in source
    assert "tma_store(map_d" in source
    assert "ThreadScales" in source
    assert "sfb, sfa_stride_m" in source  # without a group's offset
    kernel = lower(problem, Schedule(64, 48, 4, 1))
    *body, store = kernel.body.body
    assert isinstance(store, Store)
    changed = replace(kernel.body, body=(*body, replace(store, adds=True)))
    with pytest.raises(VerifyError, match="must add to D in float32"):
        verify(replace(kernel, body=changed))


def test_k_grouped_has_one_kernel_for_every_k_and_a_schedule_for_every_m() -> None:
    problem = of_k_groups(7168, 4)
    assert select(problem, 4096) == select(problem, 4000)
    times = rank(problem, 4096)
    assert next(iter(times.values())) > rank(problem, 2048)[next(iter(times))]


def of_compile() -> list[tuple[Gemm, Schedule]]:
    """A spread of the candidates of each problem."""
    return [
        (problem, schedule)
        for i, problem in enumerate(PROBLEMS.values())
        for schedule in list(candidates(problem))[i::31]
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return KernelStore(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("sample", of_compile(), ids=lambda sample: f"n{sample[0].n}-{sample[1]}")
def test_build_compiles_scaled_by_row(sample: tuple[Gemm, Schedule], store: KernelStore) -> None:
    resources = build(lower(*sample), store).resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)


@pytest.mark.parametrize("problem", [PROBLEMS["k-grouped"], PROBLEMS["dense-f32"]], ids=str)
def test_products_ahead_are_all_of_a_chain_or_as_many_as_registers_hold(problem: Gemm) -> None:
    found = set()
    for s in candidates(problem):
        columns, ahead = part_columns(problem, s) or 0, products_ahead(problem, s)
        # Each accumulator takes a register for its product, in steps of the 8 of 16 columns.
        assert ahead in range(8, columns // 2 + 1, 8)
        taken = s.num_waves * s.mma_tile[1] // 2 + part_registers(problem, s, columns) + ahead
        free = ACCUMULATOR_REGISTERS[s.num_math_warpgroups] - taken
        assert free >= 0
        if ahead < columns // 2:
            assert 8 <= free < 16  # scales of 16 columns are on their way
        found.add(ahead == columns // 2)
        assert f"kProductsAhead = {ahead};" in render(lower(problem, s))
    assert found == {True, False}


def test_wide_tiles_scaled_by_row_leave_registers_for_float32() -> None:
    problem = Gemm(32768, 512, F32, b_scale=BY_ROW)
    schedule = Schedule(64, 240, 3, 1, promotion="serial")
    with pytest.raises(ScheduleError, match="leave no registers"):
        check_schedule(problem, schedule)
    check_schedule(replace(problem, d_dtype=BF16), schedule)
