"""Grammars that make a model call tools with arguments that fit their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sagellm.errors import InvalidArgumentError
from sagellm.protocol import LIMITS
from sagellm.text.reasoning import ReasoningTags
from sagellm.text.tokenizer import Tokenizer
from sagellm.text.tool_formats import ARGS_MARKER, ToolCallFormat, control_token, tool_format

_NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}

# JSON as chat templates print it, so that a model cannot write blanks without end. "oneOf" is
# taken for "anyOf": that exactly one branch fits cannot be said in a grammar.
_JSON_STYLE: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}


def tool_call_grammar(
    format_name: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    name: str | None,
    parallel: bool,
    tokenizer: Tokenizer | None = None,
    reasoning: ReasoningTags | None = None,
    starts_inside: bool = False,
) -> str:
    """A Lark grammar for llguidance whose sentences are calls and nothing else.

    Whatever it accepts, ``ToolCallParser`` of the same format reads as calls, and each call's
    arguments satisfy the parameter schema of its tool.

    Args:
        format_name: Name of a format in ``TOOL_CALL_FORMATS``.
        tools: Descriptions that ``validate_tools`` accepts.
        name: The one tool to call, exactly once; None for any.
        parallel: With no ``name``: one or more calls instead of exactly one.
        tokenizer: The model's; markers that are its control tokens are demanded as tokens. Without
            it all markers are text.
        reasoning: The model may reason first; it has to come to an end, then the calls follow.
        starts_inside: With ``reasoning``: the prompt ended with the start tag.

    Raises:
        InvalidArgumentError: There is no tool, or none of this name, or the grammar is too long.
            That a schema uses keywords which cannot be enforced shows when it is compiled.
    """
    format = tool_format(format_name)
    functions = [tool["function"] for tool in tools]
    functions = [function for function in functions if name in (None, function["name"])]
    if not functions:
        wanted = "no tool is described" if name is None else f"no tool is named {name!r}"
        raise InvalidArgumentError(f"a call is demanded, but {wanted}; add it to tools")
    rules = [_start(reasoning, starts_inside, tokenizer)]
    rules += _calls(format, tokenizer, one=name is not None or not parallel)
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        before, after = _around_arguments(format, function["name"], tokenizer)
        schema = function.get("parameters") or _NO_PARAMETERS
        schema = {**schema, "type": "object", "x-guidance": _JSON_STYLE}
        rules.append(f"call_{index}: {before} arguments_{index} {after}".rstrip())
        compact = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
        rules.append(f"arguments_{index}: %json {compact}")
    grammar = "\n".join(["%llguidance {}", *rules, ""])
    if len(grammar.encode()) > LIMITS.grammar_bytes:
        raise InvalidArgumentError(
            f"the tools make a grammar of more than {LIMITS.grammar_bytes} bytes; describe fewer"
        )
    return grammar


def _start(tags: ReasoningTags | None, starts_inside: bool, tokenizer: Tokenizer | None) -> str:
    if tags is None:
        return "start: calls"
    begin = "" if starts_inside else _marker(tags.start, tokenizer) + " "
    optional = "" if starts_inside else "?"
    if tokenizer is not None and control_token(tokenizer, tags.end) is not None:
        thought = f"thought: /(?s:.*)/ {_marker(tags.end, tokenizer)}"
    else:
        thought = f"thought[lazy]: THOUGHT {_text(tags.end)}\nTHOUGHT: /(?s:.*)/"
    return f"start: reasoning{optional} calls\nreasoning: {begin}thought /\\n{{0,2}}/\n{thought}"


def _calls(format: ToolCallFormat, tokenizer: Tokenizer | None, *, one: bool) -> list[str]:
    """The rule ``calls``: one ``call``, or several as the family separates them."""
    marker = _marker(format.marker, tokenizer)
    if format.name == "mistral":
        several = "call" if one else 'call (", " call)*'
        return [f'calls: {marker} "[" {several} "]"']
    if format.name == "mistral_args":
        return [f"calls: {marker} call" if one else f"calls: ({marker} call)+"]
    if format.name == "hermes":
        end = _marker(format.end, tokenizer)
        several = "block" if one else r'block ("\n" block)*'
        return [f"calls: {several}", rf'block: {marker} "\n" call "\n" {end}']
    separator = _text("; " if format.separator else "\n")
    several = "call" if one else f"call ({separator} call)*"
    tagged = tokenizer is not None and control_token(tokenizer, format.marker) is not None
    return [f"calls: {marker}? {several}" if tagged else f"calls: {several}"]


def _around_arguments(
    format: ToolCallFormat, name: str, tokenizer: Tokenizer | None
) -> tuple[str, str]:
    if format.name == "mistral_args":
        return f"{_text(name)} {_marker(ARGS_MARKER, tokenizer)}", ""
    head = json.dumps({"name": name})[:-1]
    return _text(f'{head}, "{format.arguments_key}": '), _text("}")


def _marker(text: str, tokenizer: Tokenizer | None) -> str:
    """A marker as the vocabulary has it: a control token by its id, or text."""
    token_id = None if tokenizer is None else control_token(tokenizer, text)
    return _text(text) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return json.dumps(text)
