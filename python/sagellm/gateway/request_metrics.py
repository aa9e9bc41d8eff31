"""What is counted of requests: totals, and how times and lengths are distributed.

Counting takes well under a microsecond and no lock: all of it happens on the event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from time import perf_counter
from typing import TYPE_CHECKING

from sagellm.serving import HTTPMethod

if TYPE_CHECKING:
    from sagellm.engine.output import Finished, SequenceOutput
    from sagellm.gateway.context import RequestContext
    from sagellm.gateway.observer import RequestRecord

# Seconds: 1 ms to 630 s, five steps to a factor of ten.
_STEPS = (1, 1.6, 2.5, 4, 6.3)
SECONDS = tuple(round(step * 10.0**power, 9) for power in range(-3, 3) for step in _STEPS)
TOKENS = tuple(float(2**power) for power in range(21))

HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": "From arrival to the first token",
    "vllm:inter_token_latency_seconds": "Between outputs of a streamed completion",
    "vllm:request_time_per_output_token_seconds": "Mean time per token after the first",
    "vllm:e2e_request_latency_seconds": "From arrival to the last token",
    "vllm:request_queue_time_seconds": "From arrival to the first place in a step",
    "vllm:request_prefill_time_seconds": "From the first place in a step to the first token",
    "vllm:request_decode_time_seconds": "From the first token to the last",
}
TOKEN_HISTOGRAMS = {
    "vllm:request_prompt_tokens": "Tokens of a prompt",
    "vllm:request_generation_tokens": "Tokens of a completion",
}


class Distribution:
    """Counts of observed values by size."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how many values were at most that, as Prometheus has them."""
        bounds = [str(bound) for bound in self.bounds] + ["+Inf"]
        below = 0
        pairs = []
        for bound, count in zip(bounds, self.counts, strict=True):
            below += count
            pairs.append((bound, float(below)))
        return pairs


class RequestMetrics:
    """Counts requests as a ``RequestObserver``.

    A request with ``n`` completions counts once per completion wherever it ends or takes time.

    Attributes:
        histograms: By metric name.
        prompt_tokens, generation_tokens: Of requests that ran.
        ended: Completions by finish reason; ``error`` for failed ones, ``abort`` once for a request
            that was given up.
        rejected: Requests that the engine did not take, by HTTP status.
        http: HTTP requests by method, route and status; paths that are no route are ``other``.
    """

    def __init__(self) -> None:
        self.histograms = {name: Distribution(SECONDS) for name in HISTOGRAMS}
        self.histograms |= {name: Distribution(TOKENS) for name in TOKEN_HISTOGRAMS}
        self._gaps = self.histograms["vllm:inter_token_latency_seconds"]
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.ended: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self.rejected: Counter[int] = Counter()
        self.http: Counter[tuple[str, str, int]] = Counter()
        self._routes: set[str] = set()  # paths without parameters that were routed
        # By request in the engine: when each of its completions last had an output.
        self._last_output: dict[int, dict[int, float]] = {}

    def request_started(self, record: RequestRecord) -> None:
        """The engine took a request."""
        self._last_output[record.key] = {}

    def output(self, record: RequestRecord, output: SequenceOutput) -> None:
        """New output of one sequence."""
        last = self._last_output.get(record.key)
        if last is None:
            return
        if not last and output.num_prompt_tokens and output.token_ids:
            self.prompt_tokens += output.num_prompt_tokens
        if output.token_ids:
            self.generation_tokens += len(output.token_ids)
            now = perf_counter()
            before = last.get(output.index)
            if before is not None:
                self._gaps.observe(now - before)
            last[output.index] = now
        if output.finished is not None:
            self._finish(output, output.finished)

    def _finish(self, output: SequenceOutput, finished: Finished) -> None:
        self.ended[finished.reason] += 1
        stages = finished.timestamps
        if stages is None:
            return
        count = len(finished.token_ids)
        decode = stages.completed_at - stages.executed_at
        for name, seconds in (
            ("vllm:time_to_first_token_seconds", stages.executed_at - stages.queued_at),
            ("vllm:e2e_request_latency_seconds", stages.completed_at - stages.queued_at),
            ("vllm:request_queue_time_seconds", stages.scheduled_at - stages.queued_at),
            ("vllm:request_prefill_time_seconds", stages.executed_at - stages.scheduled_at),
            ("vllm:request_decode_time_seconds", decode),
        ):
            self.histograms[name].observe(seconds)
        if count > 1:
            pace = self.histograms["vllm:request_time_per_output_token_seconds"]
            pace.observe(decode / (count - 1))
        self.histograms["vllm:request_prompt_tokens"].observe(output.num_prompt_tokens)
        self.histograms["vllm:request_generation_tokens"].observe(count)

    def request_finished(self, record: RequestRecord, *, cancelled: bool) -> None:
        """A request is over."""
        self._last_output.pop(record.key, None)
        if cancelled:
            self.ended["abort"] += 1

    def request_rejected(self, context: RequestContext, status: int) -> None:
        """The engine did not take a request."""
        self.rejected[status] += 1

    def http_finished(self, context: RequestContext) -> None:
        """An HTTP request is over."""
        route = context.pattern
        if route is not None:
            if "{" not in route:
                self._routes.add(route)
        else:  # answered before routing: a path of its own only if it is known to be a route
            route = context.route if context.route in self._routes else "other"
        method = context.method if context.method in HTTPMethod.__members__ else "other"
        self.http[method, route, context.status] += 1

    def close(self) -> None:
        """Nothing is left to do."""
