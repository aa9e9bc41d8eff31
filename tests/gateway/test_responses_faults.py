"""Failures, disconnects and floods on ``/v1/responses`` and ``/v1/messages``."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import openai
import pytest

from gateway.support import (
    MODEL,
    BlockingRunner,
    HashEmbedder,
    ScriptedRunner,
    assert_pool_is_empty,
    mock_gateway,
    serve_in_thread,
)
from sagellm.backends.mock import MockRunner
from sagellm.gateway.app import create_server
from sagellm.gateway.gateway import Gateway

BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"model": MODEL, "input": "hi", "max_output_tokens": 500},
    "/v1/messages": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 500,
    },
}
PATHS = pytest.mark.parametrize("path", list(BODIES))
STREAMS = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what another thread is about to do."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def is_idle(gateway: Gateway) -> bool:
    assert gateway.engine is not None
    return not gateway.engine.engine.unfinished


class PausedTalker(BlockingRunner, ScriptedRunner):
    """Writes on and on, while its gate is open."""

    def __init__(self) -> None:
        super().__init__(script="x" * 2000)


def breaking_runner() -> ScriptedRunner:
    """Writes ``Fine so far`` and fails on the step after it, and on no other request."""
    script = {"well": "All is well.", "": "Fine so far!"}
    return ScriptedRunner(script, fail_on_token=ord("!"))


def sent_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    return [
        (kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for kind, data in blocks
    ]


def broken_stream(path: str) -> tuple[list[tuple[str, dict[str, Any]]], Gateway]:
    gateway = mock_gateway(breaking_runner())
    with serve_in_thread(create_server(gateway)) as url:
        body = {**BODIES[path], "stream": True, "temperature": 0}
        answer = httpx.post(f"{url}{path}", json=body, timeout=30)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        eventually(lambda: is_idle(gateway))
        assert_pool_is_empty(gateway)
    return sent_events(answer.text), gateway


def test_a_response_that_breaks_ends_with_response_failed() -> None:
    events, _ = broken_stream("/v1/responses")
    kind, last = events[-1]
    assert kind == last["type"] == "response.failed"
    response = last["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert response["error"]["message"]
    sent = [event["delta"] for kind, event in events if kind == "response.output_text.delta"]
    kept = [(item["status"], item["content"][0]["text"]) for item in response["output"]]
    assert kept == ([("incomplete", "".join(sent))] if sent else [])  # a late reader misses the end
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))


def test_a_message_that_breaks_ends_with_an_error_event() -> None:
    events, _ = broken_stream("/v1/messages")
    kind, last = events[-1]
    assert kind == last["type"] == "error"
    assert last["error"]["type"] == "overloaded_error"
    assert last["request_id"].startswith("req-")
    assert "message_stop" not in [kind for kind, _ in events]


@PATHS
def test_one_request_that_fails_leaves_the_next_one_alone(path: str) -> None:
    gateway = mock_gateway(breaking_runner())
    with serve_in_thread(create_server(gateway)) as url:
        body = {**BODIES[path], "temperature": 0}
        answer = httpx.post(f"{url}{path}", json=body, timeout=30)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"]
        key = "input" if "input" in body else "system"
        answer = httpx.post(f"{url}{path}", json={**body, key: "well"}, timeout=30)
        assert answer.status_code == 200
        assert "All is well." in answer.text
        assert_pool_is_empty(gateway)


def test_official_clients_raise_what_the_stream_tells() -> None:
    with serve_in_thread(create_server(mock_gateway(breaking_runner()))) as url:
        with (
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
            pytest.raises(anthropic.APIStatusError, match="overloaded_error"),
            client.messages.stream(**BODIES["/v1/messages"]) as messages,
        ):
            messages.until_done()
        with (
            openai.OpenAI(
                base_url=f"{url}/v1", api_key="x", max_retries=0, _strict_response_validation=True
            ) as other,
            other.responses.stream(model=MODEL, input="hi", temperature=0) as responses,
        ):
            last = list(responses)[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None and last.response.error.code == "server_error"


@PATHS
@STREAMS
def test_a_client_that_leaves_frees_its_blocks(path: str, stream: bool) -> None:
    runner = PausedTalker()
    gateway = mock_gateway(runner)
    with serve_in_thread(create_server(gateway)) as url:
        runner.gate.clear()
        gave_up = threading.Event()

        def leave() -> None:
            try:
                body = {**BODIES[path], "stream": stream}
                httpx.post(f"{url}{path}", json=body, timeout=httpx.Timeout(30, read=0.2))
            except httpx.ReadTimeout:
                gave_up.set()

        client = threading.Thread(target=leave)
        client.start()
        assert runner.entered.wait(30)
        client.join(30)
        assert gave_up.is_set()
        runner.gate.set()
        eventually(lambda: is_idle(gateway))
        assert_pool_is_empty(gateway)
        assert runner.num_steps < 100  # 500 tokens were asked for


class StuckEmbedder(HashEmbedder):
    """Notes when its caller gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.began = threading.Event()
        self.cancelled = threading.Event()

    async def embed(self, prompts: Any) -> Any:
        if prompts == [[1]]:  # the warm-up's and other requests pass
            self.began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return await super().embed(prompts)


def test_embeddings_stop_when_the_client_leaves() -> None:
    embedder = StuckEmbedder()
    gateway = mock_gateway(with_engine=False, embedder=embedder)
    with serve_in_thread(create_server(gateway)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/embeddings", json={"input": [1]}, timeout=httpx.Timeout(30, read=0.2)
            )
        assert embedder.began.is_set()
        assert embedder.cancelled.wait(30)
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": [2]}, timeout=30)
        assert answer.status_code == 200


@PATHS
@STREAMS
def test_what_can_never_fit_is_refused_before_anything_streams(path: str, stream: bool) -> None:
    with serve_in_thread(create_server(mock_gateway(MockRunner(max_position=64)))) as url:
        long = "x" * 200
        body = json.loads(json.dumps(BODIES[path]).replace('"hi"', json.dumps(long)))
        answer = httpx.post(f"{url}{path}", json={**body, "stream": stream}, timeout=30)
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["error"]["message"]


@PATHS
def test_a_full_queue_is_429_with_a_time_to_retry(path: str) -> None:
    runner = BlockingRunner()
    gateway = mock_gateway(runner, max_queue=1, max_num_seqs=1)
    body = {**BODIES[path], "stream": True}
    answered: list[httpx.Response] = []

    def post(url: str) -> None:
        answered.append(httpx.post(f"{url}{path}", json=body, timeout=60))

    with serve_in_thread(create_server(gateway)) as url:
        runner.gate.clear()
        threads = [threading.Thread(target=post, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: any(answer.status_code == 429 for answer in answered))
        runner.gate.set()
        for thread in threads:
            thread.join(60)
    refused = [answer for answer in answered if answer.status_code == 429]
    assert refused and all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert any(answer.status_code == 200 for answer in answered)
    if path == "/v1/messages":
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
