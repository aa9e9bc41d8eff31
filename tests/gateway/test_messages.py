"""``/v1/messages`` with the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from gateway.support import CHAT_TEMPLATE, MODEL, mock_gateway, serve_in_thread
from sagellm.gateway.app import create_server

TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message.content",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content",
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL: Any = {
    "name": "weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
SCRIPT = {
    "two calls": f"{CALL}\n{CALL.replace('Oslo', 'Bergen')}",
    "it rains": "Take an umbrella.",
    "weather": f"Let me see.\n{CALL}",
    "<think>": "Hmm, well.\n</think>\n\nForty-two.",
    "ponder": "<think>\nHmm, well.\n</think>\n\nForty-two.",
    "count": "one two three four",
    "person": '{"name": "Ada", "age": 36}',
    "": "Hello, wörld! 🙂",
}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    gateway = mock_gateway(script=SCRIPT, chat_template=TEMPLATE)
    with serve_in_thread(create_server(gateway)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def with_defaults(body: dict[str, Any]) -> dict[str, Any]:
    text = body.pop("say", "hi")
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "max_tokens": 256, "messages": messages, "temperature": 0, **body}


def for_client(body: dict[str, Any]) -> dict[str, Any]:
    body = with_defaults(body)
    body["extra_body"] = {"temperature": body.pop("temperature")}  # not a field of this client
    return body


def create(client: anthropic.Anthropic, **body: Any) -> Any:
    return client.messages.create(**for_client(body))


def events(client: anthropic.Anthropic, **body: Any) -> list[Any]:
    return list(create(client, stream=True, **body))


def read(**body: Any) -> str:
    """What the model reads of a request."""
    seen: list[str] = []

    def answer(prompt: str) -> str:
        seen.append(prompt)
        return "ok"

    gateway = mock_gateway(script=answer, chat_template=TEMPLATE)
    with serve_in_thread(create_server(gateway)) as url:
        response = httpx.post(f"{url}/v1/messages", json=with_defaults(body))
    assert response.status_code == 200, response.text
    return seen[-1]


# ------------------------------------------------------------------------------------------ answers


def test_a_text_comes_back_as_one_block(client: anthropic.Anthropic) -> None:
    message = create(client, system="Be kind.", metadata={"user_id": "me"})
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == "Hello, wörld! 🙂"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.role, message.model, message.type) == ("assistant", MODEL, "message")
    assert message.usage.output_tokens == len("Hello, wörld! 🙂".encode()) + 1


def test_max_tokens_ends_an_answer(client: anthropic.Anthropic) -> None:
    message = create(client, max_tokens=5)
    assert (message.content[0].text, message.stop_reason) == ("Hello", "max_tokens")
    assert message.usage.output_tokens == 5


def test_a_stop_sequence_ends_an_answer_and_is_named(client: anthropic.Anthropic) -> None:
    message = create(client, say="count", stop_sequences=["four", " three"])
    assert message.content[0].text == "one two"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " three")


def test_input_and_cached_tokens_add_up_to_the_prompt(client: anthropic.Anthropic) -> None:
    text = "the same long beginning of a prompt " * 4
    first, second = create(client, say=text), create(client, say=text)
    count = client.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": text}]
    ).input_tokens
    assert second.usage.cache_read_input_tokens > 0
    for usage in (first.usage, second.usage):
        assert usage.input_tokens + usage.cache_read_input_tokens == count
        assert usage.cache_creation_input_tokens == 0


def test_a_call_comes_as_a_block(client: anthropic.Anthropic) -> None:
    message = create(client, say="weather", tools=[TOOL])
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert (message.content[1].name, message.content[1].input) == ("weather", {"city": "Oslo"})
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize(("single", "cities"), [(False, ["Oslo", "Bergen"]), (True, ["Oslo"])])
def test_several_calls_come_only_when_wanted(
    client: anthropic.Anthropic, single: bool, cities: list[str]
) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": single}
    message = create(client, say="two calls", tools=[TOOL], tool_choice=choice)
    assert [block.input["city"] for block in message.content] == cities
    assert len({block.id for block in message.content}) == len(cities)


def test_hidden_tools_are_neither_shown_nor_parsed(client: anthropic.Anthropic) -> None:
    message = create(client, say="weather", tools=[TOOL], tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["text"]
    assert "<tool_call>" in message.content[0].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call_has_input_of_the_schema(client: anthropic.Anthropic, choice: Any) -> None:
    message = create(client, tools=[TOOL], tool_choice=choice)
    assert message.content[0].type == "tool_use"
    if message.stop_reason == "tool_use":
        assert set(message.content[0].input) == {"city"}


def test_thinking_comes_as_blocks_when_enabled(client: anthropic.Anthropic) -> None:
    message = create(client, thinking=THINKING)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking.strip() == "Hmm, well."
    assert message.content[1].text.strip() == "Forty-two."
    details = message.usage.output_tokens_details
    assert 0 < details.thinking_tokens < message.usage.output_tokens


@pytest.mark.parametrize("body", [{}, {"thinking": {"type": "disabled"}}], ids=repr)
def test_thinking_that_nobody_asked_for_is_not_shown_but_counts(
    client: anthropic.Anthropic, body: dict[str, Any]
) -> None:
    message = create(client, say="ponder", **body)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text.strip() == "Forty-two."
    assert message.usage.output_tokens_details.thinking_tokens > 0


def test_an_output_format_is_a_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = create(client, say="person", output_config=config)
    assert message.content[0].text == '{"name": "Ada", "age": 36}'


# ------------------------------------------------------------------------------------------ streams


def test_a_stream_has_every_event_in_order(client: anthropic.Anthropic) -> None:
    got = events(client, say="weather", tools=[TOOL])
    kinds = [event.type for event in got]
    assert list(dict.fromkeys(kinds)) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    blocks = [event.index for event in got if event.type == "content_block_start"]
    assert blocks == [0, 1]
    start, end = got[0].message, got[-2]
    assert (start.content, start.stop_reason, start.usage.output_tokens) == ([], None, 0)
    assert end.delta.stop_reason == "tool_use"
    assert end.usage.output_tokens > 0
    deltas = {event.delta.type for event in got if event.type == "content_block_delta"}
    assert deltas == {"text_delta", "input_json_delta"}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"thinking": THINKING},
        {"say": "two calls", "tools": [TOOL]},
        {"say": "count", "stop_sequences": ["three"]},
        {"max_tokens": 5},
    ],
    ids=str,
)
def test_the_stream_helper_gathers_the_same_message(
    client: anthropic.Anthropic, body: dict[str, Any]
) -> None:
    create(client, **body)  # so that both find the same prefix in the cache
    whole = create(client, **body).model_dump()
    with client.messages.stream(**for_client(dict(body))) as stream:
        gathered = stream.get_final_message().model_dump()
    for message in (whole, gathered):
        del message["id"]
        for block in message["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
    assert gathered == whole


def test_the_start_of_a_stream_tells_what_was_cached(client: anthropic.Anthropic) -> None:
    text = "another long beginning of a prompt that repeats " * 4
    create(client, say=text)
    usage = events(client, say=text)[0].message.usage
    assert usage.cache_read_input_tokens > 0


# -------------------------------------------------------------------------------------------- input


def test_the_blocks_of_an_answer_can_be_sent_back(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather"}]
    first = create(client, messages=messages, tools=[TOOL])
    messages.append({"role": "assistant", "content": first.content})
    result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "it rains"}
    messages.append({"role": "user", "content": [result]})
    assert create(client, messages=messages, tools=[TOOL]).content[0].text == "Take an umbrella."


def test_blocks_become_turns_of_the_template() -> None:
    ephemeral = {"cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
    text = read(
        system=[{"type": "text", "text": "One.", **ephemeral}, {"type": "text", "text": "Two."}],
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b", **ephemeral}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Rain?", "signature": ""},
                    {"type": "text", "text": "Looking."},
                    call,
                    {**call, "id": "t2"},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "content": [{"type": "text", "text": "no such city"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
    )
    shown = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert text == (
        f"<|system|>One.\nTwo.<|user|>a\nb<|assistant|><think>Rain?</think>Looking.{shown}{shown}"
        "<|tool|>rain<|tool|>Error: no such city<|user|>So?<|assistant|>"
    )


def test_tokens_are_counted_as_the_model_reads_them(client: anthropic.Anthropic) -> None:
    body: dict[str, Any] = {
        "model": MODEL,
        "system": "Be kind.",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [TOOL],
    }
    counted = client.messages.count_tokens(**body).input_tokens
    usage = client.messages.create(max_tokens=1, **body).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert client.messages.count_tokens(**{**body, "tools": []}).input_tokens < counted


IMAGE: Any = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]},
            "'redacted_thinking'",
        ),
        ({"messages": [{"role": "assistant", "content": "The answer is"}]}, "prefill"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": []}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}
                ]
            },
            "tool_use_id",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"output_config": {"effort": "low"}}, "effort"),
        ({"thinking": {"type": "between_tools"}}, "between_tools"),
        ({"thinking": {**THINKING, "display": "omitted"}}, "display"),
        ({"frequency": 1}, "frequency"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_by_name(
    url: str, body: dict[str, Any], named: str
) -> None:
    answer = httpx.post(f"{url}/v1/messages", json=with_defaults(dict(body)))
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert named in error["error"]["message"]
    assert error["request_id"] == answer.headers["request-id"]


def test_another_model_is_404_in_the_shape_of_this_api(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        create(client, model="another")
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"
