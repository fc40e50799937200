"""numerics.py against MMA-Sim, exact fractions, and plain transcriptions of the rules."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmasim.nv_ptx.sim import WGMMA
from numpy.typing import NDArray

from jitgen.dtypes import BF16, E4M3, F32
from jitgen.errors import ProblemError
from jitgen.numerics import AMAX_FLOOR, fma_f32, quantize_blocks, round_to, wgmma_e4m3

NAN_BITS = 0x7FFFFFFF
SameBits = Callable[..., None]
E4M3_ONE, E4M3_NEG_ZERO = 0x38, 0x80


def f32(*values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def bits32(x: NDArray[Any]) -> NDArray[np.uint32]:
    assert x.dtype == np.float32
    return np.ascontiguousarray(x).view(np.uint32)


# --- wgmma_e4m3 ---------------------------------------------------------------------------------


def e4m3_codes(kind: str, rng: np.random.Generator, rows: int, k: int) -> NDArray[Any]:
    """Codes [rows, k] without NaN."""
    shape = (rows, k)
    sign = rng.integers(0, 2, shape, dtype=np.uint8) << 7
    if kind == "gauss":
        codes = as_codes(rng.standard_normal(shape) * 100)
    elif kind == "wide":
        codes = as_codes(np.exp(rng.uniform(-7, 6, shape))) | sign
    elif kind == "tiny":
        codes = rng.integers(0, 24, shape, dtype=np.uint8) | sign
    elif kind == "subnormal":
        codes = rng.integers(0, 8, shape, dtype=np.uint8) | sign
    elif kind == "outlier":  # mostly small, one large: nearly every term loses bits
        codes = as_codes(rng.standard_normal(shape) * 4)
        codes[:, rng.integers(0, k, max(1, k // 64))] = 0x7E
    elif kind == "cancel":  # neighbours of equal size, so that sums nearly or wholly vanish
        codes = as_codes(rng.standard_normal(shape) * 100)
        codes[:, 1::2] = codes[:, ::2] ^ sign[:, ::2]
        codes[::2, 1::2] = codes[::2, ::2] ^ 0x80
    elif kind == "equal":  # beside "cancel": its even rows then give exact zeros
        codes = np.repeat(as_codes(rng.standard_normal((rows, k // 2)) * 100), 2, axis=1)
    elif kind == "zeros":  # zero entries, rows and whole steps beside large values
        codes = rng.integers(0, 127, shape, dtype=np.uint8) | sign
        codes[rng.random(shape) < 0.6] &= 0x80
        codes[rng.random(rows) < 0.2] = 0
        codes[:, 32 * rng.integers(0, k // 32) :][:, :32] &= 0x80
    else:
        codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3C
    return codes


def as_codes(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)).view(np.uint8)


def decode(codes: NDArray[np.uint8]) -> NDArray[Any]:
    return np.asarray(codes.view(ml_dtypes.float8_e4m3fn), np.float64)


def mmasim_wgmma(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[Any]:
    model = WGMMA("Hopper", "m64n8k32.f32.e4m3.e4m3")
    a_t, b_t = (torch.from_numpy(x.copy()).view(torch.float8_e4m3fn) for x in (a, b))
    result: NDArray[Any] = model(a_t, b_t.T, torch.zeros(len(a), len(b))).numpy()
    return result


def plain_wgmma(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The five steps of HOPPER.md section 2 in float64, as written there."""

    def exponent(x: NDArray[np.float64], lowest: int) -> NDArray[Any]:
        return np.where(x == 0, -10000, np.maximum(np.frexp(x)[1] - 1, lowest))

    c = np.zeros((len(a), len(b)))
    for k in range(0, a.shape[1], 32):
        a_k, b_k = decode(a[:, None, k : k + 32]), decode(b[None, :, k : k + 32])
        product = a_k * b_k
        e_product = np.where(product == 0, -10000, exponent(a_k, -6) + exponent(b_k, -6))
        e = np.maximum(np.maximum(e_product.max(axis=2), exponent(c, -126)), -133)
        unit = np.ldexp(1.0, e - 13)
        total = (np.trunc(product / unit[..., None]).sum(axis=2) + np.trunc(c / unit)) * unit
        unit = np.ldexp(1.0, np.maximum(exponent(total, -126), -126) - 13)
        c = np.trunc(total / unit) * unit
    return (c + 0.0).astype(np.float32)


KINDS = ["bytes", "gauss", "wide", "tiny", "subnormal", "outlier", "cancel", "equal", "zeros"]
SHAPES = [(64, 8, 32), (37, 51, 128), (5, 3, 256), (1, 300, 64), (131, 130, 32)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("kind", KINDS)
def test_wgmma_e4m3_equals_mmasim(
    kind: str, m: int, n: int, k: int, rng: np.random.Generator, same_bits: SameBits
) -> None:
    a, b = e4m3_codes(kind, rng, m, k), e4m3_codes(kind, rng, n, k)
    same_bits(wgmma_e4m3(a, b), mmasim_wgmma(a, b), kind)


@pytest.mark.parametrize("kind_b", KINDS)
@pytest.mark.parametrize("kind_a", KINDS)
def test_wgmma_e4m3_equals_plain_transcription(
    kind_a: str, kind_b: str, rng: np.random.Generator, same_bits: SameBits
) -> None:
    a, b = e4m3_codes(kind_a, rng, 29, 1024), e4m3_codes(kind_b, rng, 23, 1024)
    same_bits(wgmma_e4m3(a, b), plain_wgmma(a, b), f"{kind_a} x {kind_b}")


def test_wgmma_e4m3_equals_both_oracles_for_every_pair_of_codes(same_bits: SameBits) -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    a = np.zeros((len(codes), 32), np.uint8)
    a[:, 7] = codes
    got = wgmma_e4m3(a, a)
    same_bits(got, plain_wgmma(a, a), "plain")
    same_bits(got, mmasim_wgmma(a, a), "mmasim")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_wgmma_e4m3_truncates_each_term_toward_zero(sign: float) -> None:
    values = np.full((1, 32), 0.5)
    values[0, 0] = 128.0
    a, b = as_codes(values), as_codes(np.where(values == 128, 64.0, sign))
    # E = 13: 31 terms of 0.5 are below the unit 2^0 and vanish one by one, whatever their sign.
    assert wgmma_e4m3(a, b)[0, 0] == 8192.0


def test_wgmma_e4m3_keeps_13_fraction_bits_of_the_sum() -> None:
    values = np.full((1, 32), 1.0)
    values[0, :16], values[0, 16] = 256.0, 9.0
    # 16 * 2^12 + 9 * 9 + 15 = 65632 has exponent 16, so its unit is 2^3: 65632 = 8204 * 8.
    # E = 12 before the sum, unit 1/2: no term loses anything.
    a = as_codes(values)
    b = as_codes(np.where(values == 256, 16.0, values))
    assert wgmma_e4m3(a, b)[0, 0] == 65632.0
    b[0, 31] = as_codes(np.array([8.0]))[0]  # + 7 is below the unit
    assert wgmma_e4m3(a, b)[0, 0] == 65632.0
    b[0, 31] = as_codes(np.array([9.0]))[0]  # + 8 is one unit
    assert wgmma_e4m3(a, b)[0, 0] == 65640.0


def test_wgmma_e4m3_gives_positive_zero(same_bits: SameBits) -> None:
    cancel = np.zeros((4, 64), np.uint8)
    cancel[0, :2] = 0x40, 0xC0  # x - x
    cancel[1] = E4M3_NEG_ZERO  # products of -0 and +1
    cancel[2, [0, 40]] = 0xC0, 0x40  # cancels in the second step
    b = np.full((1, 64), E4M3_ONE, np.uint8)
    got = wgmma_e4m3(cancel, b)
    assert not bits32(got).any(), got
    same_bits(got, mmasim_wgmma(cancel, b), "mmasim")


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_wgmma_e4m3_spreads_nan_over_row_and_column(
    nan: int, rng: np.random.Generator, same_bits: SameBits
) -> None:
    a, b = e4m3_codes("zeros", rng, 9, 96), e4m3_codes("zeros", rng, 11, 96)
    clean = bits32(wgmma_e4m3(a, b))
    b[:, 5] = 0  # NaN times zero is NaN too
    want = bits32(wgmma_e4m3(a, b)).copy()
    a[4, 5], b[7, 95], b[2, 40] = nan, nan, nan
    want[4], want[:, [2, 7]] = NAN_BITS, NAN_BITS
    got = wgmma_e4m3(a, b)
    same_bits(bits32(got), want)
    same_bits(got, mmasim_wgmma(a, b), "mmasim")
    assert not np.isnan(clean.view(np.float32)).any()


@pytest.mark.parametrize(("m", "n"), [(300, 270), (3, 20000), (20000, 2)])
def test_wgmma_e4m3_does_not_depend_on_tiles_or_threads(
    m: int, n: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, same_bits: SameBits
) -> None:
    a, b = e4m3_codes("bytes", rng, m, 64), e4m3_codes("gauss", rng, n, 64)
    got = {}
    for num_threads in (1, 5):
        monkeypatch.setattr(os, "cpu_count", lambda n=num_threads: n)
        got[num_threads] = wgmma_e4m3(a, b)
    same_bits(got[1], got[5])
    rows, cols = np.unique(rng.integers(0, m, 40)), np.unique(rng.integers(0, n, 40))
    want = plain_wgmma(a[rows], b[cols])
    same_bits(got[1][np.ix_(rows, cols)], want)


def test_wgmma_e4m3_takes_e4m3_arrays_and_any_strides(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    a, b = e4m3_codes("gauss", rng, 20, 64), e4m3_codes("gauss", rng, 18, 64)
    want = wgmma_e4m3(a[::2], b)
    a8, b8 = a.view(E4M3.numpy), b.view(E4M3.numpy)
    same_bits(wgmma_e4m3(a8[::2], np.asfortranarray(b8)), want)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 32), (3, 0, 32), (3, 4, 0)])
def test_wgmma_e4m3_takes_empty_extents(m: int, n: int, k: int) -> None:
    got = wgmma_e4m3(np.zeros((m, k), np.uint8), np.zeros((n, k), np.uint8))
    assert got.shape == (m, n)
    assert not got.any()


def test_wgmma_e4m3_rejects_k_not_a_multiple_of_32() -> None:
    x = np.zeros((4, 40), np.uint8)
    with pytest.raises(ProblemError, match=r"multiple of 32, got 40: .* zeros to 64"):
        wgmma_e4m3(x, x)


def test_wgmma_e4m3_rejects_different_k() -> None:
    with pytest.raises(ProblemError, match="share k"):
        wgmma_e4m3(np.zeros((4, 32), np.uint8), np.zeros((4, 64), np.uint8))


@pytest.mark.parametrize("bad", [np.zeros((4, 32), np.float32), np.zeros(32, np.uint8)])
def test_wgmma_e4m3_rejects_other_dtypes_and_ranks(bad: NDArray[Any]) -> None:
    with pytest.raises(ProblemError, match="b must be a 2-D array of float8_e4m3fn"):
        wgmma_e4m3(np.zeros((4, 32), np.uint8), bad)


# --- fma_f32 ------------------------------------------------------------------------------------


def exact_fma(x: float, y: float, z: float) -> Any:
    """fma of finite float32 values by rational arithmetic, one rounding to nearest even."""
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    if exact == 0:  # IEEE 754 gives the sign of an exact zero, which fractions do not have
        with np.errstate(under="ignore"):
            return np.float32(np.float64(x) * np.float64(y) + np.float64(z))
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(size / quantum) * quantum  # round() of a Fraction takes ties to even
    magnitude = np.float32(np.inf if rounded >= 2**128 else float(rounded))
    return np.copysign(magnitude, np.float32(-1 if exact < 0 else 1))


def exact_fmas(x: NDArray[Any], y: NDArray[Any], z: NDArray[Any]) -> NDArray[np.float32]:
    want = [exact_fma(*values) for values in zip(x.flat, y.flat, z.flat, strict=True)]
    return np.array(want, np.float32).reshape(x.shape)


def finite_floats(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    x = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(1))


def near_ties(
    rng: np.random.Generator, size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """z + x * y very near half a unit in z's last place, where double rounding goes wrong."""
    exponent = rng.integers(-70, 127, size)
    sign = rng.choice([-1.0, 1.0], size)
    z = np.ldexp(rng.integers(2**23, 2**24, size), exponent - 23) * rng.choice([-1.0, 1.0], size)
    # x * y is half a unit times 1 - d^2: d near 2^-14 moves the sum by one float64 unit and a bit.
    d = rng.choice([0, 1, 2, 3, 511, 512, 513, 724, 725], size) * 2.0**-23
    half = rng.integers(-20, 30, size)
    x = np.ldexp(1 + d, half)
    y = np.ldexp(sign * (1 - d * rng.choice([0, 1], size)), exponent - 24 - half)
    return x.astype(np.float32), y.astype(np.float32), z.astype(np.float32)


def test_fma_f32_rounds_random_bit_patterns_once(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    x, y = finite_floats(rng, 9999), finite_floats(rng, 9999)
    args = x, y, finite_floats(rng, 9999)
    same_bits(fma_f32(*args), exact_fmas(*args))


def test_fma_f32_rounds_sums_of_like_size_once(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    x, y, z = (rng.standard_normal((3, 3001)).astype(np.float32) for _ in range(3))
    same_bits(fma_f32(x, y, z), exact_fmas(x, y, z))
    args = x, y, -(x * y)
    same_bits(fma_f32(*args), exact_fmas(*args), "cancellation")


def test_fma_f32_rounds_near_ties_once(rng: np.random.Generator, same_bits: SameBits) -> None:
    x, y, z = near_ties(rng, 9999)
    same_bits(fma_f32(x, y, z), exact_fmas(x, y, z))
    twice = (x.astype(np.float64) * y + z).astype(np.float32)
    assert (twice != fma_f32(x, y, z)).any(), "the data must catch double rounding"


def test_fma_f32_rounds_subnormal_results_once(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    x = np.ldexp(rng.uniform(-2, 2, 9999), rng.integers(-80, -60, 9999)).astype(np.float32)
    y = np.ldexp(rng.uniform(-2, 2, 9999), rng.integers(-80, -60, 9999)).astype(np.float32)
    z = rng.integers(0, 2**24, 9999, dtype=np.uint32).view(np.float32)
    args = x, y, z * rng.choice(f32(-1, 0, 1), 9999)
    same_bits(fma_f32(*args), exact_fmas(*args))


def test_fma_f32_rounds_huge_results_once(rng: np.random.Generator, same_bits: SameBits) -> None:
    x, y = (np.ldexp(rng.uniform(1, 2, 5000), 63).astype(np.float32) for _ in range(2))
    top = np.float32(np.finfo(np.float32).max)
    z = rng.choice([-1, 1], 5000) * np.nextafter(top, 0, dtype=np.float32)
    args = x, y, z.astype(np.float32)
    same_bits(fma_f32(*args), exact_fmas(*args))
    x, y = f32(1, -1, 1, 1 - 2**-24), np.full(4, 2.0**103, np.float32)
    args = x, y, f32(top, -top, -top, top)
    same_bits(fma_f32(*args), exact_fmas(*args), "the last tie before infinity")


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=300)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_f32_equals_exact_fractions(x: float, y: float, z: float) -> None:
    assert bits32(fma_f32(f32(x), f32(y), f32(z))) == bits32(f32(exact_fma(x, y, z)))


@settings(deadline=None, max_examples=300)
@given(
    st.integers(2**23, 2**24 - 1),
    st.integers(-149, 104),
    st.integers(-800, 800),
    st.integers(-1, 1),
    st.booleans(),
)
def test_fma_f32_equals_exact_fractions_near_ties(
    mantissa: int, exponent: int, d: int, sign: int, up: bool
) -> None:
    x = f32(1 + d * 2.0**-23)
    y = f32(np.ldexp(sign * (1 + d * (1 if up else -1) * 2.0**-23), exponent - 1))
    z = f32(np.ldexp(float(mantissa), exponent))
    assert bits32(fma_f32(x, y, z)) == bits32(exact_fmas(x, y, z))


def test_fma_f32_handles_infinities_and_nan(same_bits: SameBits) -> None:
    inf, nan = np.inf, np.nan
    cases = [
        (inf, 1, 1, inf),
        (inf, -2, 5, -inf),
        (1, 1, -inf, -inf),
        (3e38, 3e38, -inf, -inf),
        (3e38, -3e38, 0, -inf),
        (inf, 0, 1, nan),
        (inf, 1, -inf, nan),
        (nan, 1, 1, nan),
        (-nan, 1, inf, nan),
        (1, 1, nan, nan),
    ]
    x, y, z, want = (np.array(column, np.float32) for column in zip(*cases, strict=True))
    bits = bits32(want)
    want_bits = np.where(np.isnan(want), np.uint32(NAN_BITS), bits)
    same_bits(bits32(fma_f32(x, y, z)), want_bits, "infinities and NaN")


def test_fma_f32_keeps_the_sign_of_zero() -> None:
    x = f32(1, 0, 0, -(2**-100), 2**-100)
    y = f32(1, -1, -1, 2**-100, 2**-100)
    z = f32(-1, -0.0, 0.0, 0.0, -0.0)
    assert np.signbit(fma_f32(x, y, z)).tolist() == [False, True, False, True, False]


def test_fma_f32_broadcasts(rng: np.random.Generator, same_bits: SameBits) -> None:
    x, y = finite_floats(rng, 300)[:, None], finite_floats(rng, 70)
    z = finite_floats(rng, 2 * 300).reshape(2, 300, 1)
    got = fma_f32(x, y, z)
    full = [np.ascontiguousarray(v) for v in np.broadcast_arrays(x, y, z)]
    same_bits(got, fma_f32(full[0], full[1], full[2]))
    assert got[1, 299, 69] == exact_fma(x[299, 0], y[69], z[1, 299, 0])
    assert fma_f32(*(np.array(v, np.float32) for v in (2, 3, 1))) == 7
    assert fma_f32(x[:0], y, z[:, :0]).shape == (2, 0, 70)


def test_fma_f32_rejects_other_dtypes() -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ProblemError, match="z must be float32, got float64"):
        fma_f32(one, one, np.ones(1))


# --- round_to -----------------------------------------------------------------------------------


def with_neighbours(x: NDArray[Any]) -> NDArray[np.float32]:
    """x, which float32 holds exactly, and the float32 values next to it, both signs."""
    x32 = x.astype(np.float32)
    up, down = np.nextafter(x32, np.float32(np.inf)), np.nextafter(x32, np.float32(-np.inf))
    return np.concatenate([s * v for s in (1, -1) for v in (x32, up, down)]).astype(np.float32)


def test_round_to_bf16_is_nearest_even(rng: np.random.Generator, same_bits: SameBits) -> None:
    codes = np.arange(0x7F80, dtype=np.uint32) << 16  # all finite positive values
    ties = (codes | 0x8000).view(np.float32)
    x = np.concatenate([with_neighbours(codes.view(np.float32)), with_neighbours(ties)])
    x = np.concatenate([x, finite_floats(rng, 100000)])
    bits = x.view(np.uint32).astype(np.uint64)
    want = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    same_bits(round_to(x, BF16).view(np.uint16), want)


def test_round_to_e4m3_is_nearest_even_and_saturates(
    rng: np.random.Generator, same_bits: SameBits
) -> None:
    values = decode(np.arange(0x7F, dtype=np.uint8))  # 0 to 448
    ties = (values[1:] + values[:-1]) / 2
    beyond = np.array([456.0, 464.0, 465.0, 480.0, 512.0, 1e30, 3e38])
    x = with_neighbours(np.concatenate([values, ties, beyond]))
    x = np.concatenate([x, finite_floats(rng, 100000)])
    x = np.concatenate([x, f32(np.inf, -np.inf, 0.0, -0.0)])
    size = np.minimum(np.abs(x.astype(np.float64)), 448)
    low = np.minimum(np.searchsorted(values, size, side="right") - 1, 125)
    middle = (values[low] + values[low + 1]) / 2
    code = np.where(size == middle, low + low % 2, np.where(size > middle, low + 1, low))
    want = (code | np.signbit(x) << 7).astype(np.uint8)
    same_bits(round_to(x, E4M3).view(np.uint8), want)


@pytest.mark.parametrize(("dtype", "code"), [(BF16, 0x7FFF), (E4M3, 0x7F)], ids=str)
def test_round_to_gives_canonical_nan(dtype: Any, code: int) -> None:
    x = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    got = round_to(x, dtype)
    assert got.dtype == dtype.numpy
    assert (got.view(f"u{dtype.size_bytes}") == code).all(), got


def test_round_to_f32_is_the_identity() -> None:
    x = f32(1.5, np.nan, -0.0)
    assert round_to(x, F32) is x


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_round_to_keeps_the_shape_and_the_input(dtype: Any) -> None:
    for shape in ((), (0, 3), (2, 3, 4)):
        x = np.full(shape, 500.0, np.float32)
        got = round_to(x, dtype)
        assert (got.shape, got.dtype) == (shape, dtype.numpy)
        assert (x == 500).all()


def test_round_to_rejects_other_input_dtypes() -> None:
    with pytest.raises(ProblemError, match="float64"):
        round_to(np.ones(2), BF16)


# --- quantize_blocks ----------------------------------------------------------------------------


def plain_quantize(x: NDArray[Any], block: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
    (m, k), (block_m, block_k) = x.shape, block
    q = np.zeros((m, k), E4M3.numpy)
    scale = np.zeros((-(-m // block_m), -(-k // block_k)), np.float32)
    for i, j in np.ndindex(*scale.shape):
        part = np.s_[i * block_m : (i + 1) * block_m, j * block_k : (j + 1) * block_k]
        values = x[part].astype(np.float32)
        scale[i, j] = max(np.abs(values).max(), np.float32(AMAX_FLOOR)) / np.float32(448)
        q[part] = np.clip(values / scale[i, j], -448, 448).astype(E4M3.numpy)
    return q, scale


def blocky(rng: np.random.Generator, m: int, k: int) -> NDArray[np.float32]:
    """Gaussian values whose size varies from place to place by 2^40."""
    size = np.exp2(rng.uniform(-20, 20, (m, k)).round(-1))
    return (rng.standard_normal((m, k)) * size).astype(np.float32)


BLOCKS = [(1, 128), (128, 128), (128, 1), (7, 5), (1000, 1000)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
def test_quantize_blocks_equals_a_loop_over_blocks(
    block: tuple[int, int], dtype: Any, rng: np.random.Generator, same_bits: SameBits
) -> None:
    x = blocky(rng, 150, 300).astype(dtype.numpy)
    q, scale = quantize_blocks(x, block)
    want_q, want_scale = plain_quantize(x, block)
    same_bits(scale, want_scale, "scale")
    same_bits(q, want_q, "q")


@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_quantize_blocks_equals_the_same_formula_in_torch(
    block: tuple[int, int], rng: np.random.Generator, same_bits: SameBits
) -> None:
    x = blocky(rng, 256, 384)
    q, scale = quantize_blocks(x, block)
    tiles = torch.from_numpy(x).unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    floor, top = torch.tensor(AMAX_FLOOR), torch.tensor(448.0)
    scale_t = tiles.abs().amax(dim=(1, 3), keepdim=True).maximum(floor) / top
    q_t = (tiles / scale_t).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    same_bits(scale, scale_t[:, 0, :, 0].numpy())
    same_bits(q.view(np.uint8), q_t.reshape(256, 384).numpy())


def test_quantize_blocks_keeps_x_within_half_a_step(rng: np.random.Generator) -> None:
    x = blocky(rng, 64, 512)
    q, scale = quantize_blocks(x, (1, 128))
    spread = np.repeat(scale.astype(np.float64), 128, axis=1)
    error = np.abs(q.astype(np.float64) * spread - x)
    # Half of the last of 3 fraction bits, or half of the subnormal step; 2^-22 for the divisions.
    bound = np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * spread) * (1 + 2.0**-22)
    bound += 2.0**-22 * np.abs(x)
    assert (error <= bound).all()
    top = np.abs(q.astype(np.float32)).reshape(64, 4, 128).max(axis=2)
    assert (top == 448).all()


def test_quantize_blocks_gives_zero_blocks_a_positive_scale(same_bits: SameBits) -> None:
    x = np.zeros((2, 256), np.float32)
    x[0, 200], x[1, 3] = -3.0, 1e-44
    q, scale = quantize_blocks(x, (1, 128))
    floor = np.float32(2.0**-63)
    same_bits(scale, np.array([[floor, f32(3)[0] / np.float32(448)], [floor, floor]]), "scale")
    assert np.argwhere(q.astype(np.float32)).tolist() == [[0, 200]]
    assert q[0, 200] == -448
    assert scale.min() * scale.min() >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(("shape", "blocks"), [((0, 256), (0, 2)), ((3, 0), (3, 0))])
def test_quantize_blocks_takes_empty_extents(
    shape: tuple[int, int], blocks: tuple[int, int]
) -> None:
    q, scale = quantize_blocks(np.zeros(shape, np.float32), (1, 128))
    assert (q.shape, q.dtype, scale.shape) == (shape, E4M3.numpy, blocks)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_quantize_blocks_rejects_non_finite_values(dtype: Any, bad: float) -> None:
    x = np.ones((5, 300), dtype.numpy)
    x[4, 1] = x[2, 299] = bad
    with pytest.raises(ProblemError, match=rf"finite, got {bad} at \[2, 299\]"):
        quantize_blocks(x, (1, 128))


@pytest.mark.parametrize(
    ("x", "block", "message"),
    [
        (np.ones((2, 2)), (1, 2), "float32 or bfloat16, got float64"),
        (np.ones(4, np.float32), (1, 2), "2-D array"),
        (np.ones((2, 2), np.float32), (0, 2), "block must be positive"),
    ],
    ids=["dtype", "rank", "block"],
)
def test_quantize_blocks_rejects_bad_arguments(
    x: NDArray[Any], block: tuple[int, int], message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        quantize_blocks(x, block)
