"""Requests and answers of plain routes, over real connections."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sagellm.errors import (
    InvalidArgumentError,
    ModelNotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from sagellm.serving import (
    ClientDisconnected,
    HTTPMethod,
    RouterConfig,
    RouterDef,
    RouterKind,
    Server,
    format_error_response,
    generate_trace_id,
    until_disconnect,
)
from serving.support import TIMEOUT_S, client_of, running, socket_in


async def echo(query: dict[str, Any]) -> dict[str, Any]:
    return query


def one(handler: Any, **options: Any) -> Server:
    return Server({"t": [RouterDef(path="go", handler=handler, **options)]})


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str
    count: int = 1


class Answer(BaseModel):
    text: str


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_routes_answer_on_a_unix_socket_and_on_tcp(transport: str, tmp_path: Path) -> None:
    where = {"socket": socket_in(tmp_path)} if transport == "unix" else {}
    with client_of(one(echo), **where) as client:
        assert client.post("/t/go", json={"a": [1, None, "é"]}).json()["a"] == [1, None, "é"]


def test_path_is_prefix_group_and_path() -> None:
    server = Server({"chat/x": [RouterDef("", echo), RouterDef("/deep/", echo)]}, prefix="/v1/")
    with client_of(server) as client:
        assert client.post("/v1/chat/x").status_code == 200
        assert client.post("/v1/chat/x/deep").status_code == 200
        assert client.post("/v1/chat").status_code == 404


def test_async_and_sync_functions_and_callables_are_called_where_they_belong() -> None:
    loop_thread: list[int] = []

    async def in_loop(query: Any) -> str:
        loop_thread.append(threading.get_ident())
        return "loop"

    def in_thread(query: Any) -> bool:
        return threading.get_ident() != loop_thread[0]

    class Model:
        async def __call__(self, query: Any) -> str:
            return "object"

    routes = [RouterDef("a", in_loop), RouterDef("b", in_thread), RouterDef("c", Model())]
    with client_of(Server({"t": routes})) as client:
        assert client.post("/t/a").json() == "loop"
        assert client.post("/t/b").json() is True
        assert client.post("/t/c").json() == "object"


def test_handler_gets_the_request_if_it_declares_it() -> None:
    async def only_request(request: Request) -> str:
        return request.headers["x-mine"]

    def both(query: dict[str, Any], request: Request) -> list[str]:
        return [query["a"], request.method]

    with client_of(Server({"t": [RouterDef("a", only_request), RouterDef("b", both)]})) as client:
        assert client.post("/t/a", headers={"x-mine": "m"}).json() == "m"
        assert client.post("/t/b", json={"a": "x"}).json() == ["x", "POST"]


@pytest.mark.parametrize("method", [HTTPMethod.GET, HTTPMethod.DELETE])
def test_query_and_path_parameters_reach_handlers_without_body(method: HTTPMethod) -> None:
    server = Server({"m": [RouterDef("{name:path}", echo, method=method)]})
    with client_of(server) as client:
        found = client.request(method.value, "/m/org/x?a=1&b=2&b=3").json()
    assert {k: found[k] for k in ("a", "b", "name")} == {"a": "1", "b": ["2", "3"], "name": "org/x"}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b'"text"',
        b"3",
        b"null",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b"\xff\xfe",
        b'{"a": 1} x',
        b'{"a":' * 100_000,
    ],
)
def test_a_body_that_is_no_json_object_is_400_and_the_next_request_works(body: bytes) -> None:
    with client_of(one(echo)) as client:
        answer = client.post("/t/go", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["type"]) == (400, "invalid_request")
        assert client.post("/t/go", json={"a": 1}).json()["a"] == 1


def test_a_body_is_cut_off_at_its_limit_with_and_without_a_declared_length() -> None:
    server = Server({"t": [RouterDef("go", echo)]}, RouterConfig(max_body_bytes=1000))
    with client_of(server) as client:
        assert client.post("/t/go", json={"a": "x" * 2000}).status_code == 413
        chunks = (b"x" * 100 for _ in range(20))
        assert client.post("/t/go", content=chunks).status_code == 413
        assert client.post("/t/go", json={"a": "x" * 900}).status_code == 200


def test_a_body_that_a_foreign_web_page_could_send_is_415() -> None:
    with client_of(one(echo)) as client:
        for headers in ({"content-type": "text/plain"}, {"origin": "http://evil.example"}):
            assert client.post("/t/go", content=b"{}", headers=headers).status_code == 415
        headers = {"content-type": "application/json; charset=utf-8", "origin": "http://a.example"}
        assert client.post("/t/go", content=b"{}", headers=headers).status_code == 200
        assert client.post("/t/go", content=b"{}").status_code == 200


def test_request_model_validates_and_response_model_shapes() -> None:
    async def answer(query: Question) -> dict[str, Any]:
        return {"text": query.text * query.count, "secret": 1}

    server = one(answer, request_model=Question, response_model=Answer)
    with client_of(server) as client:
        assert client.post("/t/go", json={"text": "ab", "count": 2}).json() == {"text": "abab"}
        wrong = client.post("/t/go", json={"count": "x", "more": 1})
        assert wrong.status_code == 422
        for name in ("body.text", "body.count", "body.more"):
            assert name in wrong.json()["message"]
        assert client.post("/t/go").status_code == 400


def test_request_model_of_a_get_route_takes_query_parameters() -> None:
    async def answer(query: Question) -> int:
        return query.count

    with client_of(one(answer, request_model=Question, method="GET")) as client:
        assert client.get("/t/go?text=a&count=3").json() == 3
        assert client.get("/t/go?text=a&count=x").status_code == 422


def test_a_result_against_the_response_model_is_500_without_details() -> None:
    async def answer(query: Any) -> dict[str, Any]:
        return {"wrong": "secret value"}

    with client_of(one(answer, response_model=Answer)) as client:
        found = client.post("/t/go")
    assert found.status_code == 500
    assert "secret" not in found.text


def test_a_response_passes_untouched() -> None:
    async def answer(query: Any) -> Response:
        return PlainTextResponse("as is", 418, {"x-mine": "1"})

    with client_of(one(answer, response_model=Answer)) as client:
        found = client.post("/t/go")
    assert (found.status_code, found.text, found.headers["x-mine"]) == (418, "as is", "1")


def test_openapi_document_shows_models_responses_tags_and_parameters() -> None:
    route = RouterDef(
        "{name}/go",
        echo,
        request_model=Question,
        response_model=Answer,
        responses={404: {"description": "no such thing"}},
        tags=("Things",),
        summary="Does it",
        description="At length.",
    )
    server = Server({"t": [route, RouterDef("hidden", echo, include_in_schema=False)]})
    with client_of(server) as client:
        document = client.get("/openapi.json").json()
        page = client.get("/docs")
        assert page.status_code == 200
        assert "://" not in page.text  # nothing is loaded from elsewhere
    assert list(document["paths"]) == ["/t/{name}/go"]
    post = document["paths"]["/t/{name}/go"]["post"]
    assert (post["tags"], post["summary"], post["description"]) == (
        ["Things"],
        "Does it",
        "At length.",
    )
    assert [p["name"] for p in post["parameters"]] == ["name"]
    body = post["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("/Question")
    answer = post["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["$ref"].endswith("/Answer")
    assert {"404", "default"} <= set(post["responses"])
    assert {"Question", "Answer", "ErrorResponse"} <= set(document["components"]["schemas"])


# --- errors


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (HTTPException(400, "Messages required"), 400, "invalid_request"),
        (HTTPException(418, {"a": 1}), 418, "error"),
        (InvalidArgumentError("Messages required"), 400, "invalid_request"),
        (ModelNotFoundError("x"), 404, "not_found"),
        (ResourceExhaustedError("x"), 503, "unavailable"),
        (UnavailableError("x"), 503, "unavailable"),
        (ValueError("secret"), 500, "internal"),
        (StopIteration("secret"), 500, "internal"),
    ],
)
@pytest.mark.parametrize("threaded", [False, True])
def test_an_exception_keeps_its_status(
    error: Exception, status: int, kind: str, threaded: bool
) -> None:
    def in_thread(query: Any) -> None:
        raise error

    async def in_loop(query: Any) -> None:
        if isinstance(error, StopIteration):
            raise RuntimeError("secret")
        raise error

    with client_of(one(in_thread if threaded else in_loop)) as client:
        answer = client.post("/t/go")
    assert (answer.status_code, answer.json()["type"]) == (status, kind)
    assert set(answer.json()) == {"message", "type"}
    assert "secret" not in answer.text


def test_headers_of_an_http_exception_are_sent() -> None:
    async def busy(query: Any) -> None:
        raise HTTPException(429, "later", headers={"Retry-After": "7"})

    with client_of(one(busy)) as client:
        assert client.post("/t/go").headers["retry-after"] == "7"


def test_exception_handler_sees_every_exception_first() -> None:
    seen: list[str] = []

    async def shape(request: Any, error: Exception) -> Response | None:
        seen.append(type(error).__name__)
        if isinstance(error, KeyError):
            return None
        if isinstance(error, ZeroDivisionError):
            raise RuntimeError("the handler itself fails")
        return Response("mine", getattr(error, "status_code", 499 + 1))

    async def fail(query: Question) -> None:
        raise {"key": KeyError(), "zero": ZeroDivisionError(), "none": ValueError()}[query.text]

    server = Server({"t": [RouterDef("go", fail, request_model=Question)]}, exception_handler=shape)
    with client_of(server) as client:
        assert client.get("/nowhere").text == "mine"
        assert client.get("/t/go").status_code == 405
        assert client.post("/t/go", json={"x": 1}).text == "mine"
        assert client.post("/t/go", json={"text": "none"}).text == "mine"
        for text in ("key", "zero"):
            answer = client.post("/t/go", json={"text": text})
            assert (answer.status_code, answer.json()["type"]) == (500, "internal")
    assert seen == [
        "HTTPException",
        "HTTPException",
        "RequestValidationError",
        "ValueError",
        "KeyError",
        "ZeroDivisionError",
    ]


def test_missing_routes_and_methods_have_the_error_shape() -> None:
    with client_of(one(echo)) as client:
        for answer, status in ((client.get("/x"), 404), (client.get("/t/go"), 405)):
            assert answer.status_code == status
            assert set(answer.json()) == {"message", "type"}


def test_format_error_response() -> None:
    assert format_error_response("no", "mine") == {"message": "no", "type": "mine"}
    error = HTTPException(404, "gone")
    assert format_error_response(error) == {"message": "gone", "type": "not_found"}


@pytest.mark.parametrize(
    ("routers", "words"),
    [
        ({"t": [RouterDef("a", echo), RouterDef("/a", echo)]}, "two routes for POST /t/a"),
        ({"t": [RouterDef("a", lambda query, more: 1)]}, "needs more"),
        ({"t": [RouterDef("a", dict)]}, "no signature"),
        ({"t": [RouterDef("a", lambda query: (yield))]}, "RouterKind.SSE"),
    ],
)
def test_routes_that_cannot_work_are_refused_at_once(routers: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        Server(routers)


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_time_limits_that_are_none_are_refused(seconds: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"math\.inf"):
        RouterDef("a", echo, timeout=seconds)
    with pytest.raises(InvalidArgumentError, match=r"math\.inf"):
        RouterConfig(timeout=seconds)


# --- time limits


def test_a_timeout_is_504_and_cancels_an_async_handler_whose_cleanup_may_await() -> None:
    cleaned = threading.Event()

    async def slow(query: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with client_of(one(slow, timeout=0.05)) as client:
        answer = client.post("/t/go")
        assert (answer.status_code, answer.json()["type"]) == (504, "timeout")
        assert cleaned.wait(TIMEOUT_S)


def test_a_timeout_does_not_wait_for_a_sync_handler() -> None:
    release = threading.Event()

    def slow(query: Any) -> None:
        release.wait(TIMEOUT_S)

    try:
        with client_of(one(slow, timeout=0.05)) as client:
            assert client.post("/t/go").status_code == 504
            assert not release.is_set()
    finally:
        release.set()


def test_route_timeout_overrides_the_common_one_and_inf_means_none() -> None:
    async def wait(query: Any) -> str:
        await asyncio.sleep(0.1)
        return "done"

    routes = [RouterDef("a", wait), RouterDef("b", wait, timeout=math.inf)]
    with client_of(Server({"t": routes}, RouterConfig(timeout=0.01))) as client:
        assert client.post("/t/a").status_code == 504
        assert client.post("/t/b").json() == "done"


def test_sync_handlers_beyond_the_thread_limit_wait_and_are_all_answered() -> None:
    lock = threading.Lock()
    at_work = peak = 0

    def work(query: Any) -> int:
        nonlocal at_work, peak
        with lock:
            at_work += 1
            peak = max(peak, at_work)
        time.sleep(0.005)
        with lock:
            at_work -= 1
        return int(query["i"])

    server = Server({"t": [RouterDef("go", work)]}, RouterConfig(thread_concurrency=3))

    async def ask_all(client: httpx.AsyncClient) -> list[int]:
        answers = await asyncio.gather(*(client.post("/t/go", json={"i": i}) for i in range(20)))
        return [answer.json() for answer in answers]

    async def main(client: httpx.AsyncClient) -> list[int]:
        async with client:
            return await ask_all(client)

    with running(server) as at:
        assert asyncio.run(main(at.async_client())) == list(range(20))
    assert 1 <= peak <= 3


def test_until_disconnect_cancels_the_work_of_a_client_that_left() -> None:
    started, cancelled = threading.Event(), threading.Event()
    outcome: list[type[BaseException]] = []

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def answer(query: Any, request: Request) -> None:
        try:
            await until_disconnect(request, work())
        except ClientDisconnected as error:
            outcome.append(type(error))
            raise

    async def quick(query: Any, request: Request) -> str:
        return await until_disconnect(request, asyncio.sleep(0, "in time"))

    async def leave(client: httpx.AsyncClient) -> None:
        async with client:
            task = asyncio.create_task(client.post("/t/go"))
            await asyncio.to_thread(started.wait, TIMEOUT_S)
            task.cancel()
            await asyncio.wait([task])

    with running(Server({"t": [RouterDef("go", answer), RouterDef("q", quick)]})) as at:
        asyncio.run(leave(at.async_client()))
        assert cancelled.wait(TIMEOUT_S)
        with at.client() as client:
            assert client.post("/t/q").json() == "in time"
    assert outcome == [ClientDisconnected]


# --- trace ids


def test_a_clients_trace_id_is_kept_and_others_are_made() -> None:
    with client_of(one(echo)) as client:
        kept = client.post("/t/go", headers={"X-Trace-Id": "abc-1"}, json={})
        assert (kept.headers["x-trace-id"], kept.json()["trace_id"]) == ("abc-1", "abc-1")
        kept = client.post("/t/go", json={"trace_id": "abc-2"})
        assert (kept.headers["x-trace-id"], kept.json()["trace_id"]) == ("abc-2", "abc-2")
        made = [client.post("/t/go").json()["trace_id"] for _ in range(2)]
        assert len(set(made)) == 2 and all(len(trace_id) == 32 for trace_id in made)
        hostile = client.post("/t/go", json={"trace_id": "a\r\nset-cookie: b"})
        assert hostile.status_code == 200
        assert "set-cookie" not in hostile.headers
        failed = client.post("/t/go", content=b"{", headers={"X-Trace-Id": "abc-3"})
        assert (failed.status_code, failed.headers["x-trace-id"]) == (400, "abc-3")


def test_generated_trace_ids_differ() -> None:
    assert len({generate_trace_id() for _ in range(100)}) == 100


# --- hooks, CORS, middleware


def test_hooks_run_once_around_the_requests() -> None:
    events: list[str] = []

    async def startup() -> None:
        events.append("startup")

    def handler(query: Any) -> None:
        events.append("request")

    server = Server(
        {"t": [RouterDef("go", handler)]},
        on_startup=startup,
        on_shutdown=lambda: events.append("shutdown"),
        on_drain=lambda: events.append("drain"),
    )
    with client_of(server) as client:
        assert client.post("/t/go").json() is None
    assert events == ["startup", "request", "drain", "shutdown"]


def test_a_failing_startup_hook_ends_the_server_with_its_error() -> None:
    def startup() -> None:
        raise UnavailableError("no model")

    with (
        pytest.raises(RuntimeError, match="no model"),
        running(Server({}, on_startup=startup)),
    ):
        pass


def test_cors_is_off_by_default_and_never_allows_credentials() -> None:
    headers = {"origin": "http://a.example", "access-control-request-method": "POST"}

    def allowed(enable: Any) -> httpx.Headers:
        server = Server({"t": [RouterDef("go", echo)]}, enable_cors=enable)
        with client_of(server) as client:
            return client.options("/t/go", headers=headers).headers

    name = "access-control-allow-origin"
    assert name not in allowed(False)
    assert allowed(True)[name] == "*"
    assert allowed(["http://a.example"])[name] == "http://a.example"
    assert name not in allowed(["http://b.example"])
    assert "access-control-allow-credentials" not in allowed(["http://a.example"])


def test_middleware_runs_in_order_around_every_route() -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        def make(app: ASGIApp) -> ASGIApp:
            async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
                if scope["type"] == "http":
                    order.append(name)
                await app(scope, receive, send)

            return middleware

        return make

    server = Server({}, middleware=[named("outer"), named("inner")])
    with client_of(server) as client:
        assert client.get("/nowhere").status_code == 404
    assert order == ["outer", "inner"]


def test_results_are_json_even_with_what_json_lacks() -> None:
    async def answer(query: Any) -> dict[str, Any]:
        return {"a": float("nan"), "b": Answer(text="x"), "c": (1, 2), "d": Path("p")}

    with client_of(one(answer)) as client:
        found = client.post("/t/go")
    assert json.loads(found.text) == {"a": None, "b": {"text": "x"}, "c": [1, 2], "d": "p"}


def test_kind_and_method_may_be_given_as_text() -> None:
    route = RouterDef("a", echo, kind="sse", method="GET")  # type: ignore[arg-type]
    assert (route.kind, route.method) == (RouterKind.SSE, HTTPMethod.GET)
