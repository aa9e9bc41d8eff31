"""How a comparison is shown: terminal, JSON, Markdown, plot."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sagellm.bench import report
from sagellm.bench.compare import figures
from sagellm.bench.compare.figures import Figure, Row
from sagellm.bench.compare.plan import Group
from sagellm.bench.compare.run import Comparison
from sagellm.errors import UnsupportedError

_BAR_GROUP = 0.8  # of the distance between two groups of bars
_LEGEND = (
    "Medians over the rounds, in brackets the least and the largest. Nx: how many times better "
    "sagellm is, the median of the ratios within a round. %: of the read bandwidth measured in "
    "the same round."
)


def show(comparison: Comparison, *, as_json: bool) -> None:
    """Prints the result."""
    if as_json:
        report.print_json(figures.to_json(comparison))
        return
    for group in comparison.plan.groups:
        columns, cells = _table(comparison, group)
        report.print_table(_title(comparison, group), columns, cells)
    print(_LEGEND)
    for note in figures.notes(comparison):
        print(f"- {note}")


def check_folder(folder: Path) -> None:
    """Finds out before the measurement whether it can be saved.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: The folder cannot be made.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("--save draws with matplotlib; pip install 'sagellm[bench]'")
    folder.mkdir(parents=True, exist_ok=True)


def save(comparison: Comparison, folder: Path) -> None:
    """Writes compare.json and compare.md; whoever reads them meanwhile finds whole files."""
    text = json.dumps(figures.to_json(comparison), indent=2, allow_nan=False) + "\n"
    _replace(folder / "compare.json", text)
    _replace(folder / "compare.md", markdown(comparison))


def markdown(comparison: Comparison) -> str:
    """The result as a Markdown document that shows ``compare.png`` beside it."""
    plan, machine = comparison.plan, comparison.machine
    done = len(comparison.rounds)
    parts = [
        "# Comparison",
        f"Measured on {comparison.started_at}: {machine['cpu']}, {machine['cpus']} CPUs, "
        f"{machine['memory_gb']} GB, {machine['system']}. {plan.threads} threads for everyone, "
        f"{done} of {plan.rounds} rounds, sagellm's instruction set: {plan.isa or 'the best'}.",
        _versions(comparison),
    ]
    for group in plan.groups:
        columns, cells = _table(comparison, group)
        parts.append(f"## {_title(comparison, group)}")
        parts.append(_markdown_table(columns, cells))
    parts += [_LEGEND, "![](compare.png)"]
    found = figures.notes(comparison)
    if found:
        parts += ["## Notes", "\n".join(f"- {note}" for note in found)]
    return "\n\n".join(parts) + "\n"


def plot(comparison: Comparison, path: Path) -> None:
    """Draws tokens per second relative to the strongest peer, one panel per model."""
    groups = comparison.plan.groups
    with report.figure(path, columns=len(groups)) as axes:
        panels = [axes] if len(groups) == 1 else list(axes)
        for panel, group in zip(panels, groups, strict=True):
            _draw(panel, comparison, group)
        panels[0].set_ylabel("tokens/s relative to the strongest peer")


def _draw(axis: Any, comparison: Comparison, group: Group) -> None:
    rows = [row for row in figures.rows(comparison, group) if not row.lower_is_better]
    titles = [entrant.title for entrant in group.entrants]
    width = _BAR_GROUP / len(titles)
    for place, title in enumerate(titles):
        drawn = [(i, row) for i, row in enumerate(rows) if title in row.figures]
        if not drawn:
            continue
        bars = [row.figures[title] for _, row in drawn]
        scales = [_scale(row) for _, row in drawn]
        middles = [i - _BAR_GROUP / 2 + (place + 0.5) * width for i, _ in drawn]
        heights = [bar.median / scale for bar, scale in zip(bars, scales, strict=True)]
        below = [(bar.median - bar.low) / scale for bar, scale in zip(bars, scales, strict=True)]
        above = [(bar.high - bar.median) / scale for bar, scale in zip(bars, scales, strict=True)]
        drawing = axis.bar(
            middles, heights, width, yerr=[below, above], capsize=2, label=title, color=f"C{place}"
        )
        axis.bar_label(
            drawing, [f"{bar.median:,.0f}" for bar in bars], fontsize="x-small", padding=2
        )
    names = [row.name.removesuffix(", tok/s") for row in rows]
    axis.set_xticks(range(len(rows)), names, rotation=20)
    axis.axhline(1, color="k", linewidth=0.5)
    axis.set_title(group.label)
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def _scale(row: Row) -> float:
    if row.strongest is not None:
        return row.figures[row.strongest].median
    return next(iter(row.figures.values())).median


def _title(comparison: Comparison, group: Group) -> str:
    probes = figures.probes(comparison, group)
    probe = f", bandwidth probe {report.median(probes):.3g} GB/s" if probes else ""
    return f"{group.label}, {comparison.plan.threads} threads{probe}"


def _table(comparison: Comparison, group: Group) -> tuple[list[str], list[list[str]]]:
    titles = [entrant.title for entrant in group.entrants]
    columns = ["", *titles, "against the strongest peer"]
    cells = []
    for row in figures.rows(comparison, group):
        shown = [_cell(row.figures.get(title)) for title in titles]
        if row.strongest is None or row.ratio is None:
            against = "-"
        else:
            against = f"{_factor(row.ratio)} {row.strongest}"
        cells.append([row.name, *shown, against])
    return columns, cells


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    parts = [f"{_number(figure.median)} ({_number(figure.low)}-{_number(figure.high)})"]
    if figure.probe_percent is not None:
        parts.append(f"{figure.probe_percent:.0f} %")
    if figure.ratio is not None:
        parts.append(_factor(figure.ratio))
    return " ".join(parts)


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _versions(comparison: Comparison) -> str:
    seen: dict[str, str] = {}
    for group in comparison.plan.groups:
        for entrant in group.entrants:
            told = [
                one.facts.get("version")
                for one in comparison.measurements
                if one.engine == entrant.engine and one.facts
            ]
            seen[entrant.engine] = entrant.version or str(told[0] if told else "unknown")
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in seen.items()) + "."


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(path.suffix + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)
