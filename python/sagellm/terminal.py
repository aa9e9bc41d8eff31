"""Command lines: an error becomes one clear line and an exit status."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape

from sagellm.errors import SagellmError


def run_app(app: typer.Typer, *, prog_name: str, args: list[str] | None = None) -> int:
    """Runs a typer application; a SagellmError becomes one line on standard error.

    Returns:
        0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C.
    """
    try:
        app(args=args, prog_name=prog_name)
    except SagellmError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error:[/] {escape(str(error))}", highlight=False
        )
        return 1
    except SystemExit as stop:  # typer has said what there is to say
        return stop.code if isinstance(stop.code, int) else 0
    return 0
