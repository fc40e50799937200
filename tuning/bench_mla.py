"""Benchmark of MLA decode: what one call takes, beside FlashMLA's times from a file.

A time is reported only for a call whose result was compared with float64 just before, within the
bounds of FlashMLA's own tests. Ratios are FlashMLA's time / jitgen's: above 1, jitgen is faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..api_mla import mla_decode, mla_decode_sparse, quantize_mla_cache
from ..errors import VerifyError
from ..problem_mla import TOKEN_BYTES, MlaDecode
from ..runtime import driver
from ..tokens_mla import decode_tokens
from .bench import baseline_file
from .report import geomean
from .timing import measure_event_us

MLA_FILE = "h100_mla_decode.json"
PAGE = 64
FORMS = ("bf16", "fp8", "sparse")  # of cache and lists
SPARSE_KEYS = 32768  # of a sequence, of which sparse decode takes some
ABSOLUTE_ERROR, RELATIVE_ERROR, COSINE_ERROR, LSE_ERROR = 8e-4, 2.01 / 128, 5e-6, 8 / 65536


@dataclass(frozen=True)
class MlaShape:
    """`b` sequences of `s_k` keys each, DeepSeek-V3's head dims, causal; `cache` "plain" is BF16.

    With `topk` sparse: each query token looks at that many random tokens among the s_k.
    """

    b: int
    s_q: int
    h: int
    s_k: int
    cache: str = "plain"
    topk: int = 0

    def __str__(self) -> str:
        form = f"-top{self.topk}" if self.topk else "-fp8" if self.cache == "fp8" else ""
        return f"b{self.b}-q{self.s_q}-h{self.h}-k{self.s_k}{form}"

    @property
    def problem(self) -> MlaDecode:
        causal = self.s_q > 1 and not self.topk
        return MlaDecode(
            self.h, self.s_q, page=PAGE, causal=causal, cache=self.cache, sparse=self.topk > 0
        )

    @property
    def form(self) -> str:
        """One of FORMS."""
        return "sparse" if self.topk else "fp8" if self.cache == "fp8" else "bf16"

    @property
    def num_keys(self) -> int:
        """That a query token looks at."""
        return self.topk or self.s_k

    @property
    def flops(self) -> int:
        """As the baselines count them: no mask."""
        return 2 * self.b * self.s_q * self.h * self.num_keys * (576 + 512)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, queries and outputs, each once."""
        lists = self.s_q if self.topk else 1
        keys = lists * self.num_keys * (TOKEN_BYTES if self.problem.is_fp8 else 576 * 2)
        return self.b * (keys + self.s_q * self.h * (576 + 512) * 2)


@dataclass(frozen=True)
class MlaRow:
    """One shape, measured; flashmla_us is None on another GPU than the baselines'."""

    shape: MlaShape
    us: float
    flashmla_us: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.flashmla_us is None else self.flashmla_us / self.us

    @property
    def tflops(self) -> float:
        return self.shape.flops / self.us / 1e6

    @property
    def gb_per_s(self) -> float:
        return self.shape.num_bytes / self.us / 1e3

    def to_json(self) -> dict[str, Any]:
        """All fields, and figures derived of them, as JSON values."""
        derived = {"ratio": self.ratio, "tflops": self.tflops, "gb_per_s": self.gb_per_s}
        return asdict(self) | {"derived": derived}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MlaRow:
        """The row that `to_json` wrote; KeyError or TypeError if it did not."""
        return cls(MlaShape(**data["shape"]), data["us"], data["flashmla_us"])


def mla_baseline_meta() -> Mapping[str, Any]:
    """Where, when and how FlashMLA was measured; `gpu` as the driver names it."""
    meta: dict[str, Any] = baseline_file(MLA_FILE)["meta"]
    return meta


def mla_baselines(form: str = "bf16") -> Mapping[MlaShape, float]:
    """FlashMLA's times in microseconds, on the GPU that `mla_baseline_meta` names.

    form : one of FORMS; it has no dense decode over an FP8 cache: for "fp8" those over BF16
    """
    if form == "sparse":
        return {
            MlaShape(row["b"], row["s_q"], row["h"], SPARSE_KEYS, "fp8", row["topk"]): row[
                "flashmla_us"
            ]
            for row in baseline_file(MLA_FILE)["sparse_fp8_decode"]
        }
    cache = "fp8" if form == "fp8" else "plain"
    return {
        MlaShape(row["b"], row["s_q"], row["h"], row["s_k"], cache): row["flashmla_us"]
        for row in baseline_file(MLA_FILE)["dense_decode"]
    }


def bench_mla(shapes: Iterable[MlaShape], device: driver.Device) -> Iterator[MlaRow]:
    """Each shape's row as it is measured, on torch's current GPU, which is `device`.

    Raises
    ------
    VerifyError : a result is not within the bounds; nothing is timed after that
    """
    import torch

    shapes = list(shapes)
    baselines: dict[MlaShape, float] = {}
    if device.name == mla_baseline_meta()["gpu"]:
        for form in FORMS:
            baselines |= mla_baselines(form)
    for name in dict.fromkeys(shape.cache for shape in shapes):
        some = [shape for shape in shapes if shape.cache == name]
        num_blocks = max(shape.b * -(-shape.s_k // PAGE) for shape in some)
        kinds = {"plain": (576, torch.bfloat16), "fp8": (TOKEN_BYTES, torch.uint8)}
        columns, dtype = kinds[name]
        cache = torch.empty(num_blocks, PAGE, 1, columns, device="cuda", dtype=dtype)
        for blocks in cache.split(4096):
            keys = torch.empty(*blocks.shape[:3], 576, device="cuda", dtype=torch.bfloat16)
            keys.normal_(0, 0.1)
            blocks.copy_(quantize_mla_cache(keys) if name == "fp8" else keys)
        for shape in some:
            yield MlaRow(shape, _time(shape, cache), baselines.get(shape))


def _time(shape: MlaShape, cache: Any) -> float:
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    num_pages = -(-shape.s_k // PAGE)
    order = torch.randperm(len(cache), device="cuda", generator=generator).to(torch.int32)
    table = order[: shape.b * num_pages].view(shape.b, num_pages)
    size = (shape.b, shape.s_q, shape.h)
    q = torch.randn(*size, 576, device="cuda", generator=generator).bfloat16()
    lengths = torch.full((shape.b,), shape.s_k, device="cuda", dtype=torch.int32)
    out = torch.full((*size, 512), math.nan, device="cuda", dtype=torch.bfloat16)
    call: Callable[[], tuple[Any, Any]] = functools.partial(
        mla_decode, q, cache, table, lengths, causal=shape.problem.causal, out=out
    )
    if shape.topk:
        listed = (shape.b, shape.s_q * shape.topk)
        keys = torch.randint(shape.s_k, listed, device="cuda", generator=generator)
        indices = table.gather(1, keys // PAGE) * PAGE + keys % PAGE
        indices = indices.int().view(shape.b, shape.s_q, shape.topk)
        call = functools.partial(mla_decode_sparse, q, cache, indices, out=out)
    _, lse = call()
    tokens = cache.view(-1, cache.shape[-1])
    for sequence in {0, shape.b - 1}:
        if shape.topk:
            for t in range(shape.s_q):
                found = _keys(tokens[indices[sequence, t].long()])
                one = slice(t, t + 1)
                _check(shape, q[sequence, one], found, out[sequence, one], lse[sequence, :, one])
        else:
            found = _keys(cache[table[sequence].long()].flatten(0, 2)[: shape.s_k])
            _check(shape, q[sequence], found, out[sequence], lse[sequence])
    return measure_event_us(call)


def _keys(tokens: Any) -> Any:
    """Rows of a cache in float64."""
    import torch

    if tokens.dtype == torch.bfloat16:
        return tokens.double()
    decoded = decode_tokens(tokens.cpu().numpy()).astype(np.float32)
    return torch.from_numpy(decoded).to(tokens.device).double()


def _check(shape: MlaShape, q: Any, keys: Any, o: Any, lse: Any) -> None:
    """Raise VerifyError unless one sequence's results are those of float64, within the bounds."""
    import torch

    scores = torch.einsum("shd,kd->hsk", q.double(), keys) * 576**-0.5
    if shape.problem.causal:
        token, key = torch.arange(shape.s_q, device="cuda"), torch.arange(shape.s_k, device="cuda")
        hidden = key[None] >= shape.s_k - (shape.s_q - 1 - token)[:, None]
        scores.masked_fill_(hidden, -math.inf)
    want_lse = torch.logsumexp(scores, -1)
    want = torch.einsum("hsk,kd->shd", torch.exp(scores - want_lse[..., None]), keys[:, :512])
    got = o.double()
    error = (got - want).abs()
    num_bad = int(((error > ABSOLUTE_ERROR) & (error > RELATIVE_ERROR * want.abs())).sum())
    cosine = float(1 - 2 * (got * want).sum() / (got**2 + want**2).sum())
    lse_error = float(((lse.double() - want_lse) / want_lse).abs().max())
    if num_bad or not cosine < COSINE_ERROR or not lse_error < LSE_ERROR:
        raise VerifyError(
            f"{shape}: {num_bad} of {got.numel()} outputs are off, cosine difference {cosine:.1e},"
            f" lse by {lse_error:.1e} of itself"
        )


def known_geomean(ratios: Iterable[float | None]) -> float | None:
    """The geometric mean of those that are known."""
    known = [ratio for ratio in ratios if ratio is not None]
    return geomean(known) if known else None
