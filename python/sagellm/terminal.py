"""What all command lines share: errors as one line, exit statuses, progress of downloads."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import typer

from sagellm.errors import SagellmError

if TYPE_CHECKING:
    from rich.progress import Progress

# The base of typer's errors about command lines, of which typer exports only subclasses.
_UsageProblem = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])

_INTERRUPTED = 130  # as shells count: 128 + SIGINT
_BROKEN_PIPE = 141  # 128 + SIGPIPE
_YOUNG_OBJECTS = 100_000  # before the collector of cycles looks at them


def run_app(module: str, *, prog_name: str, args: list[str] | None = None) -> int:
    """Runs the typer application ``app`` of a module; an error becomes one line on stderr.

    The module is imported here, so that Ctrl-C is met in the same way from the first moment.

    Returns:
        0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C, 141 when the reader of the
        output went away.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")  # on stderr
    # Start-up makes many objects and no garbage; passes over them took a tenth of it.
    gc.set_threshold(_YOUNG_OBJECTS, 50, 100)
    # Looking for plugins of pydantic reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Threads of NumPy's BLAS spin for 2**26 cycles before they sleep, from the moment it is loaded.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    try:
        app = importlib.import_module(module).app
        command = typer.main.get_command(app)
        result: object = command.main(args=args, prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
    except SagellmError as error:
        return _fail(str(error))
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except _UsageProblem as error:
        error.show()
        return error.exit_code
    except SystemExit as stop:  # typer has met a BrokenPipeError
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        return _BROKEN_PIPE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:  # a file or folder that the user named
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    if result == _INTERRUPTED:  # typer has met the KeyboardInterrupt already
        return _interrupted()
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    sys.stderr.write("\ninterrupted\n")
    return _INTERRUPTED


def _fail(message: str) -> int:
    start, end = ("\x1b[1;31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    sys.stderr.write(f"{start}error:{end} {' '.join(message.splitlines())}\n")
    return 1


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Writes rows to stdout, columns aligned; plain text, so that other programs can read it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


@contextmanager
def pull_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A callback for downloads that draws a bar on stderr; off a terminal it is one line.

    Nothing appears unless bytes arrive.
    """
    bar: Progress | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = _new_bar()
            if bar.disable:
                sys.stderr.write(f"downloading {name} ({total / 1e6:,.0f} MB)\n")
            bar.start()
            bar.add_task(name, total=total)
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _new_bar() -> Progress:
    from rich import progress  # most commands draw nothing
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
