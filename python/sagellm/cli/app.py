"""The commands of ``sagellm`` and what they are called."""

from __future__ import annotations

import typer

from sagellm.bench.app import app as bench_app
from sagellm.cli.chat import chat
from sagellm.cli.info import info, version
from sagellm.cli.models import list_command, pull_command, remove_command, show_command
from sagellm.cli.run import run

app = typer.Typer(
    help="""Runs large language models on this machine.

    \b
    Start here:
      sagellm run smollm2 -p "Why is the sky blue?"    one answer
      sagellm chat smollm2                             a conversation
      sagellm list                                     models, here and to be pulled
      sagellm COMMAND --help                           options and examples

    A MODEL is a name from `sagellm list`, a .gguf file, a Hugging Face folder, or ORG/REPO on
    Hugging Face. Models are kept in $SAGELLM_HOME (default: ~/.cache/sagellm).
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run)
app.command("chat")(chat)
app.command("pull", no_args_is_help=True)(pull_command)
app.command("list")(list_command)
app.command("show")(show_command)
app.command("rm", no_args_is_help=True)(remove_command)
app.command("info")(info)
app.add_typer(bench_app, name="bench")
app.command("version")(version)
