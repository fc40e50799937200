"""The problem of MLA decode: attention of few query tokens over a paged cache of latent keys."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from .dtypes import BF16, F16, DType
from .errors import ProblemError

MAX_HEADS = 128
MAX_QUERIES = 8
PAGES = (16, 32, 64, 128)  # of plain caches, whose pages TMA moves
MAX_PAGE = 4096  # of FP8 caches
HEAD_DIMS = ((576, 512), (512, 512), (320, 256))  # of keys, of values
CACHES = ("plain", "fp8")
TOKEN_BYTES = 656  # of an FP8 cache: 512 codes, 4 float32 scales, 64 bfloat16
FP8_HEAD_DIMS = HEAD_DIMS[0]
SCALE_COLUMNS = 128  # that share a scale


@dataclass(frozen=True)
class MlaDecode:
    """o = softmax(scale * q k^T) v, k the first `length` rows of a sequence's pages, v a part of k.

    q [b, num_queries, num_heads, head_dim_qk] and o [.., head_dim_v] have `dtype`, as the cache
    [num_blocks, page, 1, head_dim_qk]; v is k's first head_dim_v columns. b, lengths, the pages
    and the scale are run-time. With `causal`, token t of a sequence's num_queries sees
    num_queries - 1 - t keys less than the last one.

    cache : "plain", or "fp8": uint8 [num_blocks, page, 1, 656], for each token 512 E4M3 codes, a
        float32 scale for each 128 of them, and 64 bfloat16 elements
    sparse : each query token has a list of its own of tokens of the cache, in place of a
        sequence's first `length`; needs an FP8 cache, and is never causal
    sink : each head has a score of its own beside its keys', without a value; of sparse decode
    """

    num_heads: int
    num_queries: int = 1
    head_dim_qk: int = 576
    head_dim_v: int = 512
    page: int = 64
    dtype: DType = BF16
    causal: bool = True
    cache: str = "plain"
    sparse: bool = False
    sink: bool = False

    def __str__(self) -> str:
        mask = ", causal" if self.causal else ""
        mask = ", sparse" + ", sink" * self.sink if self.sparse else mask
        columns = f"{TOKEN_BYTES} bytes" if self.is_fp8 else self.head_dim_qk
        return (
            f"mla decode {self.dtype} q[b, {self.num_queries}, {self.num_heads},"
            f" {self.head_dim_qk}] x kv[blocks, {self.page}, 1, {columns}]"
            f" -> o[b, {self.num_queries}, {self.num_heads}, {self.head_dim_v}]{mask}"
        )

    @property
    def is_fp8(self) -> bool:
        """Whether keys are decoded on their way into shared memory."""
        return self.cache == "fp8"

    @property
    def num_tokens(self) -> int:
        """Query tokens of a sequence that have keys of their own, and so count as sequences."""
        return self.num_queries if self.sparse else 1

    @property
    def num_rows(self) -> int:
        """Query rows that share their keys, those of a token side by side."""
        return self.num_heads * (self.num_queries // self.num_tokens)


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
    if problem.dtype not in (BF16, F16):
        name = getattr(problem.dtype, "name", repr(problem.dtype))
        raise ProblemError(f"q has dtype {name}, must be {BF16.name} or {F16.name}")
    for name in ("causal", "sparse", "sink"):
        if type(getattr(problem, name)) is not bool:
            raise ProblemError(f"{name} = {getattr(problem, name)!r} must be True or False")
    if problem.cache not in CACHES:
        raise ProblemError(f"cache = {problem.cache!r} must be one of {', '.join(CACHES)}")
    pages: Container[int] = range(1, MAX_PAGE + 1) if problem.is_fp8 else PAGES
    if type(problem.page) is not int or problem.page not in pages:
        legal = f"in 1..{MAX_PAGE}" if problem.is_fp8 else f"one of {', '.join(map(str, PAGES))}"
        raise ProblemError(f"page = {problem.page!r} keys, must be {legal}")
    if problem.is_fp8 and (problem.dtype != BF16 or dims != FP8_HEAD_DIMS):
        raise ProblemError(
            f"an FP8 cache has head dims {FP8_HEAD_DIMS} and queries of {BF16.name}, got {dims} and"
            f" {problem.dtype.name}"
        )
    if problem.sparse and (problem.causal or not problem.is_fp8):
        raise ProblemError(
            f"sparse decode takes an FP8 cache and no causal mask, got cache = {problem.cache!r},"
            f" causal = {problem.causal}"
        )
    if problem.sink and not problem.sparse:
        raise ProblemError("sink = True is of sparse decode")
