"""API keys, limits on bodies, bounded queues and fair shares."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.support import (
    BlockingRunner,
    assert_pool_is_empty,
    mock_gateway,
    serve_in_thread,
    serving,
)
from sagellm.errors import InvalidArgumentError
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway
from sagellm.protocol import LIMITS

PROMPT = {"prompt": "Hi", "max_tokens": 2}


def config(**options: object) -> GatewayConfig:
    return GatewayConfig(access_log=False, warm_up=False, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- API keys


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx.Client]:
    gateway = mock_gateway(config=config(api_keys=("first-key", "second-key")))
    with serving(gateway) as client:
        yield client


def test_every_route_but_the_probes_needs_a_key(guarded: httpx.Client) -> None:
    key = {"x-api-key": "first-key"}
    document = guarded.get("/openapi.json", headers=key).json()
    routes = [
        (method, path.replace("{model}", "mock"))
        for path, methods in document["paths"].items()
        for method in methods
    ]
    assert len(routes) >= 14
    open_routes = set()
    for method, path in [*routes, ("get", "/docs"), ("get", "/openapi.json"), ("get", "/nothing")]:
        response = guarded.request(method, path, json={} if method == "post" else None)
        if response.status_code == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert "error" in response.json()
        else:
            open_routes.add(path)
    assert open_routes == {"/health", "/ready", "/ping"}


@pytest.mark.parametrize(
    "headers",
    (
        {"authorization": "Bearer second-key"},
        {"authorization": "bearer  first-key"},
        {"x-api-key": "first-key"},
    ),
)
def test_any_of_the_keys_opens_in_either_header(
    guarded: httpx.Client, headers: dict[str, str]
) -> None:
    assert guarded.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    (
        {},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-keyy"},
        {"authorization": "Bearer"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"x-api-key": "FIRST-KEY"},
        {"x-api-key": "first-key,second-key"},
    ),
)
def test_nothing_else_opens(guarded: httpx.Client, headers: dict[str, str]) -> None:
    response = guarded.post("/v1/completions", json=PROMPT, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert "first-key" not in response.text.replace(headers.get("authorization", ""), "")


def test_anthropics_routes_refuse_in_anthropics_shape(guarded: httpx.Client) -> None:
    response = guarded.post("/v1/messages", json={})
    assert response.status_code == 401
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("key", ("", "two words", "line\nbreak", "ключ"))
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(InvalidArgumentError, match="API key 2") as caught:
        GatewayConfig(api_keys=("good", key))
    assert not key or key not in str(caught.value)


# ------------------------------------------------------------------------------------------ bodies


def stream_raw(url: str, head: str, chunks: Iterator[bytes]) -> tuple[bytes, int]:
    """Sends chunks until the server answers; returns the answer and the bytes it let us send."""
    parts = urlsplit(url)
    sent = 0
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as peer:
        peer.sendall(head.encode())
        try:
            for chunk in chunks:
                peer.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass  # the server has closed: it has answered
        answer = b""
        try:
            while piece := peer.recv(65536):
                answer += piece
        except OSError:
            pass
    return answer, sent


HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_body_over_the_limit_is_refused_by_its_length_before_it_is_sent() -> None:
    with serve_in_thread(create_server(mock_gateway())) as url:
        head = f"{HEAD}Content-Length: {LIMITS.body_bytes + 1}\r\n\r\n"
        answer, _ = stream_raw(url, head, iter([b"{"]))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert b'"code": "request_too_large"' in answer


def test_a_chunked_body_is_refused_while_it_is_read() -> None:
    piece = b"x" * (1 << 20)
    chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
    with serve_in_thread(create_server(mock_gateway())) as url:
        head = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n"
        answer, sent = stream_raw(url, head, (chunk for _ in range(4096)))
        assert httpx.post(f"{url}/v1/completions", json=PROMPT).status_code == 200
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")
    assert sent < 4 * LIMITS.body_bytes  # of 4 GiB


def test_a_body_that_does_not_come_is_408() -> None:
    gateway = mock_gateway(config=config(body_timeout_s=0.2))
    with serve_in_thread(create_server(gateway)) as url:
        answer, _ = stream_raw(url, f"{HEAD}Content-Length: 10\r\n\r\n", iter([b"{"]))
        assert httpx.post(f"{url}/v1/completions", json=PROMPT).status_code == 200
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_many_refused_bodies_leave_the_connection_usable() -> None:
    with serving(mock_gateway()) as client:
        for _ in range(20):
            assert client.post("/v1/completions", content=b"x").status_code in (400, 415)
        assert client.post("/v1/completions", json=PROMPT).status_code == 200


# --------------------------------------------------------------------------- names of the server


@pytest.mark.parametrize(
    ("host", "status"),
    (
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("app.localhost", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
    ),
)
def test_a_local_server_without_keys_answers_to_local_names_only(host: str, status: int) -> None:
    with serving(mock_gateway()) as client:
        for path in ("/v1/models", "/health", "/docs"):
            assert client.get(path, headers={"host": host}).status_code == status


def test_an_unknown_name_is_told_what_to_do() -> None:
    with serving(mock_gateway()) as client:
        error = client.get("/v1/models", headers={"host": "evil.example"}).json()["error"]
    assert error["code"] == "unknown_host"
    assert "--allowed-host evil.example" in error["message"]


@pytest.mark.parametrize(
    ("options", "status"),
    (
        ({"allowed_hosts": ("models.example",)}, 200),
        ({"allowed_hosts": ("*",)}, 200),
        ({"allowed_hosts": ("other.example",)}, 421),
        ({"allowed_hosts": ("other.example",), "host": "0.0.0.0"}, 421),
        ({"host": "0.0.0.0"}, 200),
        ({"api_keys": ("k",)}, 200),
    ),
)
def test_the_names_of_a_server_can_be_chosen(options: dict[str, Any], status: int) -> None:
    headers = {"host": "models.example:8000", "authorization": "Bearer k"}
    with serving(mock_gateway(config=config(**options))) as client:
        assert client.get("/v1/models", headers=headers).status_code == status


# ----------------------------------------------------------------------------------- busy servers


class Waiting:
    """Requests that hang in a stuck step, in threads of their own."""

    def __init__(self, url: str, body: dict[str, Any] = PROMPT, **request: object) -> None:
        self._url = url
        self._request = {"json": body, **request}
        self._threads: list[threading.Thread] = []
        self.statuses: list[int] = []

    def add(self) -> None:
        thread = threading.Thread(target=self._post)
        thread.start()
        self._threads.append(thread)

    def _post(self) -> None:
        answer = httpx.post(f"{self._url}/v1/completions", timeout=60, **self._request)  # type: ignore[arg-type]
        self.statuses.append(answer.status_code)

    def join(self) -> list[int]:
        for thread in self._threads:
            thread.join(60)
        return self.statuses


def wait_until(condition: object) -> None:
    """Polls what the server's own threads bring about."""
    limit = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.005)


def num_taken(gateway: Gateway) -> int:
    """Requests at hand that the engine has taken."""
    return sum(context.num_prompt_tokens > 0 for context in list(gateway.at_hand.values()))


def test_a_full_queue_is_429_with_retry_after_at_once() -> None:
    runner = BlockingRunner()
    gateway = mock_gateway(runner, max_num_seqs=1, max_queue=2)
    with serve_in_thread(create_server(gateway)) as url:
        runner.gate.clear()
        waiting = Waiting(url)
        waiting.add()
        assert runner.entered.wait(30)
        waiting.add()
        waiting.add()
        wait_until(lambda: num_taken(gateway) == 3)  # one runs, two wait
        refused = httpx.post(f"{url}/v1/completions", json=PROMPT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        runner.gate.set()
        assert waiting.join() == [200, 200, 200]
        assert httpx.post(f"{url}/v1/completions", json=PROMPT).status_code == 200
        assert_pool_is_empty(gateway)


def test_one_key_cannot_take_more_than_its_share() -> None:
    runner = BlockingRunner()
    limits = config(api_keys=("greedy", "modest"), max_requests_per_key=2)
    gateway = mock_gateway(runner, config=limits)
    with serve_in_thread(create_server(gateway)) as url:
        runner.gate.clear()
        waiting = Waiting(url, headers={"x-api-key": "greedy"})
        for _ in range(2):
            waiting.add()
        wait_until(lambda: len(gateway.at_hand) == 2)
        refused = httpx.get(f"{url}/v1/models", headers={"x-api-key": "greedy"})
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        allowed = httpx.get(f"{url}/v1/models", headers={"x-api-key": "modest"})
        assert allowed.status_code == 200
        assert httpx.get(f"{url}/health", headers={"x-api-key": "greedy"}).status_code == 200
        runner.gate.set()
        assert waiting.join() == [200, 200]
        again = httpx.get(f"{url}/v1/models", headers={"x-api-key": "greedy"})
        assert again.status_code == 200


def test_prompts_and_completions_of_a_request_count_towards_the_share() -> None:
    runner = BlockingRunner()
    limits = config(api_keys=("greedy", "modest"), max_requests_per_key=5)
    gateway = mock_gateway(runner, config=limits)
    greedy, modest = {"x-api-key": "greedy"}, {"x-api-key": "modest"}
    with serve_in_thread(create_server(gateway)) as url:
        post = f"{url}/v1/completions"
        runner.gate.clear()
        waiting = Waiting(url, {**PROMPT, "prompt": ["a", "b"], "n": 2}, headers=greedy)
        waiting.add()
        wait_until(lambda: [c.num_completions for c in list(gateway.at_hand.values())] == [4])
        refused = httpx.post(post, json={**PROMPT, "n": 2}, headers=greedy)
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        assert httpx.get(f"{url}/v1/models", headers=greedy).status_code == 200  # the fifth place
        others = Waiting(url, {**PROMPT, "n": 5}, headers=modest)
        others.add()
        wait_until(lambda: 5 in [c.num_completions for c in list(gateway.at_hand.values())])
        assert httpx.get(f"{url}/v1/models", headers=modest).status_code == 429
        runner.gate.set()
        assert waiting.join() + others.join() == [200, 200]
        again = httpx.post(post, json={**PROMPT, "n": 5}, headers=greedy)
        assert again.status_code == 200  # all was given back
        too_many = httpx.post(post, json={**PROMPT, "prompt": ["a", "b"], "n": 3}, headers=greedy)
        assert too_many.status_code == 400
        assert too_many.json()["error"]["param"] == "n"
        assert_pool_is_empty(gateway)


def test_one_of_several_keys_cannot_fill_the_queue() -> None:
    runner = BlockingRunner()
    several = config(api_keys=("greedy", "modest"))
    gateway = mock_gateway(runner, config=several, max_num_seqs=1, max_queue=3)
    with serve_in_thread(create_server(gateway)) as url:
        runner.gate.clear()
        waiting = Waiting(url, headers={"x-api-key": "greedy"})
        waiting.add()
        assert runner.entered.wait(30)
        waiting.add()
        wait_until(lambda: num_taken(gateway) == 2)  # half of one that runs and three that wait
        post = f"{url}/v1/completions"
        assert httpx.post(post, json=PROMPT, headers={"x-api-key": "greedy"}).status_code == 429
        others = Waiting(url, headers={"x-api-key": "modest"})
        others.add()
        others.add()
        wait_until(lambda: num_taken(gateway) == 4)
        runner.gate.set()
        assert waiting.join() + others.join() == [200] * 4


def test_the_servers_time_limit_answers_504() -> None:
    gateway = mock_gateway(config=config(request_timeout_s=0.05), max_batch_tokens=64)
    body = {"prompt": [5] * 3000, "max_tokens": 1000, "ignore_eos": True}
    with serving(gateway) as client:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert client.get("/health").status_code == 200
        assert_pool_is_empty(gateway)


@pytest.mark.parametrize("stream", (False, True))
def test_a_client_that_leaves_frees_its_blocks(stream: bool) -> None:
    gateway = mock_gateway(max_model_len=4096)
    body = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    assert gateway.engine is not None
    engine = gateway.engine
    with serve_in_thread(create_server(gateway)) as url:
        before = engine.num_steps
        if stream:
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=0.1)
        wait_until(lambda: not gateway.at_hand and not engine.progress().has_work)
        assert engine.num_steps - before < 4000
        assert_pool_is_empty(gateway)
