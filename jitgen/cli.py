"""The command line: look at kernels, check the machine, fill the kernel store, measure."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from .cli_bench import bench_app
from .cli_cache import cache_app
from .cli_problems import problems
from .cli_tune import records_app, tune
from .console import make_console
from .dtypes import BF16, dtype_of
from .errors import CompileError, JitgenError, ScheduleError, one_line
from .expr import Expr, acc, gelu, matrix, relu, silu, vector
from .problem import Gemm, check_problem
from .problem_list import (
    GPU_HELP,
    NUM_SMS_HELP,
    PROBLEMS_HELP,
    Grid,
    read_problems,
    select_kernels,
)
from .schedule import Schedule, check_ranges, max_stages

if TYPE_CHECKING:
    from rich.console import Console


class _Group(TyperGroup):
    """Commands whose JitgenErrors become one red line, and whose warnings one yellow line each."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except JitgenError as error:
                typer.secho(f"error: {one_line(error)}", fg="red", err=True)
                if isinstance(error, CompileError) and error.log:
                    typer.echo(error.log, err=True)
                raise typer.Exit(1) from None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    typer.secho(f"warning: {message}", fg="yellow", err=True)


app = typer.Typer(
    cls=_Group,
    help="A JIT kernel generator for NVIDIA Hopper GPUs: FP8 GEMM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.command()(problems)
app.command()(tune)
app.add_typer(records_app, name="records")


def main() -> None:
    """Run the command line: what the console script `jitgen` calls."""
    app(prog_name="jitgen")


# --- show -----------------------------------------------------------------------------------------


class Epilogue(str, Enum):
    """Epilogues that `show` knows by name."""

    none = "none"
    bias = "bias"
    bias_relu = "bias-relu"
    bias_gelu = "bias-gelu"
    bias_silu = "bias-silu"
    residual = "residual"

    @property
    def expr(self) -> Expr:
        if self is Epilogue.none:
            return acc
        if self is Epilogue.residual:
            return acc + matrix("residual")
        biased = acc + vector("bias")
        functions: dict[Epilogue, Callable[[Expr], Expr]] = {
            Epilogue.bias_relu: relu,
            Epilogue.bias_gelu: gelu,
            Epilogue.bias_silu: silu,
        }
        return functions[self](biased) if self in functions else biased


SCHEDULE_HELP = (
    'Pin the schedule: "128x128 stages=5 math_warpgroups=2 cluster=1x1 raster_group=8'
    ' split_k=1 promotion=overlapped"; all but the tile may be left out.'
)


@app.command()
def show(
    n: Annotated[int, typer.Option(help="Columns of D.")],
    k: Annotated[int, typer.Option(help="Columns of A and of B.")],
    m: Annotated[int, typer.Option(min=1, help="Rows that the schedule is chosen for.")] = 128,
    out_dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = BF16.name,
    epilogue: Annotated[Epilogue, typer.Option(help="What is fused.")] = Epilogue.none,
    schedule: Annotated[str | None, typer.Option(help=SCHEDULE_HELP)] = None,
    source: Annotated[bool, typer.Option(help="Print the CUDA source too.")] = True,
) -> None:
    """A kernel on its way from problem to cubin: schedule, tile program, source, resources."""
    from .build import build
    from .lower import lower
    from .tuning.select import named_gpu, select

    problem = Gemm(n, k, dtype_of(out_dtype), epilogue.expr)
    check_problem(problem)
    if schedule is not None:
        pinned = parse_schedule(schedule, problem)
    else:
        pinned = select(problem, m, named_gpu())
    kernel = lower(problem, pinned)
    entry = build(kernel)
    console = make_console()
    _section(console, "Problem", str(problem))
    _section(console, "Schedule", str(pinned))
    _section(console, "Kernel", str(kernel))
    if source:
        _section(console, "Source", entry.source.rstrip(), language="cuda")
    used = entry.resources
    _section(
        console,
        "Resources",
        f"{used.registers} registers a thread, {used.spill_bytes} B spilled,"
        f" {used.stack_bytes} B of stack\n"
        f"{kernel.num_threads} threads a block, {kernel.smem.total_bytes} B of shared memory"
        f" of {kernel.target.smem_per_block_bytes}\n"
        f"{len(entry.cubin)} B of cubin, {entry.path or 'in memory only'}",
    )


def _section(console: Console, title: str, text: str, language: str = "") -> None:
    """A titled text as it is: no markup in it, no line folded."""
    console.print(f"[bold]{title}[/]")
    if language and console.is_terminal:
        from rich.syntax import Syntax

        code = Syntax(text, language, theme="ansi_dark", background_color="default")
        console.print(code, soft_wrap=True)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print()


def parse_schedule(text: str, problem: Gemm) -> Schedule:
    """The schedule that `text` spells as `str(schedule)` does; without `stages`, the most that fit.

    Raises
    ------
    ScheduleError : a word of `text` is not understood
    """
    from .tuning.space import MAX_STAGES, PROMOTIONS

    tile, *words = text.split() or [""]
    extents = _extents(tile.removesuffix("x128") if tile.count("x") == 2 else tile)
    fields = {"block_m": extents[0], "block_n": extents[1], "num_stages": 0}
    promotion = Schedule.promotion
    names = {
        "stages": ("num_stages",),
        "math_warpgroups": ("num_math_warpgroups",),
        "cluster": ("cluster_m", "cluster_n"),
        "raster_group": ("raster_group",),
        "split_k": ("split_k",),
        "promotion": (),
    }
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            raise ScheduleError(f"schedule has {word!r}: after the tile, use {'=, '.join(names)}=")
        if name == "promotion":
            if value not in PROMOTIONS:
                raise ScheduleError(f"schedule has {word!r}: use {' or '.join(PROMOTIONS)}")
            promotion = value
        elif name == "cluster":
            fields |= zip(names[name], _extents(value), strict=True)
        elif value.isascii() and value.isdigit():
            fields[names[name][0]] = int(value)
        else:
            raise ScheduleError(f"schedule has {word!r}: {name} must be a number")
    schedule = Schedule(**fields, promotion=promotion)
    if "stages" in text:
        return schedule
    check_ranges(replace(schedule, num_stages=2))
    return replace(schedule, num_stages=max(2, min(max_stages(problem, schedule), MAX_STAGES)))


def _extents(text: str) -> tuple[int, int]:
    """The two numbers of "128x64"."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(part.isascii() and part.isdigit() for part in numbers):
        raise ScheduleError(f"schedule has {text!r} where two numbers are due, such as 128x64")
    return int(numbers[0]), int(numbers[1])


# --- doctor ---------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """What this machine can do, and what to install for the rest.

    Exit code 0 if kernels can be interpreted and compiled here.
    """
    from .doctor import diagnose

    found = diagnose()
    for finding in found.findings:
        word, colour = ("ok", "green") if finding.is_ok else ("no", "red")
        typer.secho(f"{word}  ", fg=colour, nl=False)
        typer.echo(f"{finding.name:<14}{finding.detail}")
    abilities = {
        "interpret": found.can_interpret,
        "compile": found.can_compile,
        "launch": found.can_launch,
    }
    able = [f"{verb}: {'yes' if is_able else 'no'}" for verb, is_able in abilities.items()]
    typer.echo(f"\n{', '.join(able)}")
    raise typer.Exit(0 if found.can_interpret and found.can_compile else 1)


# --- prebuild -------------------------------------------------------------------------------------


@app.command()
def prebuild(
    grid: Annotated[Grid | None, typer.Option(help="The shapes of `jitgen bench`.")] = None,
    problems: Annotated[Path | None, typer.Option(help=PROBLEMS_HELP)] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    gpu: Annotated[str | None, typer.Option(help=GPU_HELP)] = None,
    num_sms: Annotated[int | None, typer.Option(min=1, help=NUM_SMS_HELP)] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="For calls with batch_invariant=True.")
    ] = False,
    schedule: Annotated[str | None, typer.Option(help=SCHEDULE_HELP)] = None,
) -> None:
    """Compile kernels into the store, in parallel and without a GPU."""
    from rich.progress import Progress

    from . import build
    from .tuning.select import named_gpu

    if (grid is None) == (problems is None):
        raise typer.BadParameter("give either --grid or --problems")
    pairs = read_problems(problems) if problems else Grid.dense.problems()
    chosen = named_gpu(gpu, num_sms)
    if schedule is None:
        kernels = select_kernels(pairs, chosen, batch_invariant=batch_invariant)
    else:
        pinned = ((problem, parse_schedule(schedule, problem)) for problem, _ in pairs)
        kernels = list(dict.fromkeys(pinned))
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

            build.prebuild(kernels, num_processes=processes, on_done=on_done)
    finally:
        num_compiled = sum(prebuilt.compiled for prebuilt in done)
        seconds = time.perf_counter() - started
        typer.echo(
            f"kernels: {num_compiled} compiled, {len(done) - num_compiled} already there,"
            f" {seconds:.1f} s, {root}"
        )


# --- demo -----------------------------------------------------------------------------------------


@app.command()
def demo() -> None:
    """A real embedding model in FP8 beside FP32, on the GPU or on the interpreter."""
    from .demo import main

    raise typer.Exit(main())
