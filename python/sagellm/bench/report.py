"""How benchmark results are shown: one JSON object for scripts, one table for people."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sagellm.errors import InvalidArgumentError, UnsupportedError

_WIDEST = 1000  # columns; terminals wrap, and files are searched


def median(values: Sequence[float]) -> float:
    """Median as a plain float."""
    return float(statistics.median(values))


def spread(values: Sequence[float]) -> float:
    """(max - min) / median: how far the runs lie apart."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def print_json(result: Any) -> None:
    """Writes one JSON document to standard output."""
    json.dump(result, sys.stdout, indent=None, separators=(", ", ": "), allow_nan=False)
    sys.stdout.write("\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a table to standard output, as wide as it has to be.

    Floats are shown with four significant digits.
    """
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(soft_wrap=True, width=_WIDEST).print(table)


def progress() -> Progress:
    """A progress bar on standard error, shown on terminals only."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def check_plot(path: Path) -> None:
    """Finds out before the measurement whether a plot can be written.

    Raises:
        UnsupportedError: matplotlib is not installed.
        InvalidArgumentError: Not a PNG name, or its folder is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("--plot needs matplotlib; pip install 'sagellm[plot]'")
    if path.suffix.lower() != ".png":
        raise InvalidArgumentError(f"--plot writes PNG; name the file like {path.stem}.png")
    if not path.absolute().parent.is_dir():
        raise InvalidArgumentError(f"--plot: there is no folder {path.parent}; create it first")


@contextmanager
def figure(path: Path, *, columns: int = 1) -> Iterator[Any]:
    """Axes of matplotlib (several when ``columns`` is) that become a PNG file at the end.

    No display is needed.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(3 + 4 * columns, 4), dpi=150, layout="constrained")
    yield drawing.subplots(ncols=columns)
    drawing.savefig(path, format="png")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)
