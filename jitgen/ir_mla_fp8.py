"""Ops of MLA decode over an FP8 cache, whose tokens are decoded where they are used.

    op ::= ScaleQueries(dst, tail, unit, src)      dst, tail = the tile's rows of q, times 1 / unit
         | LoadTokens(tokens, src, where)          the block's tokens, as they are in the cache
         | ScoreTokens(dst, q, q_tail, tokens)     dst = q @ tokens^T, in units of q's
         | WeighTokens(weights, growth, ...)       what p of each token is multiplied by
         | SoftenTokens(p, scores, ...)            online softmax; maxima grow when they must
         | AttendTokens(out, p, tokens, factor)    out = out * factor + p @ tokens' first columns
         | Settle(out, max, sum, exponent)         out in units of 1, once all tokens are in it

A token's unit is the largest of its scales. Its codes count in 1 / CODE_UNITS of that, as float16;
so scores of codes are multiplied by units, which is exact enough in float32, and p is, so that
outputs sum what all tokens have in the same unit, 2^exponent of the segment.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ir import Buffer, MlaTensor


@dataclass(frozen=True)
class Tokens:
    """Of a block of tokens: E4M3 codes [keys, 512], the bfloat16 columns behind them [keys, 64],
    float16 ratios of the codes' blocks of 128 columns [keys, 4], and float32 units [keys].

    A token's decoded columns are code * ratio, rounded to float16, in unit / CODE_UNITS.
    """

    codes: Buffer
    tail: Buffer
    ratios: Buffer
    units: Buffer


@dataclass(frozen=True)
class ScaleQueries:
    """e = 14 - floor(log2(the largest |q| of the tile)), 126 at most; q * 2^e, the columns that
    meet codes in float16, the others in bfloat16; unit = 2^-e. Rows beyond the last one are
    without effect."""

    dst: Buffer
    tail: Buffer
    unit: Buffer
    src: MlaTensor

    def __str__(self) -> str:
        return (
            f"{self.dst.name}, {self.tail.name} = {self.src.name}[sequence, rows:+"
            f"{self.dst.shape[0]}] / {self.unit.name}, the power of 2 with which the largest is"
            " in [2^14, 2^15)"
        )


@dataclass(frozen=True)
class LoadTokens:
    """unit = max(largest |scale| of the token, LEAST_UNIT); ratio = CODE_UNITS * scale / unit.

    where : the block table, or for each query token the tokens of the cache that it looks at; of
        those that are not there (beyond a sequence's end, or no token of the cache) all is 0
    """

    tokens: Tokens
    src: MlaTensor
    where: MlaTensor

    def __str__(self) -> str:
        at = (
            f"{self.where.name}[token, key]"
            if self.where.name == "indices"
            else f"{self.where.name}[sequence, key / page], key % page"
        )
        t = self.tokens
        return (
            f"{t.codes.name}, {t.tail.name}, {t.ratios.name}, {t.units.name} = load"
            f" {self.src.name}[{at}] for key:+{t.units.shape[0]} via bulk copies"
        )


@dataclass(frozen=True)
class ScoreTokens:
    """A chain of float16 k16 steps over the codes' columns that starts at 0, times units /
    CODE_UNITS in float32, goes on in bfloat16 over the columns behind them."""

    dst: Buffer
    queries: Buffer
    query_tail: Buffer
    tokens: Tokens

    def __str__(self) -> str:
        t = self.tokens
        return (
            f"{self.dst.name} = mma({self.queries.name}, {t.codes.name} * {t.ratios.name}) *"
            f" {t.units.name} + mma({self.query_tail.name}, {t.tail.name})"
        )


@dataclass(frozen=True)
class WeighTokens:
    """weights = units * 2^(WEIGHT_EXPONENT - exponent).

    With the first block that has a token, and later where floor(log2(its largest unit)) is
    UNIT_SLACK or more above it, `exponent` becomes that plus 1, and growth = 2^(old - new), 2^-126
    at least; else growth is 1.
    """

    weights: Buffer
    growth: Buffer
    exponent: Buffer
    units: Buffer

    def __str__(self) -> str:
        weights, exponent, units = self.weights.name, self.exponent.name, self.units.name
        return (
            f"{exponent}, {self.growth.name} = that of {units}, if that must grow, 2^(old - new);"
            f" {weights} = {units} * 2^(w - {exponent})"
        )


@dataclass(frozen=True)
class SoftenTokens:
    """Online softmax, in units of log2; scale = softmax_scale * log2(e) * unit, a float32:

    if rowmax(scores) > (MAX_SLACK + max) / scale in any of the tile's rows, or growth != 1, in all
    of them top = max(max, rowmax(scores) * scale); else top = max. e = 2^(scores * scale - top);
    sum = sum * 2^(max - top) + rowsum(e); factor = 2^(max - top) * growth; max = top; p = e *
    weights, rounded to p's dtype.
    """

    p: Buffer
    scores: Buffer
    unit: Buffer
    max: Buffer
    sum: Buffer
    factor: Buffer
    weights: Buffer
    growth: Buffer

    def __str__(self) -> str:
        p, scores, top = self.p.name, self.scores.name, self.max.name
        scale = f"scale * {self.unit.name}"
        return (
            f"{top}, {self.factor.name} = max({top}, {scale} * {scores}) if that must grow, 2^(old"
            f" - new) * {self.growth.name}; {p} = 2^({scale} * {scores} - {top}); {self.sum.name}"
            f" += rowsum({p}); {p} *= {self.weights.name}"
        )


@dataclass(frozen=True)
class AttendTokens:
    """A chain of float16 k16 steps over the block's tokens."""

    out: Buffer
    p: Buffer
    tokens: Tokens
    factor: Buffer

    def __str__(self) -> str:
        out, codes, ratios = self.out.name, self.tokens.codes.name, self.tokens.ratios.name
        return f"{out} = {out} * {self.factor.name} + mma({self.p.name}, ({codes} * {ratios})^T)"


@dataclass(frozen=True)
class Settle:
    """out = out * 2^(exponent - WEIGHT_EXPONENT) / CODE_UNITS; max = -inf where sum is 0."""

    out: Buffer
    max: Buffer
    sum: Buffer
    exponent: Buffer

    def __str__(self) -> str:
        out, top = self.out.name, self.max.name
        return f"{out} *= 2^({self.exponent.name} - w); {top} = -inf where {self.sum.name} = 0"


TokenOp = (
    ScaleQueries | LoadTokens | ScoreTokens | WeighTokens | SoftenTokens | AttendTokens | Settle
)
