"""How far MLA decode over an FP8 cache may be from exact arithmetic: what `jitgen.ir_mla_fp8`
rounds, added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jitgen.tokens_mla import CODES, decode_tokens, split_tokens

Array = NDArray[Any]
# Half a unit in the last place of float16: of a code's product with its ratio, of a ratio, of p.
ROUNDING = 2.0**-11
# In a token's units: ratios of 2^-14 and less are multiples of 2^-24, codes 448 at most, and 64 of
# both together a unit; then the product.
TINY = 448 * 2.0**-25 / 64 + 2.0**-31
# In units of the largest one, of which p has a weight of 2^3 at least: weighted p of 2^-14 and less
# are multiples of 2^-24.
TINY_P = 448 * 2.0**-25 / 2**3
# wgmma: 36 steps of 17 terms, each cut off 2^-25 below the largest; exponentials and sums.
SUMMING = 36 * 17 * 2.0**-25


@dataclass(frozen=True)
class Expected:
    """Results of some query rows in float64, and how far off they may be."""

    o: Array  # [rows, 512]
    lse: Array  # [rows]
    o_error: Array
    lse_error: Array


def expected(q: Array, tokens: Array, scale: float, seen: Array | None = None) -> Expected:
    """Attention of q [rows, 576] to uint8 tokens [n, 656]; seen [rows, n]: all if None.

    With a relative error of 2^-10 in a code (none in blocks of columns with their token's largest
    scale), scores are off by that of sum |q k|, p by twice e^that - 1, and o by p's error of sum
    p |v| beside v's own.
    """
    keys, units = decode_tokens(tokens), np.abs(split_tokens(tokens)[1]).max(axis=1)
    units = units.astype(np.float64)
    rows = q.astype(np.float64)
    scores = rows @ keys.T * scale
    if seen is not None:
        scores[~seen] = -np.inf
    top = scores.max(axis=1, initial=-np.inf, keepdims=True)
    e = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = e.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(total > 0, e / total, 0)
        lse = np.where(total > 0, np.log(total) + top, np.inf)[:, 0]
    code_error = 2 * ROUNDING * np.abs(keys) + TINY * units[:, None]
    code_error[:, CODES:] = 0
    score_error = np.abs(rows) @ (code_error + SUMMING * np.abs(keys)).T * scale
    worst = np.where(e > 0, score_error, 0).max(axis=1, initial=0, keepdims=True) + 2.0**-20
    values = np.abs(keys[:, :CODES])
    o = p @ keys[:, :CODES]
    o_error = (2 * np.expm1(worst) + ROUNDING + SUMMING) * (p @ values) + p @ code_error[:, :CODES]
    o_error += TINY_P * len(tokens) * units.max(initial=0) + 2.0**-8 * np.abs(o)  # o in bfloat16
    return Expected(o, lse, o_error, worst[:, 0] + 2.0**-20 * np.abs(np.nan_to_num(lse, posinf=0)))


def check(want: Expected, o: Array, lse: Array, note: object = "") -> None:
    """Raise AssertionError unless o and lse are within the bounds."""
    error = np.abs(o.astype(np.float64) - want.o)
    assert np.all(error <= want.o_error), (note, (error / want.o_error).max())
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want.lse), str(note))
    known = np.isfinite(want.lse)
    off = np.abs(lse.astype(np.float64) - want.lse)[known]
    assert np.all(off <= want.lse_error[known]), (note, off.max())
