"""``sagellm pull``, ``list``, ``rm`` and ``show``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sagellm.checkpoint import open_checkpoint
from sagellm.checkpoint.catalogue import CATALOGUE, DEFAULT_MODEL
from sagellm.checkpoint.encoder import is_encoder, open_encoder
from sagellm.checkpoint.resolve import resolve_model
from sagellm.checkpoint.store import list_models, pull, remove
from sagellm.cli.options import Model
from sagellm.terminal import print_columns, pull_progress
from sagellm.text import load_tokenizer

Name = Annotated[str, typer.Argument(metavar="NAME", help="From `sagellm list`, or ORG/REPO.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def pull_command(name: Name) -> None:
    """Download a model. Interrupt it at will: a model is either absent or whole.

    \b
    Examples:
      sagellm pull smollm2
      sagellm pull gemma3-270m
      sagellm pull ORG/REPO               a Hugging Face model (pip install 'sagellm[hf]')
      sagellm pull ORG/REPO/FILE.gguf     one GGUF file of it
    """  # noqa: D301
    with pull_progress(name) as progress:
        path = pull(name, progress=progress)
    typer.echo(f"{name} is ready: {path}")


def list_command(as_json: Json = False) -> None:
    """List the models on this machine, and those of the catalogue that are not here yet.

    \b
    Examples:
      sagellm list
      sagellm list --json
    """  # noqa: D301
    models = list_models()
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {"name": m.name, "bytes": m.nbytes, "source": m.source, "path": str(m.path)}
                    for m in models
                ]
            )
        )
        return
    rows = [("model", "size", "license", "source")]
    rows += [(m.name, _megabytes(m.nbytes), m.license, m.source) for m in models]
    present = {model.name for model in models}
    for entry in CATALOGUE.values():
        if entry.name not in present:
            rows.append((entry.name, "not here", entry.license, f"sagellm pull {entry.name}"))
    print_columns(rows)


def remove_command(name: Name) -> None:
    """Delete a downloaded model.

    \b
    Example:
      sagellm rm smollm2
    """  # noqa: D301
    typer.echo(f"{name}: {_megabytes(remove(name))} freed")


def show_command(model: Model = DEFAULT_MODEL, as_json: Json = False) -> None:
    """Show what a model is: architecture, sizes, formats, context.

    \b
    Examples:
      sagellm show smollm2
      sagellm show ./model.gguf --json
    """  # noqa: D301
    path = resolve_model(model)
    facts = _encoder_facts(path) if is_encoder(path) else _decoder_facts(path)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    print_columns([(key, _shown(value)) for key, value in facts.items()])


def _encoder_facts(path: Path) -> dict[str, object]:
    checkpoint = open_encoder(path)
    config = checkpoint.config
    return {
        "name": config.name,
        "path": str(path),
        "architecture": config.architecture,
        "kind": "cross-encoder" if config.has_head else "embedding model",
        "parameters": checkpoint.num_parameters,
        "format": checkpoint.quantization,
        "longest input": config.max_tokens,
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_heads} of {config.head_dim}",
        "pooling": config.pooling,
        "normalised": config.normalize,
        "vocabulary": config.vocab_size,
    }


def _decoder_facts(path: Path) -> dict[str, object]:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    windows = {window for window in config.layer_windows if window}
    return {
        "name": config.name,
        "path": str(path),
        "architecture": config.architecture,
        "parameters": checkpoint.num_parameters,
        "format": checkpoint.quantization,
        "context": config.max_position,
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_heads} ({config.num_kv_heads} KV) of {config.head_dim}",
        "sliding window": ", ".join(map(str, sorted(windows))) or "none",
        "vocabulary": config.vocab_size,
        "chat template": load_tokenizer(checkpoint.tokenizer).chat_template is not None,
    }


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
