"""Clients that do everything but wait politely: a seeded mix of requests, and how each one ends."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

Manner = Literal["to_the_end", "before_headers", "mid_stream", "mid_prefill", "half_a_body"]
MANNERS: dict[Manner, int] = {
    "to_the_end": 50,
    "before_headers": 15,
    "mid_stream": 20,
    "mid_prefill": 10,
    "half_a_body": 5,
}
"""How clients leave, with weights."""

ENDLESS_TOKENS = 600  # of a request whose client leaves: only its cancellation ends it in time
LIMIT_S = 30.0  # for any single answer: a client that hangs fails the test
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
STRUCTURED: tuple[dict[str, Any], ...] = (
    {"regex": "[0-9]{2,12}"},
    {"choice": ["yes", "no", "perhaps"]},
    {"json": SCHEMA},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request and what its client does."""

    path: str
    body: dict[str, Any]
    manner: Manner
    events: int  # to read before leaving in the middle of a stream


@dataclass(slots=True)
class Tally:
    """What came of the requests.

    Attributes:
        statuses: Of answers that were read to their end.
        codes: Of errors, as the body or the last event of a stream names them.
        left: Clients that went away, by manner.
        wrong: Answers that no client should get.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.statuses.total() + self.left.total()


def make_plans(count: int, seed: int, *, long_prompt: str, max_tokens: int) -> list[Plan]:
    """Requests of every kind; equal arguments give equal plans.

    Args:
        count: How many.
        seed: Of all choices.
        long_prompt: Needs several steps of prefill.
        max_tokens: Most tokens of one answer.
    """
    choose = random.Random(seed)
    return [_plan(choose, long_prompt, max_tokens) for _ in range(count)]


def _plan(choose: random.Random, long_prompt: str, max_tokens: int) -> Plan:
    (manner,) = choose.choices(list(MANNERS), list(MANNERS.values()))
    kind = choose.choice(("chat", "completions", "responses", "messages", "embeddings"))
    stream = choose.random() < 0.5
    if manner in ("mid_stream", "mid_prefill"):
        kind = choose.choice(("chat", "completions", "responses", "messages"))
        stream = True
    text = f"{choose.choice(('sun', 'moon', 'rain'))} {choose.randrange(40)} "
    text += "and so on " * choose.randrange(12)
    if manner == "mid_prefill" or choose.random() < 0.05:
        text = f"{choose.random()} {long_prompt}"  # of its own from the first block on
    limit = choose.randint(1, max_tokens)
    leaves = manner in ("before_headers", "mid_stream", "mid_prefill")
    if leaves:
        limit = ENDLESS_TOKENS
    if kind == "embeddings":
        body: dict[str, Any] = {"input": [text[:100]] * choose.randint(1, 4)}
        return Plan(path="/v1/embeddings", body=body, manner=manner, events=0)
    body = {"stream": stream, "temperature": choose.choice((0, 0.9))}
    if choose.random() < 0.3:
        body["priority"] = choose.randint(-3, 3)
    if choose.random() < 0.15:
        body["deadline_ms"] = choose.uniform(1, 60)
    turns = [{"role": "user", "content": text}]
    if kind == "responses":
        body |= {"input": text, "max_output_tokens": limit}
    elif kind == "messages":
        body |= {"messages": turns, "max_tokens": limit, "model": "any"}
    else:
        body |= {"max_tokens": limit, "seed": choose.randrange(100)}
        body |= {"prompt": text} if kind == "completions" else {"messages": turns}
        if leaves:
            body["ignore_eos"] = True
        else:
            _add_extras(choose, kind, body)
    path = {"chat": "/v1/chat/completions"}.get(kind, f"/v1/{kind}")
    return Plan(path=path, body=body, manner=manner, events=choose.randint(1, 6))


def _add_extras(choose: random.Random, kind: str, body: dict[str, Any]) -> None:
    extra = choose.random()
    if extra < 0.2:
        body["n"] = choose.randint(2, 4)
    elif extra < 0.4:
        body["structured_outputs"] = choose.choice(STRUCTURED)
    elif extra < 0.5 and kind == "completions":
        body |= {"echo": True, "logprobs": 2}
    elif extra < 0.5:
        body |= {"logprobs": True, "top_logprobs": 2}


async def play(url: str, model: str, plans: list[Plan], *, at_once: int) -> Tally:
    """Runs every plan against a server, ``at_once`` of them at the same time."""
    tally = Tally()
    room = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, plan: Plan) -> None:
        async with room:
            await asyncio.wait_for(_play_one(client, url, model, plan, tally), LIMIT_S)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=LIMIT_S) as client:
        await asyncio.gather(*(one(client, plan) for plan in plans))
    return tally


async def _play_one(
    client: httpx.AsyncClient, url: str, model: str, plan: Plan, tally: Tally
) -> None:
    body = plan.body if plan.path == "/v1/embeddings" else {**plan.body, "model": model}
    if plan.manner == "half_a_body":
        await _send_half(url, plan.path, body)
        tally.left[plan.manner] += 1
    elif plan.manner == "before_headers":
        await _leave_before_headers(client, plan.path, body, tally)
    else:
        await _read(client, plan, body, tally)


async def _send_half(url: str, path: str, body: Mapping[str, Any]) -> None:
    """Announces a body, sends half of it and hangs up."""
    place = urlsplit(url)
    _, writer = await asyncio.open_connection(place.hostname, place.port)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data[: len(data) // 2])
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def _leave_before_headers(
    client: httpx.AsyncClient, path: str, body: Mapping[str, Any], tally: Tally
) -> None:
    """Sends the whole request and hangs up as soon as it is out."""
    is_sent = asyncio.Event()

    async def trace(event: str, _: Mapping[str, Any]) -> None:
        if event == "http11.send_request_body.complete":
            is_sent.set()

    task = asyncio.create_task(client.post(path, json=body, extensions={"trace": trace}))
    waits = asyncio.create_task(is_sent.wait())
    await asyncio.wait((task, waits), return_when=asyncio.FIRST_COMPLETED)
    waits.cancel()
    if task.cancel():
        await asyncio.wait((task,))
        tally.left["before_headers"] += 1
    else:
        _note(task.result(), task.result().text, tally)


async def _read(
    client: httpx.AsyncClient, plan: Plan, body: Mapping[str, Any], tally: Tally
) -> None:
    async with client.stream("POST", plan.path, json=body) as answer:
        if plan.manner == "mid_prefill" and answer.status_code == 200:
            tally.left[plan.manner] += 1
            return
        events = 0
        text = ""
        async for piece in answer.aiter_text():
            text += piece
            events += piece.count("\n\n")
            if plan.manner == "mid_stream" and answer.status_code == 200 and events >= plan.events:
                tally.left[plan.manner] += 1
                return
    _note(answer, text, tally)


def _note(answer: httpx.Response, text: str, tally: Tally) -> None:
    """Counts an answer, and checks that it is complete in form."""
    tally.statuses[answer.status_code] += 1
    is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    if not is_stream:
        body = json.loads(text)
        if answer.status_code != 200:
            error = body["error"]
            tally.codes[str(error.get("code") or error["type"])] += 1
        if answer.status_code not in (200, 429, 504):
            tally.wrong.append(f"{answer.status_code}: {text[:300]}")
        return
    events = [block for block in text.split("\n\n") if block.strip() and not block.startswith(":")]
    last = events[-1] if events else ""
    ends = ("data: [DONE]", "event: message_stop", "event: response.")
    if last.startswith(("event: error", "event: response.failed")):
        tally.codes["in_stream"] += 1
        if "deadline" not in last:
            tally.wrong.append(last[:300])
    elif not last.startswith(ends) or not text.endswith("\n\n"):
        tally.wrong.append(f"a stream ends with {last[:300]!r}")
