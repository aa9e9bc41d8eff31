"""Server-sent events: framing, failures, time limits, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sagellm.errors import InvalidArgumentError
from sagellm.serving import EventStream, RouterConfig, RouterDef, RouterKind, Server
from sagellm.serving.threads import ThreadIterator, ThreadPool
from serving.support import TIMEOUT_S, Running, client_of, running


def stream_of(handler: Any, **options: Any) -> Server:
    return Server({"t": [RouterDef("go", handler, kind=RouterKind.SSE, **options)]})


async def async_items(query: Any) -> AsyncIterator[Any]:
    for i in range(3):
        yield {"i": i}


def sync_items(query: Any) -> Iterator[Any]:
    for i in range(3):
        yield {"i": i}


async def returns_iterator(query: Any) -> Any:
    return async_items(query)


def returns_generator(query: Any) -> Any:
    return sync_items(query)


@pytest.mark.parametrize("handler", [async_items, sync_items, returns_iterator, returns_generator])
def test_items_are_data_events_and_done_is_last(handler: Any) -> None:
    with client_of(stream_of(handler)) as client:
        answer = client.post("/t/go", json={})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    expected = "".join(f'data: {{"i":{i}}}\n\n' for i in range(3)) + "data: [DONE]\n\n"
    assert answer.text == expected


def test_text_bytes_none_and_single_results_are_framed() -> None:
    async def items(query: Any) -> AsyncIterator[Any]:
        yield "two\nlines"
        yield b": ready-made\n\n"
        yield None

    async def single(query: Any) -> Any:
        return {"only": 1}

    async def nothing(query: Any) -> AsyncIterator[Any]:
        return
        yield

    routes = [RouterDef(str(i), h, RouterKind.SSE) for i, h in enumerate((items, single, nothing))]
    with client_of(Server({"t": routes})) as client:
        text = "data: two\ndata: lines\n\n: ready-made\n\ndata: null\n\ndata: [DONE]\n\n"
        assert client.post("/t/0").text == text
        assert client.post("/t/1").text == 'data: {"only":1}\n\ndata: [DONE]\n\n'
        assert client.post("/t/2").text == "data: [DONE]\n\n"


def test_sse_headers_of_the_configuration_are_sent() -> None:
    config = RouterConfig(sse_headers={"X-Mine": "1", "Cache-Control": "no-store"})
    server = Server({"t": [RouterDef("go", async_items, RouterKind.SSE)]}, config)
    with client_of(server) as client:
        headers = client.post("/t/go").headers
    assert (headers["x-mine"], headers["cache-control"]) == ("1", "no-store")


def test_a_failure_before_the_first_item_has_its_true_status() -> None:
    async def refuse(query: Any) -> AsyncIterator[Any]:
        raise HTTPException(400, "Messages required")
        yield

    def refuse_in_thread(query: Any) -> Iterator[Any]:
        raise InvalidArgumentError("Messages required")
        yield

    async def slow(query: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    for handler, status in ((refuse, 400), (refuse_in_thread, 400), (slow, 504)):
        with client_of(stream_of(handler, timeout=0.2 if handler is slow else None)) as client:
            answer = client.post("/t/go")
            assert answer.status_code == status
            assert set(answer.json()) == {"message", "type"}


def last_event(text: str) -> tuple[str, dict[str, Any]]:
    name, data = text.rstrip("\n").split("\n\n")[-1].split("\n")
    return name, json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(
    ("error", "message", "kind"),
    [
        (ValueError("secret"), "Internal error", "internal"),
        (InvalidArgumentError("bad n"), "bad n", "invalid_request"),
    ],
)
def test_a_failure_later_is_one_error_event_without_done(
    threaded: bool, error: Exception, message: str, kind: str
) -> None:
    async def fail(query: Any) -> AsyncIterator[Any]:
        yield {"i": 0}
        raise error

    def fail_in_thread(query: Any) -> Iterator[Any]:
        yield {"i": 0}
        raise error

    with client_of(stream_of(fail_in_thread if threaded else fail)) as client:
        text = client.post("/t/go").text
        assert client.post("/t/go").status_code == 200
    name, data = last_event(text)
    assert text.startswith('data: {"i":0}\n\n')
    assert (name, data["error"]["type"]) == ("event: error", kind)
    assert data["error"]["message"].startswith(message)
    assert "[DONE]" not in text and "secret" not in text


def test_an_item_that_cannot_be_encoded_is_an_error_event_and_closes_the_generator() -> None:
    closed = threading.Event()

    async def items(query: Any) -> AsyncIterator[Any]:
        try:
            yield {"i": 0}
            yield object()
        finally:
            closed.set()

    with client_of(stream_of(items)) as client:
        assert last_event(client.post("/t/go").text)[0] == "event: error"
        assert closed.wait(TIMEOUT_S)


def test_the_exception_handler_shapes_error_events() -> None:
    async def fail(query: Any) -> AsyncIterator[Any]:
        yield 1
        raise KeyError

    def shape(request: Any, error: Exception) -> Response:
        return JSONResponse({"error": {"code": type(error).__name__}}, 500)

    routes = {"t": [RouterDef("go", fail, RouterKind.SSE)]}
    with client_of(Server(routes, exception_handler=shape)) as client:
        assert last_event(client.post("/t/go").text)[1] == {"error": {"code": "KeyError"}}


def test_a_timeout_inside_a_stream_is_an_error_event_and_cancels_the_generator() -> None:
    cancelled = threading.Event()

    async def stall(query: Any) -> AsyncIterator[Any]:
        yield {"i": 0}
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with client_of(stream_of(stall, timeout=0.3)) as client:
        assert last_event(client.post("/t/go").text)[1]["error"]["type"] == "timeout"
        assert cancelled.wait(TIMEOUT_S)


def leave_after_first_line(at: Running) -> None:
    with at.client() as client, client.stream("POST", "/t/go", json={}) as answer:
        assert next(answer.iter_lines()).startswith("data: ")


def test_a_client_that_leaves_closes_an_async_generator() -> None:
    closed = threading.Event()

    async def forever(query: Any) -> AsyncIterator[Any]:
        try:
            yield {"i": 0}
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # clean-up may await
            closed.set()

    with running(stream_of(forever)) as at:
        leave_after_first_line(at)
        assert closed.wait(TIMEOUT_S)


def test_a_client_that_leaves_before_the_first_item_closes_the_generator() -> None:
    started, closed = threading.Event(), threading.Event()

    async def forever(query: Any) -> AsyncIterator[Any]:
        started.set()
        try:
            await asyncio.Event().wait()
            yield
        finally:
            closed.set()

    async def leave(at: Running) -> None:
        async with at.async_client() as client:
            task = asyncio.create_task(client.post("/t/go"))
            await asyncio.to_thread(started.wait, TIMEOUT_S)
            task.cancel()
            await asyncio.wait([task])

    with running(stream_of(forever)) as at:
        asyncio.run(leave(at))
        assert closed.wait(TIMEOUT_S)


class Kept:
    """A sync generator as a handler; keeps it, so that only `close` can end it."""

    def __init__(self, generator: Iterator[Any]) -> None:
        self.generator = generator

    def __call__(self, query: Any) -> Iterator[Any]:
        return self.generator


def test_a_client_that_leaves_closes_a_sync_generator_between_steps() -> None:
    closed = threading.Event()

    def endless() -> Iterator[Any]:
        try:
            while True:
                yield {"i": "x" * 1000}
        finally:
            closed.set()

    with running(stream_of(handler := Kept(endless()))) as at:
        leave_after_first_line(at)
        assert closed.wait(TIMEOUT_S)
    assert handler.generator is not None


@pytest.mark.parametrize("num_items_before", [0, 1])
def test_a_client_that_leaves_during_a_step_closes_a_sync_generator_after_it(
    num_items_before: int,
) -> None:
    stepping, noticed, closed = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[Any]:
        try:
            for i in range(num_items_before):
                yield {"i": i}
            stepping.set()
            noticed.wait(TIMEOUT_S)
            yield {"late": 1}
        finally:
            closed.set()

    class Noticing(ThreadIterator[Any]):
        async def aclose(self) -> None:
            await super().aclose()
            noticed.set()

    async def leave(at: Running) -> None:
        async with at.async_client() as client:
            task = asyncio.create_task(client.post("/t/go"))
            await asyncio.to_thread(stepping.wait, TIMEOUT_S)
            task.cancel()
            await asyncio.wait([task])

    pool = ThreadPool(1)
    generator = items()

    async def handler(query: Any) -> Any:
        return Noticing(generator, pool)

    with running(stream_of(handler)) as at:
        asyncio.run(leave(at))
        assert closed.wait(TIMEOUT_S)
    pool.close()


# --- EventStream


class Chunks:
    """Yields its chunks, then waits (or ends), and records what happens to it."""

    def __init__(self, chunks: list[bytes], *, ends: bool = False, stubborn: bool = False) -> None:
        self.chunks = chunks
        self.ends = ends
        self.stubborn = stubborn
        self.cancelled = threading.Event()
        self.closed = 0

    def __aiter__(self) -> Chunks:
        return self

    async def __anext__(self) -> bytes:
        if self.chunks:
            return self.chunks.pop(0)
        if self.ends:
            raise StopAsyncIteration
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            if not self.stubborn:
                raise
        return b"too late"

    async def aclose(self) -> None:
        self.closed += 1


def event_server(make: Callable[[], EventStream]) -> Server:
    async def handler(query: Any, request: Request) -> EventStream:
        return make()

    return Server({"t": [RouterDef("go", handler)]})


def test_event_stream_sends_chunks_as_they_are_and_closes_once() -> None:
    chunks, closings = Chunks([b"data: 1\n\n", b"data: 2\n\n"], ends=True), []
    done = threading.Event()

    def on_close() -> None:
        closings.append(1)
        done.set()

    server = event_server(lambda: EventStream(chunks, on_close=on_close, headers={"X-Mine": "1"}))
    with client_of(server) as client:
        answer = client.post("/t/go")
        assert done.wait(TIMEOUT_S)
    assert answer.content == b"data: 1\n\ndata: 2\n\n"
    assert answer.headers["x-mine"] == "1"
    assert answer.headers["cache-control"] == "no-cache"
    assert len(answer.headers["x-trace-id"]) == 32
    assert (chunks.closed, closings) == (1, [1])


@pytest.mark.parametrize("stubborn", [False, True])
def test_event_stream_cancels_and_closes_when_the_client_leaves(stubborn: bool) -> None:
    chunks, done = Chunks([b"data: 1\n\n"], stubborn=stubborn), threading.Event()
    with running(event_server(lambda: EventStream(chunks, on_close=done.set))) as at:
        leave_after_first_line(at)
        assert done.wait(TIMEOUT_S)
    assert chunks.cancelled.is_set()
    assert chunks.closed == 1


def test_event_stream_whose_iterator_fails_is_visibly_broken_and_closed() -> None:
    done = threading.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise ValueError

    server = event_server(lambda: EventStream(chunks(), on_close=done.set))
    with client_of(server) as client:
        with pytest.raises(Exception, match=r"incomplete chunked read|peer closed"):
            client.post("/t/go")
        assert done.wait(TIMEOUT_S)
        assert client.get("/nowhere").status_code == 404


def test_many_streams_at_once_leave_no_task_behind() -> None:
    async def items(query: Any) -> AsyncIterator[Any]:
        for i in range(20):
            await asyncio.sleep(0)
            yield {"i": i}

    async def tasks(query: Any) -> int:
        return len(asyncio.all_tasks())

    async def ask(at: Running) -> tuple[int, int]:
        async with at.async_client() as client:
            before = (await client.post("/t/tasks")).json()
            answers = await asyncio.gather(*(client.post("/t/go") for _ in range(32)))
            assert {answer.text.count("data: ") for answer in answers} == {21}
            return before, (await client.post("/t/tasks")).json()

    routes = [RouterDef("go", items, RouterKind.SSE), RouterDef("tasks", tasks)]
    with running(Server({"t": routes})) as at:
        before, after = asyncio.run(ask(at))
    assert after == before
