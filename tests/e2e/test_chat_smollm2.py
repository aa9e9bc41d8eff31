"""SmolLM2 behind HTTP, through the official client: answers, scores, forms, and a shared cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pydantic
import pytest

from gateway.support import serve_in_thread
from sagellm.engine.async_engine import AsyncEngine
from sagellm.engine.config import EngineConfig
from sagellm.engine.loading import load_engine
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway

pytestmark = [pytest.mark.native, pytest.mark.model, pytest.mark.slow]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind, größer als 世界."


@pytest.fixture(scope="module")
def gateway(smollm2: str) -> Gateway:
    config = EngineConfig(kv_cache_tokens=8192, max_model_len=1024)
    engine = load_engine(smollm2, config, device="cpu", threads=2)
    return Gateway(GatewayConfig(access_log=False), engine=AsyncEngine(engine), model_name=smollm2)


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with (
        serve_in_thread(create_server(gateway)) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as opened,
    ):
        yield opened


def create(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 48, **options}
    )


def test_a_question_is_answered_and_streamed_alike(client: openai.OpenAI) -> None:
    whole = create(client).choices[0]
    assert "Paris" in whole.message.content
    assert whole.finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content or "" for chunk in create(client, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == whole.message.content


def test_logprobs_spell_the_answer(client: openai.OpenAI) -> None:
    choice = create(client, logprobs=True, top_logprobs=2).choices[0]
    rows = choice.logprobs.content
    data = bytes(byte for row in rows for byte in row.bytes)
    assert data.decode() == choice.message.content
    assert all(row.logprob == row.top_logprobs[0].logprob for row in rows)  # greedy


def test_scores_of_a_text_are_those_of_the_logits(client: openai.OpenAI, gateway: Gateway) -> None:
    """``echo`` with ``logprobs``, as evaluation harnesses use it, against the engine's logits."""
    engine = gateway.engine
    assert engine is not None
    ids = gateway.tokenizer.encode(TEXT)
    logits = engine._thread.call(lambda: engine.engine.logits(ids)).result(60).astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    expected = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    for max_tokens in (0, 1):
        body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        response = httpx.post(
            f"{client.base_url}completions", json={**body, "temperature": 0}, timeout=60
        )
        (choice,) = response.json()["choices"]
        rows = choice["logprobs"]
        assert len(rows["token_logprobs"]) == len(ids) + max_tokens
        assert choice["text"].startswith(TEXT)
        for place in range(1, len(ids)):
            row = expected[place - 1]
            assert rows["token_logprobs"][place] == pytest.approx(row[ids[place]], abs=1e-4)
            likely = rows["top_logprobs"][place]
            greedy = int(row.argmax()) == ids[place]
            assert (max(likely.values()) == rows["token_logprobs"][place]) == greedy


class City(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0, le=99_999_999)


def test_json_of_a_schema_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="smollm2",
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        temperature=0,
        max_tokens=200,
        response_format=City,
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    (chosen,) = create(client, extra_body={"guided_choice": ["Paris", "London"]}).choices
    assert chosen.message.content in ("Paris", "London")


def test_a_shared_beginning_is_cached_and_changes_nothing(client: openai.OpenAI) -> None:
    system = {"role": "system", "content": "You are a helpful guide. " * 40}
    options = {"messages": [system, *QUESTION], "max_tokens": 16}
    cold = create(client, extra_body={"cache_salt": "alone"}, **options)
    create(client, **options)
    warm = create(client, **options)
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert warm.usage.prompt_tokens_details.cached_tokens > 200
    assert warm.choices[0].message.content == cold.choices[0].message.content


def test_a_family_without_tools_says_so(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="hermes"):
        create(client, tools=[tool])


@pytest.mark.parametrize("choice", ("required", "auto"))
def test_tools_work_once_the_operator_names_a_format(gateway: Gateway, choice: str) -> None:
    """The model's template knows no tools; forced calls keep to the grammar of the format."""
    named = Gateway(
        GatewayConfig(access_log=False, warm_up=False, tool_call_format="hermes"),
        engine=gateway.engine,
        model_name="smollm2",
    )
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "get_weather", "description": "Weather.", "parameters": parameters}
    body = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 100,
    }
    transport = httpx.ASGITransport(create_server(named).app)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/chat/completions", json=body, timeout=60)

    response = asyncio.run(ask())
    assert response.status_code == 200, response.text
    (answered,) = response.json()["choices"]
    assert response.json()["usage"]["prompt_tokens"] > 100  # the tools are in the prompt
    if choice == "required":
        (call, *_) = answered["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert "Paris" in json.loads(call["function"]["arguments"])["city"]


def test_seeds_repeat(client: openai.OpenAI) -> None:
    options = {"temperature": 1.2, "seed": 17, "n": 2, "max_tokens": 24}
    first, second = (create(client, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in second.choices] == texts
    assert texts[0] != texts[1]
    assert json.loads(first.model_dump_json())["usage"]["completion_tokens"] > 2
