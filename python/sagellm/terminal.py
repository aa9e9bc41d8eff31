"""Command lines: an error becomes one clear line and an exit status."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from sagellm.errors import SagellmError

# The base of typer's errors about command lines; typer exports only its subclasses.
_UsageProblem = typer.BadParameter.__mro__[2]


def run_app(app: typer.Typer, *, prog_name: str, args: list[str] | None = None) -> int:
    """Runs a typer application; a SagellmError becomes one line on standard error.

    Returns:
        0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C.
    """
    command = typer.main.get_command(app)
    try:
        result = command.main(args=args, prog_name=prog_name, standalone_mode=False)
    except SagellmError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error:[/] {_plain(str(error))}", highlight=False
        )
        return 1
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted")
        return 130
    except _UsageProblem as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return result if isinstance(result, int) else 0


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
