"""Ids, the access log, error shapes, models and tokens."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gateway.support import CHAT_TEMPLATE, HashEmbedder, mock_gateway, serve_in_thread, serving
from sagellm.gateway.access_log import AccessLog
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.context import new_context
from sagellm.gateway.errors import ApiError
from sagellm.gateway.gateway import Gateway
from sagellm.serving import RouterDef

SECRET = "the quick brown secret"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def logged(config: GatewayConfig, lines: list[dict[str, Any]]) -> Iterator[httpx.Client]:
    """A server whose access log is in ``lines`` after the block."""
    stream = io.StringIO()
    server = create_server(mock_gateway(config=config), log_stream=stream)
    with serve_in_thread(server) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client
    lines += map(json.loads, stream.getvalue().splitlines())


def test_the_access_log_tells_all_but_the_prompt() -> None:
    lines: list[dict[str, Any]] = []
    with logged(GatewayConfig(warm_up=False), lines) as client:
        body = {"prompt": SECRET, "max_tokens": 3, "ignore_eos": True, "n": 2}
        headers = {"x-request-id": "mine-1", "traceparent": PARENT}
        answer = client.post("/v1/completions?key=hidden", json=body, headers=headers)
        client.get("/v1/models/other")
    first, second = lines
    assert first["request_id"] == answer.headers["x-request-id"]
    assert first["request_id"].startswith("req-")
    assert first["client_request_id"] == "mine-1"
    assert first["trace_id"] == answer.headers["x-trace-id"] == PARENT.split("-")[1]
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/completions", 200)
    assert (first["prompt_tokens"], first["output_tokens"]) == (1 + len(SECRET), 6)
    assert first["finish_reasons"] == ["length", "length"]
    assert first["model"] == "mock" and first["client"] == "127.0.0.1"
    assert first["duration_ms"] > 0
    assert (second["status"], second["error"]) == (404, "model_not_found")
    assert SECRET not in json.dumps(lines) and "hidden" not in json.dumps(lines)


def test_prompts_are_logged_only_when_asked_for() -> None:
    lines: list[dict[str, Any]] = []
    with logged(GatewayConfig(warm_up=False, log_prompts=True), lines) as client:
        client.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 1})
        client.post("/v1/completions", json={"prompt": "x" * 3000, "max_tokens": 1})
    assert lines[0]["prompt"].endswith(SECRET)
    assert len(lines[1]["prompt"]) <= 1000


def test_a_reader_that_goes_away_does_not_stop_the_log() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    log = AccessLog(Broken())
    for _ in range(100):
        log.write(new_context())
    log.close()


def test_a_clients_id_is_a_label_and_never_the_id() -> None:
    with serving(mock_gateway()) as client:
        headers = {"x-request-id": "req-of-somebody-else"}
        ids = {client.get("/v1/models", headers=headers).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5
    assert "req-of-somebody-else" not in ids


@pytest.mark.parametrize("label", (b"a" * 129, b"two words", b"a\tb", b"\xff", b"", b'"}\x7f'))
def test_a_label_that_could_forge_a_line_is_dropped(label: bytes) -> None:
    context = new_context(headers=[(b"x-request-id", label), (b"x-trace-id", label)])
    assert context.client_request_id is None
    assert len(context.trace_id) == 32


def test_a_missing_route_or_method_answers_in_the_apis_shape() -> None:
    with serving(mock_gateway()) as client:
        missing = client.get("/v1/nothing")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "unknown_route"
        wrong = client.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["code"] == "method_not_allowed"
        other = client.get("/v1/messages")
        assert other.status_code == 405
        assert other.json()["error"]["type"] == "invalid_request_error"
        assert other.json()["request_id"] == other.headers["request-id"]


def test_an_unexpected_failure_is_500_without_its_details(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @staticmethod
        def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
            async def fail() -> None:
                raise KeyError("an internal secret")

            return {"broken": [RouterDef("", fail)]}

    monkeypatch.setattr("sagellm.gateway.app.ROUTE_MODULES", (Broken,))
    with caplog.at_level(logging.ERROR), serving(mock_gateway()) as client:
        response = client.post("/broken", json={})
    assert response.status_code == 500
    assert "secret" not in response.text
    request_id = response.headers["x-request-id"]
    assert request_id in response.json()["error"]["message"]
    record = next(r for r in caplog.records if request_id in r.getMessage())
    assert record.exc_info is not None and "internal secret" in str(record.exc_info[1])


def test_errors_of_the_server_do_not_name_the_request_twice() -> None:
    error = ApiError.internal()
    assert error.openai("req-1")["error"]["message"].count("req-1") == 1
    assert error.anthropic("req-1")["error"]["type"] == "api_error"


def test_unknown_fields_are_named() -> None:
    with serving(mock_gateway()) as client:
        response = client.post("/tokenize", json={"prompt": "a", "prmpt": "b"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prmpt"
    assert "prmpt" in response.json()["error"]["message"]


EMPTY_REASONING = {"type": "reasoning", "id": "r", "summary": []}
NO_TEXT = {"type": "message", "role": "user", "content": [{"type": "input_text"}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    (
        ("/v1/responses", {"input": ""}, "input"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": [EMPTY_REASONING]}, "input"),
        ("/v1/responses", {"input": [NO_TEXT]}, "input.0.content.0.text"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": []}]},
            "messages.0.content",
        ),
        ("/v1/messages", {"messages": []}, "messages"),
        ("/v1/messages", {"messages": [{"role": "user", "content": []}]}, "messages"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
        ),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": []}]}, "messages"),
    ),
)
def test_the_field_at_fault_is_named_as_the_client_wrote_it(
    path: str, body: dict[str, Any], param: str
) -> None:
    limit = {"max_tokens": 2} if path == "/v1/messages" else {}
    with serving(mock_gateway()) as client:
        response = client.post(path, json={"model": "mock", **limit, **body})
    error = response.json()["error"]
    assert response.status_code == 400
    if "messages" in path:  # this shape has no place of its own for it
        assert error["message"].startswith((f"{param}:", f"{param} ")), error
    else:
        assert error["param"] == param


def test_models_are_listed_under_every_name_and_served_under_them() -> None:
    config = GatewayConfig(access_log=False, warm_up=False, served_model_name=("a/b", "alias"))
    with serving(mock_gateway(config=config, embedder=HashEmbedder())) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["a/b", "alias", "mock-embedding"]
        assert cards[0]["capabilities"] == ["completion", "chat"]
        assert cards[2]["capabilities"] == ["embedding", "rerank"]
        assert cards[0]["max_model_len"] == 4096
        assert client.get("/v1/models/a/b").json() == cards[0]
        assert client.get("/v1/models/mock").status_code == 404
        for name, status in (("a/b", 200), ("alias", 200), ("mock", 404), ("mock-embedding", 400)):
            body = {"model": name, "prompt": "Hi", "max_tokens": 1}
            assert client.post("/v1/completions", json=body).status_code == status, name


def test_a_server_of_embeddings_refuses_generation_by_name() -> None:
    with serving(mock_gateway(with_engine=False, embedder=HashEmbedder())) as client:
        response = client.post("/v1/completions", json={"prompt": "Hi"})
        assert response.status_code == 400
        assert "embeddings only" in response.json()["error"]["message"]
        assert client.post("/tokenize", json={"prompt": "Hi"}).status_code == 400
        assert client.get("/health").status_code == 200


def test_tokens_and_text_are_each_others_inverse() -> None:
    with serving(mock_gateway()) as client:
        answer = client.post(
            "/tokenize", json={"prompt": "Gr\u00fc\u00df", "return_token_strs": True}
        )
        tokens = answer.json()["tokens"]
        assert tokens == [256, *"Gr\u00fc\u00df".encode()]
        assert answer.json()["count"] == len(tokens) == len(answer.json()["token_strs"])
        text = client.post("/detokenize", json={"tokens": tokens[1:]}).json()["prompt"]
        assert text == "Gr\u00fc\u00df"


def test_tokenizer_info_is_what_prompts_are_made_of() -> None:
    with serving(mock_gateway()) as client:
        info = client.get("/tokenizer_info").json()
        document = client.get("/openapi.json").json()
    assert info["chat_template"] == CHAT_TEMPLATE
    assert info.keys() == {"bos_token", "eos_token", "chat_template"}
    assert "get" in document["paths"]["/tokenizer_info"]
    with serving(mock_gateway(chat_template=None)) as client:
        assert client.get("/tokenizer_info").json()["chat_template"] is None
    guarded = GatewayConfig(access_log=False, warm_up=False, api_keys=("key",))
    with serving(mock_gateway(config=guarded)) as client:
        assert client.get("/tokenizer_info").status_code == 401


def test_a_tokenized_conversation_is_the_prompt_of_chat_completions() -> None:
    conversation = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    with serving(mock_gateway()) as client:
        tokens = client.post("/tokenize", json=conversation).json()
        answer = client.post("/v1/chat/completions", json={**conversation, "max_tokens": 1}).json()
        assert answer["usage"]["prompt_tokens"] == tokens["count"] == len(tokens["tokens"])


def test_the_openapi_document_declares_every_error_and_no_422() -> None:
    config = GatewayConfig(access_log=False, warm_up=False, api_keys=("k",))
    with serving(mock_gateway(config=config), headers={"x-api-key": "k"}) as client:
        document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            declared = set(operation["responses"])
            assert "422" not in declared
            assert {"200", "401", "500", "503"} <= declared, path
            if method == "post":
                assert {"400", "408", "413", "415", "429", "431", "504"} <= declared, path
            assert ("security" in operation) == (path not in {"/health", "/ready", "/ping"})
    errors = document["paths"]["/v1/messages"]["post"]["responses"]["400"]["content"]
    assert "Anthropic" in json.dumps(errors)
