"""``/metrics``: what the server does, for Prometheus and for routers in front of several servers.

Names that begin with ``vllm:`` are those that routers and dashboards of the field read already;
``sagellm:`` ones are this server's own. Counting takes well under a microsecond and no lock: all of
it happens on the event loop, scrapes included. No scrape waits for a step of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.responses import Response

from sagellm import __version__
from sagellm.engine.memory import peak_memory_bytes
from sagellm.errors import UnavailableError
from sagellm.gateway.liveness import check_liveness
from sagellm.gateway.request_metrics import HISTOGRAMS, TOKEN_HISTOGRAMS, RequestMetrics
from sagellm.serving import HTTPMethod, RouterDef

if TYPE_CHECKING:
    from sagellm.engine.engine import EngineStats
    from sagellm.gateway.gateway import Gateway

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LEDGER_PATIENCE_S = 0.05


class GatewayCollector(Collector):
    """All metrics of one gateway at the time of a scrape.

    Attributes:
        ledger: Bytes by purpose as the runner last told; empty before.
    """

    def __init__(self, gateway: Gateway, requests: RequestMetrics | None) -> None:
        """Prepares for scrapes.

        Args:
            gateway: Whose state is read.
            requests: What has been counted; None if others observe the requests.
        """
        self._gateway = gateway
        self._requests = requests
        self.ledger: dict[str, int] = {}
        self._labels = {"model_name": gateway.model_name}
        self._device = "cpu" if gateway.engine is None else gateway.engine.engine.runner.device

    def collect(self) -> Iterator[Metric]:
        """Makes every metric."""
        yield self._gauge(
            "sagellm:info",
            "Version and device",
            1,
            version=__version__,
            device=""
            if self._gateway.engine is None
            else self._gateway.engine.engine.runner.device,
        )
        yield self._gauge(
            "sagellm:http_requests_at_hand",
            "HTTP requests without a complete answer",
            len(self._gateway.at_hand),
        )
        alive = check_liveness(
            self._gateway.engine, self._gateway.embedder, self._gateway.config.stall_timeout_s
        ).is_alive
        yield self._gauge("sagellm:stalled", "1 when /health is not ok", int(not alive))
        yield self._gauge(
            "sagellm:peak_memory_bytes",
            "Largest resident memory of the process since its start",
            peak_memory_bytes(),
        )
        if self._gateway.engine is not None:
            yield from self._engine(self._gateway.engine.engine.stats())
        ledger = GaugeMetricFamily(
            "sagellm:memory_bytes", "Memory of the model by purpose", labels=("model_name", "part")
        )
        for part, size in self.ledger.items():
            ledger.add_metric((self._gateway.model_name, part), size)
        yield ledger
        if self._requests is not None:
            yield from self._counted(self._requests)

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        engine = self._gateway.engine
        assert engine is not None
        kv, config = stats.kv, engine.engine.config
        used = kv.num_blocks - kv.free_blocks
        per_block = engine.engine.runner.kv_bytes_per_block(config.block_size)
        yield self._gauge(
            "vllm:cache_config_info",
            "How the KV cache is set up",
            1,
            block_size=str(config.block_size),
            num_gpu_blocks=str(kv.num_blocks),
            enable_prefix_caching=str(config.enable_prefix_caching),
            bytes_per_block=str(per_block),
            cache_dtype=engine.engine.runner.kv_dtype,
        )
        yield self._gauge(
            "sagellm:kv_cache_info",
            "What keys and values are stored as",
            1,
            kv_dtype=engine.engine.runner.kv_dtype,
        )
        stalled_s = engine.progress().seconds_since_progress
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences that hold KV blocks", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences in the queue", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "KV blocks in use, from 0 to 1", used / kv.num_blocks),
            ("sagellm:kv_num_blocks", "KV blocks of the pool", kv.num_blocks),
            ("sagellm:kv_used_blocks", "KV blocks that sequences hold", used),
            ("sagellm:kv_cached_blocks", "KV blocks in the prefix index", kv.cached_blocks),
            ("sagellm:seconds_since_progress", "Without a step, while there is work", stalled_s),
        ):
            yield self._gauge(name, text, value)
        for name, text, value in (
            ("vllm:num_preemptions", "Sequences that lost their blocks", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up", kv.prefix_queried_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found", kv.prefix_hit_tokens),
            ("sagellm:steps", "Steps of the engine", stats.num_steps),
            ("sagellm:failed_steps", "Steps that failed as a whole", stats.num_failed_steps),
            ("sagellm:kv_evicted_blocks", "Cached blocks given up", kv.evicted_blocks),
            ("sagellm:kv_copied_blocks", "Blocks copied on write", kv.copied_blocks),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed", stats.num_draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Guesses kept", stats.num_accepted_tokens),
        ):
            yield self._counter(name, text, value)
        if stats.spec_accept_rate is not None:
            yield self._gauge(
                "sagellm:spec_accept_rate",
                "Share of the tokens guessed ahead that were kept, since the start",
                stats.spec_accept_rate,
            )

    def _counted(self, requests: RequestMetrics) -> Iterator[Metric]:
        model = self._gateway.model_name
        yield self._counter("vllm:prompt_tokens", "Tokens of prompts", requests.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens made", requests.generation_tokens)
        ended = CounterMetricFamily(
            "vllm:request_success", "Completions by end", labels=("model_name", "finished_reason")
        )
        for reason, count in requests.ended.items():
            ended.add_metric((model, reason), count)
        yield ended
        rejected = CounterMetricFamily(
            "sagellm:requests_rejected", "Not taken by the engine", labels=("model_name", "status")
        )
        for status, count in requests.rejected.items():
            rejected.add_metric((model, str(status)), count)
        yield rejected
        http = CounterMetricFamily(
            "sagellm:http_requests", "Answers", labels=("method", "route", "status")
        )
        for (method, route, status), count in requests.http.items():
            http.add_metric((method, route, str(status)), count)
        yield http
        embedded = sum(
            count
            for (_, route, status), count in requests.http.items()
            if route == "/v1/embeddings" and status == 200
        )
        yield self._counter("sagellm:embedding_requests", "Answers with embeddings", embedded)
        for name, text in (HISTOGRAMS | TOKEN_HISTOGRAMS).items():
            values = requests.histograms[name]
            family = HistogramMetricFamily(name, text, labels=("model_name",))
            family.add_metric((model,), values.buckets(), values.total)
            yield family

    def _gauge(self, name: str, text: str, value: float, **labels: str) -> Metric:
        labels = {**self._labels, **labels}
        family = GaugeMetricFamily(name, text, labels=tuple(labels))
        family.add_metric(tuple(labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family


class LedgerReader:
    """Asks the engine for its memory ledger, without waiting for a step that takes long."""

    def __init__(self, gateway: Gateway, collector: GatewayCollector) -> None:
        self._gateway = gateway
        self._collector = collector
        self._question: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Brings ``collector.ledger`` up to date, or leaves that to the end of a long step."""
        if self._gateway.engine is None:
            return
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._ask())
        await asyncio.wait([self._question], timeout=_LEDGER_PATIENCE_S)

    async def _ask(self) -> None:
        engine = self._gateway.engine
        assert engine is not None
        try:
            self._collector.ledger = await engine.call(lambda: engine.engine.runner.memory)
        except UnavailableError:
            return  # the engine has ended; the last figures stand


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The route of this module."""
    counted = next((o for o in gateway.observers if isinstance(o, RequestMetrics)), None)
    collector = GatewayCollector(gateway, counted)
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    ledger = LedgerReader(gateway, collector)

    async def metrics() -> Response:
        await ledger.refresh()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE)

    return {
        "metrics": [
            RouterDef(
                "",
                metrics,
                method=HTTPMethod.GET,
                summary="Counters, gauges and histograms for Prometheus",
                responses={
                    200: {
                        "description": "Prometheus's text format",
                        "content": {"text/plain": {"schema": {"type": "string"}}},
                    }
                },
                tags=("health",),
            )
        ]
    }
