"""The commands of ``sagellm`` and what they are called."""

from __future__ import annotations

import typer

from sagellm.bench.app import app as bench_app
from sagellm.cli.chat import chat
from sagellm.cli.info import info, version
from sagellm.cli.models import list_command, pull_command, remove_command, show_command
from sagellm.cli.run import run

app = typer.Typer(
    help="Runs large language models on this machine: quickly, reproducibly, with clear errors.",
    epilog="Start with: sagellm run smollm2 -p 'Why is the sky blue?'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("chat")(chat)
app.command("pull")(pull_command)
app.command("list")(list_command)
app.command("rm")(remove_command)
app.command("show")(show_command)
app.command("info")(info)
app.command("version")(version)
app.add_typer(bench_app, name="bench")
