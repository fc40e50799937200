"""`jitgen problems`: a model's list of problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .files import write_text
from .models import Model, read_model
from .problem import MAX_EXTENT, GroupedGemm

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
    """A model's FP8 GEMMs and MLA decode on one rank, as `--problems` of `prebuild` reads them.

    `tune` takes the GEMMs among them.

    Knows DeepSeek-V3/R1, Kimi-K2, Qwen3 (dense, MoE) and Llama-3.
    """
    model = read_model(config, tp, ep)
    entries: list[dict[str, object]] = []
    for problem, name in (*model.problems.items(), *model.experts.items()):
        entry: dict[str, object] = {"name": name, "n": problem.n, "k": problem.k, "m_max": m_max}
        if isinstance(problem, GroupedGemm):
            rows = min(m_max * model.rows_a_token, MAX_EXTENT)
            entry |= {"num_groups": problem.num_groups, "m_max": rows}
        entries.append(entry)
    for attention, name in model.attention.items():
        dims = ("num_heads", "num_queries", "head_dim_qk", "head_dim_v")
        entries.append({"name": name, **{field: getattr(attention, field) for field in dims}})
    text = "[\n  " + ",\n  ".join(map(json.dumps, entries)) + "\n]\n"
    if output:
        write_text(output, text)
    else:
        typer.echo(text, nl=False)
    report_left_out(model)


def report_left_out(model: Model) -> None:
    """Say on stderr how many problems the model has, and what is no work for jitgen."""
    num_problems = len(model.problems) + len(model.experts) + len(model.attention)
    typer.echo(
        f"{model.architecture}: problems {num_problems}, kinds left out {len(model.left_out)}",
        err=True,
    )
    for kind, reason in model.left_out.items():
        typer.echo(f"left out: {kind}: {reason}", err=True)
