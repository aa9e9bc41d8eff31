"""Events are written by hand; they say what the documented types say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagellm.backends.interface import SampledRow
from sagellm.engine.loading import mock_tokenizer
from sagellm.gateway.context import new_context
from sagellm.gateway.conversation import (
    ChatDelta,
    ChoiceEnd,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from sagellm.gateway.openai.chat_answer import ChunkWriter, completion, logprobs_of, new_header
from sagellm.gateway.openai.chat_types import ChatCompletionChunk
from sagellm.gateway.openai.completion_answer import CompletionEvents, spell
from sagellm.gateway.openai.completion_answer import new_header as completion_header
from sagellm.gateway.openai.completion_types import Completion

CONTEXT = new_context()
HEADER = new_header("chat.completion.chunk", 'a "model"', CONTEXT)
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1)
ROWS = [
    SampledRow(token_id=65, logprob=-0.5, top_ids=(65, 0xC3), top_logprobs=(-0.5, -1.25)),
    SampledRow(token_id=0xC3, logprob=float("-inf")),
]
TEXTS = [
    "plain",
    "",
    'a "b" \\ /',
    "\n\r\t\0\x1f\x7f",
    "é 世界 🙂",
    "\u2028\u2029\x85",
    "</script>",
]


def events_of(data: bytes) -> list[Any]:
    *events, rest = data.decode().split("\n\n")
    assert rest == ""
    return [event.removeprefix("data: ") for event in events]


def written(deltas: list[ChatDelta], *, with_usage: bool) -> list[Any]:
    writer = ChunkWriter(HEADER, mock_tokenizer(), with_usage=with_usage)
    chunks = [json.loads(event) for event in events_of(writer.chunks(deltas))]
    assert chunks.pop(0)["choices"][0]["delta"]["role"] == "assistant"
    return chunks


def modelled(delta: dict[str, Any], with_usage: bool, **fields: Any) -> dict[str, Any]:
    choice = {"index": 3, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
    usage = {"usage": None} if with_usage else {}
    chunk = ChatCompletionChunk.model_validate({**HEADER, "choices": [choice], **usage})
    return chunk.model_dump(exclude_unset=True)


@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_text_and_reasoning_chunks_are_those_of_the_model(text: str, with_usage: bool) -> None:
    deltas: list[ChatDelta] = [TextDelta(index=3, text=text), ReasoningDelta(index=3, text=text)]
    assert written(deltas, with_usage=with_usage) == [
        modelled({"content": text}, with_usage),
        modelled({"reasoning_content": text}, with_usage),
    ]


@pytest.mark.parametrize("with_usage", [False, True])
def test_other_chunks_are_those_of_the_model(with_usage: bool) -> None:
    call = ToolCallDelta(index=3, call_index=1, call_id="c1", name="f", arguments='{"a"')
    more = ToolCallDelta(index=3, call_index=1, arguments=':"é"}')
    deltas: list[ChatDelta] = [
        TextDelta(index=3, text="A", logprobs=ROWS),
        call,
        more,
        ChoiceEnd(index=3, finish_reason="tool_calls"),
    ]
    begin = {
        "index": 1,
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": ""},
    }
    pieces = [{"index": 1, "function": {"arguments": text}} for text in ('{"a"', ':"é"}')]
    rows = logprobs_of(ROWS, mock_tokenizer())
    assert rows["content"][1]["logprob"] == -9999.0
    assert written(deltas, with_usage=with_usage) == [
        modelled({"content": "A"}, with_usage, logprobs=rows),
        modelled({"tool_calls": [begin]}, with_usage),
        modelled({"tool_calls": [pieces[0]]}, with_usage),
        modelled({"tool_calls": [pieces[1]]}, with_usage),
        modelled({}, with_usage, finish_reason="tool_calls"),
    ]


def test_each_completion_begins_with_its_role_once() -> None:
    writer = ChunkWriter(HEADER, mock_tokenizer(), with_usage=False)
    deltas: list[ChatDelta] = [TextDelta(index=i, text="x") for i in (0, 1, 0, 1)]
    chunks = [json.loads(event) for event in events_of(writer.chunks(deltas))]
    found = [(c["choices"][0]["index"], "role" in c["choices"][0]["delta"]) for c in chunks]
    assert found == [(0, True), (0, False), (1, True), (1, False), (0, False), (1, False)]


def test_the_last_chunk_has_the_usage() -> None:
    writer = ChunkWriter(HEADER, mock_tokenizer(), with_usage=True)
    usage, done = events_of(writer.end(USAGE))
    assert done == "[DONE]"
    chunk = ChatCompletionChunk.model_validate_json(usage)
    assert chunk.choices == []
    assert chunk.usage is not None and chunk.usage.total_tokens == 12
    silent = ChunkWriter(HEADER, mock_tokenizer(), with_usage=False)
    assert events_of(silent.end(USAGE)) == ["[DONE]"]


def test_a_whole_answer_joins_what_belongs_together() -> None:
    deltas: list[ChatDelta] = [
        ReasoningDelta(index=0, text="think "),
        TextDelta(index=1, text="other"),
        ReasoningDelta(index=0, text="more"),
        ToolCallDelta(index=0, call_index=0, call_id="c0", name="f", arguments="{"),
        ToolCallDelta(index=0, call_index=1, call_id="c1", name="g", arguments="{}"),
        ToolCallDelta(index=0, call_index=0, arguments="}"),
        ChoiceEnd(index=0, finish_reason="tool_calls"),
        ChoiceEnd(index=1, finish_reason="length"),
    ]
    answer = completion(
        {**HEADER, "object": "chat.completion"}, deltas, USAGE, mock_tokenizer(), n=2
    )
    first, second = answer.choices
    assert first.message.content is None
    assert first.message.reasoning_content == "think more"
    assert first.message.tool_calls is not None
    assert [(c.id, c.function.name, c.function.arguments) for c in first.message.tool_calls] == [
        ("c0", "f", "{}"),
        ("c1", "g", "{}"),
    ]
    assert (second.message.content, second.message.tool_calls) == ("other", None)
    assert second.finish_reason == "length"


@pytest.mark.parametrize("text", TEXTS)
def test_completion_chunks_are_those_of_the_model(text: str) -> None:
    header = completion_header("m", CONTEXT)
    rows = {"text_offset": [0], "token_logprobs": [None], "tokens": ["é"], "top_logprobs": [None]}
    for logprobs, reason in ((None, None), (rows, "stop")):
        writer = CompletionEvents(header, with_usage=False)
        (event,) = events_of(writer.chunk(2, text, logprobs, reason))
        choice = {"index": 2, "text": text, "logprobs": logprobs, "finish_reason": reason}
        model = Completion.model_validate({**header, "choices": [choice]})
        assert json.loads(event) == model.model_dump(exclude_unset=True)


def test_tokens_that_are_no_text_are_spelt_in_hexadecimal() -> None:
    assert spell(mock_tokenizer(), 65) == "A"
    assert spell(mock_tokenizer(), 0xC3) == "bytes:\\xc3"
