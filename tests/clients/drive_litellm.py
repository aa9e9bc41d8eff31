"""litellm against a running server: drive_litellm.py URL MODEL."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
from checks import embedding_model, run, server_and_model

URL, MODEL = server_and_model()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def options(content: str = "What is the capital of France?", **more: Any) -> dict[str, Any]:
    return {
        "model": f"openai/{MODEL}",
        "api_base": f"{URL}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "temperature": 0,
        **more,
    }


def chat() -> None:
    answer = litellm.completion(**options())
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def streamed_chat_equals_the_whole() -> None:
    whole = litellm.completion(**options()).choices[0].message.content
    events = list(
        litellm.completion(**options(stream=True, stream_options={"include_usage": True}))
    )
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole
    assert any(getattr(event, "usage", None) for event in events)


def asynchronous_chats_at_once() -> None:
    async def ask() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**options()) for _ in range(4)))

    assert len({answer.choices[0].message.content for answer in asyncio.run(ask())}) == 1


def text_completion() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=f"{URL}/v1",
        api_key="none",
        prompt="Once upon a time",
        max_tokens=8,
        temperature=0,
    )
    assert answer.choices[0].text


def forced_tool_call() -> None:
    answer = litellm.completion(
        **options(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=64)
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert answer.choices[0].finish_reason == "tool_calls"


def schema() -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": COLOUR, "strict": True},
    }
    answer = litellm.completion(**options("Which colour is grass?", response_format=form))
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "green")


def embeddings() -> None:
    answer = litellm.embedding(
        model=f"openai/{embedding_model()}",
        api_base=f"{URL}/v1",
        api_key="none",
        input=["one", "two"],
        encoding_format="float",
    )
    assert [item["index"] for item in answer.data] == [0, 1]
    assert len(answer.data[0]["embedding"]) == len(answer.data[1]["embedding"]) > 0


def errors_have_their_class() -> None:
    for wrong, kind in (
        ({"temperature": -1}, litellm.BadRequestError),
        ({"model": "openai/nosuch"}, litellm.NotFoundError),
    ):
        try:
            litellm.completion(**options(**wrong), num_retries=0)
        except kind:
            continue
        raise AssertionError(f"{wrong} was accepted")


if __name__ == "__main__":
    run(
        "litellm",
        (
            chat,
            streamed_chat_equals_the_whole,
            asynchronous_chats_at_once,
            text_completion,
            forced_tool_call,
            schema,
            embeddings,
            errors_have_their_class,
        ),
    )
