"""Tool calls in streamed text: every family, every split, and what is no call after all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.errors import InvalidArgumentError
from sagellm.protocol import LIMITS
from sagellm.text import load_tokenizer
from sagellm.text.tool_calls import (
    TOOL_CALL_FORMATS,
    CallPiece,
    TextPiece,
    ToolCallParser,
    call_text,
    detect_tool_format,
    needs_special_tokens,
    result_text,
    tool_format,
    tool_system_prompt,
    validate_tools,
)
from text.vocabularies import spm_source, train_spm

TOOLS = ("f", "get_weather")
Parts = list[str | tuple[str, str]]


def read(format_name: str, pieces: Iterable[str]) -> Parts:
    """Texts, and calls as name and arguments, in order."""
    parser = ToolCallParser(format_name, TOOLS)
    out = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    parts: Parts = []
    calls: dict[int, int] = {}
    for event in out:
        if isinstance(event, CallPiece):
            if event.name is not None:
                assert event.call_index == len(calls)
                calls[event.call_index] = len(parts)
                parts.append((event.name, event.arguments_delta))
            else:
                place = calls[event.call_index]
                name, arguments = parts[place]
                parts[place] = (name, arguments + event.arguments_delta)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += event.text
        else:
            parts.append(event.text)
    assert parser.num_calls == len(calls)
    return parts


F = '{"name": "f", "arguments": {"x": 1}}'
G = '{"name": "get_weather", "parameters": {"city": "Paris \\"x\\" }"}}'
CF = ("f", '{"x": 1}')
CG = ("get_weather", '{"city": "Paris \\"x\\" }"}')

CASES: list[tuple[str, str, Parts]] = [
    # Hermes
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", [CF]),
    ("hermes", f"<tool_call>{F}</tool_call>\n<tool_call>\n{G}</tool_call>\n", [CF, CG]),
    ("hermes", f"Let me see.\n<tool_call>{F}</tool_call>", ["Let me see.\n", CF]),
    ("hermes", f"\n\n<tool_call>{F}</tool_call>\n\nDone.", [CF, "\n\nDone."]),
    ("hermes", f"<tool_call>[{F}, {G}]</tool_call>", [CF, CG]),
    ("hermes", f"<tool_call>{F}", [CF]),
    ("hermes", f"<tool_call>{F}\n</tool_", [CF]),
    ("hermes", f"<tool_call>{F}\n<tool_call>{G}", [CF, CG]),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', [CF]),
    ("hermes", '<tool_call>{"id": 7, "type": "function", ' + F[1:] + "</tool_call>", [CF]),
    ("hermes", f'<tool_call>{F[:-1]}, "thought": [1]}}</tool_call>', [CF]),
    ("hermes", '<tool_call>{"\\u006eame": "\\u0066", "arguments": {"x": 1}}</tool_call>', [CF]),
    ("hermes", f"<tool_call>{F}<tool_call>no <", [CF, "<tool_call>no <"]),
    ("hermes", F, [F]),
    ("hermes", " \n", [" \n"]),
    ("hermes", "a < b <tool", ["a < b <tool"]),
    # Llama 3
    ("llama3", G, [CG]),
    ("llama3", f" {G}; {F}", [CG, CF]),
    ("llama3", f"<|python_tag|>{F};{G}\n", [CF, CG]),
    ("llama3", f"Well: <|python_tag|>{F}", ["Well: ", CF]),
    ("llama3", f"Well: {F}", [f"Well: {F}"]),
    ("llama3", f"{F}; and more", [CF, "; and more"]),
    ("llama3", '<|python_tag|>search.call(query="x")', ['<|python_tag|>search.call(query="x")']),
    ("llama3", '{"answer": {"name": "f"}}', ['{"answer": {"name": "f"}}']),
    # Mistral
    ("mistral", f"[TOOL_CALLS][{F}]", [CF]),
    ("mistral", f"[TOOL_CALLS] [{F}, {G}]", [CF, CG]),
    ("mistral", f"[TOOL_CALLS]{F}", [CF]),
    ("mistral", 'Hm.[TOOL_CALLS]f[ARGS]{"x": 1}', ["Hm.", CF]),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]f{"x": 1}', [CF, CF]),
    ("mistral_args", '[TOOL_CALLS]f[CALL_ID]a1B2[ARGS] {"x": 1}', [CF]),
    ("mistral_args", f"[TOOL_CALLS][{F}]", [CF]),
    ("mistral_args", "[TOOL_CALLS]g[ARGS]{}", ["[TOOL_CALLS]g[ARGS]{}"]),
    ("mistral_args", "[TOOL_CALLS]" + "n" * 200, ["[TOOL_CALLS]" + "n" * 200]),
    ("mistral", "[1] says so", ["[1] says so"]),
    # Gemma
    ("gemma", G, [CG]),
    ("gemma", f"```json\n{G}\n```", [CG]),
    ("gemma", f"```tool_code\n{F}\n```\n```json\n{G}```\n", [CF, CG]),
    ("gemma", f"```\n[{F}, {G}]\n```", [CF, CG]),
    ("gemma", f"Here:\n```json\n{F}\n``` ok", ["Here:\n", CF, " ok"]),
    ("gemma", "```python\nf(x=1)\n```", ["```python\nf(x=1)\n```"]),
    ("gemma", '```json\n{"a": 1}\n```', ['```json\n{"a": 1}\n```']),
    ("gemma", "`````", ["`````"]),
]  # fmt: skip

BROKEN = [
    "<tool_call>",
    "<tool_call>{",
    "<tool_call>{}</tool_call>",
    "<tool_call>[]</tool_call>",
    "<tool_call>no</tool_call>",
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}, "name": "unknown"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": null}</tool_call>',
    '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}, "parameters": {}, "name": "f"}</tool_call>',
    '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f\n", "arguments": {}}</tool_call>',
    '<tool_call>{"function": {"name": "f", "arguments": {}}}</tool_call>',
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    '<tool_call>{"name": "f", "argu',
    '<tool_call>{"arguments": {"x": 1}, "name": "f',
]


@pytest.mark.parametrize(("format_name", "text", "expected"), CASES)
def test_calls_of_each_family(format_name: str, text: str, expected: Parts) -> None:
    assert read(format_name, [text]) == expected
    assert read(format_name, text) == expected  # a character at a time


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_call_comes_back_as_it_was(text: str) -> None:
    assert read("hermes", [text]) == [text]
    assert read("hermes", text) == [text]


def test_a_good_call_is_found_behind_a_broken_one() -> None:
    text = f"<tool_call>{{'name'\n<tool_call>{F}</tool_call>"
    assert read("hermes", [text]) == ["<tool_call>{'name'\n", CF]


def test_arguments_that_break_off_stay_and_the_rest_is_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": oops}}</tool_call> and'
    assert read("hermes", [text]) == [("f", '{"x": '), "oops}}</tool_call> and"]


def test_arguments_cut_short_by_the_end_stay_as_they_are() -> None:
    assert read("hermes", ['<tool_call>{"name": "f", "arguments": {"x": "ab']) == [
        ("f", '{"x": "ab')
    ]


def test_a_broken_call_in_an_array_leaves_those_before_it() -> None:
    text = f'[TOOL_CALLS][{F}, {{"name": "nobody", "arguments": {{}}}}]'
    assert read("mistral", [text]) == [CF, ', {"name": "nobody", "arguments": {}}]']


def test_arguments_stream_as_soon_as_the_name_is_known() -> None:
    parser = ToolCallParser("hermes", TOOLS)
    assert parser.push('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.push('{"x"') == [CallPiece(call_index=0, name="f", arguments_delta='{"x"')]
    assert parser.push(": 1") == [CallPiece(call_index=0, name=None, arguments_delta=": 1")]
    assert parser.push("}}</tool_call>") == [
        CallPiece(call_index=0, name=None, arguments_delta="}")
    ]
    assert parser.finish() == []


def test_text_is_held_back_only_as_far_as_it_may_begin_a_marker() -> None:
    parser = ToolCallParser("hermes", TOOLS)
    assert parser.push("one <") == [TextPiece(text="one ")]
    assert parser.push("tool_cal") == []
    assert parser.push("m") == [TextPiece(text="<tool_calm")]
    assert parser.push("!") == [TextPiece(text="!")]


def test_a_json_answer_streams_once_a_key_rules_out_a_call() -> None:
    parser = ToolCallParser("llama3", TOOLS)
    assert parser.push('{"answer') == []
    assert parser.push('"') == [TextPiece(text='{"answer"')]


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "```", "json", "\n",
    F, G, '{"name": "f", ', '"arguments": ', '{"x": 1}', "}", "{", "[", "]", ", ", "; ", '"', "f",
    "<", "text", " ", "\\", '{"name": "unknown", "arguments": {}}', "é", "1", ":",
]  # fmt: skip
hostile = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
formats = st.sampled_from(sorted(TOOL_CALL_FORMATS))


@settings(max_examples=600, deadline=None)
@given(formats, hostile, st.lists(st.integers(0, 120), max_size=8))
def test_any_split_of_the_answer_gives_the_same_result(
    format_name: str, text: str, cuts: list[int]
) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    whole = read(format_name, [text])
    assert read(format_name, pieces) == whole
    assert read(format_name, text) == whole


@settings(max_examples=600, deadline=None)
@given(formats, hostile)
def test_characters_come_out_in_order_and_none_is_invented(format_name: str, text: str) -> None:
    parts = read(format_name, [text])
    position = 0
    for part in parts:
        wanted = part if isinstance(part, str) else part[1]
        found = text.find(wanted, position)
        assert found >= 0, (part, text)
        position = found + len(wanted)
    if not any(isinstance(part, tuple) for part in parts):
        assert "".join(str(part) for part in parts) == text


@settings(max_examples=200, deadline=None)
@given(
    formats,
    st.lists(
        st.tuples(
            st.sampled_from(TOOLS),
            st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers(), max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_calls_written_into_a_prompt_are_read_back(
    format_name: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    parts = read(format_name, call_text(format_name, calls))
    assert [(part[0], json.loads(part[1])) for part in parts] == calls


@pytest.mark.parametrize(
    ("format_name", "unit"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>{"a":"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ['),
        ("hermes", "<tool_call"),
        ("llama3", "{"),
        ("llama3", '{"id": ['),
        ("llama3", f"{F}; "),
        ("mistral", "[TOOL_CALLS]["),
        ("mistral_args", "[TOOL_CALLS]f"),
        ("gemma", "```"),
        ("gemma", "```json\n{"),
        ("gemma", " "),
    ],
)
@pytest.mark.parametrize("in_one_piece", [True, False])
def test_a_megabyte_of_hostile_text_comes_out_whole(
    format_name: str, unit: str, in_one_piece: bool
) -> None:
    """With quadratic work this takes hours."""
    text = unit * (1_000_000 // len(unit))
    parser = ToolCallParser(format_name, TOOLS)
    size = len(text) if in_one_piece else 7
    out = [
        piece
        for start in range(0, len(text), size)
        for piece in parser.push(text[start : start + size])
    ]
    out += parser.finish()
    if parser.num_calls == 0:
        assert "".join(piece.text for piece in out if isinstance(piece, TextPiece)) == text


# Detection: the parts of published templates that tell the families apart.
TEMPLATES: list[tuple[str, str | None]] = [
    ("{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}", None),
    ("{% for m in messages %}<start_of_turn>{{ m.role }}{% endfor %}", None),
    (
        "{%- if tools %}...<tool_call>\\n{\\\"name\\\": <function-name>, \\\"arguments\\\": "
        "<args-json-object>}\\n</tool_call>{% endif %}",
        "hermes",
    ),
    ("{% if tools %}<tool_call>\n<function=name>\n<parameter=arguments>{% endif %}", None),
    ("{% if tools %}<tool_call>name\n<arg_key>arguments{% endif %}", None),
    (
        "{%- if tools %}<|start_header_id|>{{ 'Respond in the format {\"name\": function name, "
        '"parameters": dictionary}\' }}{% endif %}',
        "llama3",
    ),
    ("{% if tools %}{{ '<|python_tag|>' }}{% endif %}", "llama3"),
    ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS] [{\"name\": ", "mistral"),
    ("{% if tools %}{% endif %}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", "mistral_args"),
    ("{% if tools %}<start_of_turn>{\"name\": , \"parameters\": }{% endif %}", "gemma"),
    ("{% if tools %}<start_of_turn>[func_name(param=value)]{% endif %}", None),
]  # fmt: skip


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_the_template_tells_the_family(template: str, expected: str | None) -> None:
    assert detect_tool_format(template) == expected


def test_a_model_without_a_template_has_no_family() -> None:
    assert detect_tool_format(None) is None


def test_whether_markers_are_control_tokens_is_asked_of_the_vocabulary() -> None:
    assert needs_special_tokens("mistral")
    assert not needs_special_tokens("hermes")
    plain = load_tokenizer(spm_source(train_spm()))
    assert not needs_special_tokens("mistral", plain)


def test_an_unknown_format_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(InvalidArgumentError, match="hermes, llama3, mistral"):
        tool_format("xml")


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "web_search"}], r"tools\[0\]"),
        ([{"type": "function", "name": "f"}], '"function"'),
        ([function("a b")], "letters"),
        ([function("")], "letters"),
        ([function('x"')], "letters"),
        ([function("n" * 129)], "128"),
        ([function(), function()], "twice"),
        ([function(description=3)], "description"),
        ([function(parameters=[])], "JSON schema"),
        ([function(parameters={"type": "array"})], "object"),
        ([function(parameters={"x": float("nan")})], "not JSON"),
        ([function(parameters={"x": object()})], "not JSON"),
        ([function(parameters=nested(100_000))], "deeper"),
        ([function(parameters={"description": "x" * LIMITS.schema_bytes})], "exceed"),
        ([function(f"f{i}") for i in range(LIMITS.tool_schemas + 1)], "at most"),
    ],
)
def test_wrong_descriptions_are_errors_that_say_where(
    tools: Sequence[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        validate_tools(tools)


def test_right_descriptions_pass() -> None:
    validate_tools([])
    validate_tools([function(description=None, parameters=None), function("a.b-C_9", strict=True)])
    validate_tools([function(parameters={"properties": {}})])


@pytest.mark.parametrize("format_name", sorted(TOOL_CALL_FORMATS))
def test_the_system_prompt_shows_tools_and_a_call_that_can_be_read(format_name: str) -> None:
    tools = [function("get_weather", description="Größe", parameters={"type": "object"})]
    prompt = tool_system_prompt(format_name, tools)
    assert json.dumps(tools[0]["function"], ensure_ascii=False) in prompt.splitlines()
    example = prompt[prompt.index(tool_format(format_name).marker):] if (
        tool_format(format_name).marker in prompt
    ) else prompt.splitlines()[-1]  # fmt: skip
    parser = ToolCallParser(format_name, ["NAME"])
    parser.push(example)
    assert parser.num_calls == 1


def test_a_result_is_a_message_of_its_own() -> None:
    assert result_text("f", 'say "hi"') == (
        '<tool_response>\n{"name": "f", "content": "say \\"hi\\""}\n</tool_response>'
    )
