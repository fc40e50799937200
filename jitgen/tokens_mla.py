"""Tokens of an FP8 cache of latent keys, as FlashMLA lays them out, 656 bytes each: 512 E4M3 codes,
a float32 scale for each 128 of them, and the last 64 columns in bfloat16. In NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, E4M3
from .errors import ProblemError
from .numerics import quantize_blocks
from .problem_mla import FP8_HEAD_DIMS, SCALE_COLUMNS, TOKEN_BYTES

Array = NDArray[Any]
COLUMNS, CODES = FP8_HEAD_DIMS
NUM_SCALES = CODES // SCALE_COLUMNS
_NAN_VALUE = 480.0  # what the code of NaN counts as: its bits go on where those of 448 end
_BF16_BITS = 8  # of a significand


def quantize_tokens(keys: Array) -> Array:
    """uint8 [..., 656] of bfloat16 [..., 576]; ProblemError if it is not that, or not finite."""
    if keys.dtype != BF16.numpy or keys.ndim == 0 or keys.shape[-1] != COLUMNS:
        raise ProblemError(
            f"keys are {keys.dtype}{list(keys.shape)}, must be {BF16.name} [.., {COLUMNS}]"
        )
    rows = keys.reshape(-1, COLUMNS)
    codes, scales = quantize_blocks(rows[:, :CODES], (1, SCALE_COLUMNS))
    parts = (codes, scales, np.ascontiguousarray(rows[:, CODES:]))
    tokens = np.concatenate([part.view(np.uint8) for part in parts], axis=1)
    return tokens.reshape(*keys.shape[:-1], TOKEN_BYTES)


def decode_tokens(tokens: Array, *, exact: bool = False) -> Array:
    """[n, 576] of uint8 [n, 656]: bfloat16 as `ir_mla.LoadTokens` says, or exact, as float64."""
    codes, scales, tail = np.split(tokens, (CODES, CODES + 4 * NUM_SCALES), axis=1)
    values = codes.view(E4M3.numpy).astype(np.float64)
    values = np.where(np.isnan(values), np.where(codes & 0x80, -_NAN_VALUE, _NAN_VALUE), values)
    of_code = np.repeat(np.ascontiguousarray(scales).view(np.float32), SCALE_COLUMNS, axis=1)
    last = np.ascontiguousarray(tail).view(BF16.numpy)
    if exact:
        return np.concatenate([values * of_code.astype(np.float64), last.astype(np.float64)], 1)
    with np.errstate(invalid="ignore", over="ignore"):
        high = of_code.astype(BF16.numpy).astype(np.float32)
        low = (of_code - high).astype(BF16.numpy).astype(np.float64)
        decoded = _round(values * high.astype(np.float64) + _round(values * low))
        return np.concatenate([decoded.astype(BF16.numpy), last], axis=1)


def _round(x: Array) -> Array:
    """float64 rounded to bfloat16's precision, to nearest even, as float64."""
    fraction, exponent = np.frexp(x)
    rounded: Array = np.ldexp(np.rint(np.ldexp(fraction, _BF16_BITS)), exponent - _BF16_BITS)
    return rounded
