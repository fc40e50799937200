"""Random operands of MLA decode that are timed, and whether its results are those of float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ..api_mla import mla_decode, mla_decode_sparse, quantize_mla_cache
from ..errors import VerifyError
from ..problem_mla import SCALE_COLUMNS, TOKEN_BYTES, MlaDecode
from ..schedule_mla import MlaSchedule
from ..tokens_mla import CODES, COLUMNS, NUM_SCALES

# Those of FlashMLA's own tests.
ABSOLUTE_ERROR, RELATIVE_ERROR, COSINE_ERROR, LSE_ERROR = 8e-4, 2.01 / 128, 5e-6, 8 / 65536
SPREAD = 0.1  # standard deviation of keys
PAGES_AT_ONCE = 4096


def make_cache(problem: MlaDecode, num_pages: int) -> Any:
    """A cache of so many pages, on torch's current GPU, all of them random."""
    import torch

    dtype = getattr(torch, problem.dtype.name)
    kind = (TOKEN_BYTES, torch.uint8) if problem.is_fp8 else (problem.head_dim_qk, dtype)
    cache = torch.empty(num_pages, problem.page, 1, kind[0], device="cuda", dtype=kind[1])
    for pages in cache.split(PAGES_AT_ONCE):
        keys = torch.empty(*pages.shape[:3], problem.head_dim_qk, device="cuda", dtype=dtype)
        keys.normal_(0, SPREAD)
        pages.copy_(quantize_mla_cache(keys) if problem.is_fp8 else keys)
    return cache


class MlaOperands:
    """`batch` sequences of `num_keys` keys each, in pages of `cache` in random order.

    topk : of sparse decode: each query token looks at that many random tokens of its sequence
    """

    def __init__(
        self, problem: MlaDecode, batch: int, num_keys: int, cache: Any, topk: int = 0
    ) -> None:
        import torch

        self.problem, self.batch = problem, batch
        self._num_keys, self._cache = num_keys, cache
        generator = torch.Generator("cuda").manual_seed(0)
        num_pages, page = -(-num_keys // problem.page), problem.page
        order = torch.randperm(len(cache), device="cuda", generator=generator).to(torch.int32)
        self._table = order[: batch * num_pages].view(batch, num_pages)
        size = batch, problem.num_queries, problem.num_heads
        dtype = getattr(torch, problem.dtype.name)
        q = torch.randn(*size, problem.head_dim_qk, device="cuda", generator=generator)
        self._q = q.to(dtype)
        self.o = torch.full((*size, problem.head_dim_v), math.nan, device="cuda", dtype=dtype)
        self.lse: Any = None
        self._call: Callable[..., tuple[Any, Any]]
        if topk:
            listed = batch, problem.num_queries * topk
            keys = torch.randint(num_keys, listed, device="cuda", generator=generator)
            indices = self._table.gather(1, keys // page) * page + keys % page
            self._indices = indices.int().view(batch, problem.num_queries, topk)
            self._call = functools.partial(mla_decode_sparse, self._q, cache, self._indices)
        else:
            lengths = torch.full((batch,), num_keys, device="cuda", dtype=torch.int32)
            self._call = functools.partial(
                mla_decode,
                *(self._q, cache, self._table, lengths),
                head_dim_v=problem.head_dim_v,
                causal=problem.causal,
            )

    def run(self, schedule: MlaSchedule | None = None) -> None:
        """o and lse, launched as a user would."""
        _, self.lse = self._call(out=self.o, schedule=schedule)

    def check(self) -> None:
        """Raise VerifyError unless o and lse of the first and the last sequence are those of
        float64, within the bounds above."""
        for sequence, queries, want, want_lse in self._expected:
            got = self.o[sequence, queries].double()
            lse = self.lse[sequence, :, queries].double()
            error = (got - want).abs()
            is_off = ~(error <= ABSOLUTE_ERROR) & ~(error <= RELATIVE_ERROR * want.abs())
            cosine = float(1 - 2 * (got * want).sum() / (got**2 + want**2).sum())
            lse_error = float(((lse - want_lse) / want_lse).abs().max())
            if is_off.any() or not cosine < COSINE_ERROR or not lse_error < LSE_ERROR:
                raise VerifyError(
                    f"{self.problem}, b = {self.batch}, {self._num_keys} keys:"
                    f" {int(is_off.sum())} of {got.numel()} outputs are off, cosine difference"
                    f" {cosine:.1e}, lse by {lse_error:.1e} of itself"
                )

    @functools.cached_property
    def _expected(self) -> list[tuple[int, slice, Any, Any]]:
        """Query tokens of a sequence, with their o and lse in float64."""
        tokens = self._cache.view(-1, self._cache.shape[-1])
        expected = []
        for sequence in sorted({0, self.batch - 1}):
            if self.problem.sparse:
                for t in range(self.problem.num_queries):
                    found = tokens[self._indices[sequence, t].long()]
                    expected.append(self._attend(sequence, slice(t, t + 1), found))
            else:
                found = self._cache[self._table[sequence].long()].flatten(0, 2)
                expected.append(self._attend(sequence, slice(None), found[: self._num_keys]))
        return expected

    def _attend(self, sequence: int, queries: slice, found: Any) -> tuple[int, slice, Any, Any]:
        import torch

        problem, keys = self.problem, decode_rows(found)
        q = self._q[sequence, queries].double()
        scores = torch.einsum("shd,kd->hsk", q, keys) * problem.head_dim_qk**-0.5
        if problem.causal:
            token = torch.arange(len(q), device="cuda")
            limits = len(keys) - (len(q) - 1 - token)[:, None]
            hidden = torch.arange(len(keys), device="cuda")[None] >= limits
            scores.masked_fill_(hidden, -math.inf)
        lse = torch.logsumexp(scores, -1)
        p = torch.exp(scores - lse[..., None])
        o = torch.einsum("hsk,kd->shd", p, keys[:, : problem.head_dim_v])
        return sequence, queries, o, lse


def decode_rows(rows: Any) -> Any:
    """Rows of a cache, on the device where they are, in float64 [n, 576]: of uint8 [n, 656] exactly
    what `decode_tokens` gives."""
    import torch

    if rows.dtype != torch.uint8:
        return rows.double()
    codes, scales, tail = rows.split((CODES, 4 * NUM_SCALES, 2 * (COLUMNS - CODES)), 1)
    of_code = scales.contiguous().view(torch.float32).double().repeat_interleave(SCALE_COLUMNS, 1)
    values = codes.contiguous().view(torch.float8_e4m3fn).float().double() * of_code
    return torch.cat([values, tail.contiguous().view(torch.bfloat16).double()], dim=1)
