"""The command line's part that tunes: `jitgen tune` and `jitgen records`."""

from __future__ import annotations

import importlib.util
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import make_console
from .errors import DeviceError, JitgenError, one_line
from .problem import check_problem
from .problem_list import (
    GPU_HELP,
    NUM_SMS_HELP,
    PROBLEMS_HELP,
    Grid,
    parse_extents,
    read_problems,
)
from .tuning.keys import TunedProblem, is_tunable, tuned_gemm

if TYPE_CHECKING:
    from .lower import AnyProblem, AnySchedule
    from .runtime.driver import Device
    from .tuning.session import Session
    from .tuning.tune import Job, Outcome

records_app = typer.Typer(help="Files of tuning records.", no_args_is_help=True)


def tune(
    grid: Annotated[Grid | None, typer.Option(help="The shapes of `jitgen bench`.")] = None,
    problems: Annotated[Path | None, typer.Option(help=PROBLEMS_HELP)] = None,
    n: Annotated[int | None, typer.Option(help="Columns of D, with --k and --m.")] = None,
    k: Annotated[
        int | None,
        typer.Option(help="Columns of A and of B; K-grouped, with --num-groups, without."),
    ] = None,
    m: Annotated[str, typer.Option(help='Such as "64" or "1..4096,8192".')] = "1..4096",
    out_dtype: Annotated[
        str | None,
        typer.Option(help="Of D, such as float8_e4m3fn; default: bfloat16, K-grouped float32."),
    ] = None,
    num_groups: Annotated[
        int | None, typer.Option(help="With --n: of a grouped GEMM, with m rows in all.")
    ] = None,
    gated: Annotated[bool, typer.Option("--gated", help="With --n: gate and up.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of records; default: the one that `gemm` reads.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Schedules to measure a shape.")] = 32,
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which nothing more is measured.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Leave out what has a record of the same kernels.")
    ] = True,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That compile; default: one a core.")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Fill the store and stop; needs no GPU.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help=f"With --compile-only. {GPU_HELP}")] = None,
    num_sms: Annotated[
        int | None, typer.Option(min=1, help=f"With --compile-only. {NUM_SMS_HELP}")
    ] = None,
) -> None:
    """Measure which schedule is fastest for each M bucket of a problem, and record it.

    A schedule wins only with the interpreter's result, bit for bit, or one of MLA decode with that
    of float64 within its bounds. Shapes whose times are not stable are not recorded.
    """
    from .tuning.records import user_folder
    from .tuning.select import named_gpu
    from .tuning.tune import make_jobs

    started = time.monotonic()
    pairs = _read_pairs(grid, problems, n, k, m, out_dtype, num_groups, gated)
    if compile_only:
        _compile(make_jobs(pairs, named_gpu(gpu, num_sms), candidates), processes)
        return
    if gpu or num_sms:
        raise typer.BadParameter("--gpu and --num-sms go with --compile-only")
    device = _find_device()
    session = _open_session(output or user_folder(), device)
    jobs = make_jobs(pairs, device.gpu, candidates)
    left = session.remaining(jobs) if resume else jobs
    if num_recorded := len(jobs) - len(left):
        typer.echo(f"{num_recorded} shapes are recorded already: see --no-resume", err=True)
    left = _compile(left, processes)
    end = started + (math.inf if time_limit is None else time_limit)
    counts = _measure(left, session, lambda: time.monotonic() >= end)
    unmeasured = len(left) - counts.total()
    typer.echo(
        f"shapes: {counts['measured']} measured, {counts['unstable']} unstable,"
        f" {counts['failed']} failed, {unmeasured} not reached,"
        f" {time.monotonic() - started:.1f} s, {output or user_folder()}"
    )
    if counts["failed"]:
        raise typer.Exit(1)


@records_app.command("merge")
def merge_records(
    folders: Annotated[list[Path], typer.Argument(help="Folders of records.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that takes them all.")],
) -> None:
    """Put records together: of those of the newest kernels, the fastest."""
    from .tuning.records import read_folder, save

    found = [record for folder in folders for record in read_folder(folder)]
    save(output, found)
    typer.echo(f"records: {len(found)} read, {len(read_folder(output))} in {output}")


def _read_pairs(
    grid: Grid | None,
    problems: Path | None,
    n: int | None,
    k: int | None,
    m: str,
    out_dtype: str | None,
    num_groups: int | None,
    gated: bool,
) -> list[tuple[TunedProblem, int]]:
    """Each problem with each m, from the one of three sources that was given."""
    has_k = k is not None or (n is not None and num_groups is not None)
    if ((grid is None) + (problems is None) + (n is None)) != 2 or (n is None) == has_k:
        raise typer.BadParameter("give one of --grid, --problems, or --n with --k")
    if n is None and (num_groups is not None or gated):
        raise typer.BadParameter("--num-groups and --gated go with --n")
    if grid:
        return [(problem, m) for problem, m in grid.problems() if is_tunable(problem, m)]
    if problems:
        listed = read_problems(problems)
        pairs = [(p, m) for p, m in listed if isinstance(p, TunedProblem) and is_tunable(p, m)]
        if left_out := len(listed) - len(pairs):
            typer.echo(f"left out: {left_out} shapes that are not tuned", err=True)
        return pairs
    problem = tuned_gemm(n or 0, k, num_groups, out_dtype, gated=gated)
    check_problem(problem)
    return [(problem, extent) for extent in parse_extents(m, problem)]


def _find_device() -> Device:
    """The GPU that the measuring process will use, through torch."""
    from .runtime import driver

    if importlib.util.find_spec("torch") is None:
        raise DeviceError("measuring needs torch: pip install 'jitgen[bench]'")
    found = driver.device(0)
    driver.check_architecture(found)
    return found


def _open_session(folder: Path, device: Device) -> Session:
    from . import __version__
    from .codegen import fingerprint
    from .runtime.nvrtc import compiler_version
    from .tuning import machine
    from .tuning.records import Provenance
    from .tuning.session import Session

    provenance = Provenance(
        driver=machine.driver_release(),
        nvrtc=compiler_version(),
        jitgen=__version__,
        fingerprint=fingerprint(),
    )
    return Session(folder, device.gpu, provenance, machine.sm_clock_mhz)


def _compile(jobs: Sequence[Job], processes: int | None) -> list[Job]:
    """The jobs without what cannot be compiled; all the rest is in the store then."""
    from rich.progress import Progress

    from . import build

    started = time.perf_counter()
    kernels = list(dict.fromkeys((job.problem, s) for job in jobs for s in job.schedules))
    refused: dict[tuple[AnyProblem, AnySchedule], JitgenError] = {}
    console = make_console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"compiling {len(kernels)} kernels", total=len(kernels))
        built = build.prebuild(
            kernels,
            num_processes=processes,
            on_done=lambda _: progress.advance(task),
            on_error=refused.__setitem__,
        )
    num_compiled = sum(prebuilt.compiled for prebuilt in built)
    typer.echo(
        f"kernels: {num_compiled} compiled, {len(built) - num_compiled} already there,"
        f" {len(refused)} refused, {time.perf_counter() - started:.1f} s",
        err=True,
    )
    for (_, schedule), error in refused.items():
        typer.echo(f"refused: {schedule}: {one_line(error)}", err=True)
    return [
        replace(job, schedules=tuple(s for s in job.schedules if (job.problem, s) not in refused))
        for job in jobs
    ]


def _measure(jobs: Sequence[Job], session: Session, is_late: Callable[[], bool]) -> Counter[str]:
    """Measure the jobs and record what comes out; how many had which status."""
    from rich.progress import Progress

    from .tuning.measure import GpuMeasurer
    from .tuning.tune import tune
    from .tuning.worker import IsolatedMeasurer

    counts: Counter[str] = Counter()
    console = make_console(stderr=True)
    with (
        IsolatedMeasurer(GpuMeasurer) as measurer,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("measuring", total=len(jobs))

        def tell(job: Job, text: str) -> None:
            progress.update(task, description=f"{job}: {text}")

        for outcome in tune(jobs, measurer, is_late=is_late, on_progress=tell):
            session.add(outcome)
            counts[outcome.status] += 1
            progress.advance(task)
            console.print(_outcome_line(outcome), markup=False, highlight=False, soft_wrap=True)
    return counts


def _outcome_line(outcome: Outcome) -> str:
    winner, errors = outcome.winner, len(outcome.errors)
    failed = f"; {errors} schedules failed, see the journal" if errors else ""
    if winner is None:
        return f"{outcome.job}: {outcome.status}: {outcome.reason}{failed}"
    gain = f", {outcome.speedup:.2f}x as fast as before" if outcome.speedup else ""
    return f"{outcome.job}: {winner.kernel_us:.2f} us{gain}, {winner.schedule}{failed}"
