"""Benchmark of MLA decode: what one call takes, beside FlashMLA's times from a file.

A time is reported only for a call whose result was compared with float64 just before, within the
bounds of FlashMLA's own tests. Ratios are FlashMLA's time / jitgen's: above 1, jitgen is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..problem_mla import TOKEN_BYTES, MlaDecode
from ..runtime import driver
from .bench import baseline_file
from .operands_mla import MlaOperands, make_cache
from .report import geomean
from .timing import measure_event_us

MLA_FILE = "h100_mla_decode.json"
PAGE = 64
FORMS = ("bf16", "fp8", "sparse")  # of cache and lists
SPARSE_KEYS = 32768  # of a sequence, of which sparse decode takes some


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
    def num_pages(self) -> int:
        """Of all sequences."""
        return self.b * -(-self.s_k // PAGE)

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
    shapes = list(shapes)
    baselines: dict[MlaShape, float] = {}
    if device.name == mla_baseline_meta()["gpu"]:
        for form in FORMS:
            baselines |= mla_baselines(form)
    for name in dict.fromkeys(shape.cache for shape in shapes):
        some = [shape for shape in shapes if shape.cache == name]
        cache = make_cache(some[0].problem, max(shape.num_pages for shape in some))
        for shape in some:
            # No more than its own: pages that lie further apart take longer to look up.
            us = _time(shape, cache[: shape.num_pages])
            yield MlaRow(shape, us, baselines.get(shape))


def _time(shape: MlaShape, cache: Any) -> float:
    operands = MlaOperands(shape.problem, shape.b, shape.s_k, cache, shape.topk)
    operands.run()
    operands.check()
    return measure_event_us(operands.run)


def known_geomean(ratios: Iterable[float | None]) -> float | None:
    """The geometric mean of those that are known."""
    known = [ratio for ratio in ratios if ratio is not None]
    return geomean(known) if known else None
