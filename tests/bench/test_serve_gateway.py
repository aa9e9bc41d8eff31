"""`bench serve` against our own server on the mock model."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.support import assert_pool_is_empty, mock_gateway, serve_in_thread
from sagellm.bench.serve import ServeOptions, ServeResult
from sagellm.bench.serve import run as measure
from sagellm.bench.serve_load import ClosedLoop, OpenLoop
from sagellm.bench.workloads import Workload, choose
from sagellm.gateway.app import create_server

RANDOM = Workload(name="small", prompt_tokens=80, output_tokens=12, requests=8)


def bench(*workloads: Workload, **options: Any) -> ServeResult:
    gateway = mock_gateway()
    with serve_in_thread(create_server(gateway)) as url:
        result = measure(ServeOptions(url=url, workloads=workloads, warmup=1, **options))
        assert_pool_is_empty(gateway)
    return result


@pytest.mark.parametrize("endpoint", ("completions", "chat"))
@pytest.mark.parametrize("load", (ClosedLoop(concurrency=3), OpenLoop(rate=200)))
def test_lengths_are_exact_and_enforced(endpoint: Any, load: Any) -> None:
    result = bench(RANDOM, endpoint=endpoint, loads=[load])
    assert result.model == "mock"
    assert result.lengths_enforced_by == ("ignore_eos", "min_tokens")
    metrics = result.points[0].metrics
    assert (metrics.completed, metrics.errors) == (8, {})
    assert (metrics.input_tokens, metrics.output_tokens) == (8 * 80, 8 * 12)
    assert (metrics.wrong_prompt_lengths, metrics.wrong_output_lengths) == (0, 0)
    assert metrics.tokens_counted_from == "usage"


def test_a_shared_prefix_is_found_in_the_cache() -> None:
    workload = choose("shared-prefix", prompt_tokens=40, output_tokens=4, prefix_tokens=320)
    result = bench(*workload, requests=4)
    metrics = result.points[0].metrics
    assert metrics.input_tokens == 4 * 360
    # The warm-up has computed another prefix, and one request computes this one.
    assert metrics.cached_tokens is not None
    assert 3 * 304 <= metrics.cached_tokens < 4 * 360


def test_multi_turn_finds_its_own_history() -> None:
    workload = choose("multi-turn", prompt_tokens=64, output_tokens=8, turns=3)
    result = bench(*workload, requests=2)
    metrics = result.points[0].metrics
    assert (metrics.completed, metrics.errors) == (6, {})
    assert metrics.wrong_prompt_lengths == 0
    assert metrics.cached_tokens


def test_the_contract_reads_memory_and_prefix_hits_from_the_server() -> None:
    result = bench(RANDOM, contract="year2")
    server = result.points[0].server
    assert server.memory_mb is not None
    assert server.memory_mb > 10
    assert server.prefix_hit_rate is not None
    assert 0 <= server.prefix_hit_rate <= 1
