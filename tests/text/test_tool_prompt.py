"""Tools as text, for chat templates that know none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagellm.text import ChatTemplate
from sagellm.text.tool_calls import TOOL_CALL_FORMATS, CallPiece, ToolCallParser
from sagellm.text.tool_prompt import call_text, messages_with_tools, tool_system_prompt

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
OTHER = {**CALL, "id": "c2", "function": {"name": "sub", "arguments": {"ü": "<x>"}}}


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_calls_are_written_as_the_parser_of_the_format_reads_them(name: str) -> None:
    parser = ToolCallParser(name, ["add", "sub"])
    pieces = [*parser.push(call_text(name, [("add", {"a": 1}), ("sub", {})])), *parser.finish()]
    calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
    names = [call.name for call in calls if call.name]
    assert names[0] == "add"
    first = "".join(call.arguments_delta for call in calls if call.call_index == 0)
    assert json.loads(first) == {"a": 1}
    if name != "mistral_args":
        assert names == ["add", "sub"]


def test_the_system_message_holds_every_tool_and_the_form_of_a_call() -> None:
    text = tool_system_prompt("hermes", [ADD])
    assert json.dumps(ADD["function"]) in text
    assert "<tool_call>\n" in text
    assert "</tool_call>" in text


def test_tools_join_the_system_message_or_become_one() -> None:
    user = {"role": "user", "content": "hi"}
    given = [{"role": "system", "content": "Be brief."}, user]
    joined = messages_with_tools("hermes", given, [ADD])
    prompt = tool_system_prompt("hermes", [ADD])
    assert joined == [{"role": "system", "content": f"Be brief.\n\n{prompt}"}, user]
    assert given[0]["content"] == "Be brief."  # the caller's own turns stay as they are
    assert messages_with_tools("hermes", [user], [ADD]) == [
        {"role": "system", "content": prompt},
        user,
    ]
    assert messages_with_tools("hermes", given, []) == given


def test_calls_and_results_become_text_of_roles_that_every_template_knows() -> None:
    turns = messages_with_tools(
        "hermes",
        [
            {"role": "user", "content": "sum"},
            {"role": "assistant", "content": "Well.", "tool_calls": [CALL, OTHER]},
            {"role": "tool", "tool_call_id": "c2", "content": "2"},
            {"role": "tool", "tool_call_id": "lost", "content": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ],
        [],
    )
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert all(turn.keys() == {"role", "content"} for turn in turns)
    both = call_text("hermes", [("add", {"a": 1}), ("sub", {"ü": "<x>"})])
    assert turns[1]["content"] == f"Well.\n{both}"
    results = turns[2]["content"].split("\n")
    assert json.loads(results[1]) == {"name": "sub", "content": "2"}
    assert json.loads(results[4]) == {"name": "unknown", "content": ""}
    assert turns[3]["content"] == call_text("hermes", [("add", {"a": 1})])


@pytest.mark.parametrize(
    ("source", "uses"),
    (
        ("{% for tool in tools %}{{ tool }}{% endfor %}", True),
        ("{% if tools is defined and tools %}x{% endif %}", True),
        ("{# tools #} the tools: {{ messages[0].tools }} {{ 'tools' }}", False),
    ),
)
def test_a_template_tells_whether_its_code_uses_tools(source: str, uses: bool) -> None:
    assert ChatTemplate(source).uses("tools") is uses
