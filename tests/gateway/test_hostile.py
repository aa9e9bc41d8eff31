"""Requests out of the field's advisories, each followed by a normal one that must succeed.

``hostile/*.json`` hold the corpus. A case is a request (``json``, ``text`` or ``base64`` body, or
``raw`` bytes of a connection) and what may answer it: by default any 4xx in the API's error shape;
``"expect": "2xx"`` for what only looks bad; ``"any"`` where both are right, but never a 5xx;
``"closed"`` where the HTTP layer itself refuses. ``"status"`` asks for exactly one.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.support import HashEmbedder, assert_pool_is_empty, mock_gateway, serve_in_thread
from sagellm.gateway.app import create_server
from sagellm.gateway.gateway import Gateway

CORPUS = sorted((Path(__file__).parent / "hostile").glob("*.json"))


def cases() -> list[Any]:
    found = []
    for path in CORPUS:
        content = json.loads(path.read_text())
        assert content["about"] and content["advisories"], path.name
        found += [
            pytest.param(case, id=f"{path.stem}: {case['name']}") for case in content["cases"]
        ]
    return found


def expand(value: Any) -> Any:
    """Builds what would be too long to write: ``$text``, ``$list``, ``$nest``, ``$keys``."""
    if isinstance(value, list):
        return [expand(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$text" in value:
        text, count = value["$text"]
        return text * count
    if "$list" in value:
        item, count = value["$list"]
        return [item] * count
    if "$keys" in value:
        count, item = value["$keys"]
        return {str(number): item for number in range(count)}
    if "$concat" in value:
        return "".join(expand(part) for part in value["$concat"])
    if "$nest" in value:
        path, depth = value["$nest"]
        nested: Any = 1
        for _ in range(depth):
            for name in reversed(path.split(".")):
                nested = {name: nested}
        return nested
    return {name: expand(item) for name, item in value.items()}


def encode(value: Any) -> bytes:
    """JSON without recursion limits on nesting."""
    if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict):
        head, tail = b"", b""
        while isinstance(value, dict) and len(value) == 1:
            ((name, value),) = value.items()
            head += json.dumps(name).encode().join((b"{", b":"))
            tail += b"}"
        return head + encode(value) + tail
    if isinstance(value, dict):
        parts = (json.dumps(name).encode() + b":" + encode(item) for name, item in value.items())
        return b"{" + b",".join(parts) + b"}"
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    return mock_gateway(embedder=HashEmbedder(), max_num_seqs=8, max_queue=16)


@pytest.fixture(scope="module")
def url(gateway: Gateway) -> Iterator[str]:
    with serve_in_thread(create_server(gateway)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def send(client: httpx.Client, case: dict[str, Any]) -> httpx.Response:
    if "json" in case:
        body = encode(expand(case["json"]))
    elif "text" in case:
        body = expand(case["text"]).encode("utf-8", "surrogatepass")
    else:
        body = base64.b64decode(case.get("base64", ""))
    headers = {"content-type": "application/json"} if body else {}
    headers |= {name: expand(value) for name, value in case.get("headers", {}).items()}
    method = case.get("method", "POST")
    return client.request(method, expand(case["path"]), content=body or None, headers=headers)


def send_raw(url: str, data: bytes) -> bytes:
    """What the server answers to bytes, until it closes or 10 seconds have passed."""
    parts = urlsplit(url)
    answer = b""
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while piece := peer.recv(65536):
                answer += piece
        except OSError:
            pass  # refused while we were still talking
    return answer


def assert_error_shape(path: str, response: httpx.Response) -> None:
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
        assert body["request_id"] == response.headers["request-id"]
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message and len(message) < 4000
    assert "Traceback" not in message and ".py" not in message


def assert_works(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("case", cases())
def test_a_hostile_request_is_refused_and_the_next_one_served(
    case: dict[str, Any], client: httpx.Client, url: str, gateway: Gateway
) -> None:
    expected = case.get("expect", "4xx")
    if "raw" in case:
        answer = send_raw(url, expand(case["raw"]).encode("latin-1"))
        assert not answer.startswith(b"HTTP/1.1 5"), answer[:200]
        if "status" in case:
            assert answer.startswith(b"HTTP/1.1 %d " % case["status"]), answer[:200]
        assert b"x-injected" not in answer.lower()
    else:
        response = send(client, case)
        status = response.status_code
        if "status" in case:
            assert status == case["status"], response.text[:500]
        elif expected == "4xx":
            assert 400 <= status < 500, response.text[:500]
        elif expected == "2xx":
            assert 200 <= status < 300, response.text[:500]
        else:
            assert status < 500, response.text[:500]
        if status >= 400 and case.get("shape", True):
            assert_error_shape(expand(case["path"]), response)
    assert_works(client)
    assert client.get("/health").status_code == 200


def test_nothing_of_the_corpus_stays_behind(client: httpx.Client, gateway: Gateway) -> None:
    assert_works(client)
    assert gateway.at_hand == {}
    assert_pool_is_empty(gateway)
