"""The command line: look at kernels, check the machine, fill the kernel store, measure."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from .dtypes import BF16, DType, dtype_of
from .errors import CompileError, DeviceError, JitgenError, ProblemError, ScheduleError, StoreError
from .expr import Expr, acc, gelu, matrix, relu, silu, vector
from .problem import MAX_EXTENT, Gemm, check_problem
from .schedule import Schedule, max_stages
from .target import SM90A

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .runtime.store import KernelStore
    from .tuning.bench import Cell, Result, Shape

MIN_CUDA_MAJOR = 13  # of the NVRTC that pyproject.toml asks for: a driver runs no newer cubins
PIPE_COLUMNS = 200  # width of what is printed where there is no terminal


class _Group(TyperGroup):
    """Commands whose JitgenErrors become one red line, and whose warnings one yellow line each."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except JitgenError as error:
                typer.secho(f"error: {_message(error)}", fg="red", err=True)
                if isinstance(error, CompileError) and error.log:
                    typer.echo(error.log, err=True)
                raise typer.Exit(1) from None


def _message(error: Exception) -> str:
    """What the error says, on one line and without a compiler's log."""
    log = error.log if isinstance(error, CompileError) else ""
    return " ".join(str(error).removesuffix(log).split())


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
bench_app = typer.Typer(help="Measure on this machine's GPU.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line: what the console script `jitgen` calls."""
    app(prog_name="jitgen")


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_COLUMNS)


class Grid(str, Enum):
    """A named list of shapes."""

    dense = "dense"


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
    'Pin the schedule: "128x128 stages=5 math_warpgroups=2 cluster=1x1 raster_group=8"; all but'
    " the tile may be left out."
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
    from .tuning.model import choose

    problem = Gemm(n, k, dtype_of(out_dtype), epilogue.expr)
    check_problem(problem)
    pinned = parse_schedule(schedule, problem) if schedule is not None else choose(problem, m)
    kernel = lower(problem, pinned)
    entry = build(kernel)
    console = _console()
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
    from .tuning.space import MAX_STAGES

    tile, *words = text.split() or [""]
    extents = _extents(tile.removesuffix("x128") if tile.count("x") == 2 else tile)
    fields = {"block_m": extents[0], "block_n": extents[1], "num_stages": 0}
    names = {
        "stages": ("num_stages",),
        "math_warpgroups": ("num_math_warpgroups",),
        "cluster": ("cluster_m", "cluster_n"),
        "raster_group": ("raster_group",),
    }
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            raise ScheduleError(f"schedule has {word!r}: after the tile, use {'=, '.join(names)}=")
        if len(names[name]) == 2:
            fields |= zip(names[name], _extents(value), strict=True)
        elif value.isascii() and value.isdigit():
            fields[names[name][0]] = int(value)
        else:
            raise ScheduleError(f"schedule has {word!r}: {name} must be a number")
    schedule = Schedule(**fields)
    if "stages" in text or not schedule.block_n:
        return schedule
    return replace(schedule, num_stages=max(2, min(max_stages(problem, schedule), MAX_STAGES)))


def _extents(text: str) -> tuple[int, int]:
    """The two numbers of "128x64"."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(part.isascii() and part.isdigit() for part in numbers):
        raise ScheduleError(f"schedule has {text!r} where two numbers are due, such as 128x64")
    return int(numbers[0]), int(numbers[1])


# --- doctor ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing that `doctor` looked at."""

    name: str
    is_ok: bool
    detail: str

    @property
    def colour(self) -> str:
        return "green" if self.is_ok else "red"


@app.command()
def doctor() -> None:
    """What this machine can do, and what to install for the rest.

    Exit code 0 if kernels can be interpreted and compiled here.
    """
    from .runtime import driver

    interpreter = _find("interpreter", _look_at_interpreter)
    compiler = _find("compiler", _look_at_compiler)
    cuda, torch = _find("CUDA driver", _look_at_driver), _find("torch", _look_at_torch)
    ordinals = range(driver.num_devices())
    gpus = [_find(f"GPU {i}", functools.partial(_look_at_gpu, i)) for i in ordinals]
    python, nvrtc = _find("Python", _look_at_python), _find("NVRTC", _look_at_nvrtc)
    store = _find("kernel store", _look_at_store)
    launches = cuda.is_ok and torch.is_ok and any(gpu.is_ok for gpu in gpus)
    for finding in (python, interpreter, nvrtc, compiler, store, cuda, *gpus, torch):
        typer.secho("ok  " if finding.is_ok else "no  ", fg=finding.colour, nl=False)
        typer.echo(f"{finding.name:<14}{finding.detail}")
    verdict = {"interpret": interpreter.is_ok, "compile": compiler.is_ok, "launch": launches}
    able = [f"{verb}: {'yes' if is_able else 'no'}" for verb, is_able in verdict.items()]
    typer.echo(f"\n{', '.join(able)}")
    raise typer.Exit(0 if interpreter.is_ok and compiler.is_ok else 1)


def _find(name: str, look: Callable[[], str]) -> Finding:
    """What `look` returns, or what it raises."""
    try:
        return Finding(name, True, look())
    except (JitgenError, ImportError) as error:
        return Finding(name, False, _message(error))


def _look_at_python() -> str:
    from . import __version__

    return f"{platform.python_version()}, jitgen {__version__}"


def _look_at_interpreter() -> str:
    """Runs a GEMM whose result is known."""
    import numpy as np

    from .api import gemm
    from .dtypes import E4M3

    a, b = np.ones((4, 256), E4M3.numpy), np.ones((8, 256), E4M3.numpy)
    scales = np.ones((4, 2), np.float32), np.ones((1, 2), np.float32)
    if not (gemm(a, b, scales, out_dtype="float32") == 256).all():
        raise JitgenError(f"a GEMM of ones is wrong with NumPy {np.__version__}: report this")
    return f"NumPy {np.__version__}"


def _look_at_nvrtc() -> str:
    from .runtime.nvrtc import compiler_version

    return f"{compiler_version()}, cuda-bindings {metadata.version('cuda-bindings')}"


def _look_at_compiler() -> str:
    """Compiles a kernel, past the store."""
    from .codegen import headers, render
    from .lower import lower
    from .runtime.nvrtc import compile_cubin
    from .tuning.model import choose

    problem = Gemm(128, 128)
    kernel = lower(problem, choose(problem, 64))
    compiled = compile_cubin(
        render(kernel), name=f"{kernel.name}.cu", headers=headers(), target=kernel.target
    )
    return f"{kernel.target.arch} kernel in {compiled.resources.compile_seconds:.2f} s"


def _look_at_store() -> str:
    with warnings.catch_warnings(record=True) as damages:
        warnings.simplefilter("always")
        store = _open_store()
        count = sum(1 for _ in store.entries())
    damaged = f", damaged: {len(damages)}" if damages else ""
    return f"{store.root}, writable, kernels: {count}{damaged}"


def _open_store() -> KernelStore:
    """The default store; StoreError if it keeps nothing."""
    from .runtime.store import KernelStore

    with warnings.catch_warnings(record=True) as problems:
        warnings.simplefilter("always")
        store = KernelStore()
    if problems:
        raise StoreError(str(problems[0].message))
    if store.root is None or not os.access(store.root, os.W_OK):
        raise StoreError(f"{store.root} cannot be written: name a folder in JITGEN_CACHE_DIR")
    return store


def _look_at_driver() -> str:
    from .runtime import driver

    remedy = "launching needs a Hopper GPU with NVIDIA driver 580 or newer"
    try:
        version = driver.driver_version()
    except DeviceError as error:
        reason = str(error).removesuffix("; `jitgen doctor` tells more")
        raise DeviceError(f"{reason}: {remedy}") from None
    if int(version.partition(".")[0]) < MIN_CUDA_MAJOR:
        raise DeviceError(f"runs CUDA {version}, kernels are of {MIN_CUDA_MAJOR}.0: {remedy}")
    return f"runs CUDA {version}"


def _look_at_gpu(ordinal: int) -> str:
    from .runtime import driver

    found = driver.device(ordinal)
    driver.check_architecture(found)
    major, minor = found.compute_capability
    return f"{found.name}, compute capability {major}.{minor}, {found.num_sms} SMs"


def _look_at_torch() -> str:
    """Reads torch's version file: importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise DeviceError("missing, calls on a GPU take its tensors: pip install 'jitgen[torch]'")
    text = Path(spec.origin).with_name("version.py").read_text()
    version, cuda = (
        match[1] if (match := re.search(rf"^{name}\b.*= '([^']+)'$", text, re.MULTILINE)) else None
        for name in ("__version__", "cuda")
    )
    if cuda is None:
        raise DeviceError(
            f"{version} is without CUDA: install one with it, see https://pytorch.org"
        )
    return f"{version}, CUDA {cuda}"


# --- prebuild -------------------------------------------------------------------------------------

PROBLEMS_HELP = (
    'JSON: a list of {"n": 7168, "k": 2048, "m": [1, 64]}; instead of m, "m_max": 4096 stands for'
    ' every m up to it; "out_dtype" is bfloat16 by default.'
)


@app.command()
def prebuild(
    grid: Annotated[Grid | None, typer.Option(help="The shapes of `jitgen bench`.")] = None,
    problems: Annotated[Path | None, typer.Option(help=PROBLEMS_HELP)] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    num_sms: Annotated[
        int, typer.Option(min=1, help="SMs of the GPU that will run the kernels.")
    ] = SM90A.num_sms,
) -> None:
    """Compile kernels into the store, in parallel and without a GPU."""
    from rich.progress import Progress

    from . import build
    from .tuning.model import choose

    if (grid is None) == (problems is None):
        raise typer.BadParameter("give either --grid or --problems")
    pairs = read_problems(problems) if problems else _grid_problems()
    kernels = list(dict.fromkeys((problem, choose(problem, m, num_sms)) for problem, m in pairs))
    root = _open_store().root
    done: list[build.Prebuilt] = []
    started = time.perf_counter()
    console = _console(stderr=True)
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


def _grid_problems() -> list[tuple[Gemm, int]]:
    from .tuning.bench import GRID_DENSE

    return [(shape.problem, shape.m) for shape in GRID_DENSE]


def read_problems(path: Path) -> list[tuple[Gemm, int]]:
    """The problems of a file as PROBLEMS_HELP describes it, each with every m to choose for.

    Raises
    ------
    ProblemError : the file cannot be read, or an entry breaks a rule; says which entry and field
    """
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise ProblemError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ProblemError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ProblemError(f"{path} must hold a list of problems, not empty")
    pairs: list[tuple[Gemm, int]] = []
    for i, entry in enumerate(entries):
        try:
            problem, extents = _read_problem(entry)
        except ProblemError as error:
            raise ProblemError(f"{path}, entry {i}: {error}") from None
        pairs += [(problem, m) for m in extents]
    return pairs


def _read_problem(entry: object) -> tuple[Gemm, list[int]]:
    if not isinstance(entry, dict):
        raise ProblemError(f"must be an object with n, k and m or m_max, got {entry!r:.80}")
    if unknown := set(entry) - {"n", "k", "m", "m_max", "out_dtype"}:
        raise ProblemError(f"unknown field {min(unknown)}: use n, k, m or m_max, out_dtype")
    if missing := {"n", "k"} - set(entry):
        raise ProblemError(f"field {min(missing)} is missing")
    problem = Gemm(entry["n"], entry["k"], _read_dtype(entry.get("out_dtype", BF16.name)))
    check_problem(problem)
    if ("m" in entry) == ("m_max" in entry):
        raise ProblemError("give either m, a list, or m_max")
    if "m_max" in entry:
        return problem, _buckets(_read_extent("m_max", entry["m_max"]))
    extents = entry["m"]
    if not isinstance(extents, list) or not extents:
        raise ProblemError(f"m must be a list of extents, not empty, got {extents!r:.80}")
    return problem, [_read_extent(f"m[{i}]", m) for i, m in enumerate(extents)]


def _read_dtype(name: object) -> DType:
    if not isinstance(name, str):
        raise ProblemError(f"out_dtype must be a name, got {name!r:.80}")
    return dtype_of(name)


def _read_extent(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_EXTENT:
        raise ProblemError(f"{field} must be an int in 1..{MAX_EXTENT}, got {value!r:.80}")
    return value


def _buckets(m_max: int) -> list[int]:
    """Every extent that a schedule is chosen for, up to m_max's."""
    from .tuning.model import m_bucket

    buckets = [m_bucket(1)]
    while buckets[-1] < m_bucket(m_max):
        buckets.append(m_bucket(buckets[-1] + 1))
    return buckets


# --- bench, demo ----------------------------------------------------------------------------------


@bench_app.command("gemm")
def bench_gemm(
    grid: Annotated[Grid, typer.Option(help="Shapes: DeepSeek-V3's linear layers.")] = Grid.dense,
    m: Annotated[list[int] | None, typer.Option(min=1, help="Only these m; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Six shapes only, for a look.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, after each shape.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a report here, after each shape.")
    ] = None,
) -> None:
    """Kernel times of the FP8 GEMM beside cuBLASLt (live) and DeepGEMM (from a file)."""
    from rich.progress import Progress

    from . import __version__
    from .tuning import bench

    shapes = _shapes(bench.GRID_QUICK if quick else bench.GRID_DENSE, m)
    device = bench.check_machine()
    command = f"jitgen {shlex.join(sys.argv[1:])}"
    meta = bench.collect_meta(device, version=__version__, command=command)
    result = bench.Result(meta, ())
    console = _console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for row in progress.track(bench.bench_gemm(shapes, device), total=len(shapes)):
            result = replace(result, rows=(*result.rows, row))
            if json_file:
                _write(json_file, json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
            if markdown:
                _write(markdown, bench.render_markdown(result))
            console.print(f"{row.shape}: {row.jitgen.kernel_us:.2f} us", highlight=False)
    _print_result(result)


def _shapes(grid: Sequence[Shape], extents: Sequence[int] | None) -> list[Shape]:
    """The grid, or its (n, k) at other m."""
    if not extents:
        return list(grid)
    shapes = (replace(shape, m=m) for m in extents for shape in grid)
    return list(dict.fromkeys(shapes))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ProblemError(f"cannot write {path}: {error.strerror}") from None


def _print_result(result: Result) -> None:
    from .tuning import bench

    console, summaries = _console(), bench.summarize(result.rows)
    launches = " or ".join(map(str, bench.num_launches(result.rows)))
    console.print(f"{result.meta.gpu}: {launches} kernel launched by a call", highlight=False)
    console.print(_table(bench.COLUMNS, [bench.row_cells(row) for row in result.rows]))
    console.print("* the peer is faster\n\nGeometric means")
    rows = [bench.summary_cells(summary) for summary in summaries]
    console.print(_table(bench.SUMMARY_COLUMNS, rows))
    live = summaries[-1].live_over_baseline
    if live is not None and abs(live - 1) > bench.LIVE_TOLERANCE:
        warnings.warn(
            f"cuBLASLt takes {live:.2f} of its time in the file: this machine is not like that one,"
            " and ratios to DeepGEMM mislead",
            stacklevel=1,
        )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"[red]{cell.text}*[/]" if cell.is_loss else cell.text for cell in row))
    return table


@app.command()
def demo() -> None:
    """A real embedding model in FP8 beside FP32, on the GPU or on the interpreter."""
    from .demo import main

    raise typer.Exit(main())
