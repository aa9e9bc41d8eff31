"""The same request has the same answer over HTTP: alone or in company, cold or from the prefix
cache, whole or streamed, with the mock model and with a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from gateway.support import CHAT_TEMPLATE, serve_in_thread
from sagellm.backends.mock import MockRunner
from sagellm.engine.async_engine import AsyncEngine
from sagellm.engine.config import EngineConfig
from sagellm.engine.engine import Engine
from sagellm.engine.loading import load_engine, mock_tokenizer
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway
from sagellm.text import ChatTemplate

LIMIT_S = 120.0
COMPANY = 32
BLOCK_SIZE = 16
SYSTEM_TOKENS = 1000

TOPICS = ("rivers", "the moon", "bread", "Paris", "owls", "rain", "chess", "tea")
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 1234}


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    url: str
    gateway: Gateway
    max_tokens: int

    def num_tokens(self, text: str) -> int:
        return len(self.gateway.tokenizer.encode(text))


def _mock_engine() -> Engine:
    config = EngineConfig(
        max_num_seqs=64, kv_cache_tokens=65536, block_size=BLOCK_SIZE, max_model_len=4096
    )
    template = ChatTemplate(CHAT_TEMPLATE, "", "<eos>")
    return Engine(MockRunner(), mock_tokenizer(), config, chat_template=template)


def _real_engine(model: str) -> Engine:
    config = EngineConfig(kv_cache_tokens=16384, block_size=BLOCK_SIZE, max_model_len=2048)
    return load_engine(model, config, device="cpu", threads=2)


@pytest.fixture(
    scope="module",
    params=[
        "mock",
        pytest.param("smollm2", marks=[pytest.mark.native, pytest.mark.model, pytest.mark.slow]),
    ],
)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    if request.param == "mock":
        engine, max_tokens = _mock_engine(), 24
    else:
        engine, max_tokens = _real_engine(request.getfixturevalue("smollm2")), 12
    gateway = Gateway(
        GatewayConfig(access_log=False), engine=AsyncEngine(engine), model_name="model"
    )
    with serve_in_thread(create_server(gateway)) as url:
        yield Served(url, gateway, max_tokens)


def bodies(at: Served, salt: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests of three routes; with a salt of their own they find nothing in the cache."""
    common: dict[str, Any] = {"model": "model", "cache_salt": salt}
    made: list[tuple[str, dict[str, Any]]] = []
    for topic in TOPICS[:2]:
        turns = [{"role": "user", "content": f"Write three short sentences about {topic}."}]
        for rule in (GREEDY, SEEDED):
            shared = {**common, **rule, "max_tokens": at.max_tokens}
            made.append(("chat/completions", {**shared, "messages": turns}))
            made.append(("completions", {**shared, "prompt": f"About {topic}: ", "n": 2}))
    shared = {**common, **SEEDED, "max_tokens": 2 * at.max_tokens}
    form = {"structured_outputs": {"regex": "[a-z]{3,12} [0-9]{1,3}"}}
    made.append(("completions", {**shared, **form, "prompt": "A word and a number: "}))
    return made


def company(at: Served) -> list[tuple[str, dict[str, Any]]]:
    """Other requests, of many lengths."""
    return [
        (
            "completions",
            {
                "model": "model",
                "prompt": f"{i} " + f"Tell me about {TOPICS[i % len(TOPICS)]}. " * (1 + i % 7),
                "max_tokens": 1 + i % at.max_tokens,
                "temperature": 0.05 * i,
                "seed": i,
                "stream": i % 2 == 0,
            },
        )
        for i in range(COMPANY)
    ]


async def texts_of(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> list[str]:
    """The text of each choice, read as a stream if it is one."""
    answer = await client.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return [c.get("text") or c["message"]["content"] for c in answer.json()["choices"]]
    texts = [""] * body.get("n", 1)
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        for choice in json.loads(line[6:])["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content")
            texts[choice["index"]] += piece or ""
    return texts


def ask(
    at: Served, asked: list[tuple[str, dict[str, Any]]], *, alone: bool = False
) -> list[list[str]]:
    """Answers to requests, one after the other or all at once among others."""

    async def run() -> list[list[str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=at.url, timeout=LIMIT_S, limits=limits) as client:
            if alone:
                return [await texts_of(client, *item) for item in asked]
            others = [asyncio.create_task(texts_of(client, *item)) for item in company(at)]
            answers = await asyncio.gather(*(texts_of(client, *item) for item in asked))
            await asyncio.gather(*others)
            return answers

    return asyncio.run(run())


def streamed(asked: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [(route, {**body, "stream": True}) for route, body in asked]


def test_company_cache_and_streaming_change_no_byte(served: Served) -> None:
    expected = ask(served, bodies(served, "alone"), alone=True)
    assert all(text for texts in expected for text in texts)
    assert len({text for texts in expected for text in texts}) > len(expected) // 2
    assert ask(served, bodies(served, "alone"), alone=True) == expected, "warm"
    assert ask(served, bodies(served, "crowd")) == expected, "cold, among others"
    assert ask(served, bodies(served, "crowd")) == expected, "warm, among others"
    assert ask(served, streamed(bodies(served, "stream"))) == expected, "streamed, among others"
    assert ask(served, streamed(bodies(served, "stream")), alone=True) == expected, "streamed"


def test_scores_are_the_same_in_company(served: Served) -> None:
    body = {"model": "model", "prompt": "Owls see well at night.", "echo": True, "logprobs": 3}
    body |= {"max_tokens": 4, "temperature": 0}

    def scores(client: httpx.Client) -> str:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return json.dumps(answer.json()["choices"])

    with httpx.Client(base_url=served.url, timeout=LIMIT_S) as client:
        before = scores(client)
        ask(served, bodies(served, "scores"))
        assert scores(client) == before


def test_a_shared_system_prompt_is_found_and_changes_no_byte(served: Served) -> None:
    system = "You answer questions about owls, rivers and bread, and you are brief. "
    while served.num_tokens(system) < SYSTEM_TOKENS:
        system += f"Owl number {len(system)} sleeps by day. "

    def create(client: httpx.Client, question: str, salt: str) -> tuple[str, int]:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = {"model": "model", "messages": turns, "cache_salt": salt}
        answer = client.post(
            "/v1/chat/completions", json={**body, **GREEDY, "max_tokens": served.max_tokens}
        )
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        found = usage["prompt_tokens_details"]["cached_tokens"]
        assert isinstance(found, int)
        return answer.json()["choices"][0]["message"]["content"], found

    with httpx.Client(base_url=served.url, timeout=LIMIT_S) as client:
        cold, found = create(client, "What do owls eat?", "first")
        assert found == 0
        _, found = create(client, "Where do rivers end?", "second")  # fills another cache
        assert found == 0
        warm, found = create(client, "What do owls eat?", "second")  # shares the system turn only
        assert found >= SYSTEM_TOKENS - BLOCK_SIZE
        assert warm == cold
