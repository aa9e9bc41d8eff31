"""How a measured server is shown: terminal, JSON, Markdown, plots, and a folder with all of it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from sagellm.bench import report
from sagellm.bench.serve import Point, ServeResult
from sagellm.bench.serve_contract import Clause
from sagellm.bench.serve_metrics import Distribution, LoadMetrics, RequestTiming
from sagellm.errors import UnsupportedError

_LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2EL", "e2el_ms"))
_SUMMARY = (
    "load",
    "done",
    "failed",
    "req/s",
    "tok/s",
    "TTFT mean",
    "TTFT p99",
    "TPOT mean",
    "ITL p99",
    "E2EL mean",
)
_LATE_MS = 5.0

Rows = list[tuple[str, ...]]


def show(result: ServeResult, *, as_json: bool) -> None:
    """Prints the result."""
    if as_json:
        report.print_json(to_json(result))
        return
    if len(result.points) > 1:
        rows = [_summary_row(point) for point in result.points]
        report.print_table(f"{_title(result)}; latencies in ms", _SUMMARY, rows)
    for point in result.points:
        if len(result.points) == 1:
            report.print_table(_title(result), (point.label, ""), _figure_rows(point))
            rows = _latency_rows(point.metrics)
            report.print_table("latency, ms", _latency_columns(), rows)
        for note in notes(point):
            print(f"{point.label}: {note}")
        if point.contract:
            title = f"contract {result.contract}: {point.label}"
            columns = ("clause", "bound", "measured", "verdict")
            report.print_table(title, columns, [_clause_row(clause) for clause in point.contract])
    if result.interrupted:
        print("interrupted: figures of what was complete")


def to_json(result: ServeResult) -> dict[str, Any]:
    """The result as one JSON object, without the single requests."""
    shown = {
        name: getattr(result, name)
        for name in ("url", "model", "endpoint", "seed", "started_at", "cpus", "contract")
    }
    return {
        **shown,
        "lengths_enforced_by": list(result.lengths_enforced_by),
        "objectives_ms": None if result.objectives is None else asdict(result.objectives),
        "interrupted": result.interrupted,
        "passed": None if result.contract is None else result.passed,
        "points": [
            {
                "label": point.label,
                "workload": asdict(point.workload),
                "load": {"kind": type(point.load).__name__, **asdict(point.load)},
                "metrics": asdict(point.metrics),
                "server": asdict(point.server),
                "contract": [asdict(clause) for clause in point.contract],
                "notes": notes(point),
            }
            for point in result.points
        ],
    }


def notes(point: Point) -> list[str]:
    """What a reader has to know before trusting the figures."""
    metrics = point.metrics
    found = []
    for kind, count in metrics.errors.items():
        found.append(f"{count} requests failed ({kind}): {metrics.error_examples[kind]}")
    if metrics.unfinished:
        found.append(f"{metrics.unfinished} requests were cut off and are not counted")
    if metrics.wrong_prompt_lengths:
        found.append(
            f"{metrics.wrong_prompt_lengths} prompts do not have the length asked by the server's "
            "own count"
        )
    if metrics.wrong_output_lengths:
        found.append(
            f"{metrics.wrong_output_lengths} answers do not have the length asked; the server may "
            "not know ignore_eos"
        )
    if metrics.tokens_counted_from == "events":
        found.append("the server gave no usage: output tokens are streamed events, a lower bound")
    if metrics.cached_tokens and metrics.input_tokens:
        share = metrics.cached_tokens / metrics.input_tokens
        found.append(f"{share:.0%} of the prompt tokens came from the server's prefix cache")
    late = metrics.client_late_ms
    if late is not None and late.p99 > _LATE_MS:
        found.append(
            f"the client was {late.p99:.1f} ms late at p99: it is too slow here for this load"
        )
    return found


def _title(result: ServeResult) -> str:
    return f"{result.model} at {result.url}, {result.endpoint}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _summary_row(point: Point) -> tuple[str, ...]:
    m = point.metrics

    def pick(distribution: Distribution | None, name: str) -> str:
        return _number(None if distribution is None else getattr(distribution, name))

    return (
        point.label,
        str(m.completed),
        str(m.failed),
        _number(m.request_throughput),
        _number(m.output_throughput),
        pick(m.ttft_ms, "mean"),
        pick(m.ttft_ms, "p99"),
        pick(m.tpot_ms, "mean"),
        pick(m.itl_ms, "p99"),
        pick(m.e2el_ms, "mean"),
    )


def _figure_rows(point: Point) -> Rows:
    m, server = point.metrics, point.server
    figures: list[tuple[str, float | None]] = [
        ("completed requests", m.completed),
        ("failed requests", m.failed),
        ("of them rejected as busy", m.rejected),
        ("duration, s", m.duration_s),
        ("requests open at once, mean", m.concurrency),
        ("prompt tokens", m.input_tokens),
        ("of them from the prefix cache", m.cached_tokens),
        ("output tokens", m.output_tokens),
        ("output tokens per event", m.tokens_per_event),
        ("requests/s", m.request_throughput),
        ("good requests/s", m.goodput),
        ("prompt tokens/s", m.input_throughput),
        ("output tokens/s", m.output_throughput),
        ("all tokens/s", m.total_throughput),
        ("server: memory, MB", server.memory_mb),
        ("server: prefix hit rate", server.prefix_hit_rate),
        ("server: speculation accepted", server.spec_accept_rate),
    ]
    return [(name, _number(value)) for name, value in figures]


def _latency_columns() -> tuple[str, ...]:
    return ("", "mean", "std", "min", "p50", "p90", "p95", "p99", "max")


def _latency_rows(metrics: LoadMetrics) -> Rows:
    rows: Rows = []
    for name, attribute in _LATENCIES:
        distribution: Distribution | None = getattr(metrics, attribute)
        cells = (
            None if distribution is None else getattr(distribution, column)
            for column in _latency_columns()[1:]
        )
        rows.append((name, *map(_number, cells)))
    return rows


def _clause_row(clause: Clause) -> tuple[str, ...]:
    verdict = "pass" if clause.passed else f"FAIL: {clause.reason}"
    return (clause.name, clause.bound, _number(clause.measured), verdict)


def markdown(result: ServeResult, plots: Sequence[str] = ()) -> str:
    """The result as a Markdown document that shows ``plots``, file names beside it."""
    parts = [
        f"# {result.model}",
        f"Measured on {result.started_at} at `{result.url}`, endpoint {result.endpoint}, "
        f"seed {result.seed}, client on {result.cpus} CPUs. Answer lengths enforced by: "
        f"{', '.join(result.lengths_enforced_by) or 'nothing the server knows'}.",
    ]
    if result.interrupted:
        parts.append("**Interrupted**: figures of what was complete.")
    if result.contract is not None:
        parts.append(f"Contract {result.contract}: **{'pass' if result.passed else 'FAIL'}**.")
    parts.append(_markdown_table(_SUMMARY, [_summary_row(point) for point in result.points]))
    parts.append("Latencies are in milliseconds; tok/s are output tokens.")
    parts += [f"![]({name})" for name in plots]
    for point in result.points:
        parts.append(f"## {point.label}")
        parts += ["\n".join(f"- {note}" for note in notes(point))] if notes(point) else []
        parts.append(_markdown_table(("figure", "value"), _figure_rows(point)))
        parts.append(_markdown_table(_latency_columns(), _latency_rows(point.metrics)))
        if point.contract:
            rows = [_clause_row(clause) for clause in point.contract]
            parts.append(_markdown_table(("clause", "bound", "measured", "verdict"), rows))
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def check_folder(folder: Path) -> None:
    """Finds out before the measurement whether it can be saved.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: The folder cannot be made.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("--save draws with matplotlib; pip install 'sagellm[bench]'")
    folder.mkdir(parents=True, exist_ok=True)


def save(result: ServeResult, folder: Path) -> None:
    """Writes result.json, requests.jsonl, report.md and the plots into ``folder``."""
    (folder / "result.json").write_text(json.dumps(to_json(result), indent=2) + "\n")
    with open(folder / "requests.jsonl", "w") as lines:
        for point in result.points:
            for timing in point.timings:
                lines.write(json.dumps(_request(point, timing)) + "\n")
    plots = []
    swept = [
        list(points) for _, points in groupby(result.points, key=lambda point: point.workload.name)
    ]
    for points in swept:
        if len(points) > 1:
            name = f"load-{points[0].workload.name}.png"
            plot_load(points, folder / name)
            plots.append(name)
    plot_distribution(result.points, folder / "distribution.png")
    plots.append("distribution.png")
    (folder / "report.md").write_text(markdown(result, plots))


def _request(point: Point, timing: RequestTiming) -> dict[str, Any]:
    answered = timing.failure is None
    origin = min(other.start for other in point.timings)
    return {
        "point": point.label,
        "start_s": timing.start - origin,
        "late_s": timing.late_s,
        "prompt_tokens": timing.prompt_tokens,
        "cached_tokens": timing.cached_tokens,
        "output_tokens": timing.output_tokens,
        "ttft_s": timing.ttft if answered else None,
        "e2el_s": timing.e2el,
        "itl_s": timing.itl if answered else [],
        "failure": None if timing.failure is None else asdict(timing.failure),
    }


def plot_load(points: Sequence[Point], path: Path) -> None:
    """Draws first-token time, time per token and throughput against the load."""
    points = sorted(points, key=lambda point: point.load.value)
    loads = [point.load.value for point in points]
    with report.figure(path, columns=3) as axes:
        for axis, (name, attribute) in zip(axes, _LATENCIES, strict=False):
            for percentile, style in (("p50", "o-"), ("p99", "o--")):
                values = [
                    getattr(getattr(point.metrics, attribute), percentile, float("nan"))
                    for point in points
                ]
                axis.plot(loads, values, style, label=percentile)
            axis.set_ylabel(f"{name}, ms")
            axis.legend(loc="upper left")
        axes[2].clear()
        axes[2].plot(loads, [point.metrics.output_throughput for point in points], "o-")
        axes[2].set_ylabel("output tokens/s")
        for axis in axes:
            axis.set_xlabel(points[0].load.unit)
            axis.set_xticks(loads, [f"{load:g}" for load in loads])
            axis.set_ylim(bottom=0)
        axes[1].set_title(points[0].workload.name)


def plot_distribution(points: Sequence[Point], path: Path) -> None:
    """Draws the cumulative distributions of first-token times and inter-token latencies."""
    with report.figure(path, columns=2) as axes:
        for point in points:
            done = [timing for timing in point.timings if timing.failure is None]
            first = [1e3 * timing.ttft for timing in done]
            gaps = [1e3 * gap for timing in done for gap in timing.itl]
            for axis, values in zip(axes, (first, gaps), strict=True):
                if values:
                    axis.ecdf(values, label=point.label)
        for axis, name in zip(axes, ("TTFT", "ITL"), strict=True):
            axis.set_xlabel(f"{name}, ms")
            axis.set_ylabel("share of samples")
            if axis.lines:
                axis.legend(loc="lower right", fontsize="small")
