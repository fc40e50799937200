"""`jitgen prebuild`: compile kernels into the store."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from .cli_problems import DEFAULT_M_MAX, EP, M_MAX, TP, report_left_out
from .console import make_console
from .lower import AnyProblem, AnySchedule
from .models import read_model
from .problem import MAX_EXTENT, Gemm
from .problem_list import (
    GPU_HELP,
    NUM_SMS_HELP,
    PROBLEMS_HELP,
    Grid,
    read_problems,
    select_kernels,
)
from .schedule_text import SCHEDULE_HELP, parse_schedule
from .tuning.model import m_buckets
from .tuning.space_mla import BATCHES


def prebuild(
    grid: Annotated[Grid | None, typer.Option(help="The shapes of `jitgen bench`.")] = None,
    problems: Annotated[Path | None, typer.Option(help=PROBLEMS_HELP)] = None,
    model: Annotated[
        Path | None, typer.Option(help="A config.json, as `jitgen problems` reads it.")
    ] = None,
    tp: Annotated[int | None, TP] = None,
    ep: Annotated[int | None, EP] = None,
    m_max: Annotated[int | None, M_MAX] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only part I of N, 0 <= I < N, for rank I.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help='A Ray cluster to compile on: "auto", "host:6379".'),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help=GPU_HELP)] = None,
    num_sms: Annotated[int | None, typer.Option(min=1, help=NUM_SMS_HELP)] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="For calls with batch_invariant=True.")
    ] = False,
    schedule: Annotated[str | None, typer.Option(help=SCHEDULE_HELP)] = None,
) -> None:
    """Compile kernels into the store, in parallel and without a GPU.

    --tp, --ep and --m-max go with --model; their defaults are those of `jitgen problems`. With
    --ray the kernels come back into the store of this machine.
    """
    from .tuning.select import named_gpu

    part = _parse_shard(shard)
    if (grid is None) + (problems is None) + (model is None) != 2:
        raise typer.BadParameter("give one of --grid, --problems or --model")
    if model is None and (tp, ep, m_max) != (None, None, None):
        raise typer.BadParameter("--tp, --ep and --m-max go with --model")
    if ray and processes:
        raise typer.BadParameter("--processes is of this machine: give it without --ray")
    if model:
        pairs = _problems_of_model(model, tp or 1, ep or 1, m_max or DEFAULT_M_MAX)
    else:
        pairs = read_problems(problems) if problems else [*(grid or Grid.dense).problems()]
    chosen = named_gpu(gpu, num_sms)
    if schedule is None:
        kernels = select_kernels(pairs, chosen, batch_invariant=batch_invariant)
    else:
        kernels = _pinned(pairs, schedule)
    _compile(kernels[part], processes, ray)


def _parse_shard(text: str | None) -> slice:
    """Every n-th kernel from the i-th on, for "i/n"."""
    match = re.fullmatch(r"(\d+)/(\d+)", "0/1" if text is None else text, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise typer.BadParameter(f"--shard is {text!r}: give i/n with 0 <= i < n, such as 0/8")
    return slice(int(match[1]), None, int(match[2]))


def _problems_of_model(config: Path, tp: int, ep: int, m_max: int) -> list[tuple[AnyProblem, int]]:
    model = read_model(config, tp, ep)
    report_left_out(model)
    pairs: list[tuple[AnyProblem, int]] = []
    for problems, most in (
        (model.problems, m_max),
        (model.experts, min(m_max * model.rows_a_token, MAX_EXTENT)),
    ):
        for problem in problems:
            pairs += [(problem, m) for m in m_buckets(range(1, most + 1), problem)]
    pairs += [(attention, batch) for attention in model.attention for batch in BATCHES]
    return pairs


def _pinned(
    pairs: list[tuple[AnyProblem, int]], schedule: str
) -> list[tuple[AnyProblem, AnySchedule]]:
    gemms = dict.fromkeys(problem for problem, _ in pairs if isinstance(problem, Gemm))
    if len(gemms) < len({problem for problem, _ in pairs}):
        raise typer.BadParameter("--schedule is of a GEMM: leave MLA decode out of the problems")
    return [(problem, parse_schedule(schedule, problem)) for problem in gemms]


def _compile(
    kernels: list[tuple[AnyProblem, AnySchedule]], processes: int | None, ray: str | None
) -> None:
    from rich.progress import Progress

    from . import build

    root = build.open_shared_store().root
    done: list[build.Prebuilt] = []
    started = time.perf_counter()
    console = make_console(stderr=True)
    try:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"{len(kernels)} kernels", total=len(kernels))

            def on_done(prebuilt: build.Prebuilt) -> None:
                done.append(prebuilt)
                progress.advance(task)

            if ray:
                from .ray_prebuild import prebuild_on_ray

                prebuild_on_ray(kernels, ray, on_done=on_done)
            else:
                build.prebuild(kernels, num_processes=processes, on_done=on_done)
    finally:
        num_compiled = sum(prebuilt.compiled for prebuilt in done)
        seconds = time.perf_counter() - started
        typer.echo(
            f"kernels: {num_compiled} compiled, {len(done) - num_compiled} already there,"
            f" {seconds:.1f} s, {root}"
        )
