"""The interpreter against float64, an independent model of the hardware, and itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

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
from jitgen.errors import ProblemError
from jitgen.expr import OPERATIONS, Expr, as_expr
from jitgen.interpret import interpret
from jitgen.lower import lower
from jitgen.tuning.space import candidates

Array = NDArray[Any]
Tensors = dict[str, Array]
SameBits = Callable[..., None]

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT = np.dtype(ml_dtypes.bfloat16)
NAN_F32, NAN_BF16, NAN_E4M3 = (
    0x7FFFFFFF,
    0x7FFF,
    0x7F,
)  # what the GPU writes: HOPPER.md section 2, PTX ISA

SMALL = Schedule(64, 64, 4, 1)
MS, NS, KS = (0, 1, 7, 129), (8, 72), (16, 144, 576)


# --- data and reference -------------------------------------------------------------------------


def make_tensors(
    rng: np.random.Generator, m: int, n: int, k: int, *, exact: bool = False
) -> Tensors:
    """Operands of all magnitudes; `exact`: integers and scales 2^i, with exact float64 sums."""
    if exact:
        a, b = (rng.integers(-16, 17, (rows, k)).astype(np.float32) for rows in (m, n))
        scale: Callable[..., Array] = lambda *shape: np.exp2(rng.integers(-2, 3, shape))  # noqa: E731
    else:
        a, b = (
            rng.standard_normal((rows, k)) * np.exp2(rng.integers(-6, 5, (rows, k)))
            for rows in (m, n)
        )
        scale = lambda *shape: np.exp(rng.uniform(-5, 5, shape)) * rng.choice([-1, 1], shape)  # noqa: E731
    return {
        "a": a.astype(FP8),
        "b": b.astype(FP8),
        "sfa": scale(m, -(-k // 128)).astype(np.float32),
        "sfb": scale(-(-n // 128), -(-k // 128)).astype(np.float32),
    }


def f64(array: Array) -> NDArray[np.float64]:
    return np.asarray(array, np.float64)


def blocks_of(t: Mapping[str, Array]) -> list[tuple[Array, Array, Array]]:
    """For each block of 128 of k: the scale of each element of D, and both operands, in float64."""
    k = t["a"].shape[1]
    rows = np.arange(t["b"].shape[0]) // 128
    return [
        (
            f64(t["sfa"])[:, i, None] * f64(t["sfb"])[rows, i][None, :],
            f64(t["a"])[:, i * 128 : (i + 1) * 128],
            f64(t["b"])[:, i * 128 : (i + 1) * 128],
        )
        for i in range(-(-k // 128))
    ]


def reference(t: Mapping[str, Array]) -> NDArray[np.float64]:
    """The GEMM in float64: dequantize, multiply, add."""
    m, n = t["a"].shape[0], t["b"].shape[0]
    return sum((s * (a @ b.T) for s, a, b in blocks_of(t)), np.zeros((m, n)))


def tolerance(t: Mapping[str, Array]) -> NDArray[np.float64]:
    """A bound on |acc - reference| that follows from HOPPER.md section 2, for each element of D.

    One k32 step aligns 32 products and the accumulator c to units of u = 2^(E - 13), where E is the
    largest exponent among them, and truncates each: 33 errors below u. It then truncates the sum to
    13 fraction bits: an error below 2^-13 of its magnitude. 2^E <= max(P, |c|), where P is the
    largest 2^(ea + eb), the exponents of the operands clamped below at -6. All of it truncates
    toward zero, so |c| and the sum never exceed S, the sum of |a b| over the block's steps so far:

        error of a step < 2^-13 * (33 * max(P, S before) + S after)

    Promotion forms rn(sa * sb), off by 2^-24 of it, and rounds each fma by 2^-24 of the running
    sum, which is at most the sum of |s| S over the blocks so far. Second-order terms: 1 % on top.
    """
    m, n = t["a"].shape[0], t["b"].shape[0]
    error, total = np.zeros((m, n)), np.zeros((m, n))
    for s, a, b in blocks_of(t):
        size = np.zeros((m, n))
        of_block = np.zeros((m, n))
        for k in range(0, a.shape[1], 32):
            a_k, b_k = np.abs(a[:, k : k + 32]), np.abs(b[:, k : k + 32])
            power_a, power_b = (
                np.where(x > 0, np.exp2(np.floor(np.log2(np.maximum(x, 2.0**-6)))), 0)
                for x in (a_k, b_k)
            )
            largest = np.zeros((m, n))
            for i in range(a_k.shape[1]):
                np.maximum(largest, power_a[:, i, None] * power_b[None, :, i], out=largest)
            before, size = size, size + a_k @ b_k.T
            of_block += 2.0**-13 * (33 * np.maximum(largest, before) + size)
        total += np.abs(s) * size
        error += np.abs(s) * of_block + 2.0**-24 * np.abs(s) * size + 2.0**-24 * total
    return 1.01 * error


def half_ulp(value: Array, dtype: Any) -> Array:
    """Half a unit in the last place of |value| in `dtype`: the error of rounding to nearest."""
    bits, lowest = (8, -126) if dtype == BF16 else (24, -126)
    exponent = np.frexp(np.maximum(np.abs(value), 2.0**lowest))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, lowest) - bits)


def run(
    problem: Gemm, tensors: Mapping[str, Array], schedule: Schedule = SMALL, **options: Any
) -> Array:
    return interpret(lower(problem, schedule), tensors, **options)


def parts_of(t: Mapping[str, Array], split_k: int) -> list[Tensors]:
    """The problems of the parts of k: ceil(K blocks / split_k) K blocks each, what is left last."""
    num_blocks = t["sfa"].shape[1]
    size = -(-num_blocks // split_k)
    parts = []
    for first in range(0, num_blocks, size):
        of_k, of_blocks = (
            np.s_[:, first * 128 : (first + size) * 128],
            np.s_[:, first : first + size],
        )
        parts.append(
            {"a": t["a"][of_k], "b": t["b"][of_k], "sfa": t["sfa"][of_blocks]}
            | {"sfb": t["sfb"][of_blocks]}
        )
    assert len(parts) == split_k
    return parts


def sum_of_parts(t: Mapping[str, Array], split_k: int) -> Array:
    """((p0 + p1) + p2) ... in NumPy's float32, each part a problem of its own."""
    n = t["b"].shape[0]
    total, *others = (run(Gemm(n, p["a"].shape[1], F32), p) for p in parts_of(t, split_k))
    for part in others:
        with np.errstate(over="ignore", invalid="ignore"):
            total = total + part
        total[np.isnan(total)] = np.uint32(NAN_F32).view(np.float32)
    return total


def shapes(*, ms: tuple[int, ...] = MS) -> pytest.MarkDecorator:
    values = [(m, n, k) for m in ms for n in NS for k in KS]
    return pytest.mark.parametrize(
        ("m", "n", "k"), values, ids=[f"m{m}-n{n}-k{k}" for m, n, k in values]
    )


# --- against float64 ----------------------------------------------------------------------------


@shapes()
@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_interpret_hopper_is_within_the_derived_bound_of_float64(
    rng: np.random.Generator, m: int, n: int, k: int, d_dtype: Any
) -> None:
    tensors = make_tensors(rng, m, n, k)
    d = run(Gemm(n, k, d_dtype), tensors)
    assert (d.shape, d.dtype) == ((m, n), d_dtype.numpy)
    want = reference(tensors)
    bound = tolerance(tensors)
    bound += half_ulp(np.abs(want) + bound, d_dtype)
    excess = np.abs(f64(d) - want) - bound
    assert np.all(excess <= 0), (
        f"m{m} n{n} k{k}: beyond the bound at {np.unravel_index(excess.argmax(), excess.shape)}"
    )


@shapes()
@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_interpret_exact_equals_float64_after_rounding(
    rng: np.random.Generator, same_bits: SameBits, m: int, n: int, k: int, d_dtype: Any
) -> None:
    tensors = make_tensors(rng, m, n, k, exact=True)
    d = run(Gemm(n, k, d_dtype), tensors, numerics="exact")
    # Sums of small integers times 2^-4..2^4 are exact in float64 and float32: one rounding is left.
    want = reference(tensors)
    assert np.array_equal(want, want.astype(np.float32))
    same_bits(d, (want + 0.0).astype(np.float32).astype(d_dtype.numpy), f"m{m} n{n} k{k}")


def test_interpret_exact_is_float64_for_any_scales(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 129, 72, 576)
    d = run(Gemm(72, 576, F32), tensors, numerics="exact")
    want = reference(tensors)
    size = sum(np.abs(s) * (np.abs(a) @ np.abs(b).T) for s, a, b in blocks_of(tensors))
    # Float64 sums of 576 terms in two orders differ by at most 576 * 2^-52 of the sum of sizes.
    assert np.all(
        np.abs(f64(d) - want) <= half_ulp(want, F32) * (1 + 2.0**-20) + 576 * 2.0**-52 * size
    )


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_interpret_exact_rounds_once(sign: float, split_k: int) -> None:
    tensors = {
        "a": np.zeros((1, 144), FP8),
        "b": np.zeros((8, 144), FP8),
        "sfa": np.array([[1.0, 2.0**-40]], np.float32),
        "sfb": np.ones((1, 2), np.float32),
    }
    tensors["a"][0, [0, 1, 128]] = sign, sign * 2.0**-4, sign
    tensors["b"][:, [0, 1, 128]] = 1.0, 2.0**-4, 1.0
    # 1 + 2^-8 + 2^-40 is above the middle of 1 and 1 + 2^-7, the neighbours in bf16. Rounded to
    # float32 first, it would be the middle, and go to 1.
    schedule = Schedule(64, 64, 4, 1, split_k=split_k)
    d = run(Gemm(8, 144, BF16), tensors, schedule, numerics="exact")
    assert np.all(f64(d) == sign * (1 + 2.0**-7))


def test_interpret_hopper_differs_from_exact(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 64, 64, 576)
    hopper = run(Gemm(64, 576, F32), tensors)
    exact = run(Gemm(64, 576, F32), tensors, numerics="exact")
    assert np.mean(hopper != exact) > 0.5  # 13 fraction bits against 24


def test_interpret_rejects_unknown_numerics(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 1, 8, 16)
    with pytest.raises(ProblemError, match=r'"hopper" or "exact".*fast'):
        run(Gemm(8, 16), tensors, numerics="fast")


# --- against MMA-Sim and exact fractions --------------------------------------------------------


def round_fraction(x: Fraction, bits: int) -> Fraction:
    """x to nearest even at `bits` significant bits, with float32's subnormals, without overflow."""
    if x == 0:
        return x
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    unit = Fraction(2) ** (max(exponent, -126) - bits + 1)
    return round(x / unit) * unit  # Python rounds Fractions to nearest even


def mmasim_gemm(t: Tensors, bits: int, split_k: int) -> list[list[Fraction]]:
    """D from MMA-Sim's Hopper WGMMA and exact fractions: nothing of jitgen is in it."""
    total, *others = (mmasim_sums(part) for part in parts_of(t, split_k))
    for part in others:
        for row, values in enumerate(part):
            total[row] = [
                round_fraction(x + y, 24) for x, y in zip(total[row], values, strict=True)
            ]
    return [[round_fraction(value, bits) for value in values] for values in total]


def mmasim_sums(t: Tensors) -> list[list[Fraction]]:
    """The float32 sums over k."""
    torch = pytest.importorskip("torch")
    from mmasim.nv_ptx.sim import WGMMA

    m, k = t["a"].shape
    n, num_blocks = t["b"].shape[0], -(-k // 128)
    model = WGMMA("Hopper", f"m64n{n}k32.f32.e4m3.e4m3")
    padded = []
    for name, rows in (("a", 64), ("b", n)):
        codes = np.zeros((rows, num_blocks * 128), np.uint8)
        codes[: t[name].shape[0], :k] = t[name].view(np.uint8)
        padded.append(torch.from_numpy(codes).view(torch.float8_e4m3fn))
    a, b = padded
    d = [[Fraction(0)] * n for _ in range(m)]
    for block in range(num_blocks):
        part = torch.zeros(64, n)
        for i in range(block * 128, (block + 1) * 128, 32):
            part = model(a[:, i : i + 32], b[:, i : i + 32].T, part)
        for row in range(m):
            for column in range(n):
                product = Fraction(float(t["sfa"][row, block])) * Fraction(
                    float(t["sfb"][column // 128, block])
                )
                s = round_fraction(product, 24)
                step = s * Fraction(float(part[row, column])) + d[row][column]
                d[row][column] = round_fraction(step, 24)
    return d


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "split_k"),
    [(9, 24, 272, 1), (3, 136, 144, 1), (64, 8, 16, 1), (9, 24, 272, 2), (3, 136, 272, 3)],
    ids=["k272", "n136", "k16", "k272-split2", "n136-split3"],
)
def test_interpret_hopper_equals_mmasim_and_exact_fractions(
    rng: np.random.Generator,
    same_bits: SameBits,
    m: int,
    n: int,
    k: int,
    split_k: int,
    d_dtype: Any,
) -> None:
    tensors = make_tensors(rng, m, n, k)
    want = mmasim_gemm(tensors, 8 if d_dtype == BF16 else 24, split_k)
    values = np.array([[float(value) for value in row] for row in want]).reshape(m, n)
    as_f32 = values.astype(np.float32)
    assert np.array_equal(as_f32, values)
    schedule = Schedule(64, 144 if n > 128 else 32, 4, 1, split_k=split_k)
    d = run(Gemm(n, k, d_dtype), tensors, schedule)
    same_bits(
        d + d.dtype.type(0), as_f32.astype(d_dtype.numpy) + d.dtype.type(0), f"m{m} n{n} k{k}"
    )


# --- one meaning for all schedules of as many parts of k, and for all layouts -------------------


@pytest.mark.parametrize(
    ("m", "n", "k", "split_k"),
    [
        *((129, 72, 144, split_k) for split_k in (1, 2)),
        *((7, 576, 144, split_k) for split_k in (1, 2)),
        *((200, 264, 1168, split_k) for split_k in (1, 2, 3, 4, 5)),
    ],
    ids=lambda v: str(v),
)
def test_interpret_gives_the_same_bits_for_every_schedule_of_a_split(
    rng: np.random.Generator, same_bits: SameBits, m: int, n: int, k: int, split_k: int
) -> None:
    problem = Gemm(n, k, F32, acc + vector("bias"))
    tensors = make_tensors(rng, m, n, k)
    bias = rng.standard_normal(n).astype(BFLOAT)
    by_tile: dict[tuple[int, int, int], list[Schedule]] = {}
    for s in candidates(problem):
        if s.split_k == split_k:
            by_tile.setdefault((s.block_m, s.num_math_warpgroups, s.block_n), []).append(s)
    # Of each tile one cluster and promotion, all in turn.
    picked = [choices[i % len(choices)] for i, choices in enumerate(by_tile.values())]
    if k > 1000:
        picked = picked[:: len(picked) // 6]
    if split_k == 1:
        picked.append(Schedule(128, 64, 2, 2, 2, 2, raster_group=1))
    assert len(picked) >= 6
    want = sum_of_parts(tensors, split_k) + up(bias)
    for schedule in picked:
        d = run(problem, tensors | {"bias": bias}, schedule)
        same_bits(d, want, f"{problem}\n{schedule}")


@pytest.mark.parametrize("split_k", [1, 2, 3])
@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_interpret_swapped_and_in_turns_gives_the_bits_of_the_plain_one(
    rng: np.random.Generator, same_bits: SameBits, d_dtype: Any, split_k: int
) -> None:
    m, n, k = 133, 264, 1168
    problem = Gemm(n, k, d_dtype, silu(acc + vector("bias")) * matrix("residual"))
    tensors = make_tensors(rng, m, n, k) | {
        "bias": rng.standard_normal(n).astype(BFLOAT),
        "residual": rng.standard_normal((m, n)).astype(BFLOAT),
    }
    want = run(problem, tensors, Schedule(128, 64, 2, split_k=split_k))
    swapped = [
        Schedule(24, 64, 2, 1, split_k=split_k, swap_ab=True),
        Schedule(128, 128, 2, 2, split_k=split_k, swap_ab=True),
    ]
    in_turns = [
        Schedule(64, 96, 2, 2, pingpong=True),
        Schedule(64, 64, 2, 3, 2, 1, pingpong=True),
        Schedule(40, 128, 2, 2, swap_ab=True, pingpong=True),
    ]
    for schedule in swapped + (in_turns if split_k == 1 else []):
        same_bits(run(problem, tensors, schedule), want, f"{problem}\n{schedule}")


def test_interpret_takes_every_split(rng: np.random.Generator, same_bits: SameBits) -> None:
    m, n, k = 3, 24, 42 * 128 + 16  # the last part is shorter in every split
    tensors = make_tensors(rng, m, n, k)
    sums = {split_k: sum_of_parts(tensors, split_k) for split_k in range(1, 9)}
    for split_k, want in sums.items():
        schedule = Schedule(64, 32, 2, 1, split_k=split_k)
        same_bits(run(Gemm(n, k, F32), tensors, schedule), want, schedule)
        same_bits(run(Gemm(n, k, BF16), tensors, schedule), to_bf16(want), schedule)
    assert len({total.tobytes() for total in sums.values()}) == 8  # the order of a sum does show


@shapes(ms=(7, 129))
def test_interpret_takes_sfa_row_major_or_m_major(
    rng: np.random.Generator, same_bits: SameBits, m: int, n: int, k: int
) -> None:
    tensors = make_tensors(rng, m, n, k)
    m_major = tensors | {"sfa": np.asfortranarray(tensors["sfa"])}
    strided = tensors | {
        "sfa": np.repeat(np.repeat(tensors["sfa"], 3, axis=0), 2, axis=1)[::3, ::2]
    }
    want = run(Gemm(n, k), tensors)
    same_bits(run(Gemm(n, k), m_major), want)
    same_bits(run(Gemm(n, k), strided), want)


def test_interpret_repeats_itself(rng: np.random.Generator, same_bits: SameBits) -> None:
    tensors = make_tensors(rng, 129, 72, 576)
    copies = {name: tensor.copy() for name, tensor in tensors.items()}
    kernel = lower(Gemm(72, 576), Schedule(128, 64, 3, 2))
    want = interpret(kernel, tensors)
    for _ in range(3):
        same_bits(interpret(kernel, tensors), want)
    for name, tensor in tensors.items():
        same_bits(tensor, copies[name], f"{name} was written")


def test_interpret_rows_do_not_depend_on_m(rng: np.random.Generator, same_bits: SameBits) -> None:
    tensors = make_tensors(rng, 129, 72, 576)
    want = run(Gemm(72, 576), tensors)
    for m in (1, 64, 65, 128):
        fewer = tensors | {"a": tensors["a"][:m], "sfa": tensors["sfa"][:m]}
        same_bits(run(Gemm(72, 576), fewer), want[:m], f"m{m}")


def test_interpret_padding_of_k_with_zeros_changes_nothing(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    tensors = make_tensors(rng, 7, 72, 144)
    padded = dict(tensors)
    for name in ("a", "b"):
        padded[name] = np.zeros((tensors[name].shape[0], 256), FP8)
        padded[name][:, :144] = tensors[name]
    same_bits(run(Gemm(72, 256), padded), run(Gemm(72, 144), tensors))


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_interpret_tiles_equal_the_full_run_and_leave_the_rest_nan(
    rng: np.random.Generator, same_bits: SameBits, d_dtype: Any
) -> None:
    m, n, k = 333, 264, 144
    tensors = make_tensors(rng, m, n, k)
    for schedule in (
        Schedule(64, 64, 4, 1),
        Schedule(128, 96, 3, 2, 2, 1),
        Schedule(192, 64, 2, 3),
        Schedule(64, 64, 2, 1, split_k=2),
    ):
        kernel = lower(Gemm(n, k, d_dtype), schedule)
        full = interpret(kernel, tensors)
        origins = [o for o in kernel.body.traversal.tiles(m, n) if o[0] < m and o[1] < n]
        some = [origins[i] for i in rng.choice(len(origins), 3, replace=False)]
        sample = interpret(kernel, tensors, tiles=some)
        inside = np.zeros((m, n), bool)
        for row, column in some:
            inside[row : row + schedule.block_m, column : column + schedule.block_n] = True
        assert 0 < inside.sum() < m * n
        same_bits(sample[inside], full[inside], f"{schedule}, tiles {some}")
        assert np.isnan(f64(sample[~inside])).all()


def test_interpret_of_no_tiles_is_nan(rng: np.random.Generator) -> None:
    d = run(Gemm(72, 144), make_tensors(rng, 7, 72, 144), tiles=[])
    assert np.isnan(f64(d)).all()


def test_interpret_takes_tiles_from_an_iterator(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    tensors = make_tensors(rng, 129, 72, 144)
    kernel = lower(Gemm(72, 144), SMALL)
    tiles = kernel.body.traversal.tiles(129, 72)
    same_bits(interpret(kernel, tensors, tiles=tiles), interpret(kernel, tensors))


# --- epilogues ----------------------------------------------------------------------------------

M, N, K = 129, 72, 144


def operands_of(rng: np.random.Generator) -> Tensors:
    return {
        "bias": rng.standard_normal(N).astype(BFLOAT),
        "gain": rng.standard_normal(N).astype(np.float32),
        "residual": (100 * rng.standard_normal((M, N))).astype(BFLOAT),
        "wide": rng.standard_normal((M, N)).astype(np.float32),
        "alpha": np.asarray(rng.standard_normal(), np.float32),
    }


def pick(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensors[name] for name in names}


def to_bf16(x: Array) -> Array:
    """Nearest even, by integers: bf16 is the upper half of a float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype(np.uint16).view(BFLOAT)


def bf16_values(x: Array) -> Array:
    return np.asarray(to_bf16(x), np.float32)


def up(tensor: Array) -> Array:
    return np.asarray(tensor, np.float32)


# Expression, operands, and its value in float32 from the accumulators x and the operands t: +, -
# and * of NumPy round float32 to nearest even, as the GPU does.
EXACT_EPILOGUES: dict[str, tuple[Expr, tuple[str, ...], Callable[[Array, Tensors], Array]]] = {
    "bias": (acc + vector("bias"), ("bias",), lambda x, t: x + up(t["bias"])),
    "bias f32": (acc + vector("gain", F32), ("gain",), lambda x, t: x + t["gain"]),
    "residual": (acc + matrix("residual"), ("residual",), lambda x, t: x + up(t["residual"])),
    "residual f32": (matrix("wide", F32) - acc, ("wide",), lambda x, t: t["wide"] - x),
    "scalar": (acc * scalar("alpha"), ("alpha",), lambda x, t: x * t["alpha"]),
    "constants": (0.1 * acc - 3, (), lambda x, t: np.float32(0.1) * x - np.float32(3)),
    "relu": (relu(acc), (), lambda x, t: np.where(x > 0, x, np.float32(0))),
    "cast": (cast(acc, BF16) + 0.5, (), lambda x, t: bf16_values(x) + np.float32(0.5)),
    "cast f32": (cast(acc, F32), (), lambda x, t: x),
    "maximum": (
        maximum(acc, matrix("residual")),
        ("residual",),
        lambda x, t: np.where(x > up(t["residual"]), x, up(t["residual"])),
    ),
    "all": (
        relu(acc * scalar("alpha") + vector("bias")) * vector("gain", F32) + matrix("residual"),
        ("alpha", "bias", "gain", "residual"),
        lambda x, t: (
            np.where(
                x * t["alpha"] + up(t["bias"]) > 0, x * t["alpha"] + up(t["bias"]), np.float32(0)
            )
            * t["gain"]
            + up(t["residual"])
        ),
    ),
    "used twice": (acc * acc + acc, (), lambda x, t: x * x + x),
    "no accumulator": (matrix("residual") * 2, ("residual",), lambda x, t: up(t["residual"]) * 2),
}


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", EXACT_EPILOGUES)
def test_interpret_epilogue_rounds_each_operation_to_float32(
    rng: np.random.Generator, same_bits: SameBits, name: str, d_dtype: Any, split_k: int
) -> None:
    """And it is applied once, to the sum of all parts of k."""
    expr, names, value = EXACT_EPILOGUES[name]
    tensors, operands = make_tensors(rng, M, N, K), operands_of(rng)
    want = value(sum_of_parts(tensors, split_k), operands)
    assert want.dtype == np.float32
    schedule = Schedule(64, 48, 2, 1, split_k=split_k)
    d = run(Gemm(N, K, d_dtype, expr), tensors | pick(operands, *names), schedule)
    same_bits(d, to_bf16(want) if d_dtype == BF16 else want, str(expr))


# "exact" rounds once, when D is stored: a cast in between has no float64 meaning to compare with.
@pytest.mark.parametrize("name", [name for name in EXACT_EPILOGUES if "cast" not in name])
def test_interpret_exact_epilogue_is_that_of_float64(rng: np.random.Generator, name: str) -> None:
    expr, names, value = EXACT_EPILOGUES[name]
    tensors, operands = make_tensors(rng, M, N, K, exact=True), operands_of(rng)
    wide = {name: f64(tensor) for name, tensor in operands.items()}
    want = (
        f64(value(reference(tensors), wide))
        if name != "constants"
        else np.float32(0.1) * reference(tensors) - 3
    )
    if name != "no accumulator":
        assert want.dtype == np.float64
    d = run(Gemm(N, K, F32, expr), tensors | pick(operands, *names), numerics="exact")
    assert np.all(np.abs(f64(d) - want) <= half_ulp(want, F32) * (1 + 2.0**-20))


@pytest.mark.parametrize(
    ("expr", "names", "value"),
    [
        (vector("gain", F32), ("gain",), lambda t: t["gain"]),
        (vector("gain", F32) * 2, ("gain",), lambda t: t["gain"] * 2),
        (scalar("alpha"), ("alpha",), lambda t: t["alpha"]),
        (
            vector("gain", F32) * scalar("alpha"),
            ("gain", "alpha"),
            lambda t: t["gain"] * t["alpha"],
        ),
        (acc * 0 + 1 - acc * 0, (), lambda t: np.float32(1)),
        (as_expr(3.0), (), lambda t: np.float32(3)),
        (cast(as_expr(3.0), BF16), (), lambda t: np.float32(3)),
    ],
    ids=lambda value: str(value) if isinstance(value, Expr) else "",
)
@pytest.mark.parametrize("numerics", ["hopper", "exact"])
def test_interpret_epilogue_spreads_over_the_tile(
    rng: np.random.Generator, same_bits: SameBits, expr: Expr, names: Any, value: Any, numerics: str
) -> None:
    tensors, operands = make_tensors(rng, M, N, K, exact=True), operands_of(rng)
    d = run(Gemm(N, K, F32, expr), tensors | pick(operands, *names), numerics=numerics)
    want = np.broadcast_to(np.asarray(value(operands), np.float32), (M, N))
    if numerics == "hopper" or len(names) < 2:
        same_bits(d, want, str(expr))
    else:
        assert np.all(np.abs(f64(d) - f64(want)) <= half_ulp(f64(want), F32) * (1 + 2.0**-20))


def spread_sums(rng: np.random.Generator, low: float, high: float) -> Tensors:
    """A GEMM whose accumulators lie all over [low, high]: one product each, scaled by rows."""
    tensors = {
        "a": np.zeros((M, 16), FP8),
        "b": np.zeros((N, 16), FP8),
        "sfa": rng.uniform(low, high, (M, 1)).astype(np.float32),
        "sfb": np.ones((1, 1), np.float32),
    }
    tensors["a"][:, 0] = 1.0
    tensors["b"][:, 0] = rng.uniform(0.5, 1, N)
    return tensors


def ulp(x: Array) -> Array:
    return 2 * half_ulp(x, F32)


def exact_gelu(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))


def exact_silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_interpret_silu_is_within_its_bound_of_float64(rng: np.random.Generator) -> None:
    # Beyond -88 exp(-x) leaves float32.
    tensors = spread_sums(rng, -88, 88)
    sums = f64(run(Gemm(N, 16, F32), tensors))
    d = f64(run(Gemm(N, 16, F32, silu(acc)), tensors))
    want = np.vectorize(exact_silu)(sums)
    # Three roundings by half a unit (exp, 1 + it, the quotient), each worth a unit at most.
    assert np.all(np.abs(d - want) <= 3 * ulp(want))
    assert OPERATIONS["silu"][1] >= 3


def test_interpret_silu_underflows_to_zero_where_exp_overflows(rng: np.random.Generator) -> None:
    tensors = spread_sums(rng, -1000, -200)
    sums = run(Gemm(N, 16, F32), tensors)
    assert sums.max() < -89
    d = run(Gemm(N, 16, F32, silu(acc)), tensors)
    assert np.all(d.view(np.uint32) == 0x80000000)


@pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (-6, 13), (-12, -6)], ids=lambda v: str(v))
def test_interpret_gelu_is_within_its_bound_of_float64(
    rng: np.random.Generator, low: float, high: float
) -> None:
    tensors = spread_sums(rng, low, high)
    sums = f64(run(Gemm(N, 16, F32), tensors))
    d = f64(run(Gemm(N, 16, F32, gelu(acc)), tensors))
    want = np.vectorize(exact_gelu)(sums)
    # The argument z of erfc is off by 2^-24 (rounded) and 0.3 * 2^-24 (the constant), which erfc
    # multiplies by |z erfc'(z) / erfc(z)|; erfc and the product are rounded. 2^-24 of a value is at
    # most one unit of it.
    z = -sums / math.sqrt(2)
    condition = np.abs(z) * 2 / math.sqrt(math.pi) * np.exp(-z * z) / np.vectorize(math.erfc)(z)
    units = 1.3 * condition + 2
    assert np.all(np.abs(d - want) <= units * ulp(want))
    # Where erfc does not amplify, the bound of OPERATIONS holds against the true function too.
    tame = sums > -1.5
    assert np.all(np.abs(d - want)[tame] <= OPERATIONS["gelu"][1] * ulp(want)[tame])


@pytest.mark.parametrize("op", ["silu", "gelu"])
def test_interpret_exact_activation_is_that_of_float64(rng: np.random.Generator, op: str) -> None:
    function, expr = {"silu": (exact_silu, silu(acc)), "gelu": (exact_gelu, gelu(acc))}[op]
    tensors = spread_sums(rng, -12, 12)
    want = np.vectorize(function)(reference(tensors))
    d = run(Gemm(N, 16, F32, expr), tensors, numerics="exact")
    assert np.all(np.abs(f64(d) - want) <= half_ulp(want, F32) * (1 + 2.0**-20))


# --- NaN, infinities and signs of zero ----------------------------------------------------------


def nan_of(d_dtype: Any) -> int:
    return NAN_BF16 if d_dtype == BF16 else NAN_F32


def bits(d: Array) -> Array:
    return d.view(np.uint16 if d.dtype == BFLOAT else np.uint32)


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("code", [0x7F, 0xFF], ids=hex)
def test_interpret_nan_in_a_and_b_spreads_over_row_and_column_only(
    rng: np.random.Generator, same_bits: SameBits, code: int, d_dtype: Any
) -> None:
    tensors = make_tensors(rng, 129, 72, 576)
    clean = run(Gemm(72, 576, d_dtype), tensors)
    tensors["a"].view(np.uint8)[[3, 128], [575, 0]] = code
    tensors["b"].view(np.uint8)[70, 130] = code
    d = run(Gemm(72, 576, d_dtype), tensors)
    poisoned = np.zeros((129, 72), bool)
    poisoned[[3, 128]] = True
    poisoned[:, 70] = True
    assert np.all(bits(d)[poisoned] == nan_of(d_dtype))
    same_bits(d[~poisoned], clean[~poisoned])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_interpret_bad_scales_spread_over_their_block_only(
    rng: np.random.Generator, same_bits: SameBits, bad: float, d_dtype: Any
) -> None:
    tensors = make_tensors(rng, 7, 264, 272)
    clean = run(Gemm(264, 272, d_dtype), tensors)
    tensors["sfa"][5, 2] = bad
    tensors["sfb"][1, 0] = bad
    d = run(Gemm(264, 272, d_dtype), tensors, Schedule(64, 192, 2, 1, promotion="serial"))
    poisoned = np.zeros((7, 264), bool)
    poisoned[5] = True
    poisoned[:, 128:256] = True
    assert not np.isfinite(f64(d[poisoned])).any()
    same_bits(d[~poisoned], clean[~poisoned])
    nans = np.isnan(f64(d))
    assert np.all(bits(d)[nans] == nan_of(d_dtype))
    if np.isnan(bad):
        assert nans[poisoned].all()


def test_interpret_infinite_scale_times_zero_is_nan() -> None:
    tensors = {
        "a": np.zeros((2, 16), FP8),
        "b": np.ones((8, 16), FP8),
        "sfa": np.array([[np.inf], [np.inf]], np.float32),
        "sfb": np.ones((1, 1), np.float32),
    }
    tensors["a"][1] = -1.0
    d = run(Gemm(8, 16, F32), tensors)
    assert np.all(bits(d)[0] == NAN_F32)
    assert np.all(d[1] == -np.inf)


def test_interpret_overflow_gives_infinity(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 2, 8, 16)
    tensors["a"][...], tensors["b"][...] = 448.0, 448.0
    tensors["sfa"][:] = np.array([[1e20], [-1e20]], np.float32)
    tensors["sfb"][:] = 1e15
    assert np.all(f64(run(Gemm(8, 16, BF16), tensors)) == [[np.inf], [-np.inf]])


# Every NaN result is 0x7FFFFFFF on the GPU, whatever NaN went in (CUDA C++ Programming Guide,
# "Floating-Point Standard").
NAN_EPILOGUES: dict[str, Expr] = {
    "x + nan": acc + matrix("bad", F32),
    "nan + x": matrix("bad", F32) + acc,
    "nan - x": matrix("bad", F32) - acc,
    "x * nan": acc * matrix("bad", F32),
    "maximum(x, nan)": maximum(acc, matrix("bad", F32)),
    "maximum(nan, x)": maximum(matrix("bad", F32), acc),
    "relu(nan)": relu(matrix("bad", F32)),
}


@pytest.mark.parametrize("payload", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FC12345], ids=hex)
@pytest.mark.parametrize("name", NAN_EPILOGUES)
def test_interpret_epilogue_gives_the_gpus_nan(
    rng: np.random.Generator, name: str, payload: int
) -> None:
    tensors = make_tensors(rng, 7, 72, 16)
    tensors["bad"] = np.full((7, 72), payload, np.uint32).view(np.float32)
    d = run(Gemm(72, 16, F32, NAN_EPILOGUES[name]), tensors)
    assert [hex(b) for b in np.unique(bits(d))] == [hex(NAN_F32)]


@pytest.mark.parametrize("d_dtype", [BF16, F32], ids=str)
def test_interpret_epilogue_of_infinities_gives_the_gpus_nan(
    rng: np.random.Generator, d_dtype: Any
) -> None:
    tensors = make_tensors(rng, 7, 72, 16)
    tensors["inf"] = np.full((7, 72), np.inf, np.float32)
    inf = matrix("inf", F32)
    for expr in (inf - inf, inf + -1.0 * inf, (acc * acc + 1) * 0.0 * inf):
        d = run(Gemm(72, 16, d_dtype, expr), tensors)
        assert [hex(b) for b in np.unique(bits(d))] == [hex(nan_of(d_dtype))], str(expr)


def test_interpret_cast_of_nan_is_the_gpus_bf16_nan(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 7, 72, 16)
    tensors["sfa"][:] = np.nan
    d = run(Gemm(72, 16, F32, cast(acc, BF16)), tensors)
    assert [hex(b) for b in np.unique(bits(d))] == [hex(NAN_BF16 << 16)]


@pytest.mark.parametrize("op", ["relu", "maximum", "silu", "gelu"])
def test_interpret_activation_of_nan_is_nan(rng: np.random.Generator, op: str) -> None:
    expr = {"relu": relu(acc), "maximum": maximum(acc, 0), "silu": silu(acc), "gelu": gelu(acc)}[op]
    tensors = make_tensors(rng, 7, 72, 16)
    tensors["a"].view(np.uint8)[4, 0] = NAN_E4M3
    d = run(Gemm(72, 16, F32, expr), tensors)
    assert np.isnan(d[4]).all()
    assert np.isfinite(np.delete(d, 4, axis=0)).all()


@pytest.mark.parametrize(
    ("left", "right"), [(0.0, -0.0), (-0.0, 0.0), (0.0, 0.0), (-0.0, -0.0)], ids=lambda v: str(v)
)
def test_interpret_maximum_takes_plus_zero_over_minus_zero(left: float, right: float) -> None:
    """PTX ISA, max: +0.0 > -0.0."""
    n = 72  # wide enough for NumPy's vector loops
    tensors = {
        "a": np.zeros((7, 16), FP8),
        "b": np.zeros((n, 16), FP8),
        "sfa": np.ones((7, 1), np.float32),
        "sfb": np.ones((1, 1), np.float32),
        "left": np.full((7, n), left, np.float32),
        "right": np.full((7, n), right, np.float32),
    }
    d = run(Gemm(n, 16, F32, maximum(matrix("left", F32), matrix("right", F32))), tensors)
    minus = math.copysign(1, left) == math.copysign(1, right) == -1
    assert np.all(bits(d) == (0x80000000 if minus else 0))


def test_interpret_relu_of_minus_zero_is_plus_zero(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 7, 72, 16) | {"zero": np.full((7, 72), -0.0, np.float32)}
    d = run(Gemm(72, 16, F32, relu(matrix("zero", F32))), tensors)
    assert np.all(bits(d) == 0)


def test_interpret_constant_keeps_the_sign_of_zero(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 7, 72, 16)
    for zero, want in ((0.0, 0), (-0.0, 0x80000000)):
        d = run(Gemm(72, 16, F32, (acc * acc + 1) * zero), tensors)
        assert np.all(bits(d) == want)


# --- sums of parts of k -------------------------------------------------------------------------

TINY = 2.0**-149  # times 2^-9, the least e4m3, it rounds to zero


def with_parts(values: Array) -> Tensors:
    """A GEMM whose product over K block i is the float32 values[row, i], and 0 of sign 0 for TINY.

    A sum that starts at +0 is -0 only where a negative value rounds to it.
    """
    m, num_blocks = values.shape
    tensors = {
        "a": np.zeros((m, 128 * num_blocks), FP8),
        "b": np.zeros((72, 128 * num_blocks), FP8),
        "sfa": np.abs(values).astype(np.float32),
        "sfb": np.ones((1, num_blocks), np.float32),
    }
    tiny = np.abs(values) == TINY
    tensors["a"][:, ::128] = np.copysign(np.where(tiny, 2.0**-9, 1.0), values)
    tensors["b"][:, ::128] = 1.0
    return tensors


INF, NAN, LARGEST = np.inf, np.nan, float(np.finfo(np.float32).max)
# The parts of a sum, and what their sum is in the order of k.
SUMS: dict[str, tuple[list[float], float]] = {
    "first two first": ([2.0**24, 1, 1], 2.0**24),
    "first two first, reversed": ([1, 1, 2.0**24], 2.0**24 + 2),
    "cancels first": ([2.0**30, -(2.0**30), 1], 1.0),
    "cancels last": ([2.0**30, 1, -(2.0**30)], 0.0),
    "tie to even below": ([2.0**24, 1, 0], 2.0**24),
    "tie to even above": ([2.0**24 + 2, 1, 0], 2.0**24 + 4),
    "each add is rounded": ([2.0**24, 1, 2.0**-20], 2.0**24),
    "overflow": ([LARGEST, LARGEST, -LARGEST], INF),
    "no overflow": ([LARGEST, -LARGEST, LARGEST], LARGEST),
    "negative overflow": ([-LARGEST, -LARGEST, LARGEST], -INF),
    "infinity": ([1, INF, 1], INF),
    "infinities": ([INF, INF, INF], INF),
    "infinities of two signs": ([INF, 1, -INF], NAN),
    "nan first": ([NAN, 1, 1], NAN),
    "nan in the middle": ([1, NAN, 1], NAN),
    "nan last": ([INF, 1, NAN], NAN),
    "subnormals": ([2.0**-140, 2.0**-149 * 3, -(2.0**-140)], 2.0**-149 * 3),
    "minus zeros": ([-TINY, -TINY, -TINY], -0.0),
    "plus zero and minus zeros": ([0, -TINY, -TINY], 0.0),
    "minus zeros and plus zero": ([-TINY, -TINY, 0], 0.0),
    "minus zero and one": ([-TINY, 1, -1], 0.0),
}


@pytest.mark.parametrize("d_dtype", [F32, BF16], ids=str)
def test_interpret_adds_parts_in_the_order_of_k(same_bits: SameBits, d_dtype: Any) -> None:
    tensors = with_parts(np.array([values for values, _ in SUMS.values()]))
    want = np.array([total for _, total in SUMS.values()], np.float32)
    want.view(np.uint32)[np.isnan(want)] = NAN_F32
    want = np.tile(want[:, None], (1, 72))
    d = run(Gemm(72, 384, d_dtype), tensors, Schedule(64, 48, 2, 1, split_k=3))
    rounded = want.astype(BFLOAT)
    rounded.view(np.uint16)[np.isnan(want)] = NAN_BF16
    for i, name in enumerate(SUMS):
        same_bits(d[i], want[i] if d_dtype == F32 else rounded[i], name)
    if d_dtype == F32:
        same_bits(d, sum_of_parts(tensors, 3))


def test_interpret_copies_the_first_part() -> None:
    """Minus zero stays: nothing is added to it, neither zero nor another block's sums."""
    tensors = with_parts(np.full((7, 2), -TINY))
    for split_k in (1, 2):
        d = run(Gemm(72, 256, F32), tensors, Schedule(64, 48, 2, 1, split_k=split_k))
        assert np.all(bits(d) == 0x80000000)


@pytest.mark.parametrize("code", [0x7F, 0xFF], ids=hex)
def test_interpret_nan_in_one_part_spreads_over_its_row_and_column_only(
    rng: np.random.Generator, same_bits: SameBits, code: int
) -> None:
    tensors = make_tensors(rng, 65, 72, 576)
    schedule = Schedule(64, 48, 2, 1, split_k=3)
    clean = run(Gemm(72, 576, F32), tensors, schedule)
    tensors["a"].view(np.uint8)[[3, 64], [575, 0]] = code
    tensors["b"].view(np.uint8)[70, 300] = code
    poisoned = np.zeros((65, 72), bool)
    poisoned[[3, 64]] = poisoned[:, 70] = True
    d = run(Gemm(72, 576, F32), tensors, schedule)
    assert np.all(bits(d)[poisoned] == NAN_F32)
    same_bits(d[~poisoned], clean[~poisoned])


@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_interpret_exact_does_not_depend_on_the_split(
    rng: np.random.Generator, same_bits: SameBits, split_k: int
) -> None:
    tensors = make_tensors(rng, 7, 72, 576, exact=True) | {"gain": np.full(72, 0.75, np.float32)}
    problem = Gemm(72, 576, F32, relu(acc) * vector("gain", F32) - 1)
    schedule = Schedule(64, 48, 2, 1, split_k=split_k)
    d = run(problem, tensors, schedule, numerics="exact")
    same_bits(d, run(problem, tensors, numerics="exact"))
    want = np.maximum(reference(tensors), 0.0) * 0.75 - 1
    same_bits(d, want.astype(np.float32))


def test_interpret_exact_adds_parts_in_float64() -> None:
    names = ("first two first", "first two first, reversed", "each add is rounded")
    tensors = with_parts(np.array([SUMS[name][0] for name in names] + [[1, 2.0**-30, -1]]))
    schedule = Schedule(64, 48, 2, 1, split_k=3)
    d = run(Gemm(72, 384, F32), tensors, schedule, numerics="exact")
    want = [2.0**24 + 2, 2.0**24 + 2, 2.0**24 + 2, 2.0**-30]
    assert np.array_equal(f64(d), np.tile(np.array(want)[:, None], (1, 72)))


# --- rejections ---------------------------------------------------------------------------------

BAD: dict[str, Callable[[Tensors], Tensors]] = {
    "a missing": lambda t: {k: v for k, v in t.items() if k != "a"},
    "bias missing": lambda t: {k: v for k, v in t.items() if k != "bias"},
    "extra": lambda t: t | {"extra": t["bias"]},
    "a of another k": lambda t: t | {"a": t["a"][:, :128]},
    "a of one dimension": lambda t: t | {"a": t["a"][0]},
    "a as codes": lambda t: t | {"a": t["a"].view(np.uint8)},
    "b of another n": lambda t: t | {"b": t["b"][:64]},
    "sfa of another m": lambda t: t | {"sfa": t["sfa"][:-1]},
    "sfa of another k": lambda t: t | {"sfa": t["sfa"][:, :1]},
    "sfa float64": lambda t: t | {"sfa": t["sfa"].astype(np.float64)},
    "sfb transposed": lambda t: t | {"sfb": t["sfb"].T},
    "bias float32": lambda t: t | {"bias": t["bias"].astype(np.float32)},
    "bias of another n": lambda t: t | {"bias": t["bias"][:8]},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_interpret_rejects_tensors(
    rng: np.random.Generator, change: Callable[[Tensors], Tensors]
) -> None:
    problem = Gemm(72, 144, BF16, acc + vector("bias"))
    tensors = make_tensors(rng, 7, 72, 144) | {"bias": np.zeros(72, BFLOAT)}
    assert run(problem, tensors).shape == (7, 72)
    with pytest.raises(ProblemError, match="kernel takes"):
        run(problem, change(tensors))


def test_interpret_rejects_d(rng: np.random.Generator) -> None:
    tensors = make_tensors(rng, 7, 72, 144)
    with pytest.raises(ProblemError, match="kernel takes"):
        run(Gemm(72, 144), tensors | {"d": np.zeros((7, 72), BFLOAT)})
