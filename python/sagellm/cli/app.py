"""The commands of ``sagellm`` and what they are called."""

from __future__ import annotations

import typer

from sagellm.cli.lazy import STYLE, Entry, lazy_group

COMMANDS = {
    "run": Entry("sagellm.cli.run", "run", "Answer one prompt, printing the text as it is made."),
    "chat": Entry("sagellm.cli.chat", "chat", "Talk with a model."),
    "serve": Entry(
        "sagellm.cli.serve",
        "serve",
        "Serve a model over HTTP, with the APIs of OpenAI and Anthropic.",
    ),
    "top": Entry("sagellm.cli.top", "top", "Show what a server does: load, throughput, latency."),
    "pull": Entry("sagellm.cli.models", "pull_command", "Download a model."),
    "list": Entry(
        "sagellm.cli.models",
        "list_command",
        "List the models on this machine, and those of the catalogue that are not here yet.",
    ),
    "show": Entry(
        "sagellm.cli.models",
        "show_command",
        "Show what a model is: architecture, sizes, formats, context.",
    ),
    "rm": Entry("sagellm.cli.models", "remove_command", "Delete a downloaded model."),
    "info": Entry("sagellm.cli.info", "info", "Show what this machine can run."),
    "bench": Entry("sagellm.bench.app", "app", "Measure this machine."),
    "version": Entry("sagellm.cli.version", "version", "Print the version of sagellm."),
}

app = typer.Typer(
    help="""Runs large language models on this machine.

    \b
    Start here:
      sagellm run smollm2 -p "Why is the sky blue?"    one answer
      sagellm chat smollm2                             a conversation
      sagellm serve smollm2                            an HTTP server
      sagellm top                                      what that server does right now
      sagellm list                                     models, here and to be pulled
      sagellm COMMAND --help                           options and examples

    A MODEL is a name from `sagellm list`, a .gguf file, a Hugging Face folder, or ORG/REPO on
    Hugging Face. Models are kept in $SAGELLM_HOME (default: ~/.cache/sagellm).
    """,
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    **STYLE,
)


@app.callback()
def _options() -> None:
    """There are none but --help."""
