"""The command line: look at kernels, check the machine, fill the kernel store, measure."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from .cli_bench import bench_app
from .cli_cache import cache_app
from .cli_explain import explain
from .cli_prebuild import prebuild
from .cli_problems import problems
from .cli_report import report
from .cli_tune import records_app, tune
from .console import make_console
from .dtypes import BF16, dtype_of
from .epilogues import EPILOGUE_HELP, Epilogue
from .errors import CompileError, JitgenError, one_line
from .problem import Gemm, check_problem
from .schedule_text import SCHEDULE_HELP, schedule_for

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
cache_app.command()(explain)
app.command()(prebuild)
app.command()(problems)
app.command()(report)
app.command()(tune)
app.add_typer(records_app, name="records")


def main() -> None:
    """Run the command line: what the console script `jitgen` calls."""
    app(prog_name="jitgen")


# --- show -----------------------------------------------------------------------------------------


@app.command()
def show(
    n: Annotated[int, typer.Option(help="Columns of D.")],
    k: Annotated[int, typer.Option(help="Columns of A and of B.")],
    m: Annotated[int, typer.Option(min=1, help="Rows that the schedule is chosen for.")] = 128,
    out_dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = BF16.name,
    epilogue: Annotated[Epilogue, typer.Option(help=EPILOGUE_HELP)] = Epilogue.none,
    schedule: Annotated[str | None, typer.Option(help=SCHEDULE_HELP)] = None,
    source: Annotated[bool, typer.Option(help="Print the CUDA source too.")] = True,
) -> None:
    """A kernel on its way from problem to cubin: schedule, tile program, source, resources."""
    from .build import build
    from .lower import lower
    from .tuning.select import named_gpu

    problem = Gemm(n, k, dtype_of(out_dtype), epilogue.expr)
    check_problem(problem)
    pinned = schedule_for(problem, m, named_gpu(), schedule)
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


# --- demo -----------------------------------------------------------------------------------------


@app.command()
def demo() -> None:
    """A real embedding model in FP8 beside FP32, on the GPU or on the interpreter."""
    from .demo import main

    raise typer.Exit(main())
