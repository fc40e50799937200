"""Hopper's arithmetic on 16-bit operands in NumPy: BF16 and FP16 wgmma."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, F16
from .errors import ProblemError
from .numerics import NAN_F32, F32Array

WGMMA_16_K = 16
_FRACTION_BITS = 25  # that a term keeps below the largest exponent of its step
_ZERO_EXPONENT = -133  # of a term that is zero
_MIN_EXPONENTS = {BF16.numpy: -126, F16.numpy: -14}  # of normal numbers; subnormals have it too


def wgmma_16(a: NDArray[Any], b: NDArray[Any], acc: F32Array | None = None) -> F32Array:
    """acc + A @ B^T as a chain of `wgmma.m64nNk16.f32` leaves it in the accumulator.

    Each step of 16 of k: every product, and the accumulator, is truncated toward zero to a multiple
    of 2^(E - 25), E the largest exponent among them (that of a product is the sum of its factors');
    they are summed exactly, and the sum is truncated toward zero to float32.

    Parameters
    ----------
    a : bfloat16 or float16 [m, k]; k % 16 == 0
    b : of the same dtype, [n, k]
    acc : float32 [m, n], finite; None for zero
    Returns
    -------
    float32 [m, n]; 0x7FFFFFFF wherever the row of a or the row of b is not finite
    Raises
    ------
    ProblemError : a dtype or shape breaks a rule above
    Notes
    -----
    The public model MMA-Sim (`pip install mmasim`), which the tests compare this with. For finite
    operands; MMA-Sim tells infinities from NaN.
    """
    if a.dtype not in _MIN_EXPONENTS or a.dtype != b.dtype:
        raise ProblemError(
            f"a and b must be both bfloat16 or both float16, got {a.dtype}, {b.dtype}"
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] % WGMMA_16_K:
        raise ProblemError(
            f"a [m, k] and b [n, k] must share k, a multiple of {WGMMA_16_K}; got"
            f" {list(a.shape)} and {list(b.shape)}"
        )
    bad_a, bad_b = (~np.isfinite(x.astype(np.float32)).all(axis=1) for x in (a, b))
    (a64, exponent_a), (b64, exponent_b) = (_split(x) for x in (a, b))
    total = np.zeros((len(a), len(b))) if acc is None else acc.astype(np.float64)
    for k in range(0, a.shape[1], WGMMA_16_K):
        step = slice(k, k + WGMMA_16_K)
        terms = a64[:, None, step] * b64[None, :, step]
        exponents = exponent_a[:, None, step] + exponent_b[None, :, step]
        exponents[terms == 0] = _ZERO_EXPONENT
        top = np.maximum(exponents.max(axis=2), _exponent(total, -126))
        unit = np.ldexp(1.0, top - _FRACTION_BITS)
        terms /= unit[:, :, None]
        np.trunc(terms, out=terms)
        total = _truncate_f32((terms.sum(axis=2) + np.trunc(total / unit)) * unit)
    out = total.astype(np.float32)
    out[bad_a] = NAN_F32
    out[:, bad_b] = NAN_F32
    return out


def _split(x: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The values, zero where they are not finite, and their exponents."""
    values = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return values, _exponent(values, _MIN_EXPONENTS[x.dtype])


def _exponent(x: NDArray[np.float64], least: int) -> NDArray[np.int32]:
    exponent: NDArray[np.int32] = np.maximum(np.frexp(x)[1] - 1, least).astype(np.int32)
    exponent[x == 0] = _ZERO_EXPONENT
    return exponent


def _truncate_f32(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """x rounded toward zero to a float32, as float64."""
    nearest = x.astype(np.float32)
    bits = nearest.view(np.int32)
    bits -= np.abs(nearest.astype(np.float64)) > np.abs(x)  # a step toward zero
    return nearest.astype(np.float64) + 0.0
