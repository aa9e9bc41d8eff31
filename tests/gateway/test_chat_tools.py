"""Tools, reasoning and structured output of chat completions, on models that follow a script."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pydantic
import pytest

from gateway.support import CHAT_TEMPLATE, mock_gateway, serve_in_thread
from sagellm.gateway.app import create_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [WEATHER, ADD]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SUM = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
REASONED = "<think>\nLet me see.\n</think>\n\nIt is 3."
REASONING_TEMPLATE = CHAT_TEMPLATE + "{#- thoughts end with </think> #}"
USER = [{"role": "user", "content": "hello"}]


@contextmanager
def client_of(script: Any, chat_template: str = REASONING_TEMPLATE) -> Iterator[openai.OpenAI]:
    gateway = mock_gateway(script=script, chat_template=chat_template)
    with (
        serve_in_thread(create_server(gateway)) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """What the user says selects the answer."""
    script = {
        "both": f"Looking.\n{PARIS}\n{SUM}",
        "one": PARIS,
        "broken": '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>',
        "unknown": '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>',
        "cut": PARIS,
        "reason": REASONED,
        "endless": "<think>\nand on and on and on",
        "": "nothing special",
    }
    with client_of(script) as opened:
        yield opened


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def create(client: openai.OpenAI, text: str = "hello", **options: Any) -> Any:
    options = {"temperature": 0, "messages": say(text), **options}
    return client.chat.completions.create(model="mock", **options)


def streamed(client: openai.OpenAI, text: str, **options: Any) -> dict[str, Any]:
    """A stream's answer put together, and the events of its calls as they came."""
    answer: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "events": []}
    for chunk in create(client, text, stream=True, **options):
        (choice,) = chunk.choices
        answer["content"] += choice.delta.content or ""
        answer["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            answer["events"].append(call)
            kept = answer["calls"].setdefault(call.index, {"id": call.id, "arguments": ""})
            kept["name"] = call.function.name or kept["name"]
            kept["arguments"] += call.function.arguments or ""
        answer["reason"] = choice.finish_reason
    return answer


def calls_of(message: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or ()
    ]


# ---- calls that the model makes


def test_calls_are_split_from_the_text(client: openai.OpenAI) -> None:
    choice = create(client, "both", tools=TOOLS).choices[0]
    assert choice.message.content.strip() == "Looking."
    assert calls_of(choice.message) == [
        ("get_weather", {"city": "Paris"}),
        ("add", {"a": 1, "b": 2}),
    ]
    assert choice.finish_reason == "tool_calls"
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2 and all(re.fullmatch("call_[0-9a-f]{24}", i) for i in ids)


def test_an_answer_of_calls_alone_has_no_content(client: openai.OpenAI) -> None:
    message = create(client, "one", tools=TOOLS).choices[0].message
    assert message.content is None
    assert calls_of(message) == [("get_weather", {"city": "Paris"})]


def test_streamed_calls_equal_the_whole_ones(client: openai.OpenAI) -> None:
    whole = create(client, "both", tools=TOOLS).choices[0].message
    answer = streamed(client, "both", tools=TOOLS)
    assert answer["content"] == whole.content
    found = [
        (call["name"], json.loads(call["arguments"])) for _, call in sorted(answer["calls"].items())
    ]
    assert found == calls_of(whole)
    assert answer["reason"] == "tool_calls"
    first = answer["events"][0]
    assert (first.index, first.type, first.function.arguments) == (0, "function", "")
    assert first.id.startswith("call_")
    for event in answer["events"]:
        begins = event.id is not None
        assert begins == (event.function.name is not None) == (event.type is not None)


def test_one_call_only_when_calls_may_not_be_parallel(client: openai.OpenAI) -> None:
    options = {"tools": TOOLS, "parallel_tool_calls": False}
    message = create(client, "both", **options).choices[0].message
    assert calls_of(message) == [("get_weather", {"city": "Paris"})]
    assert list(streamed(client, "both", **options)["calls"]) == [0]


@pytest.mark.parametrize("text", ["broken", "unknown"])
def test_what_is_no_call_stays_text(client: openai.OpenAI, text: str) -> None:
    choice = create(client, text, tools=TOOLS).choices[0]
    assert choice.message.tool_calls is None
    assert "<tool_call>" in choice.message.content
    assert choice.finish_reason == "stop"


def test_a_call_that_is_cut_short_says_length(client: openai.OpenAI) -> None:
    choice = create(client, "cut", tools=TOOLS, max_tokens=len(PARIS) - 20).choices[0]
    assert choice.finish_reason == "length"


def test_without_tools_nothing_is_parsed(client: openai.OpenAI) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = create(client, "one", **options).choices[0]
        assert choice.message.content == PARIS
        assert choice.message.tool_calls is None
        assert choice.finish_reason == "stop"


def test_tools_reach_the_template_unless_the_choice_is_none() -> None:
    seen: list[str] = []

    def script(prompt: str) -> str:
        seen.append(prompt)
        return "ok"

    with client_of(script) as client:
        create(client, tools=TOOLS)
        create(client, tools=TOOLS, tool_choice="none")
    assert any("get_weather" in prompt for prompt in seen)
    assert "get_weather" not in seen[-1]


# ---- calls that are forced


def test_a_required_call_comes_whatever_the_model_would_say(client: openai.OpenAI) -> None:
    choice = create(client, tools=TOOLS, tool_choice="required", max_tokens=400).choices[0]
    assert choice.finish_reason == "tool_calls"
    ((name, arguments), *_) = calls_of(choice.message)
    assert name in ("get_weather", "add")
    assert set(arguments) in ({"city"}, {"a", "b"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call_is_of_that_tool(client: openai.OpenAI, stream: bool) -> None:
    options = {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "max_tokens": 400,
        "temperature": 1,
        "seed": 4,
    }
    if stream:
        answer = streamed(client, "hello", **options)
        found = [(c["name"], json.loads(c["arguments"])) for c in answer["calls"].values()]
        reason = answer["reason"]
    else:
        choice = create(client, **options).choices[0]
        found, reason = calls_of(choice.message), choice.finish_reason
    ((name, arguments),) = found
    assert name == "add"
    assert all(0 <= arguments[key] <= 99 for key in ("a", "b"))
    assert reason == "tool_calls"


def test_forced_calls_that_may_not_be_parallel_are_one(client: openai.OpenAI) -> None:
    options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    choice = create(client, "both", **options, max_tokens=400).choices[0]
    assert len(choice.message.tool_calls) == 1


# ---- refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "'fly'",
        ),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "get_weather"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER] * 129}, "tools"),
    ],
)
def test_tools_that_cannot_be_served_are_a_400(
    client: openai.OpenAI, options: dict[str, Any], told: str
) -> None:
    response = httpx.post(f"{client.base_url}chat/completions", json={"messages": USER, **options})
    assert response.status_code == 400, response.text
    assert told in response.json()["error"]["message"]


def test_a_family_that_is_not_known_is_named_with_those_that_are() -> None:
    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with client_of("x", chat_template=plain) as client:
        with pytest.raises(openai.BadRequestError, match=r"hermes.*llama3.*mistral"):
            create(client, tools=TOOLS)
        assert create(client, tools=TOOLS, tool_choice="none").choices[0].message.content == "x"


# ---- histories


def test_calls_of_earlier_turns_reach_the_template_as_objects() -> None:
    seen: list[str] = []

    def script(prompt: str) -> str:
        seen.append(prompt)
        return "18 degrees"

    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "18"},
    ]
    with client_of(script) as client:
        answer = create(client, messages=messages, tools=TOOLS)
        again = answer.choices[0].message.model_dump()  # as clients send it back
        create(client, messages=[*messages, again, *USER], tools=TOOLS)
    assert '"arguments": {"city": "Paris"}' in seen[0]
    assert "<|tool|>18" in seen[0]
    assert answer.choices[0].message.content == "18 degrees"


# ---- reasoning


def test_reasoning_is_split_off(client: openai.OpenAI) -> None:
    answer = create(client, "reason")
    message = answer.choices[0].message
    assert message.reasoning_content == "Let me see."
    assert message.content == "It is 3."
    details = answer.usage.completion_tokens_details
    assert details.reasoning_tokens == REASONED.index("</think>") + len("</think>")
    parts = streamed(client, "reason")
    assert (parts["reasoning"], parts["content"]) == ("Let me see.", "It is 3.")


def test_a_template_that_opens_the_block_begins_inside() -> None:
    with client_of("Hmm.\n</think>\nYes.") as client:
        thinking = {"chat_template_kwargs": {"enable_thinking": True}}
        message = create(client, extra_body=thinking).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hmm.", "Yes.")
        plain = create(client).choices[0].message
        assert plain.content == "Hmm.\n</think>\nYes."


def test_reasoning_without_an_end_is_all_reasoning(client: openai.OpenAI) -> None:
    answer = create(client, "endless")
    message = answer.choices[0].message
    assert message.content == ""
    assert message.reasoning_content == "and on and on and on"
    usage = answer.usage
    assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens


def test_logprobs_of_reasoning_and_calls_are_the_same_in_a_stream(client: openai.OpenAI) -> None:
    for text in ("reason", "both"):
        options = {"tools": TOOLS, "logprobs": True, "top_logprobs": 1}
        whole = create(client, text, **options).choices[0].logprobs.content
        rows = [
            row
            for chunk in create(client, text, **options, stream=True)
            for choice in chunk.choices
            if choice.logprobs
            for row in choice.logprobs.content
        ]
        assert rows == whole
        spelt = "".join(row.token for row in whole)
        assert spelt == (REASONED if text == "reason" else f"Looking.\n{PARIS}\n{SUM}")


# ---- structured output


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=9)
    label: str = pydantic.Field(max_length=5)
    model_config = pydantic.ConfigDict(extra="forbid")


def test_parse_gives_an_object_of_the_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="mock", messages=USER, temperature=1, seed=5, max_tokens=300, response_format=Point
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def schema_of(point: type[pydantic.BaseModel]) -> Mapping[str, Any]:
    return point.model_json_schema()


@pytest.mark.parametrize(
    "options",
    [
        {"guided_json": schema_of(Point)},
        {"guided_json": json.dumps(schema_of(Point))},
        {"structured_outputs": {"json": schema_of(Point)}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "point", "schema": schema_of(Point), "strict": True},
            }
        },
    ],
)
def test_json_satisfies_the_schema(client: openai.OpenAI, options: dict[str, Any]) -> None:
    answer = create(client, extra_body=options, max_tokens=300)
    Point.model_validate_json(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"guided_regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"structured_outputs": {"regex": "x{1,4}y"}}, "x{1,4}y"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_grammar": 'start: "<" /[a-c]{2}/ ">"'}, "<[a-c]{2}>"),
        ({"structured_outputs": {"grammar": 'start: "one" | "two"'}}, "one|two"),
    ],
)
def test_other_forms_hold(client: openai.OpenAI, options: dict[str, Any], pattern: str) -> None:
    content = create(client, extra_body=options, max_tokens=100).choices[0].message.content
    assert re.fullmatch(pattern, content)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"guided_regex": "("}, ""),
        ({"guided_grammar": "nonsense"}, ""),
        ({"guided_json": {"type": "nothing"}}, ""),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
        ),
        ({"guided_choice": []}, "guided_choice"),
    ],
)
def test_a_form_that_cannot_be_served_is_a_400(
    client: openai.OpenAI, options: dict[str, Any], told: str
) -> None:
    response = httpx.post(f"{client.base_url}chat/completions", json={"messages": USER, **options})
    assert response.status_code == 400, response.text
    assert told in response.json()["error"]["message"]
    assert create(client).choices[0].message.content == "nothing special"
