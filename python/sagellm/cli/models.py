"""``sagellm pull``, ``list``, ``rm`` and ``show``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sagellm.checkpoint import open_checkpoint
from sagellm.checkpoint.catalogue import CATALOGUE
from sagellm.checkpoint.store import list_models, pull, remove, resolve_model
from sagellm.cli.progress import pull_progress

Name = Annotated[str, typer.Argument(help="Catalogue name, or org/repository on Hugging Face.")]


def pull_command(name: Name) -> None:
    """Download a model. Interrupt it at will: a model is either absent or whole."""
    with pull_progress() as progress:
        path = pull(name, progress=progress)
    typer.echo(f"{name} is ready: {path.name}")


def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """List the models on this machine, and those of the catalogue that are not here yet."""
    models = list_models()
    present = {model.name for model in models}
    if as_json:
        typer.echo(
            json.dumps([{"name": m.name, "bytes": m.nbytes, "source": m.source} for m in models])
        )
        return
    table = Table("model", "size", "license", "source")
    for model in models:
        table.add_row(model.name, _megabytes(model.nbytes), model.license, model.source)
    for entry in CATALOGUE.values():
        if entry.name not in present:
            table.add_row(
                f"[dim]{entry.name}",
                "[dim]not here",
                f"[dim]{entry.license}",
                f"[dim]sagellm pull {entry.name}",
            )
    Console().print(table)


def remove_command(name: Name) -> None:
    """Delete a downloaded model."""
    typer.echo(f"{name}: {_megabytes(remove(name))} freed")


def show_command(
    name: Annotated[str, typer.Argument(help="Name or path of a model.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a model is: architecture, sizes, formats, context."""
    checkpoint = open_checkpoint(resolve_model(name))
    config = checkpoint.config
    windows = {window for window in config.layer_windows if window}
    facts: dict[str, object] = {
        "name": config.name,
        "architecture": config.architecture,
        "parameters": checkpoint.num_parameters,
        "format": checkpoint.quantization,
        "context": config.max_position,
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_heads} ({config.num_kv_heads} KV) of {config.head_dim}",
        "sliding window": ", ".join(map(str, sorted(windows))) or "none",
        "vocabulary": config.vocab_size,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in facts.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
