"""A server that a thousand unruly clients have used is as it was: nothing is lost, kept or changed.

Each round mixes all routes, streams, several completions, forms, log-probabilities, priorities and
deadlines over a pool and a queue that are too small, with clients that leave at every stage.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.disorder import MANNERS, Plan, Tally, make_plans, play
from gateway.support import (
    CHAT_TEMPLATE,
    HashEmbedder,
    assert_pool_is_empty,
    serve_in_thread,
)
from sagellm.backends.mock import MockRunner
from sagellm.engine.async_engine import AsyncEngine
from sagellm.engine.config import EngineConfig
from sagellm.engine.embedding import DecoderEmbedder
from sagellm.engine.engine import Engine
from sagellm.engine.loading import load_engine, mock_tokenizer
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.request_metrics import RequestMetrics
from sagellm.text import ChatTemplate

LIMIT_S = 15.0  # until the server has noticed that the last client left
MEMORY_BOUND_BYTES = 6 << 20
"""How much a second round may add to the process, which holds the clients too."""

PROBES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chat/completions", {"messages": [{"role": "user", "content": "sun"}], "max_tokens": 12}),
    ("completions", {"prompt": "sun", "max_tokens": 12, "logprobs": 2, "n": 2, "seed": 5}),
    ("responses", {"input": "moon", "max_output_tokens": 12}),
    ("messages", {"messages": [{"role": "user", "content": "rain"}], "max_tokens": 12}),
    ("embeddings", {"input": "sun"}),
)
OWN_FIELDS = (
    "id",
    "created",
    "created_at",
    "completed_at",
    "usage",
)  # differ between equal answers


class WatchedGateway(Gateway):
    """A gateway that tells which loop it runs on."""

    loop: asyncio.AbstractEventLoop

    async def warm_up(self) -> None:
        """Notes the loop."""
        self.loop = asyncio.get_running_loop()
        await super().warm_up()


@dataclass(frozen=True, slots=True)
class Level:
    """What a server at rest holds."""

    tasks: int
    threads: int
    descriptors: int
    memory_bytes: int


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls, within a bound."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"not after {LIMIT_S} s: {what}"
        time.sleep(0.01)


def num_tasks(gateway: WatchedGateway) -> int:
    """Tasks of the server's loop, the one that counts excepted."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), gateway.loop).result(LIMIT_S)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_at_rest(gateway: WatchedGateway, tasks: int | None) -> bool:
    assert gateway.engine is not None
    stats = gateway.engine._thread.call(gateway.engine.engine.stats).result(LIMIT_S)
    return (
        not gateway.at_hand
        and stats.num_running == stats.num_waiting == 0
        and not gateway.engine.engine.unfinished
        and (tasks is None or num_tasks(gateway) <= tasks)
    )


def level_of(gateway: WatchedGateway, tasks: int | None = None) -> Level:
    """Waits for rest, looks into the pool, and measures."""
    assert gateway.engine is not None
    wait_until(lambda: is_at_rest(gateway, tasks), f"at rest, with at most {tasks} tasks")
    gateway.engine._thread.call(lambda: assert_pool_is_empty(gateway)).result(LIMIT_S)
    gc.collect()
    return Level(
        num_tasks(gateway),
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        resident_bytes(),
    )


def probe(url: str, model: str) -> list[str]:
    """The bytes of greedy answers of every route, without what no two answers share."""
    answers = []
    for route, body in PROBES:
        named = body if route == "embeddings" else {**body, "model": model, "temperature": 0}
        answer = httpx.post(f"{url}/v1/{route}", json=named, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        answers.append(json.dumps(without_own_fields(answer.json())))
    return answers


def without_own_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_own_fields(v) for k, v in value.items() if k not in OWN_FIELDS}
    if isinstance(value, list):
        return [without_own_fields(item) for item in value]
    return value


@contextmanager
def served(gateway: WatchedGateway) -> Iterator[str]:
    with serve_in_thread(create_server(gateway)) as url:
        yield url


def mock_server() -> WatchedGateway:
    config = EngineConfig(
        max_num_seqs=12,
        max_queue=24,
        max_batch_tokens=256,
        max_chunk_tokens=64,
        block_size=16,
        kv_cache_tokens=4096,
        max_model_len=2048,
    )
    template = ChatTemplate(CHAT_TEMPLATE, "", "<eos>")
    engine = Engine(MockRunner(), mock_tokenizer(), config, chat_template=template)
    return WatchedGateway(
        GatewayConfig(access_log=False),
        engine=AsyncEngine(engine),
        embedder=HashEmbedder(),
        model_name="any",
        embedding_name="vectors",
    )


def real_server(model: str) -> WatchedGateway:
    config = EngineConfig(
        max_num_seqs=8,
        max_queue=12,
        max_batch_tokens=128,
        kv_cache_tokens=2048,
        max_model_len=1024,
    )
    engine = AsyncEngine(load_engine(model, config, device="cpu", threads=2))
    return WatchedGateway(
        GatewayConfig(access_log=False),
        engine=engine,
        embedder=DecoderEmbedder(engine),
        model_name="any",
        embedding_name="vectors",
    )


def check_round(url: str, plans: list[Plan], at_once: int) -> Tally:
    """Every request was answered in form, or its client left."""
    tally = asyncio.run(play(url, "any", plans, at_once=at_once))
    assert tally.wrong == []
    assert tally.total == len(plans)
    assert set(tally.left) == set(MANNERS) - {"to_the_end"}
    assert tally.statuses[200] > len(plans) // 20
    assert tally.statuses[429] > 0, "the queue was never full"
    return tally


def touch_pool(gateway: WatchedGateway, url: str, prompt: str) -> None:
    """Writes to every block once: memory that the system grants on first use is no leak."""
    assert gateway.engine is not None
    num_tokens = len(gateway.tokenizer.encode(prompt))
    for salt in range(2 + gateway.engine.engine.capacity.pool_tokens // num_tokens):
        body = {"prompt": prompt, "max_tokens": 1, "cache_salt": str(salt)}
        httpx.post(f"{url}/v1/completions", json=body, timeout=LIMIT_S).raise_for_status()


def check_server(
    gateway: WatchedGateway,
    count: int,
    at_once: int,
    *,
    least_aborted: int,
    long_prompt: str,
    max_tokens: int,
) -> None:
    options: dict[str, Any] = {"long_prompt": long_prompt, "max_tokens": max_tokens}
    with served(gateway) as url:
        touch_pool(gateway, url, long_prompt)
        before = probe(url, "any")
        at_start = level_of(gateway)
        check_round(url, make_plans(count, 1, **options), at_once)
        first = level_of(gateway, at_start.tasks)
        assert probe(url, "any") == before
        tally = check_round(url, make_plans(count, 2, **options), at_once)
        second = level_of(gateway, at_start.tasks)
        assert tally.codes, "no request was refused or ran out of time"
        counters = gateway.observers[0]
        assert isinstance(counters, RequestMetrics)
        # Requests that nobody waits for would fill the server, and few others would get in.
        assert counters.ended["abort"] >= least_aborted, "clients left without an effect"
        assert probe(url, "any") == before
        assert httpx.get(f"{url}/health").status_code == 200
    assert gateway.engine is not None
    assert second.threads <= first.threads
    assert second.descriptors <= first.descriptors
    assert second.memory_bytes - first.memory_bytes < MEMORY_BOUND_BYTES


@pytest.mark.slow
def test_a_thousand_unruly_clients_leave_no_trace() -> None:
    options: dict[str, Any] = {"long_prompt": "once more, " * 120, "max_tokens": 24}
    check_server(mock_server(), 1000, 48, least_aborted=200, **options)


@pytest.mark.native
@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_survives_unruly_clients(smollm2: str) -> None:
    options: dict[str, Any] = {"long_prompt": "once more, " * 200, "max_tokens": 12}
    check_server(real_server(smollm2), 100, 22, least_aborted=5, **options)
