"""Hopper's arithmetic in NumPy, bit for bit: FP8 wgmma, FP32 fma, rounding, quantization."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, E4M3, F32, DType
from .errors import ProblemError

F32Array = NDArray[np.float32]

WGMMA_K = 32
E4M3_MAX = 448.0
# Smallest amax that a scale is made from: scale >= 2^-63, so the product of two scales, which the
# GEMM's promotion forms, is a normal float32 and an all-zero block divides by no zero.
AMAX_FLOOR = E4M3_MAX * 2.0**-63
# What the GPU writes for NaN: wgmma (the public model MMA-Sim) and fma.rn.f32 (PTX ISA).
NAN_F32 = np.uint32(0x7FFFFFFF).view(np.float32)
_NAN_BF16 = 0x7FFF
_NAN_E4M3 = 0x7F

_TILE = 128  # 33 terms of a tile, 2 MB, stay near a core and keep its NumPy calls above 40 us
_FMA_CHUNK = 8192

_CODES = np.arange(256, dtype=np.uint8)
# Value of each E4M3 code; NaN codes count as zero here, wgmma_e4m3 treats them apart.
_VALUE: F32Array = np.nan_to_num(_CODES.view(E4M3.numpy).astype(np.float32), nan=0.0)
# Exponent of each code, subnormals at -6: HOPPER.md section 2, step 1.
_EXPONENT = np.maximum((_CODES & 0x7F) >> 3, 1).astype(np.int32) - 7
# Sums over k of _POWER_A[a] * _POWER_B[b] = 2^(8(ea + eb) - 15) find max(ea + eb): see _wgmma_tile.
_POWER_A: F32Array = np.ldexp((_VALUE != 0).astype(np.float32), 8 * _EXPONENT - 8)
_POWER_B: F32Array = np.ldexp((_VALUE != 0).astype(np.float32), 8 * _EXPONENT - 7)


def wgmma_e4m3(a: NDArray[Any], b: NDArray[Any]) -> F32Array:
    """A @ B^T as a chain of `wgmma.m64nNk32.f32.e4m3.e4m3` leaves it in the accumulator.

    The chain starts at zero and takes k in order, 32 at a time. Exact zeros come out as +0,
    as in the public model MMA-Sim. The result does not depend on the number of threads.

    Parameters
    ----------
    a : float8_e4m3fn, or its codes as uint8, [m, k]; k % 32 == 0 (pad with zeros)
    b : float8_e4m3fn, or its codes as uint8, [n, k]
    Returns
    -------
    float32 [m, n]; 0x7FFFFFFF wherever the row of a or the row of b holds a NaN
    Raises
    ------
    ProblemError : a dtype or shape breaks a rule above
    Notes
    -----
    HOPPER.md section 2, steps 1-5; measured on an H100, and equal to MMA-Sim's Hopper WGMMA.
    """
    a_codes, b_codes = _e4m3_codes("a", a), _e4m3_codes("b", b)
    (m, k), (n, k_b) = a_codes.shape, b_codes.shape
    if k != k_b:
        raise ProblemError(f"a and b must share k, got a [{m}, {k}] and b [{n}, {k_b}]")
    if k % WGMMA_K:
        raise ProblemError(
            f"k must be a multiple of {WGMMA_K}, got {k}: pad a and b with zeros to "
            f"{-(-k // WGMMA_K) * WGMMA_K}"
        )
    a_t, b_t = np.ascontiguousarray(a_codes.T), np.ascontiguousarray(b_codes.T)
    out = np.empty((m, n), np.float32)
    # Few rows take wide tiles, few columns tall ones, so that each NumPy call has work to do.
    tile_m = max(_TILE, _TILE * _TILE // max(n, 1))
    tile_n = max(_TILE, _TILE * _TILE // max(m, 1))

    def run(origin: tuple[int, int]) -> None:
        rows = slice(origin[0], origin[0] + tile_m)
        cols = slice(origin[1], origin[1] + tile_n)
        out[rows, cols] = _wgmma_tile(a_t[:, rows], b_t[:, cols])

    origins = [(i, j) for i in range(0, m, tile_m) for j in range(0, n, tile_n)]
    if len(origins) == 1:
        run(origins[0])
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, origins))
    out[((a_codes & 0x7F) == _NAN_E4M3).any(axis=1)] = NAN_F32
    out[:, ((b_codes & 0x7F) == _NAN_E4M3).any(axis=1)] = NAN_F32
    return out


def _wgmma_tile(a_t: NDArray[np.uint8], b_t: NDArray[np.uint8]) -> F32Array:
    """One tile [m, n] from k-major codes [k, m] and [k, n]; NaN codes count as zero."""
    m, n = a_t.shape[1], b_t.shape[1]
    acc = np.zeros((m, n), np.float32)
    power, scale = np.empty_like(acc), np.empty_like(acc)
    terms = np.empty((WGMMA_K + 1, m, n), np.float32)
    acc_bits, field, scale_bits = acc.view(np.int32), power.view(np.int32), scale.view(np.int32)
    acc_field = np.empty_like(field)
    for k in range(0, a_t.shape[0], WGMMA_K):
        a_step, b_step = a_t[k : k + WGMMA_K], b_t[k : k + WGMMA_K]
        # Step 2. A product of exponent e adds 2^(8e - 15), a zero product adds nothing. So the sum
        # of 32 is in [2^(8E - 15), 2^(8E - 10)] up to rounding, and its float32 exponent field, in
        # [8E + 112, 8E + 117], has E + 14 above its low three bits: one matmul gives the maximum
        # of 32, whatever its order of summation. No nonzero product gives E = -14, which is
        # harmless: a nonzero acc is a multiple of 2^-25 (E >= -12 when it was made).
        np.matmul(_POWER_A.take(a_step).T, _POWER_B.take(b_step), out=power)
        np.right_shift(field, 26, out=field)
        np.add(field, 127 - 14, out=field)  # E + 127, as in a float32
        np.bitwise_and(acc_bits, 0x7F800000, out=acc_field)
        np.right_shift(acc_field, 23, out=acc_field)
        np.maximum(field, acc_field, out=field)
        np.subtract(127 + 13 + 127, field, out=scale_bits)
        np.left_shift(scale_bits, 23, out=scale_bits)  # scale = 2^(13 - E)
        # Steps 3 and 4, in units of 2^(E - 13). All exact in float32: a product has at most 8
        # significant bits and is below 2^(E + 2), acc below 2^(E + 1), so the truncated terms are
        # integers that sum to less than 32 * 2^15 + 2^14 < 2^24; no scaling leaves 2^+-126.
        np.einsum("km,kn->kmn", _VALUE.take(a_step), _VALUE.take(b_step), out=terms[:WGMMA_K])
        terms[WGMMA_K] = acc
        np.multiply(terms, scale, out=terms)
        np.trunc(terms, out=terms)
        np.add.reduce(terms, axis=0, out=acc)
        # Step 5: clearing fraction bits truncates toward zero. A zero is +0: either acc was +0 and
        # no product counts, or terms cancel, for the one that sets E is never truncated to zero.
        np.divide(acc, scale, out=acc)
        np.bitwise_and(acc_bits, -(1 << 10), out=acc_bits)
    return acc


def _e4m3_codes(name: str, x: NDArray[Any]) -> NDArray[np.uint8]:
    if x.ndim != 2 or x.dtype not in (np.dtype(np.uint8), E4M3.numpy):
        raise ProblemError(
            f"{name} must be a 2-D array of {E4M3.name} (or of its codes as uint8), "
            f"got {x.dtype} {list(x.shape)}"
        )
    return np.ascontiguousarray(x).view(np.uint8)


def fma_f32(x: NDArray[Any], y: NDArray[Any], z: NDArray[Any]) -> F32Array:
    """x * y + z rounded once to nearest even, as the GPU's `fma.rn.f32`, with subnormals kept.

    Parameters
    ----------
    x, y, z : float32, shapes that broadcast together
    Returns
    -------
    float32 of the broadcast shape; every NaN is 0x7FFFFFFF
    Raises
    ------
    ProblemError : an operand is not float32
    Notes
    -----
    x * y is exact in float64. The float64 sum is rounded to odd, with its error from Knuth's
    TwoSum, and 53 >= 24 + 2 bits make the second rounding innocuous (Boldo and Melquiond 2008).
    """
    for name, operand in (("x", x), ("y", y), ("z", z)):
        if operand.dtype != np.float32:
            raise ProblemError(f"{name} must be float32, got {operand.dtype}: convert it first")
    chunks = np.nditer(
        [x, y, z, None],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly"], ["readonly"], ["readonly"], ["writeonly", "allocate"]],
        op_dtypes=[np.float64, np.float64, np.float64, np.float32],
        buffersize=_FMA_CHUNK,
    )
    with chunks, np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for x64, y64, z64, out in chunks:
            _fma_chunk(x64, y64, z64, out)
        result: F32Array = chunks.operands[3]
    return result


def _fma_chunk(
    x: NDArray[np.float64], y: NDArray[np.float64], z: NDArray[np.float64], out: F32Array
) -> None:
    product = x * y
    total = product + z
    z_part = total - product
    product_part = total - z_part
    np.subtract(product, product_part, out=product_part)
    np.subtract(z, z_part, out=z_part)
    error = np.add(product_part, z_part, out=z_part)
    # NaN errors, which come with infinite or NaN totals, must not count as inexact.
    inexact = (np.abs(error, out=product_part) > 0).view(np.int8)
    # Round to odd: one step toward zero where the error points there, then set the last bit.
    bits, error_bits = total.view(np.int64), error.view(np.int64)
    np.bitwise_xor(error_bits, bits, out=error_bits)
    np.right_shift(error_bits, 63, out=error_bits)
    np.multiply(error_bits, inexact, out=error_bits)
    np.add(bits, error_bits, out=bits)
    np.bitwise_or(bits, inexact, out=bits)
    out[...] = total
    np.copyto(out, NAN_F32, where=np.isnan(out))


def sum_f32(x: F32Array, y: F32Array) -> F32Array:
    """x + y rounded once to nearest even, with subnormals kept; every NaN is 0x7FFFFFFF.

    So adds `add.rn.f32`, and so does TMA in L2 (`cp.reduce.async.bulk.tensor`; on an H100, with
    subnormals, zeros, infinities and NaN on either side).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.asarray(x + y)
    np.copyto(total, NAN_F32, where=np.isnan(total))
    return total


def round_to(x: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """x rounded to nearest even in `dtype`, as the GPU's `cvt.rn` (E4M3: `.satfinite`).

    Parameters
    ----------
    x : float32, any shape
    dtype : BF16, E4M3 or F32
    Returns
    -------
    dtype.numpy, same shape. BF16: NaN is 0x7FFF. E4M3: beyond +-448 and infinite saturate to
    +-448, NaN is 0x7F. F32: x itself.
    Raises
    ------
    ProblemError : x is not float32, or dtype is not one of the three
    Notes
    -----
    PTX ISA, `cvt`; HOPPER.md section 2.
    """
    if x.dtype != np.float32:
        raise ProblemError(f"x must be float32, got {x.dtype}: convert it first")
    if dtype == F32:
        return x
    if dtype not in (BF16, E4M3):
        raise ProblemError(f"cannot round to {dtype}: use one of {BF16}, {E4M3}, {F32}")
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if dtype == BF16:
            out = np.asarray(x.astype(dtype.numpy))
            np.copyto(out.view(np.uint16), np.uint16(_NAN_BF16), where=np.isnan(x))
        else:
            out = np.asarray(np.clip(x, -E4M3_MAX, E4M3_MAX).astype(dtype.numpy))
            np.copyto(out.view(np.uint8), np.uint8(_NAN_E4M3), where=np.isnan(x))
    return out


def quantize_rows(x: NDArray[Any], power_of_two: bool = False) -> tuple[NDArray[Any], F32Array]:
    """E4M3 values and one float32 scale a row of the last axis, as a GEMM's epilogue makes them.

    amax = max(|x|, AMAX_FLOOR), scale = rn(amax / 448) and q = E4M3 satfinite of rn(x * rn(448 /
    amax)): one division a row, where `quantize_blocks` has one an element, and so perhaps another
    last bit. `power_of_two` rounds the scale up to a power of two, by which x is divided exactly.
    A row with a NaN gets a scale of NaN, and NaN wherever x is.

    Parameters
    ----------
    x : float32 or, for exact numerics, float64 [..., n]
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        amax = np.maximum(np.abs(x).max(axis=-1), x.dtype.type(AMAX_FLOOR)).astype(np.float32)
        scale: F32Array = amax / np.float32(E4M3_MAX)
        inverse: F32Array = np.float32(E4M3_MAX) / amax
        if power_of_two:
            scale = ceil_to_power_of_two(scale)
            inverse = np.float32(1) / scale
        scaled = (x * inverse[..., None].astype(x.dtype)).astype(np.float32)
    np.copyto(scale, NAN_F32, where=np.isnan(scale))
    return round_to(scaled, E4M3), scale


def ceil_to_power_of_two(scale: F32Array) -> F32Array:
    """Scales above 0 rounded up to powers of two, as ue8m0 holds them; infinities and NaN stay."""
    rounded = (scale.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
    return np.where(np.isfinite(scale), rounded.view(np.float32), scale)


def check_block(block: object) -> None:
    """Raise ProblemError unless `block` is a pair of positive ints: rows and columns of a block."""
    pair = block if isinstance(block, tuple) else ()
    if len(pair) != 2 or not all(type(extent) is int and extent > 0 for extent in pair):
        raise ProblemError(f"block must be positive, two ints, got {block!r}: try (1, 128)")


def quantize_blocks(x: NDArray[Any], block: tuple[int, int]) -> tuple[NDArray[Any], F32Array]:
    """E4M3 values and one float32 scale a block, so that x is about q * scale.

    Per block: scale = max(amax, AMAX_FLOOR) / 448, q = E4M3 satfinite of x / scale, each division
    IEEE float32. A GPU repeats it bit for bit with the same two divisions (in torch divide by a
    tensor: a Python scalar as divisor becomes a multiplication by its reciprocal there).

    Parameters
    ----------
    x : float32 or bfloat16 [m, k]
    block : (rows, columns) of a block; the last ones may be partial
    Returns
    -------
    q : float8_e4m3fn [m, k]
    scale : float32 [ceil(m / rows), ceil(k / columns)], >= 2^-63
    Raises
    ------
    ProblemError : x is not 2-D float32 or bfloat16, holds NaN or Inf, or block is not positive
    Notes
    -----
    The blockwise recipe of DeepSeek-V3 (1x128 activations, 128x128 weights). AMAX_FLOOR is
    448 * 2^-63: an all-zero block gets scale 2^-63.
    """
    if x.ndim != 2 or x.dtype not in (F32.numpy, BF16.numpy):
        raise ProblemError(
            f"x must be a 2-D array of float32 or bfloat16, got {x.dtype} {list(x.shape)}"
        )
    check_block(block)
    values = x.astype(np.float32, copy=False)
    (m, k), (block_m, block_k) = x.shape, block
    if x.size == 0:
        num_blocks = (-(-m // block_m), -(-k // block_k))
        return np.zeros((m, k), E4M3.numpy), np.zeros(num_blocks, np.float32)
    amax = np.maximum.reduceat(np.abs(values), np.arange(0, k, block_k), axis=1)
    amax = np.maximum.reduceat(amax, np.arange(0, m, block_m), axis=0)
    if not np.isfinite(amax).all():
        i, j = np.argwhere(~np.isfinite(values))[0]
        raise ProblemError(
            f"x must be finite, got {values[i, j]} at [{i}, {j}]: no scale can represent it"
        )
    amax = np.maximum(amax, np.float32(AMAX_FLOOR))
    scale: F32Array = np.divide(amax, np.float32(E4M3_MAX), dtype=np.float32)
    spread = np.repeat(np.repeat(scale, block_m, axis=0)[:m], block_k, axis=1)[:, :k]
    return round_to(values / spread, E4M3), scale
