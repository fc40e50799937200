"""The problem of MLA decode: attention of few query tokens over a paged cache of latent keys."""

from __future__ import annotations

from dataclasses import dataclass

from .dtypes import BF16, F16, DType
from .errors import ProblemError

MAX_HEADS = 128
MAX_QUERIES = 8
PAGES = (16, 32, 64, 128)
HEAD_DIMS = ((576, 512), (512, 512), (320, 256))  # of keys, of values


@dataclass(frozen=True)
class MlaDecode:
    """o = softmax(scale * q k^T) v, k the first `length` rows of a sequence's pages, v a part of k.

    q [b, num_queries, num_heads, head_dim_qk] and o [.., head_dim_v] have `dtype`, as the cache
    [num_blocks, page, 1, head_dim_qk]; v is k's first head_dim_v columns. b, lengths, the pages
    and the scale are run-time. With `causal`, token t of a sequence's num_queries sees
    num_queries - 1 - t keys less than the last one.
    """

    num_heads: int
    num_queries: int = 1
    head_dim_qk: int = 576
    head_dim_v: int = 512
    page: int = 64
    dtype: DType = BF16
    causal: bool = True

    def __str__(self) -> str:
        mask = ", causal" if self.causal else ""
        return (
            f"mla decode {self.dtype} q[b, {self.num_queries}, {self.num_heads},"
            f" {self.head_dim_qk}] x kv[blocks, {self.page}, 1, {self.head_dim_qk}]"
            f" -> o[b, {self.num_queries}, {self.num_heads}, {self.head_dim_v}]{mask}"
        )

    @property
    def num_rows(self) -> int:
        """Query rows of a sequence, those of a token side by side."""
        return self.num_heads * self.num_queries


def check_mla(problem: MlaDecode) -> None:
    """Raise ProblemError, naming the rule and what is legal, unless `problem` keeps all rules."""
    if not isinstance(problem, MlaDecode):
        raise ProblemError(f"the problem is a {type(problem).__name__}, must be an MlaDecode")
    for name, value, high in (
        ("num_heads", problem.num_heads, MAX_HEADS),
        ("num_queries", problem.num_queries, MAX_QUERIES),
    ):
        if type(value) is not int or not 1 <= value <= high:
            raise ProblemError(f"{name} = {value!r} must be in 1..{high}")
    dims = problem.head_dim_qk, problem.head_dim_v
    if dims not in HEAD_DIMS:
        legal = ", ".join(map(str, HEAD_DIMS))
        raise ProblemError(f"head dims (of keys, of values) are {dims}, must be one of {legal}")
    if type(problem.page) is not int or problem.page not in PAGES:
        legal = ", ".join(map(str, PAGES))
        raise ProblemError(f"page = {problem.page!r} keys, must be one of {legal}")
    if problem.dtype not in (BF16, F16):
        name = getattr(problem.dtype, "name", repr(problem.dtype))
        raise ProblemError(f"q has dtype {name}, must be {BF16.name} or {F16.name}")
    if type(problem.causal) is not bool:
        raise ProblemError(f"causal = {problem.causal!r} must be True or False")
