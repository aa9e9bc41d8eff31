"""OpenAI's and Anthropic's own clients against real models: SmolLM2, and MiniLM beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import numpy as np
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from gateway.support import serve_in_thread
from sagellm.checkpoint.resolve import resolve_model
from sagellm.engine.config import EngineConfig
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.loading import ModelOptions, open_gateway

pytestmark = [pytest.mark.native, pytest.mark.model, pytest.mark.slow]

QUESTION = "What is the capital of France?"
TURNS: Any = [{"role": "user", "content": QUESTION}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS},
}


class Town(BaseModel):
    """A town."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Paris", "Rome"]


@pytest.fixture(scope="module")
def url(smollm2: str, minilm: str) -> Iterator[str]:
    options = ModelOptions(
        path=resolve_model(smollm2),
        name=smollm2,
        embedding_path=resolve_model(minilm),
        embedding_name=minilm,
        device="cpu",
        threads=2,
        engine=EngineConfig(kv_cache_tokens=8192, max_model_len=1024),
    )
    config = GatewayConfig(access_log=False, tool_call_format="hermes")
    with serve_in_thread(create_server(open_gateway(config, options))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    asked = {"model": "smollm2", "messages": TURNS, "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**{**asked, **options})


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = chat(client)
    assert "Paris" in whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    *events, last = chat(client, stream=True, stream_options={"include_usage": True})
    text = "".join(e.choices[0].delta.content or "" for e in events)
    assert text == whole.choices[0].message.content
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_forced_tool_call_there_and_back(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 64}
    choice = chat(client, parallel_tool_calls=False, **options).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    turns = [*TURNS, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Rain"}]
    assert chat(client, messages=turns, tools=[WEATHER]).choices[0].finish_reason is not None


def test_a_streamed_tool_call_equals_the_whole(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": named, "max_tokens": 64}
    (call,) = chat(client, **options).choices[0].message.tool_calls
    pieces = [
        piece
        for event in chat(client, stream=True, **options)
        for piece in event.choices[0].delta.tool_calls or ()
    ]
    assert [piece.function.name for piece in pieces if piece.function.name] == ["get_weather"]
    assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments


def test_parse_gives_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="smollm2", messages=TURNS, response_format=Town, temperature=0, max_tokens=32
    )
    assert isinstance(answer.choices[0].message.parsed, Town)
    response = client.responses.parse(
        model="smollm2", input=QUESTION, text_format=Town, temperature=0, max_output_tokens=32
    )
    assert isinstance(response.output_parsed, Town)


def test_completions(client: openai.OpenAI, url: str) -> None:
    options: Any = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 6}
    whole = client.completions.create(**options, temperature=0).choices[0].text
    assert "Paris" in whole
    # In this client's types every event has a finish_reason, which the API itself leaves null.
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as loose:
        events = loose.completions.create(**options, temperature=0, stream=True)
        assert "".join(event.choices[0].text for event in events) == whole


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    options: Any = {"model": "smollm2", "input": QUESTION, "temperature": 0}
    whole = client.responses.create(**options, max_output_tokens=24)
    assert "Paris" in whole.output_text
    with client.responses.stream(**options, max_output_tokens=24) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == whole.output_text


def test_embeddings_rank_what_is_alike_first(client: openai.OpenAI) -> None:
    texts = ["A cat sleeps.", "A kitten naps.", "Taxes are due in April."]
    found = client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    cat, kitten, taxes = (np.array(item.embedding) for item in found.data)
    assert len(cat) == 384
    assert cat @ kitten > 0.5 > 0.2 > cat @ taxes
    assert found.model == "minilm"


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2", "minilm"]
    with pytest.raises(openai.NotFoundError, match="smollm2, minilm"):
        chat(client, model="nosuch")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(client, temperature=-1)


def test_messages_whole_streamed_and_counted(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "smollm2", "messages": TURNS, "max_tokens": 24}
    counted = claude.messages.count_tokens(model="smollm2", messages=TURNS).input_tokens
    # The installed client warns of models by name when the temperature is a keyword of its own.
    whole = claude.messages.create(**options, extra_body={"temperature": 0})
    (block,) = whole.content
    assert block.type == "text"
    assert "Paris" in block.text
    cached = whole.usage.cache_read_input_tokens or 0
    assert whole.usage.input_tokens + cached == counted
    with claude.messages.stream(**options, extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == block.text


def test_a_forced_tool_use(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model="smollm2",
        messages=TURNS,
        max_tokens=64,
        tools=[{"name": "get_weather", "description": "Weather", "input_schema": PARAMETERS}],
        tool_choice={"type": "tool", "name": "get_weather"},
        extra_body={"temperature": 0},
    )
    (call,) = (block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use"
    assert call.input["city"] in ("Paris", "Rome")
