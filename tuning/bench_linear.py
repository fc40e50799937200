"""The benchmark of `jitgen.nn.Fp8Linear`: a step, forward and backward, beside torch's in bfloat16.

Steps are timed in CUDA graphs of some, as a training loop that is bound by the GPU runs them, and
one by one as Python calls them. Both sides take turns; what is reported is the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

STEPS = 10  # of a graph, or between two looks at the clock
ROUNDS = 7
METHOD = f"wall clock around {STEPS} steps, median of {ROUNDS} rounds in which all take turns"


@dataclass(frozen=True)
class LinearShape:
    """y [tokens, out_features] of x [tokens, in_features], without a bias."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"[{self.tokens}, {self.in_features}] x {self.out_features}"


@dataclass(frozen=True)
class LinearRow:
    """Microseconds of a step, medians.

    bf16 : of torch.nn.Linear
    fp8 : of Fp8Linear, which quantizes x, the weight and dy
    kept : of Fp8Linear whose weight's codes are there, as with `keep_codes` where it did not change
    eager_bf16, eager_fp8, eager_kept : the same where Python launches each kernel
    """

    shape: LinearShape
    bf16: float
    fp8: float
    kept: float
    eager_bf16: float
    eager_fp8: float
    eager_kept: float

    def to_json(self) -> dict[str, Any]:
        """All fields, and the ratios."""
        ratios = {"fp8": self.bf16 / self.fp8, "kept": self.bf16 / self.kept}
        return asdict(self) | {"derived": {"speedups": ratios}}


def bench_linear(shapes: Iterable[LinearShape], device: str = "cuda") -> Iterator[LinearRow]:
    """A row for each shape, of random data."""
    for shape in shapes:
        steps = make_steps(shape, device)
        in_graphs = take_turns({name: _captured(step) for name, step in steps.items()})
        eager = take_turns({name: _repeated(step) for name, step in steps.items()})
        yield LinearRow(shape, *in_graphs.values(), *eager.values())


def make_steps(shape: LinearShape, device: str) -> dict[str, Callable[[], Any]]:
    """What computes y and the gradients of x and of the weight, by name."""
    import torch

    from ..nn import Fp8Linear
    from ..nn.linear import multiply

    features = shape.in_features, shape.out_features
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(shape.tokens, shape.in_features, requires_grad=True, **options)
    dy = torch.randn(shape.tokens, shape.out_features, **options)
    usual = torch.nn.Linear(*features, bias=False, **options)
    layer = Fp8Linear(*features, bias=False, **options)
    codes = layer.weight_codes(transposed=True)

    def step(weight: torch.Tensor, product: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(product(), [x, weight], dy)

    return {
        "bf16": step(usual.weight, lambda: usual(x)),
        "fp8": step(layer.weight, lambda: layer(x)),
        "kept": step(layer.weight, lambda: multiply(x, layer.weight, codes)),
    }


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """STEPS of them in a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            step()
    replay: Callable[[], Any] = graph.replay
    return replay


def _repeated(step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def take_turns(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of each of the STEPS steps that a call runs, medians of ROUNDS."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + ROUNDS):
        for name, call in calls.items():
            begin = _finished_at()
            call()
            times[name].append((_finished_at() - begin) * 1e6 / STEPS)
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first warms


def _finished_at() -> float:
    """The time, in seconds, at which the GPU has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def print_rows(console: Console, rows: Iterable[LinearRow]) -> None:
    """A table, and beside the times how much faster than bfloat16 they are."""
    from rich.table import Table

    table = Table("step", "BF16 us", "FP8 us", "weight's codes kept", "eager: BF16", "FP8", "kept")
    for row in rows:
        pairs = (
            (row.bf16, row.fp8, row.kept),
            (row.eager_bf16, row.eager_fp8, row.eager_kept),
        )
        cells = []
        for bf16, *others in pairs:
            cells += [f"{bf16:.1f}", *(f"{us:.1f} (x{bf16 / us:.2f})" for us in others)]
        table.add_row(str(row.shape), *cells)
    console.print(table)
