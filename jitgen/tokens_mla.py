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
# The arithmetic of `ir_mla_fp8`, with the same names in templates/include/jitgen/mla_codes.cuh.
LEAST_UNIT = 2.0**-60  # of a token
CODE_UNITS = 64.0  # that a code of the largest scale counts in a token's unit: a ratio in float16
WEIGHT_EXPONENT = 4  # p <= 2^8 and units < 2^(exponent + 3): weighted p < 2^15, in float16
UNIT_SLACK = 3  # by which units may exceed the exponent, in log2
NO_MAX = -1e38  # the maximum before the first key: below all that follow


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


def decode_tokens(tokens: Array) -> Array:
    """float64 [n, 576] of uint8 [n, 656], exact; NaN for the codes of NaN."""
    codes, scales, tail = split_tokens(tokens)
    of_code = np.repeat(scales.astype(np.float64), SCALE_COLUMNS, axis=1)
    return np.concatenate([codes.astype(np.float64) * of_code, tail.astype(np.float64)], axis=1)


def split_tokens(tokens: Array) -> tuple[Array, Array, Array]:
    """Codes [n, 512], float32 scales [n, 4] and bfloat16 [n, 64] of uint8 [n, 656]."""
    codes, scales, tail = (
        np.ascontiguousarray(part)
        for part in np.split(tokens, (CODES, CODES + 4 * NUM_SCALES), axis=1)
    )
    return codes.view(E4M3.numpy), scales.view(np.float32), tail.view(BF16.numpy)
