"""`jitgen problems`: a model's list of problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .files import write_text
from .models import Model, read_model
from .problem import MAX_EXTENT

TP = typer.Option(min=1, help="Ranks that split each layer.")
EP = typer.Option(min=1, help="Ranks that share the experts.")
M_MAX = typer.Option(min=1, max=MAX_EXTENT, help="Most rows (tokens) of a call.")
DEFAULT_M_MAX = 8192


def problems(
    config: Annotated[Path, typer.Argument(help="The model's config.json of Hugging Face.")],
    tp: Annotated[int, TP] = 1,
    ep: Annotated[int, EP] = 1,
    m_max: Annotated[int, M_MAX] = DEFAULT_M_MAX,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: print the list.")
    ] = None,
) -> None:
    """A model's dense FP8 GEMMs on one rank, as `--problems` of `tune` and `prebuild` reads them.

    Knows DeepSeek-V3/R1, Kimi-K2, Qwen3 (dense, MoE) and Llama-3.
    """
    model = read_model(config, tp, ep)
    entries = [
        json.dumps({"name": name, "n": problem.n, "k": problem.k, "m_max": m_max})
        for problem, name in model.problems.items()
    ]
    text = "[\n  " + ",\n  ".join(entries) + "\n]\n"
    if output:
        write_text(output, text)
    else:
        typer.echo(text, nl=False)
    report_left_out(model)


def report_left_out(model: Model) -> None:
    """Say on stderr how many problems the model has, and what has no kernel yet."""
    typer.echo(
        f"{model.architecture}: problems {len(model.problems)},"
        f" kinds left out {len(model.left_out)}",
        err=True,
    )
    for kind, reason in model.left_out.items():
        typer.echo(f"left out: {kind}: {reason}", err=True)
