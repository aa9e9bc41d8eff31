"""``sagellm top``: what a server does right now."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sagellm.errors import InvalidArgumentError, UnavailableError

_TIMEOUT_S = 10.0
_QUANTILES = (0.5, 0.9, 0.99)
_HISTOGRAMS = {
    "ttft_ms": "vllm:time_to_first_token_seconds",
    "itl_ms": "vllm:inter_token_latency_seconds",
    "e2e_ms": "vllm:e2e_request_latency_seconds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """One reading of ``/metrics``.

    Attributes:
        at: Seconds of ``time.perf_counter``.
        values: Samples by name, summed over their labels.
        buckets: For each histogram, counts up to each bound, cumulative.
        errors: HTTP answers of status 500 and above.
        model: The model's name.
    """

    at: float
    values: dict[str, float]
    buckets: dict[str, dict[float, float]]
    errors: float
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What happened between two scrapes; None where nothing did or the server does not tell.

    Attributes:
        seconds: Between the scrapes.
        running, waiting: Sequences.
        kv_usage: Share of KV blocks in use.
        prompt_tokens_per_s, output_tokens_per_s, completions_per_s: Rates.
        prefix_hit_rate: Share of prompt tokens found in the prefix index.
        preemptions, errors: In between; errors are HTTP answers of status 500 and above.
        stalled: Whether ``/health`` says so.
        latencies: Percentiles by name, such as ``{"ttft_ms": {"p50": 12.0}}``.
    """

    model: str
    seconds: float
    running: float | None
    waiting: float | None
    kv_usage: float | None
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    completions_per_s: float | None
    prefix_hit_rate: float | None
    preemptions: float | None
    errors: float
    stalled: bool
    latencies: dict[str, dict[str, float | None]] = field(default_factory=dict)


def top(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Of a server, such as http://127.0.0.1:8000.")
    ] = "http://127.0.0.1:8000",
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between readings.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one reading and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per reading.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="SAGELLM_API_KEY", help="If the server wants one.")
    ] = None,
) -> None:
    """Show what a server does: load, throughput, latency.

    Rates and percentiles are those of the time between two readings of /metrics; percentiles are
    interpolated within the buckets of histograms. It works with other servers, too, that have the
    metrics of vLLM.

    \b
    Examples:
      sagellm top
      sagellm top http://10.0.0.5:8000 --interval 5
      sagellm top --once --json | jq .output_tokens_per_s
    """  # noqa: D301
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(timeout=_TIMEOUT_S, headers=headers) as client:
        before = scrape(client, url)
        console = Console(highlight=False)
        if once or as_json or not console.is_terminal:
            while True:
                time.sleep(interval)
                after = scrape(client, url)
                reading = compare(before, after)
                _print(console, reading, url, as_json=as_json)
                if once:
                    return
                before = after
        _watch(client, url, interval, before, console)


def scrape(client: httpx.Client, url: str) -> Scrape:
    """Reads ``/metrics`` once.

    Raises:
        InvalidArgumentError: The URL is none, or there are no metrics.
        UnavailableError: Nobody answers there.
    """
    address = f"{url.rstrip('/')}/metrics"
    try:
        answer = client.get(address)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InvalidArgumentError(
            f"{url!r} is no URL ({error}); write it like http://127.0.0.1:8000"
        ) from error
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"no answer from {address}: {error or type(error).__name__}; is the server running "
            "(sagellm serve), and is this its address?"
        ) from error
    if answer.status_code == 401:
        raise InvalidArgumentError(
            f"{address} wants an API key; give --api-key or set SAGELLM_API_KEY"
        )
    if answer.status_code != 200:
        raise UnavailableError(
            f"{address} answers {answer.status_code}; it is no server with metrics, or it is down"
        )
    return read(answer.text, time.perf_counter())


def read(text: str, at: float) -> Scrape:
    """Takes a text in Prometheus's format apart.

    Args:
        text: The body of ``/metrics``.
        at: When it was read.

    Raises:
        InvalidArgumentError: It is something else.
    """
    values: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    errors, model = 0.0, ""
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                model = model or sample.labels.get("model_name", "")
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
                if sample.name.endswith("_bucket"):
                    counts = buckets.setdefault(family.name, {})
                    bound = float(sample.labels["le"])
                    counts[bound] = counts.get(bound, 0.0) + sample.value
                elif sample.name == "sagellm:http_requests_total":
                    errors += sample.value if sample.labels["status"] >= "500" else 0.0
    except (ValueError, KeyError) as error:
        raise InvalidArgumentError(f"/metrics is not in Prometheus's format: {error}") from error
    return Scrape(at=at, values=values, buckets=buckets, errors=errors, model=model)


def compare(before: Scrape, after: Scrape) -> Reading:
    """What happened between two scrapes of one server."""
    seconds = max(after.at - before.at, 1e-9)

    def grown(name: str) -> float | None:
        if name not in after.values:
            return None
        # A counter that fell belongs to a server that was restarted in between.
        start = before.values.get(name, 0.0)
        return after.values[name] - (start if start <= after.values[name] else 0.0)

    def rate(name: str) -> float | None:
        growth = grown(name)
        return None if growth is None else growth / seconds

    hits, queries = grown("vllm:prefix_cache_hits_total"), grown("vllm:prefix_cache_queries_total")
    latencies = {}
    for label, name in _HISTOGRAMS.items():
        counts = _bucket_growth(before.buckets.get(name, {}), after.buckets.get(name, {}))
        latencies[label] = {
            f"p{100 * q:.0f}": _milliseconds(quantile(counts, q)) for q in _QUANTILES
        }
    return Reading(
        model=after.model,
        seconds=seconds,
        running=after.values.get("vllm:num_requests_running"),
        waiting=after.values.get("vllm:num_requests_waiting"),
        kv_usage=after.values.get("vllm:kv_cache_usage_perc"),
        prompt_tokens_per_s=rate("vllm:prompt_tokens_total"),
        output_tokens_per_s=rate("vllm:generation_tokens_total"),
        completions_per_s=rate("vllm:request_success_total"),
        prefix_hit_rate=hits / queries if hits is not None and queries else None,
        preemptions=grown("vllm:num_preemptions_total"),
        errors=after.errors - (before.errors if before.errors <= after.errors else 0.0),
        stalled=after.values.get("sagellm:stalled", 0.0) > 0,
        latencies=latencies,
    )


def _bucket_growth(
    before: Mapping[float, float], after: Mapping[float, float]
) -> list[tuple[float, float]]:
    """Bounds in ascending order, with how many values came since that are at most that."""
    restarted = any(before.get(bound, 0.0) > count for bound, count in after.items())
    start = {} if restarted else before
    return [(bound, after[bound] - start.get(bound, 0.0)) for bound in sorted(after)]


def quantile(counts: Sequence[tuple[float, float]], q: float) -> float | None:
    """A quantile of a histogram, interpolated within the bucket that it falls into.

    Args:
        counts: Upper bounds, the last one infinite, and cumulative counts.
        q: From 0 to 1.

    Returns:
        None without values; the last finite bound if it lies beyond.
    """
    total = counts[-1][1] if counts else 0.0
    if total <= 0:
        return None
    rank = q * total
    low, below = 0.0, 0.0
    for bound, count in counts:
        if count >= rank and count > below:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = (low if math.isinf(bound) else bound), count
    return low


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _watch(
    client: httpx.Client, url: str, interval: float, before: Scrape, console: Console
) -> None:
    with Live(
        Text("reading ..."), console=console, screen=True, auto_refresh=False
    ) as live:  # Ctrl-C ends it
        while True:
            time.sleep(interval)
            try:
                after = scrape(client, url)
            except UnavailableError as error:
                live.update(Text(f"{error}\n\ntrying again every {interval:g} s", style="red"))
            else:
                live.update(view(compare(before, after), url))
                before = after
            live.refresh()


def _print(console: Console, reading: Reading, url: str, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(asdict(reading)) + "\n")
        sys.stdout.flush()
    else:
        console.print(view(reading, url))


def view(reading: Reading, url: str) -> Group:
    """A reading for the terminal."""
    title = Text.assemble(
        (reading.model or "?", "bold"), f" at {url}, over {reading.seconds:.1f} s"
    )
    load = Table.grid(padding=(0, 3))
    for name, value in (
        ("running", _number(reading.running, "d")),
        ("waiting", _number(reading.waiting, "d")),
        ("KV cache", f"{_number(reading.kv_usage, '.1%')} {_bar(reading.kv_usage)}"),
        ("prompt tokens/s", _number(reading.prompt_tokens_per_s, ",.1f")),
        ("output tokens/s", _number(reading.output_tokens_per_s, ",.1f")),
        ("completions/s", _number(reading.completions_per_s, ",.2f")),
        ("prefix hits", _number(reading.prefix_hit_rate, ".1%")),
        ("preemptions", _number(reading.preemptions, "d")),
        ("errors", _number(reading.errors, "d")),
    ):
        load.add_row(name, value)
    delays = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    delays.add_column("milliseconds")
    for q in _QUANTILES:
        delays.add_column(f"p{100 * q:.0f}", justify="right")
    for label, percentiles in reading.latencies.items():
        name = label.removesuffix("_ms").upper()
        delays.add_row(name, *(_number(value, ",.1f") for value in percentiles.values()))
    parts: list[Text | Table] = [title, Text(), load, Text(), delays]
    if reading.stalled:
        parts.insert(1, Text("stalled: /health says that the engine does not move", style="red"))
    return Group(*parts)


def _number(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    return format(int(value) if style == "d" else value, style)


def _bar(share: float | None, width: int = 20) -> str:
    filled = 0 if share is None else round(width * min(max(share, 0.0), 1.0))
    return "█" * filled + "░" * (width - filled)
