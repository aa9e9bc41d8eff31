"""A small OpenAI-shaped server whose tokenizer is known, for tests of the client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

KNOWN_FIELDS = {
    *("model", "messages", "prompt", "max_tokens", "temperature", "stream"),
    *("stream_options", "ignore_eos", "min_tokens"),
}
Fault = Literal["busy", "error", "error event", "garbage", "truncated", "hang", "no stream"]


@dataclass
class FakeOpenAI:
    """Answers ``a b c ...``, a word per event.

    A "words" tokenizer counts one token per word of up to five letters and two per longer word, a
    "bytes" tokenizer one per byte; "pairs" counts no text as one token. Each chat message costs
    ``overhead`` tokens more.

    Attributes:
        rejected: Fields that are an error here.
        natural_length: Answers end here unless ``ignore_eos`` is given.
        fault: What happens to requests of more than two output tokens.
        hanging: Set while a request hangs.
    """

    tokenizer: Literal["words", "bytes", "pairs"] = "words"
    overhead: int = 7
    rejected: frozenset[str] = frozenset()
    has_tokenize: bool = False
    usage: bool = True
    cached_tokens: int | None = None
    natural_length: int | None = None
    fault: Fault | None = None
    metrics: str | None = None
    api_key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_tokenized: int = 0
    hanging: threading.Event = field(default_factory=threading.Event)

    def count_text(self, text: str) -> int:
        if self.tokenizer == "bytes":
            return len(text.encode())
        per_word = 2 if self.tokenizer == "pairs" else 1
        return sum(per_word + (len(word) > 5) for word in text.split())

    def count(self, body: dict[str, Any]) -> int:
        if "messages" in body:
            contents = [message["content"] for message in body["messages"]]
            return sum(self.overhead + self.count_text(content) for content in contents)
        return 1 + self.count_text(body["prompt"])  # a BOS

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        if self.has_tokenize:
            app.router.add_post("/tokenize", self._tokenize)
        if self.metrics is not None:
            app.router.add_get("/metrics", self._metrics)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        hits = 90 * len(self.requests)
        return web.Response(text=(self.metrics or "").format(hits=hits, queries=hits / 0.9))

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.num_tokenized += 1
        return web.json_response({"count": self.count(await request.json())})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        unknown = sorted((set(body) - KNOWN_FIELDS) | (set(body) & self.rejected))
        if unknown:
            return web.json_response({"error": {"message": f"{unknown} unknown"}}, status=400)
        length = int(body["max_tokens"])
        fault = self.fault if length > 2 else None
        if fault == "busy":
            return web.Response(status=429, headers={"Retry-After": "1"}, text="busy")
        if fault == "error":
            return web.Response(status=500, text="broken")
        if self.natural_length is not None and not body.get("ignore_eos"):
            length = min(length, self.natural_length)
        usage = {"prompt_tokens": self.count(body), "completion_tokens": length}
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        if not body["stream"] or fault == "no stream":
            return web.json_response({"choices": [{"text": "a"}], "usage": usage})
        return await self._stream(request, body, length, usage, fault)

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        length: int,
        usage: dict[str, Any],
        fault: Fault | None,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: object) -> None:
            data = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {data}\n\n".encode())

        chat = "messages" in body
        if chat:
            await send({"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]})
        for i in range(length):
            if i == 2 and fault is not None:
                if fault == "hang":
                    self.hanging.set()
                    await asyncio.Event().wait()
                if fault == "error event":
                    await send({"error": {"message": "out of luck", "type": "server_error"}})
                if fault == "garbage":
                    await send("{")
                return response
            word = f"{chr(ord('a') + i % 26)} "
            reason = "length" if i == length - 1 else None
            choice = {"delta": {"content": word}} if chat else {"text": word}
            await send({"choices": [{**choice, "finish_reason": reason}]})
        if self.usage and (body.get("stream_options") or {}).get("include_usage"):
            await send({"choices": [], "usage": usage})
        await send("[DONE]")
        return response


@asynccontextmanager
async def _site(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def serving(fake: FakeOpenAI) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    started = threading.Event()
    running: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with _site(fake.app()) as url:
            running.append((url, asyncio.get_running_loop(), stop))
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            started.set()

    thread = threading.Thread(target=run, name="fake-openai")
    thread.start()
    started.wait()
    url, loop, stop = running[0]
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
