"""Host time of a call: what Python and the driver take until its work is in the GPU's queue.

The GPU is not waited for within a batch of calls; between batches it is, so that the queue, which
holds about a thousand launches, never fills.
"""

from __future__ import annotations

import functools
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import PLAIN, bind, gemm
from ..api_quantize import quantize
from ..calls import find_call
from ..errors import VerifyError
from ..runtime import driver
from ..runtime.launch import MAX_IDLE_LAUNCHES
from .bench import Shape
from .peers import cublaslt_call

if TYPE_CHECKING:
    from rich.console import Console

BATCH_CALLS = 100
NUM_WARMUP_BATCHES = 3
NUM_ACTIVATIONS = 8 * MAX_IDLE_LAUNCHES  # too many addresses for one launch each to be kept

GEMM_OUT = "gemm(out=out)"
GEMM_MOVED = "gemm(out=out), a and sfa moved"
GEMM = "gemm()"
BOUND = "bind(out=out)()"
LAUNCH = "cuLaunchKernel alone, same kernel"
SCALED_MM = "torch._scaled_mm, a scale a tensor"

# What a call may take on the host of an H100, in microseconds.
BARS_US: Mapping[str, float] = {GEMM_OUT: 10.0, GEMM_MOVED: 10.0, GEMM: 13.0, BOUND: 6.0}


@dataclass(frozen=True)
class HostTime:
    """Host time of one call: median, 10th and 90th percentile of the means of batches."""

    name: str
    median_us: float
    p10_us: float
    p90_us: float
    num_calls: int

    @property
    def bar_us(self) -> float | None:
        return BARS_US.get(self.name)

    @property
    def is_over_bar(self) -> bool:
        return self.bar_us is not None and self.median_us > self.bar_us


@dataclass(frozen=True)
class HostResult:
    """Host times of calls of one shape, and where they were measured."""

    shape: Shape
    times: tuple[HostTime, ...]
    gpu: str
    cpu: str
    python: str
    torch: str
    jitgen: str
    date: str
    command: str

    def to_json(self) -> dict[str, Any]:
        """All fields, and the bar of each call, as JSON values."""
        times = [asdict(time) | {"bar_us": time.bar_us} for time in self.times]
        return asdict(self) | {"times": times}


def measure_host_us(
    calls: Mapping[str, Callable[[], object]],
    *,
    num_calls: int,
    synchronize: Callable[[], object],
) -> tuple[HostTime, ...]:
    """The host time of each call, by name; their batches take turns.

    What a call returns lives until the next call has returned.

    Parameters
    ----------
    calls : each puts the same work into the GPU's queue every time
    num_calls : of each at least; rounded up to whole batches of BATCH_CALLS
    synchronize : waits for the GPU
    """
    num_batches = -(-num_calls // BATCH_CALLS)
    means: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(NUM_WARMUP_BATCHES + num_batches):
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            for _ in range(BATCH_CALLS):
                result = call()
            means[name].append((time.perf_counter() - started) / BATCH_CALLS * 1e6)
            del result
    synchronize()
    return tuple(_summarize(name, times[NUM_WARMUP_BATCHES:]) for name, times in means.items())


def _summarize(name: str, batch_us: Sequence[float]) -> HostTime:
    ordered = sorted(batch_us)
    last = len(ordered) - 1
    return HostTime(
        name,
        median_us=statistics.median(ordered),
        p10_us=ordered[round(0.1 * last)],
        p90_us=ordered[round(0.9 * last)],
        num_calls=len(ordered) * BATCH_CALLS,
    )


def bench_host(
    shape: Shape, device: driver.Device, *, num_calls: int, version: str, command: str
) -> HostResult:
    """Host times on torch's current GPU, which is `device`.

    Parameters
    ----------
    num_calls : as for `measure_host_us`
    version, command : of jitgen, and what was typed

    Raises
    ------
    VerifyError : two ways to make the same call give different results
    """
    import torch

    calls = _make_calls(shape, "cuda")
    return HostResult(
        shape,
        measure_host_us(calls, num_calls=num_calls, synchronize=torch.cuda.synchronize),
        gpu=device.name,
        cpu=_cpu_name(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        jitgen=version,
        date=datetime.now(timezone.utc).date().isoformat(),
        command=command,
    )


def _make_calls(shape: Shape, device: str) -> dict[str, Callable[[], object]]:
    """The calls by name; those of jitgen have been made once and gave the same D."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.m, shape.k, device=device, generator=generator)
    weight = torch.randn(shape.n, shape.k, device=device, generator=generator)
    (a, sfa), (b, sfb) = quantize(x), quantize(weight, (128, 128))
    scales = sfa, sfb
    out = torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device=device)
    copies = [(a.clone(), sfa.clone()) for _ in range(NUM_ACTIVATIONS)]
    activations = itertools.cycle(copies)

    def moved() -> Any:
        a, sfa = next(activations)
        return gemm(a, b, (sfa, sfb), out=out)

    calls = {
        GEMM_OUT: lambda: gemm(a, b, scales, out=out),
        GEMM_MOVED: moved,
        GEMM: lambda: gemm(a, b, scales),
        BOUND: bind(a, b, scales, out=out),
    }
    expected = gemm(a, b, scales).view(torch.int16)
    for name, call in calls.items():
        out.fill_(torch.nan)
        if not torch.equal(call().view(torch.int16), expected):
            raise VerifyError(f"{shape}: {name} gives another result than the first call")
    return {**calls, LAUNCH: _launch(a, b, scales, out), SCALED_MM: cublaslt_call(x, weight)}


def _launch(a: Any, b: Any, scales: tuple[Any, Any], out: Any) -> Callable[[], object]:
    """The driver call that is in each of jitgen's."""
    import torch

    call, addresses = find_call(a, b, scales, PLAIN, out, None, None)
    if call.launches is None:
        raise VerifyError(f"a call with {tuple(out.shape)} results launches nothing")
    stream = torch.cuda.current_stream().cuda_stream
    return functools.partial(call.launches.make(addresses), stream)


def _cpu_name() -> str:
    """The processor's name as Linux gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_host_result(console: Console, result: HostResult) -> None:
    """Print where it was measured and a line a call; what is over its bar, in red with a star."""
    from rich.table import Table

    where = (result.gpu, result.cpu, f"Python {result.python}", f"torch {result.torch}")
    console.print(f"{result.shape} on {', '.join(where)}", highlight=False)
    table = Table()
    table.add_column("call")
    for column in ("host us", "p10 - p90", "bar us"):
        table.add_column(column, justify="right")
    for line in result.times:
        median = f"{line.median_us:.2f}"
        table.add_row(
            line.name,
            f"[red]{median}*[/]" if line.is_over_bar else median,
            f"{line.p10_us:.2f} - {line.p90_us:.2f}",
            "" if line.bar_us is None else f"{line.bar_us:.0f}",
        )
    console.print(table)
    num_calls = result.times[0].num_calls
    console.print(
        f"median and spread of {num_calls // BATCH_CALLS} batches of {BATCH_CALLS} calls;"
        " * over its bar",
        highlight=False,
    )
