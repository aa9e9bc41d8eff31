"""OpenTelemetry spans of real requests."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from gateway.support import ScriptedRunner, mock_gateway, serving
from sagellm.errors import InvalidArgumentError, UnsupportedError
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.observer import ObserverGroup
from sagellm.gateway.request_metrics import RequestMetrics
from sagellm.gateway.tracing import SpanObserver, open_tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CHAT = {
    "model": "mock",
    "messages": [{"role": "user", "content": "a secret"}],
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.9,
}


@contextmanager
def traced(runner: Any = None) -> Iterator[tuple[httpx.Client, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    gateway = mock_gateway(runner or ScriptedRunner("hidden answer"))
    gateway.observers = (RequestMetrics(), SpanObserver(exporter, in_background=False))
    gateway.metrics = ObserverGroup(gateway.observers)
    with serving(gateway) as client:
        yield client, exporter


def by_kind(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, ReadableSpan]:
    inner, server = exporter.get_finished_spans()
    assert server.kind is SpanKind.SERVER
    return server, inner


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


def test_a_request_is_a_span_below_the_callers_with_the_engines_below_it() -> None:
    with traced() as (client, exporter):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code == 200
        assert client.get("/metrics").status_code == 200  # whose spans nobody wants
    server, inner = by_kind(exporter)
    assert f"{server.context.trace_id:032x}" == f"{inner.context.trace_id:032x}" == TRACE
    assert server.parent is not None
    assert f"{server.parent.span_id:016x}" == PARENT
    assert inner.parent is not None
    assert inner.parent.span_id == server.context.span_id
    assert server.name == "POST /v1/chat/completions"
    assert attributes(server)["http.response.status_code"] == 200
    assert attributes(server)["http.route"] == "/v1/chat/completions"
    assert attributes(server)["sagellm.request_id"] == answer.headers["x-request-id"]
    usage = answer.json()["usage"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "mock",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.choice.count": 1,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert {name: attributes(inner)[name] for name in expected} == expected
    assert inner.name == "chat mock"
    assert server.start_time is not None and server.end_time is not None
    (first,) = inner.events
    assert server.start_time <= first.timestamp <= server.end_time


def test_prompts_and_answers_stay_out_of_spans() -> None:
    with traced() as (client, exporter):
        client.post("/v1/chat/completions", json=CHAT)
    text = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "secret" not in text
    assert "hidden" not in text


def test_a_request_without_a_traceparent_begins_a_trace() -> None:
    with traced() as (client, exporter):
        headers = {"traceparent": "00-zz-zz-01"}
        assert client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    server, inner = by_kind(exporter)
    assert server.parent is None
    assert inner.context.trace_id == server.context.trace_id


def test_a_refused_request_has_no_span_of_the_engine() -> None:
    with traced() as (client, exporter):
        assert client.post("/v1/chat/completions", json={"model": "mock"}).status_code == 400
    (server,) = exporter.get_finished_spans()
    assert attributes(server)["http.response.status_code"] == 400
    assert server.status.status_code is not StatusCode.ERROR  # the client's fault


def test_a_failed_request_is_an_error_in_both_spans() -> None:
    def fail(prompt: str) -> str:
        raise RuntimeError("broken on purpose")

    with traced(ScriptedRunner(fail)) as (client, exporter):
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 503
    for span in by_kind(exporter):
        assert span.status.status_code is StatusCode.ERROR
        assert "error.type" in attributes(span)


def test_nothing_is_left_open_after_a_client_leaves() -> None:
    body = {**CHAT, "stream": True}
    with (
        traced() as (client, exporter),
        client.stream("POST", "/v1/chat/completions", json=body),
    ):
        pass  # leaves without reading
    server, inner = by_kind(exporter)
    assert server.end_time is not None
    assert inner.end_time is not None


@pytest.mark.parametrize(("name", "expected"), [(None, "sagellm"), ("mine", "mine")])
def test_the_service_has_a_name(
    monkeypatch: pytest.MonkeyPatch, name: str | None, expected: str
) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    if name is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    with traced() as (client, exporter):
        client.get("/version")
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == expected


def test_without_an_endpoint_tracing_is_not_there() -> None:
    gateway = mock_gateway()
    assert [type(observer) for observer in gateway.observers] == [RequestMetrics]
    asyncio.run(gateway.close())


def test_an_endpoint_turns_it_on() -> None:
    engine = mock_gateway().engine
    gateway = Gateway(GatewayConfig(otlp_endpoint="http://127.0.0.1:9/"), engine=engine)
    assert [type(observer) for observer in gateway.observers] == [RequestMetrics, SpanObserver]
    asyncio.run(gateway.close())


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://host:4317", "http://", "x"])
def test_an_endpoint_that_is_no_url_is_an_error(endpoint: str) -> None:
    with pytest.raises(InvalidArgumentError, match="http://127"):
        open_tracing(endpoint)


def test_a_missing_extra_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"sagellm\[otel\]"):
        open_tracing("http://127.0.0.1:4318")
