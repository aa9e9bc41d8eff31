"""``/v1/responses`` with the official client, which checks every answer strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from gateway.support import CHAT_TEMPLATE, MODEL, mock_gateway, serve_in_thread
from sagellm.gateway.app import create_server

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message.content",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content",
)
SCRIPT = {
    "two calls": f"{CALL}\n{CALL.replace('Oslo', 'Bergen')}",
    "it rains": "Take an umbrella.",
    "weather": f"Let me see.\n{CALL}",
    "think": "<think>\nHmm, well.\n</think>\n\nForty-two.",
    "person": '{"name": "Ada", "age": 36}',
    "nothing": "",
    "": "Hello, wörld! 🙂",
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_in_thread(create_server(mock_gateway(script=SCRIPT, chat_template=TEMPLATE))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def create(client: openai.OpenAI, **body: Any) -> Any:
    return client.responses.create(model=MODEL, **{"input": "hi", "temperature": 0, **body})


def events(client: openai.OpenAI, **body: Any) -> list[Any]:
    return list(create(client, stream=True, **body))


def prompts() -> tuple[Any, list[str]]:
    """A gateway that notes what the model read, and the notes."""
    seen: list[str] = []

    def answer(prompt: str) -> str:
        seen.append(prompt)
        return "ok"

    return mock_gateway(script=answer, chat_template=TEMPLATE), seen


def read(body: dict[str, Any]) -> str:
    """What the model reads of a request."""
    gateway, seen = prompts()
    with serve_in_thread(create_server(gateway)) as url:
        answer = httpx.post(f"{url}/v1/responses", json={"model": MODEL, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return seen[-1]


# ------------------------------------------------------------------------------------------ answers


def test_a_text_comes_back_as_one_message(client: openai.OpenAI) -> None:
    response = create(client, input="hi", instructions="Be kind.", metadata={"a": "b"}, user="me")
    assert response.output_text == "Hello, wörld! 🙂"
    assert response.status == "completed"
    assert response.error is None and response.incomplete_details is None
    assert [item.type for item in response.output] == ["message"]
    assert response.output[0].status == "completed"
    assert (response.metadata, response.user) == ({"a": "b"}, "me")
    assert response.instructions == "Be kind."
    assert response.model == MODEL
    usage = response.usage
    assert usage.output_tokens == len("Hello, wörld! 🙂".encode()) + 1  # the end token counts
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_nothing_is_stored_and_the_answer_says_so(url: str) -> None:
    for store in (True, False, None):
        body = {"model": MODEL, "input": "hi", "temperature": 0, "store": store}
        answer = httpx.post(f"{url}/v1/responses", json=body)
        assert answer.status_code == 200
        assert answer.json()["store"] is False


def test_max_output_tokens_makes_it_incomplete(client: openai.OpenAI) -> None:
    response = create(client, max_output_tokens=5)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hello"
    assert response.output[0].status == "incomplete"
    assert response.usage.output_tokens == 5


def test_a_repeated_prompt_reports_its_cached_tokens(client: openai.OpenAI) -> None:
    text = "the same long beginning of a prompt " * 4
    first = create(client, input=text)
    second = create(client, input=text)
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert second.output_text == first.output_text


def test_an_empty_answer_is_an_empty_message(client: openai.OpenAI) -> None:
    response = create(client, input="nothing")
    assert response.output_text == ""
    assert [item.type for item in response.output] == ["message"]


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    response = create(client, input="think")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text.strip() == "Hmm, well."
    assert response.output_text.strip() == "Forty-two."
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens


def test_calls_come_as_items(client: openai.OpenAI) -> None:
    response = create(client, input="weather", tools=[TOOL])
    assert [item.type for item in response.output] == ["message", "function_call"]
    call = response.output[1]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"})
    assert call.call_id and call.status == "completed"
    assert response.tools[0].name == "weather"


@pytest.mark.parametrize(("parallel", "cities"), [(True, ["Oslo", "Bergen"]), (False, ["Oslo"])])
def test_several_calls_come_only_when_wanted(
    client: openai.OpenAI, parallel: bool, cities: list[str]
) -> None:
    response = create(client, input="two calls", tools=[TOOL], parallel_tool_calls=parallel)
    calls = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == cities
    assert len({call.call_id for call in calls}) == len(calls)


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_parse_gives_an_object_of_the_schema(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model=MODEL, input="person", temperature=0, text_format=Person
    )
    assert response.output_parsed == Person(name="Ada", age=36)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_forced_call_has_arguments_of_the_schema(client: openai.OpenAI, choice: Any) -> None:
    response = create(client, input="hi", tools=[TOOL], tool_choice=choice, max_output_tokens=200)
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls
    if response.status == "completed":
        assert set(json.loads(calls[0].arguments)) == {"city"}


# ------------------------------------------------------------------------------------------ streams


def test_a_text_stream_has_every_event_in_order(client: openai.OpenAI) -> None:
    got = events(client)
    kinds = [event.type for event in got]
    deltas = [event for event in got if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert len(deltas) > 5
    assert [event.sequence_number for event in got] == list(range(len(got)))
    text = "".join(event.delta for event in deltas)
    assert text == "Hello, wörld! 🙂" == got[-1].response.output_text
    ids = {event.item_id for event in got if hasattr(event, "item_id")}
    assert ids == {got[-1].response.output[0].id}
    assert got[0].response.id == got[-1].response.id


def test_a_stream_ends_with_the_same_response_as_one_answer(client: openai.OpenAI) -> None:
    for body in ({}, {"input": "think"}, {"input": "weather", "tools": [TOOL]}):
        whole = create(client, **body).model_dump()
        last = events(client, **body)[-1].response.model_dump()
        for response in (whole, last):
            for key in ("id", "created_at", "completed_at", "usage"):
                del response[key]
            for item in response["output"]:
                del item["id"]
                item.pop("call_id", None)
        assert last == whole


def test_reasoning_streams_before_the_text(client: openai.OpenAI) -> None:
    got = events(client, input="think")
    kinds = list(dict.fromkeys(event.type for event in got))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.completed",
    ]
    done = next(event for event in got if event.type == "response.reasoning_text.done")
    pieces = [event.delta for event in got if event.type == "response.reasoning_text.delta"]
    assert "".join(pieces) == done.text
    assert (done.output_index, got[-2].output_index) == (0, 1)


def test_the_stream_helper_gathers_calls(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input="two calls", temperature=0, tools=[TOOL]
    ) as stream:
        snapshots = [
            event.snapshot
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        response = stream.get_final_response()
    assert snapshots[-1].endswith("}")
    assert [item.parsed_arguments for item in response.output if item.type == "function_call"] == [
        {"city": "Oslo"},
        {"city": "Bergen"},
    ]


def test_the_stream_helper_parses_a_schema(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input="person", temperature=0, text_format=Person
    ) as stream:
        assert stream.get_final_response().output_parsed == Person(name="Ada", age=36)


def test_a_cut_stream_ends_with_incomplete(client: openai.OpenAI) -> None:
    got = events(client, max_output_tokens=5)
    assert got[-1].type == "response.incomplete"
    assert got[-1].response.incomplete_details.reason == "max_output_tokens"
    assert got[-1].response.output[0].status == "incomplete"
    assert got[-1].response.usage.output_tokens == 5


# -------------------------------------------------------------------------------------------- input


def test_the_items_of_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": "weather"}]
    first = create(client, input=items, tools=[TOOL])
    items += first.output
    call = first.output[-1]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "it rains"})
    assert create(client, input=items, tools=[TOOL]).output_text == "Take an umbrella."


def test_items_become_turns_of_the_template() -> None:
    text = read(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": [{"type": "input_text", "text": "Rule."}]},
                {
                    "type": "message",
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "one"},
                        {"type": "input_text", "text": "two"},
                    ],
                },
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Rain?"}],
                },
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Looking.", "annotations": []}],
                },
                {
                    "type": "function_call",
                    "call_id": "c1",
                    "name": "weather",
                    "arguments": '{"city": "Oslo"}',
                },
                {
                    "type": "function_call_output",
                    "call_id": "c1",
                    "output": [{"type": "input_text", "text": "rain"}],
                },
            ],
        }
    )
    assert text == (
        "<|system|>Be brief.<|system|>Rule.<|user|>one\ntwo"
        "<|assistant|><think>Rain?</think>Looking.<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n'
        "</tool_call><|tool|>rain<|assistant|>"
    )


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"role": "critic", "content": "x"}]}, "role"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}, "call_id"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
            "input.0.arguments",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"frequency": 1}, "frequency"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_by_name(
    url: str, body: dict[str, Any], named: str
) -> None:
    answer = httpx.post(f"{url}/v1/responses", json={"model": MODEL, "input": "hi", **body})
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["error"]["message"]


def test_fields_without_effect_are_taken(client: openai.OpenAI) -> None:
    response = create(
        client,
        background=False,
        truncation="disabled",
        service_tier="auto",
        include=[],
        prompt_cache_key="k",
        safety_identifier="s",
        tool_choice="auto",
        text={"format": {"type": "text"}, "verbosity": "medium"},
        extra_body={"previous_response_id": None, "conversation": None, "top_logprobs": 0},
    )
    assert response.output_text.startswith("Hello")
    assert (response.prompt_cache_key, response.safety_identifier) == ("k", "s")


def test_another_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="another", input="hi")
