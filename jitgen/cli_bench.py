"""`jitgen bench`: measure on this machine's GPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import make_console
from .files import read_json, write_json, write_text
from .problem_list import Grid

if TYPE_CHECKING:
    from .tuning.bench import Shape
    from .tuning.report import Result


class Layout(str, Enum):
    """The layouts of a grouped GEMM that are measured; swiglu: that it is fused."""

    group_of_row = "group_of_row"
    ragged = "ragged"
    masked = "masked"
    swiglu = "swiglu"
    k_grouped = "k_grouped"


bench_app = typer.Typer(help="Measure on this machine's GPU.", no_args_is_help=True)


@bench_app.command("gemm")
def bench_gemm(
    grid: Annotated[Grid, typer.Option(help="Shapes: DeepSeek-V3's linear layers.")] = Grid.dense,
    m: Annotated[list[int] | None, typer.Option(min=1, help="Only these m; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Six shapes only, for a look.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, after each shape.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write a report here, after each shape; in the end a plot beside it."),
    ] = None,
) -> None:
    """Kernel times of the FP8 GEMM beside cuBLASLt, CUTLASS (live) and DeepGEMM (from a file)."""
    from rich.progress import Progress

    from . import __version__
    from .tuning import bench, report

    shapes = _shapes(bench.GRID_QUICK if quick else bench.GRID_DENSE, m)
    device = bench.check_machine()
    meta = report.collect_meta(device, version=__version__, arguments=sys.argv[1:])
    result = report.Result(meta, ())
    console = make_console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for row in progress.track(bench.bench_gemm(shapes, device), total=len(shapes)):
            result = replace(result, rows=(*result.rows, row))
            if json_file:
                write_json(json_file, result.to_json())
            if markdown:
                write_text(markdown, report.render_markdown(result))
            console.print(f"{row.shape}: {row.jitgen.kernel_us:.2f} us", highlight=False)
    if markdown:
        _write_report(markdown, result)
    report.print_result(make_console(), result)


@bench_app.command("grouped")
def bench_grouped(
    layout: Annotated[
        list[Layout] | None, typer.Option(help="Only these layouts; repeatable.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="N = 4096, K = 2048 only; of k_grouped four shapes.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, after each shape.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a report here, after each shape.")
    ] = None,
) -> None:
    """Kernel times of the grouped FP8 GEMM beside DeepGEMM (from a file).

    Layout swiglu: ragged, with SwiGLU and requantization fused, beside the unfused sequence. Layout
    k_grouped: weight gradients, beside those of torch.
    """
    from . import __version__
    from .tuning import bench, bench_fused, bench_grouped, bench_k_grouped, report, report_grouped

    shapes = [
        shape
        for shape in bench_grouped.grid_grouped()
        if (not layout or shape.layout in [chosen.value for chosen in layout])
        and (not quick or (shape.n, shape.k) == (4096, 2048))
    ]
    device = bench.check_machine()
    meta = report.collect_meta(device, version=__version__, arguments=sys.argv[1:])
    live = bench_grouped.live_over_baseline(device)
    result = report_grouped.GroupedResult(meta, (), live)
    console = make_console(stderr=True)

    def keep(text: str) -> None:
        if json_file:
            write_json(json_file, result.to_json())
        if markdown:
            write_text(markdown, report_grouped.render_markdown(result))
        console.print(text, highlight=False)

    for row in bench_grouped.bench_grouped(shapes, device):
        result = replace(result, rows=(*result.rows, row))
        keep(f"{row.shape}: {row.jitgen.kernel_us:.2f} us")
    with_fused = not layout or Layout.swiglu in layout
    for fused in bench_fused.bench_fused(bench_fused.FUSED_SHAPES if with_fused else (), device):
        result = replace(result, fused=(*result.fused, fused))
        keep(f"{fused.shape}, SwiGLU: {fused.fused.kernel_us:.2f} us")
    by_k: Sequence[bench_k_grouped.KGroupedShape] = ()
    if not layout or Layout.k_grouped in layout:
        whole, few = bench_k_grouped.K_GROUPED_SHAPES, bench_k_grouped.DEEPGEMM_SHAPES
        by_k = few if quick else whole
    for gradient in bench_k_grouped.bench_k_grouped(by_k, device):
        result = replace(result, k_grouped=(*result.k_grouped, gradient))
        keep(f"{gradient.shape}: {gradient.jitgen.kernel_us:.2f} us")
    report_grouped.print_result(make_console(), result)


@bench_app.command("report")
def bench_report(
    json_files: Annotated[
        list[Path],
        typer.Argument(help="What `bench gemm`, `bench grouped` or `bench mla` wrote as JSON."),
    ],
    markdown: Annotated[
        Path | None, typer.Option(help="Write a report here, and a plot of `bench gemm` beside it.")
    ] = None,
) -> None:
    """The report of an earlier benchmark again, of groups and MLA decode from several files too.

    Needs no GPU.
    """
    from .tuning import report, report_grouped, report_mla

    found = [read_json(path) for path in json_files]
    if all(isinstance(data, dict) and data.get("family") == report_mla.FAMILY for data in found):
        decode = report_mla.MlaResult.from_json(*found)
        if markdown:
            write_text(markdown, report_mla.render_markdown(decode))
        return report_mla.print_result(make_console(), decode)
    if all(isinstance(data, dict) and "fused" in data for data in found):
        grouped = report_grouped.GroupedResult.from_json(*found)
        if markdown:
            write_text(markdown, report_grouped.render_markdown(grouped))
        return report_grouped.print_result(make_console(), grouped)
    if len(found) > 1:
        raise typer.BadParameter("only results of `bench grouped` or `bench mla` go together")
    result = report.Result.from_json(found[0])
    if markdown:
        _write_report(markdown, result)
    report.print_result(make_console(), result)


def _write_report(markdown: Path, result: Result) -> None:
    """The report and, beside it, its plot; without matplotlib a warning instead."""
    from .tuning import plot, report

    picture = markdown.with_suffix(".svg")
    svg = plot.over_floor_svg(result.rows)
    if svg:
        write_text(picture, svg)
    else:
        warnings.warn("no plot without matplotlib: pip install 'jitgen[bench]'", stacklevel=2)
    write_text(markdown, report.render_markdown(result, plot=picture.name if svg else None))


def _shapes(grid: Sequence[Shape], extents: Sequence[int] | None) -> list[Shape]:
    """The grid, or its (n, k) at other m."""
    if not extents:
        return list(grid)
    shapes = (replace(shape, m=m) for m in extents for shape in grid)
    return list(dict.fromkeys(shapes))


class MlaForm(str, Enum):
    """What `bench mla` measures."""

    bf16 = "bf16"
    fp8 = "fp8"
    sparse = "sparse"


@bench_app.command("mla")
def bench_mla(
    b: Annotated[list[int] | None, typer.Option(min=1, help="Only these b; repeatable.")] = None,
    s_k: Annotated[list[int] | None, typer.Option(min=1, help="Only these s_k.")] = None,
    form: Annotated[
        list[MlaForm] | None,
        typer.Option("--format", help="Of the cache; sparse: FP8, lists of tokens. Repeatable."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, after each shape.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a report here, after each shape.")
    ] = None,
) -> None:
    """Times of MLA decode beside FlashMLA's (from a file; for fp8, those over BF16)."""
    from . import __version__
    from .tuning import bench, report, report_mla
    from .tuning import bench_mla as mla

    shapes = [
        shape
        for chosen in form or [MlaForm.bf16]
        for shape in mla.mla_baselines(chosen.value)
        if (not b or shape.b in b) and (not s_k or shape.s_k in s_k)
    ]
    if not shapes:
        raise typer.BadParameter("no shape of the grid has such b and s_k")
    device = bench.check_machine()
    meta = report.collect_meta(device, version=__version__, arguments=sys.argv[1:])
    result = report_mla.MlaResult(replace(meta, method=report_mla.METHOD, peers={}), ())
    console = make_console(stderr=True)
    for row in mla.bench_mla(shapes, device):
        result = replace(result, rows=(*result.rows, row))
        if json_file:
            write_json(json_file, result.to_json())
        if markdown:
            write_text(markdown, report_mla.render_markdown(result))
        console.print(f"{row.shape}: {row.us:.2f} us", highlight=False)
    report_mla.print_result(make_console(), result)


@bench_app.command("linear")
def bench_linear(
    tokens: Annotated[int, typer.Option(min=1, help="Rows of x.")] = 4096,
    in_features: Annotated[int, typer.Option(min=16, help="Columns of x.")] = 7168,
    out_features: Annotated[
        list[int] | None, typer.Option(min=16, help="Columns of y; repeatable.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """A training step of jitgen.nn.Fp8Linear beside torch's linear in bfloat16."""
    from . import __version__
    from .tuning import bench, report
    from .tuning import bench_linear as linear

    device = bench.check_machine()
    shapes = [linear.LinearShape(tokens, in_features, n) for n in out_features or (2112, 4096)]
    rows = list(linear.bench_linear(shapes))
    if json_file:
        meta = {"gpu": device.name, "jitgen": __version__, "method": linear.METHOD}
        meta["command"] = report.command_line(sys.argv[1:])
        write_json(json_file, {"meta": meta, "rows": [row.to_json() for row in rows]})
    linear.print_rows(make_console(), rows)


@bench_app.command("load")
def bench_load(
    n: Annotated[int, typer.Option(min=8, help="Columns of D.")] = 2112,
    k: Annotated[int, typer.Option(min=16, help="Columns of A and of B.")] = 7168,
    rounds: Annotated[int, typer.Option(min=1, help="Each opens the store anew.")] = 20,
) -> None:
    """From a kernel in the store to its function handle, and from a problem to a miss.

    Compiles the kernels of every m into the store first.
    """
    from . import build
    from .plans import plan
    from .problem import Gemm
    from .runtime import driver
    from .tuning import bench, load

    device = bench.check_machine()
    driver.make_current(device.ordinal)
    kernels = plan(Gemm(n, k), range(1, 8193)).kernels
    build.prebuild(kernels)
    times = load.measure_loads(
        kernels,
        build.open_shared_store,
        lambda entry, kernel: driver.load(
            entry.cubin,
            kernel.name,
            smem_bytes=kernel.smem.total_bytes,
            ordinal=device.ordinal,
        ),
        num_rounds=rounds,
    )
    console = make_console()
    console.print(f"n = {n}, k = {k}, {len(kernels)} kernels on {device.name}", highlight=False)
    load.print_load_times(console, times)


@bench_app.command("host")
def bench_host(
    n: Annotated[int, typer.Option(min=8, help="Columns of D.")] = 2112,
    k: Annotated[int, typer.Option(min=16, help="Columns of A and of B.")] = 7168,
    m: Annotated[int, typer.Option(min=1, help="Rows of D.")] = 64,
    calls: Annotated[int, typer.Option(min=1, help="Calls of each kind, in batches.")] = 10_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Host time of a warm call, beside torch._scaled_mm and the bare driver call."""
    from . import __version__
    from .tuning import bench, host, report

    device = bench.check_machine()
    shape = bench.Shape(m, n, k)
    result = host.bench_host(
        shape,
        device,
        num_calls=calls,
        version=__version__,
        command=report.command_line(sys.argv[1:]),
    )
    if json_file:
        write_json(json_file, result.to_json())
    host.print_host_result(make_console(), result)
