"""What a load on a server measured, in the definitions of ``vllm bench serve``.

For a request sent at ``start`` whose streamed events with text arrived at ``t1 <= ... <= tk`` and
whose answer ended at ``end``, with ``n`` output tokens:

    TTFT = t1 - start                  time to first token
    E2EL = end - start                 end-to-end latency
    TPOT = (E2EL - TTFT) / (n - 1)     time per output token after the first; needs n > 1
    ITL  = t2 - t1, ..., tk - t(k-1)   inter-token latencies: every gap counts by itself
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from sagellm.errors import InvalidArgumentError

CountedFrom = Literal["usage", "events"]
_SLO_NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request has no answer.

    Attributes:
        kind: Groups failures, such as "http 500" or "timeout".
        message: What the server or the transport said.
        rejected: The server was too busy and said when to come back (429 or 503 with Retry-After).
    """

    kind: str
    message: str
    rejected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """One request as the client saw it; times in seconds of one monotonic clock.

    Attributes:
        start: Just before the request was sent.
        token_times: Arrival of every event that carried text.
        end: Arrival of the last event of the answer; of a failure, when it was known.
        output_tokens: From the server's usage, or the number of events when it gave none.
        prompt_tokens, cached_tokens: From the server's usage; None when it did not say.
        asked_prompt_tokens: None where the length depends on the server's own answers.
        late_s: How long after its planned moment the request was sent (open loop).
    """

    start: float
    token_times: tuple[float, ...] = ()
    end: float
    output_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    asked_prompt_tokens: int | None = None
    asked_output_tokens: int | None = None
    counted_from: CountedFrom = "usage"
    late_s: float = 0.0
    failure: Failure | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.token_times[0] - self.start

    @property
    def e2el(self) -> float:
        """Seconds to the end of the answer."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between consecutive events with text."""
        return [after - before for before, after in pairwise(self.token_times)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Summary of a sample. ``std`` is the population's; percentiles interpolate linearly."""

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @property
    def median(self) -> float:
        """The 50th percentile."""
        return self.p50

    @staticmethod
    def of(values: Sequence[float]) -> Distribution | None:
        """The summary of ``values``; None when there are none, because nothing was measured."""
        if not values:
            return None
        sample = np.asarray(values, dtype=np.float64)
        p50, p90, p95, p99 = np.percentile(sample, (50, 90, 95, 99)).tolist()
        return Distribution(
            count=sample.size,
            mean=float(sample.mean()),
            std=float(sample.std()),
            min=float(sample.min()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=float(sample.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """Service-level objectives in milliseconds; None: no bound.

    A request is good when it was answered within all of them. An answer of one token has no TPOT
    and meets any bound on it.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @staticmethod
    def parse(text: str) -> Objectives:
        """Reads ``ttft:200,tpot:20``.

        Raises:
            InvalidArgumentError: Another name, or not a positive number.
        """
        bounds: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            try:
                bounds[name] = float(value)
            except ValueError:
                bounds[name] = 0.0
            if name not in _SLO_NAMES or not 0 < bounds[name] < float("inf"):
                raise InvalidArgumentError(
                    f"--goodput has {part.strip()!r}; give milliseconds for some of ttft, tpot and "
                    "e2el, such as ttft:200,tpot:20"
                )
        return Objectives(**bounds)

    def met_by(self, timing: RequestTiming) -> bool:
        """Whether an answered request was good."""
        tpot = timing.tpot or 0.0
        pairs = ((self.ttft, timing.ttft), (self.tpot, tpot), (self.e2el, timing.e2el))
        return all(bound is None or seconds * 1e3 <= bound for bound, seconds in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMetrics:
    """Figures of one load. Rates are per second of ``duration_s``.

    Attributes:
        duration_s: First request sent to last answer complete.
        completed, failed, rejected: Requests; ``failed`` includes ``rejected``.
        unfinished: Requests cut off by Ctrl-C; they are in no other figure.
        errors: How many failures of each kind.
        error_examples: What the first failure of each kind said.
        error_rate: failed / (completed + failed).
        concurrency: Mean number of requests open at once.
        input_tokens: Prompt tokens of completed requests as the server counted them; None when it
            did not say for some of them.
        input_throughput, output_throughput, total_throughput: Tokens per second.
        goodput: Good requests per second; None without objectives.
        cached_tokens: Prompt tokens that the server took from its cache; None when it did not say.
        tokens_per_event: Output tokens divided by streamed events. Above 1, ITL is longer than the
            time between tokens.
        tokens_counted_from: "events" when some answers had no usage: a lower bound then.
        wrong_prompt_lengths, wrong_output_lengths: Requests whose usage is not what was asked.
        client_late_ms: How late requests were sent (open loop). Milliseconds here mean that the
            client was too slow for this load, and the load was not what was asked for.
    """

    duration_s: float
    completed: int
    failed: int
    rejected: int
    unfinished: int
    errors: Mapping[str, int]
    error_examples: Mapping[str, str]
    error_rate: float | None
    concurrency: float
    input_tokens: int | None
    output_tokens: int
    cached_tokens: int | None
    request_throughput: float
    input_throughput: float | None
    output_throughput: float
    total_throughput: float | None
    goodput: float | None
    good_share: float | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2el_ms: Distribution | None
    tokens_per_event: float | None
    tokens_counted_from: CountedFrom
    wrong_prompt_lengths: int
    wrong_output_lengths: int
    client_late_ms: Distribution | None


def summarize(
    timings: Sequence[RequestTiming],
    *,
    objectives: Objectives | None = None,
    unfinished: int = 0,
    open_loop: bool = False,
) -> LoadMetrics:
    """Figures of the requests of one load; nothing that was not measured becomes a number."""
    done = [t for t in timings if t.failure is None]
    failures = [t.failure for t in timings if t.failure is not None]
    duration = max((t.end for t in timings), default=0.0) - min(
        (t.start for t in timings), default=0.0
    )
    output_tokens = sum(t.output_tokens for t in done)
    input_tokens = _total(t.prompt_tokens for t in done)
    events = sum(len(t.token_times) for t in done)
    good = None if objectives is None else sum(map(objectives.met_by, done))

    def rate(count: float) -> float:
        return count / duration if duration > 0 else 0.0

    return LoadMetrics(
        duration_s=duration,
        completed=len(done),
        failed=len(failures),
        rejected=sum(failure.rejected for failure in failures),
        unfinished=unfinished,
        errors=dict(Counter(failure.kind for failure in failures)),
        error_examples={failure.kind: failure.message for failure in reversed(failures)},
        error_rate=len(failures) / len(timings) if timings else None,
        concurrency=rate(sum(t.e2el for t in timings)),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=_total(t.cached_tokens for t in done),
        request_throughput=rate(len(done)),
        input_throughput=None if input_tokens is None else rate(input_tokens),
        output_throughput=rate(output_tokens),
        total_throughput=None if input_tokens is None else rate(input_tokens + output_tokens),
        goodput=None if good is None else rate(good),
        good_share=good / len(timings) if good is not None and timings else None,
        ttft_ms=_milliseconds(t.ttft for t in done),
        tpot_ms=_milliseconds(t.tpot for t in done if t.tpot is not None),
        itl_ms=_milliseconds(gap for t in done for gap in t.itl),
        e2el_ms=_milliseconds(t.e2el for t in done),
        tokens_per_event=output_tokens / events if events else None,
        tokens_counted_from="events" if any(t.counted_from == "events" for t in done) else "usage",
        wrong_prompt_lengths=sum(_differs(t.prompt_tokens, t.asked_prompt_tokens) for t in done),
        wrong_output_lengths=sum(_differs(t.output_tokens, t.asked_output_tokens) for t in done),
        client_late_ms=_milliseconds(t.late_s for t in timings) if open_loop else None,
    )


def _differs(measured: int | None, asked: int | None) -> bool:
    return asked is not None and measured != asked


def _total(counts: Iterable[int | None]) -> int | None:
    total = 0
    empty = True
    for count in counts:
        if count is None:
            return None
        total += count
        empty = False
    return None if empty else total


def _milliseconds(seconds: Iterable[float]) -> Distribution | None:
    return Distribution.of([1e3 * value for value in seconds])
