"""What /metrics tells after real requests to a real server on the mock model."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from gateway.support import BlockingRunner, HashEmbedder, mock_gateway, serving
from models.make_tiny import make_tiny_gguf
from sagellm.engine.config import EngineConfig
from sagellm.errors import InvalidArgumentError
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.loading import ModelOptions, open_gateway
from sagellm.gateway.request_metrics import SECONDS, Distribution, RequestMetrics

USER = [{"role": "user", "content": "hello " * 20}]
ANSWER = "twelve bytes"
MOST_POLLS = 10_000  # of something that has to happen soon


class Metrics:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of the one sample with this name and these labels."""
        wanted = labels.items()
        found = [v for (n, own), v in self.samples.items() if n == name and wanted <= own]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def labels(self, name: str) -> list[dict[str, str]]:
        return [dict(own) for n, own in self.samples if n == name]


def scrape(client: httpx.Client) -> Metrics:
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Metrics(answer.text)


def chat(client: httpx.Client, **options: Any) -> httpx.Response:
    body = {"model": "mock", "messages": USER, "max_tokens": 64, "temperature": 0, **options}
    answer = client.post("/v1/chat/completions", json=body)
    answer.read()
    return answer


def test_requests_are_counted_and_timed() -> None:
    with serving(mock_gateway(script=ANSWER)) as client:
        usage = chat(client).json()["usage"]
        assert chat(client, stream=True).status_code == 200
        assert chat(client, max_tokens=3).json()["choices"][0]["finish_reason"] == "length"
        metrics = scrape(client)
    prompt = usage["prompt_tokens"]
    generated = 2 * usage["completion_tokens"] + 3
    assert metrics("vllm:prompt_tokens_total", model_name="mock") == 3 * prompt
    assert metrics("vllm:generation_tokens_total", model_name="mock") == generated
    for reason, count in {"stop": 2, "length": 1, "abort": 0, "error": 0}.items():
        assert metrics("vllm:request_success_total", finished_reason=reason) == count
    for name in (
        "time_to_first_token_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ):
        assert metrics(f"vllm:{name}_count") == 3, name
        assert metrics(f"vllm:{name}_bucket", le="+Inf") == 3, name
        assert metrics.families[f"vllm:{name}"].type == "histogram"
    assert metrics("vllm:request_prompt_tokens_sum") == 3 * prompt
    assert metrics("vllm:request_generation_tokens_sum") == generated
    # One gap between any two outputs of the streamed completion, and none of the others.
    assert 1 <= metrics("vllm:inter_token_latency_seconds_count") < usage["completion_tokens"]
    whole = metrics("vllm:e2e_request_latency_seconds_sum")
    parts = ("queue", "prefill", "decode")
    assert whole == pytest.approx(
        sum(metrics(f"vllm:request_{part}_time_seconds_sum") for part in parts)
    )


def test_tokens_guessed_ahead_and_kept_are_counted() -> None:
    with serving(mock_gateway(script="once more " * 5)) as client:
        before = scrape(client)
        chat(client, max_tokens=5)
        assert before("vllm:spec_decode_num_draft_tokens_total") == 0
        assert not before.labels("sagellm:spec_accept_rate")
        answer = chat(client).json()["choices"][0]["message"]["content"]
        metrics = scrape(client)
    assert answer == "once more " * 5
    drafted = metrics("vllm:spec_decode_num_draft_tokens_total", model_name="mock")
    accepted = metrics("vllm:spec_decode_num_accepted_tokens_total", model_name="mock")
    assert 20 < accepted <= drafted
    assert metrics("sagellm:spec_accept_rate") == accepted / drafted


def test_every_completion_counts_and_the_prompt_once() -> None:
    with serving(mock_gateway(script=ANSWER)) as client:
        usage = chat(client, n=3).json()["usage"]
        metrics = scrape(client)
    assert metrics("vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert metrics("vllm:generation_tokens_total") == usage["completion_tokens"]
    assert metrics("vllm:request_success_total", finished_reason="stop") == 3


def test_the_engine_is_read_at_the_time_of_the_scrape() -> None:
    gateway = mock_gateway(script=ANSWER, kv_cache_tokens=1024, block_size=16)
    with serving(gateway) as client:
        before = scrape(client)
        first = chat(client).json()["usage"]
        second = chat(client).json()["usage"]
        metrics = scrape(client)
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert metrics("vllm:prefix_cache_hits_total") == cached
    assert metrics("vllm:prefix_cache_queries_total") == 2 * first["prompt_tokens"]
    assert metrics("vllm:num_requests_running") == 0
    assert metrics("vllm:num_requests_waiting") == 0
    assert metrics("vllm:kv_cache_usage_perc") == 0
    assert metrics("vllm:num_preemptions_total") == 0
    assert metrics("sagellm:steps_total") > before("sagellm:steps_total")
    assert metrics("sagellm:kv_num_blocks") == 64
    assert metrics("sagellm:kv_used_blocks") == 0
    assert metrics("sagellm:kv_cached_blocks") > 0
    assert metrics("sagellm:kv_evicted_blocks_total") == 0
    assert metrics("sagellm:stalled") == 0
    assert metrics("sagellm:memory_bytes", part="kv") > 0
    (config,) = metrics.labels("vllm:cache_config_info")
    assert (config["block_size"], config["num_gpu_blocks"]) == ("16", "64")
    assert config["enable_prefix_caching"] == "True"
    assert config["cache_dtype"] == "int64"
    assert metrics("sagellm:kv_cache_info", kv_dtype="int64") == 1
    resident = metrics("process_resident_memory_bytes")
    assert metrics("sagellm:peak_memory_bytes") >= resident * 0.9 > 0


@pytest.mark.native
def test_the_kv_dtype_that_was_asked_for_shows(tmp_path: Path) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")
    options = ModelOptions(
        path=path,
        name="tiny",
        device="cpu",
        threads=1,
        kv_dtype="int8",
        engine=EngineConfig(kv_cache_tokens=512),
    )
    with serving(open_gateway(GatewayConfig(), options)) as client:
        metrics = scrape(client)
    (config,) = metrics.labels("vllm:cache_config_info")
    assert config["cache_dtype"] == "int8"
    assert metrics("sagellm:kv_cache_info", kv_dtype="int8") == 1
    with pytest.raises(InvalidArgumentError, match="'mock' has no option kv_dtype"):
        open_gateway(GatewayConfig(), replace(options, device="mock"))


def test_a_device_that_cannot_be_deterministic_refuses(tmp_path: Path) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    options = ModelOptions(path=path, name="tiny", device="reference", deterministic=True)
    with pytest.raises(InvalidArgumentError, match="'reference' has no option deterministic"):
        open_gateway(GatewayConfig(), options)


def test_refusals_failures_and_http_answers_are_told_apart() -> None:
    with serving(mock_gateway(script=ANSWER, max_queue=8)) as client:
        long = [{"role": "user", "content": "x" * 10_000}]  # more than the pool holds
        assert chat(client, messages=long).status_code == 400
        assert chat(client, nosuch=1).status_code == 400
        assert client.get("/nosuch/route").status_code == 404
        assert client.get("/other/nosuch").status_code == 404
        assert chat(client).status_code == 200
        metrics = scrape(client)
    assert metrics("sagellm:requests_rejected_total", status="400") == 1
    route = "/v1/chat/completions"
    count = "sagellm:http_requests_total"
    assert metrics(count, method="POST", route=route, status="400") == 2
    assert metrics(count, method="POST", route=route, status="200") == 1
    assert metrics(count, method="GET", route="other", status="404") == 2


def test_paths_and_methods_of_attackers_make_no_labels() -> None:
    with serving(mock_gateway(script=ANSWER)) as client:
        for number in range(20):
            client.request(f"X{number}", f"/v1/path-{number}")
            client.get(f"/v1/models/name-{number}")
        metrics = scrape(client)
    routes = {labels["route"] for labels in metrics.labels("sagellm:http_requests_total")}
    methods = {labels["method"] for labels in metrics.labels("sagellm:http_requests_total")}
    assert not [route for route in routes if "-1" in route]
    assert methods <= {"GET", "POST", "other"}


def test_a_route_refused_before_routing_keeps_its_name_once_it_is_known() -> None:
    config = GatewayConfig(access_log=False, warm_up=False, api_keys=("key",))
    with serving(mock_gateway(script=ANSWER, config=config)) as client:
        headers = {"Authorization": "Bearer key"}
        assert client.get("/metrics").status_code == 401
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/v1/models").status_code == 401
        metrics = Metrics(client.get("/metrics", headers=headers).text)
    assert metrics("sagellm:http_requests_total", route="/v1/models", status="401") == 1


def test_embeddings_are_counted_without_an_engine() -> None:
    gateway = mock_gateway(with_engine=False, embedder=HashEmbedder())
    with serving(gateway) as client:
        body = {"model": "mock-embedding", "input": ["a", "b"]}
        assert client.post("/v1/embeddings", json=body).status_code == 200
        metrics = scrape(client)
    assert metrics("sagellm:embedding_requests_total") == 1
    assert not metrics.labels("vllm:num_requests_running")


def test_a_scrape_is_answered_while_a_step_hangs() -> None:
    """The requests at hand show, and the memory ledger is the last one known."""
    runner = BlockingRunner()
    gateway = mock_gateway(runner)
    with serving(gateway) as client:
        known = scrape(client)("sagellm:memory_bytes", part="kv")
        runner.gate.clear()
        other = threading.Thread(target=chat, args=(client,))
        other.start()
        try:
            assert runner.entered.wait(30)
            for _ in range(3):  # unanswered questions to the engine do not pile up
                metrics = scrape(client)
                assert metrics("vllm:num_requests_running") == 1
                assert metrics("sagellm:http_requests_at_hand") == 2  # and the scrape itself
                assert metrics("vllm:kv_cache_usage_perc") > 0
                assert metrics("sagellm:memory_bytes", part="kv") == known
            assert metrics("sagellm:seconds_since_progress") > 0
        finally:
            runner.gate.set()
            other.join(30)
        assert scrape(client)("vllm:num_requests_running") == 0


def test_a_stalled_engine_shows() -> None:
    runner = BlockingRunner()
    config = GatewayConfig(access_log=False, warm_up=False, stall_timeout_s=0.01)
    with serving(mock_gateway(runner, config=config)) as client:
        runner.gate.clear()
        other = threading.Thread(target=chat, args=(client,))
        other.start()
        try:
            assert runner.entered.wait(30)
            assert any(client.get("/health").status_code == 503 for _ in range(MOST_POLLS))
            assert scrape(client)("sagellm:stalled") == 1
        finally:
            runner.gate.set()
            other.join(30)


def test_a_request_that_its_client_gives_up_is_an_abort() -> None:
    runner = BlockingRunner()
    gateway = mock_gateway(runner)
    with serving(gateway) as client:
        runner.gate.clear()
        body = {"model": "mock", "messages": USER, "stream": True, "max_tokens": 512}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            assert runner.entered.wait(30)
        runner.gate.set()
        polls = (scrape(client) for _ in range(MOST_POLLS))
        metrics = next(m for m in polls if m("sagellm:http_requests_at_hand") == 1)
        assert metrics("vllm:request_success_total", finished_reason="abort") == 1


def test_two_gateways_count_for_themselves() -> None:
    with (
        serving(mock_gateway(script=ANSWER)) as one,
        serving(mock_gateway(script=ANSWER)) as two,
    ):
        chat(one)
        assert scrape(one)("vllm:request_success_total", finished_reason="stop") == 1
        assert scrape(two)("vllm:request_success_total", finished_reason="stop") == 0


def test_an_observer_of_ones_own_replaces_the_counters() -> None:
    gateway = mock_gateway(script=ANSWER)
    assert isinstance(gateway.metrics, RequestMetrics)
    asyncio.run(gateway.close())


@given(st.lists(st.one_of(st.floats(0, 2000), st.sampled_from(SECONDS)), max_size=40))
def test_distributions_equal_those_of_the_client_library(values: list[float]) -> None:
    ours = Distribution(SECONDS)
    registry = CollectorRegistry()
    theirs = Histogram("x", "x", buckets=SECONDS, registry=registry)
    for value in values:
        ours.observe(value)
        theirs.observe(value)
    expected = [
        sample.value for sample in next(iter(theirs.collect())).samples if "bucket" in sample.name
    ]
    assert [count for _, count in ours.buckets()] == expected
    assert ours.total == pytest.approx(registry.get_sample_value("x_sum"))
