"""Grammars of forced calls, judged by llguidance, and read back by the parser."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sagellm.errors import InvalidArgumentError
from sagellm.protocol import LIMITS
from sagellm.text import Tokenizer
from sagellm.text.reasoning import ReasoningParser, ReasoningTags
from sagellm.text.tool_calls import (
    TOOL_CALL_FORMATS,
    CallPiece,
    TextPiece,
    ToolCallParser,
    call_text,
    validate_tools,
)
from sagellm.text.tool_grammar import tool_call_grammar

CONTROL = ("<eos>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>")


class ByteModel:
    """A token for each byte, and control tokens."""

    size = 256 + len(CONTROL)
    special_ids = frozenset(range(256, size))

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        ids: list[int] = []
        while text:
            found = next((c for c in CONTROL if parse_special and text.startswith(c)), None)
            ids += [256 + CONTROL.index(found)] if found else text[0].encode()
            text = text[len(found or text[0]) :]
        return ids

    def piece(self, token_id: int) -> str:
        return CONTROL[token_id - 256] if token_id >= 256 else chr(token_id)

    def find(self, piece: str) -> int | None:
        return 256 + CONTROL.index(piece) if piece in CONTROL else None

    def piece_bytes(self, token_id: int) -> bytes:
        return CONTROL[token_id - 256].encode() if token_id >= 256 else bytes([token_id])


class Vocabulary:
    """The same for llguidance."""

    is_tokenizer_wrapper = True
    eos_token_id = 256
    bos_token_id = None
    tokens = tuple(ByteModel().piece_bytes(i) for i in range(ByteModel.size))
    special_token_ids = tuple(sorted(ByteModel.special_ids))

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


TOKENIZER = Tokenizer(ByteModel(), eos_id=256)
VOCABULARY = llguidance.LLTokenizer(Vocabulary())  # type: ignore[arg-type]


def matcher(grammar: str) -> llguidance.LLMatcher:
    found = llguidance.LLMatcher(VOCABULARY, grammar, log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def accepts(grammar: str, text: str) -> bool:
    """Whether the grammar takes the whole text; control tokens are written as their text."""
    ids = TOKENIZER.encode(text, parse_special=True)
    follower = matcher(grammar)
    return follower.try_consume_tokens(ids) == len(ids) and follower.is_accepting()


def tool(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **given, **fields}}


WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/Days"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
)
TOOLS = [WEATHER, tool("now")]
PARIS: tuple[str, dict[str, Any]] = ("get_weather", {"city": "Paris", "days": 3})
NOW: tuple[str, dict[str, Any]] = ("now", {})
FORMATS = sorted(TOOL_CALL_FORMATS)


def grammar(format_name: str, **options: Any) -> str:
    settings = {"name": None, "parallel": True, "tokenizer": TOKENIZER, **options}
    return tool_call_grammar(format_name, TOOLS, **settings)


@pytest.mark.parametrize("format_name", FORMATS)
def test_calls_that_fit_are_accepted_and_others_are_not(format_name: str) -> None:
    forced = grammar(format_name)
    assert accepts(forced, call_text(format_name, [PARIS]))
    assert accepts(forced, call_text(format_name, [("get_weather", {"city": 'Zürich "}'})]))
    assert accepts(forced, call_text(format_name, [NOW, PARIS, NOW]))
    for wrong in (
        ("get_weather", {}),
        ("get_weather", {"city": 1}),
        ("get_weather", {"city": "x", "days": 10}),
        ("get_weather", {"city": "x", "more": 1}),
        ("now", {"x": 1}),
        ("unknown", {}),
    ):
        assert not accepts(forced, call_text(format_name, [wrong])), wrong
    assert not accepts(forced, "")
    assert not accepts(forced, "Sure! " + call_text(format_name, [NOW]))
    assert not accepts(forced, call_text(format_name, [NOW]) + " Done.")


@pytest.mark.parametrize("format_name", FORMATS)
def test_one_call_only_when_calls_are_not_parallel(format_name: str) -> None:
    forced = grammar(format_name, parallel=False)
    assert accepts(forced, call_text(format_name, [NOW]))
    assert accepts(forced, call_text(format_name, [PARIS]))
    assert not accepts(forced, call_text(format_name, [NOW, PARIS]))


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_named_tool_is_called_once_and_no_other(format_name: str) -> None:
    forced = grammar(format_name, name="now")
    assert accepts(forced, call_text(format_name, [NOW]))
    assert not accepts(forced, call_text(format_name, [PARIS]))
    assert not accepts(forced, call_text(format_name, [NOW, NOW]))


def test_a_marker_that_is_a_control_token_must_be_that_token() -> None:
    text = call_text("mistral", [NOW])
    spelled = list(text.encode())
    forced = matcher(grammar("mistral"))
    assert forced.try_consume_tokens(spelled) == 0
    as_text = matcher(grammar("mistral", tokenizer=None))
    assert as_text.try_consume_tokens(spelled) == len(spelled)
    assert accepts(grammar("llama3"), "<|python_tag|>" + call_text("llama3", [NOW]))


@pytest.mark.parametrize("control", [True, False])
def test_a_model_may_reason_before_it_calls(control: bool) -> None:
    tags, tokenizer = ReasoningTags(), TOKENIZER if control else None
    if not control:
        tags = ReasoningTags(start="<reason>", end="</reason>")
    call = call_text("hermes", [NOW])
    thought = f"\nIs it <now>?\n{call}\n"
    free = grammar("hermes", tokenizer=tokenizer, reasoning=tags)
    assert accepts(free, call)
    assert accepts(free, f"{tags.start}{thought}{tags.end}\n\n{call}")
    assert not accepts(free, f"{tags.start}{thought}{tags.end}\n\n")
    assert not accepts(free, f"{thought}{tags.end}{call}")
    inside = grammar("hermes", tokenizer=tokenizer, reasoning=tags, starts_inside=True)
    assert accepts(inside, f"{thought}{tags.end}\n\n{call}")
    assert not accepts(inside, call)

    splitter = ReasoningParser(tags.start, tags.end, starts_inside=True)
    parser = ToolCallParser("hermes", ["now"])
    for kind, text in splitter.push(f"{thought}{tags.end}\n\n{call}") + splitter.finish():
        if kind == "text":
            parser.push(text)
    assert parser.num_calls == 1


def test_tools_that_are_missing_are_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="'x'"):
        tool_call_grammar("hermes", TOOLS, name="x", parallel=True)
    with pytest.raises(InvalidArgumentError, match="no tool"):
        tool_call_grammar("hermes", [], name=None, parallel=True)


def test_a_grammar_beyond_the_limit_is_an_error() -> None:
    schema = {"type": "object", "description": "x" * (LIMITS.schema_bytes - 100)}
    tools = [tool("f", schema)]
    validate_tools(tools)
    with pytest.raises(InvalidArgumentError, match="describe fewer"):
        tool_call_grammar("hermes", tools, name=None, parallel=True)


def test_texts_in_a_schema_cannot_leave_it() -> None:
    schema = {
        "type": "object",
        "properties": {'x"}\nstart: "y': {"const": "</tool_call>\n%json {"}},
        "required": ['x"}\nstart: "y'],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": True, "lenient": True},
    }
    forced = tool_call_grammar("hermes", [tool("f", schema)], name=None, parallel=True)
    right = {'x"}\nstart: "y': "</tool_call>\n%json {"}
    assert accepts(forced, call_text("hermes", [("f", right)]))
    assert not accepts(forced, call_text("hermes", [("f", {})]))
    assert not accepts(forced, "y")


def sample(grammar_text: str, data: st.DataObject, most: int = 400) -> str | None:
    """A sentence of a grammar, each byte drawn among those allowed; None if it gets too long."""
    follower = matcher(grammar_text)
    written: list[int] = []
    while len(written) < most:
        mask = np.frombuffer(follower.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        assert len(allowed) > 0, follower.get_error()
        plain = [t for t in allowed.tolist() if t >= 256 or 32 <= t < 127] or allowed.tolist()
        closing = [t for t in plain if t == 256 or chr(t) in '"}]']
        # Two of three times towards the end, so that sentences come to one.
        choices = closing if closing and data.draw(st.integers(0, 2)) else plain
        token = data.draw(st.sampled_from(choices))
        if token == 256:
            return TOKENIZER.decode(written, skip_special=False)
        assert follower.consume_token(token), follower.get_error()
        written.append(token)
    return None


leaves: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "number", "minimum": -2},
        {"type": "string", "maxLength": 6},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["a", 'b"', 3, {"k": "}"}]},
        {"oneOf": [{"type": "integer"}, {"type": "string", "pattern": "^[a-c]{2}$"}]},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    ]
)
schemas = st.dictionaries(st.sampled_from(["x", "long name", 'q"', "é"]), leaves, max_size=3).map(
    lambda properties: {
        "type": "object",
        "properties": properties,
        "required": sorted(properties)[:1],
        "additionalProperties": False,
    }
)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(FORMATS), schemas, st.booleans(), st.data())
def test_whatever_a_grammar_accepts_is_read_as_calls(
    format_name: str, schema: dict[str, Any], parallel: bool, data: st.DataObject
) -> None:
    tools = [tool("f", schema), tool("f.2")]
    text = sample(
        tool_call_grammar(format_name, tools, name=None, parallel=parallel, tokenizer=TOKENIZER),
        data,
    )
    event("unfinished" if text is None else "complete")
    if text is None:
        return
    parser = ToolCallParser(format_name, ["f", "f.2"])
    pieces = [piece for char in text for piece in parser.push(char)] + parser.finish()
    assert not [piece for piece in pieces if isinstance(piece, TextPiece)], text
    assert parser.num_calls == 1 if not parallel else parser.num_calls >= 1
    for index in range(parser.num_calls):
        parts = [p for p in pieces if isinstance(p, CallPiece) and p.call_index == index]
        arguments = json.loads("".join(part.arguments_delta for part in parts))
        assert set(arguments) <= set(schema["properties"])
        if parts[0].name == "f":
            assert set(schema["required"]) <= set(arguments)
