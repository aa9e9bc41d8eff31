"""How model families write tool calls, and which of them a model uses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagellm.errors import InvalidArgumentError
from sagellm.protocol import LIMITS
from sagellm.text.json_scanner import MAX_DEPTH
from sagellm.text.tokenizer import Tokenizer

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
"""Names of tools: letters, digits, underscore, dot and hyphen."""

_USES_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallFormat:
    """How one family writes calls.

    Attributes:
        name: The name users know it by.
        marker: Text before a call.
        end: Text after a call that began with ``marker``; empty if there is none.
        bare: A call may also stand without its marker where the answer begins or a call ended.
        separator: Characters besides whitespace that may stand between two calls.
        fence_words: Words that may follow the marker; empty if none may.
        named: After the marker the tool's name may stand outside the JSON object.
        arguments_key: The key of the arguments beside ``"name"`` in what the model writes.
        control: The marker is a control token in the vocabularies that the family came with.
    """

    name: str
    marker: str
    end: str = ""
    bare: bool = False
    separator: str = ""
    fence_words: tuple[str, ...] = ()
    named: bool = False
    arguments_key: str = "arguments"
    control: bool = False


TOOL_CALL_FORMATS: Mapping[str, ToolCallFormat] = {
    format.name: format
    for format in (
        ToolCallFormat(name="hermes", marker="<tool_call>", end="</tool_call>"),
        ToolCallFormat(
            name="llama3",
            marker="<|python_tag|>",
            bare=True,
            separator=";",
            arguments_key="parameters",
            control=True,
        ),
        ToolCallFormat(name="mistral", marker="[TOOL_CALLS]", named=True, control=True),
        ToolCallFormat(name="mistral_args", marker="[TOOL_CALLS]", named=True, control=True),
        ToolCallFormat(
            name="gemma",
            marker="```",
            end="```",
            bare=True,
            fence_words=("", "json", "tool_call", "tool_code"),
            arguments_key="parameters",
        ),
    )
}
"""The formats by name.

``hermes`` (Hermes, Qwen 2.5 and 3): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.
``llama3``: ``{"name": ..., "parameters": {...}}``, several separated by ``;``, after
``<|python_tag|>`` or alone. ``mistral``: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``;
``mistral_args`` writes ``[TOOL_CALLS]name[ARGS]{...}`` per call instead, and both read both.
``gemma``: ``{"name": ..., "parameters": {...}}`` alone or in a code block.
"""

ARGS_MARKER = "[ARGS]"
"""Stands between a tool's name and its arguments in ``mistral_args``."""

CALL_ID_MARKER = "[CALL_ID]"
"""Stands between a tool's name and an id of the call in some of Mistral's models."""


def tool_format(name: str) -> ToolCallFormat:
    """A format by its name.

    Raises:
        InvalidArgumentError: There is none of that name.
    """
    found = TOOL_CALL_FORMATS.get(name)
    if found is None:
        raise InvalidArgumentError(
            f"no tool call format {name!r}; choose one of {', '.join(TOOL_CALL_FORMATS)}"
        )
    return found


def detect_tool_format(chat_template: str | None, tokenizer: Tokenizer | None = None) -> str | None:
    """The format in which a model writes calls, told by its chat template.

    A template that never mentions ``tools`` cannot describe any to the model: it has no format,
    whatever its family. So has one that teaches a syntax which is not read here, such as calls in
    XML or as Python expressions.

    Args:
        chat_template: Jinja source; None when the model has none.
        tokenizer: Settles families that share a marker by their control tokens.
    """
    if chat_template is None or not _USES_TOOLS.search(chat_template):
        return None

    def has(*texts: str) -> bool:
        return any(text in chat_template for text in texts)

    json_parameters = has('"parameters"', '\\"parameters\\"')
    if has("[TOOL_CALLS]"):
        known_args = tokenizer is not None and tokenizer.id_of(ARGS_MARKER) is not None
        return (
            "mistral_args" if has(ARGS_MARKER) or (known_args and not has('"name"')) else "mistral"
        )
    if has("<tool_call>"):
        other = has("<function=", "<arg_key>")
        return "hermes" if has("arguments") and not other else None
    if has("<|python_tag|>") or (has("<|start_header_id|>") and json_parameters):
        return "llama3"
    if has("<start_of_turn>") and json_parameters:
        return "gemma"
    return None


def needs_special_tokens(format_name: str, tokenizer: Tokenizer | None = None) -> bool:
    """Whether calls are only seen when control tokens are part of the text.

    Then requests with tools need ``SamplingParams.skip_special_tokens=False``.

    Args:
        format_name: The format.
        tokenizer: Whose control tokens count; without one, what is usual in the family.
    """
    format = tool_format(format_name)
    if tokenizer is None:
        return format.control
    return any(control_token(tokenizer, text) is not None for text in (format.marker, format.end))


def control_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the control token with this text; None if it is ordinary text."""
    found = tokenizer.id_of(text) if text else None
    return found if found is not None and found in tokenizer.special_ids else None


def validate_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Checks descriptions of tools in OpenAI's form.

    ``{"type": "function", "function": {"name", "description"?, "parameters"?, "strict"?}}``.
    All parameter schemas together are bounded by ``LIMITS.schema_bytes``.

    Raises:
        InvalidArgumentError: A description is wrong, or the limits are exceeded.
    """
    if len(tools) > LIMITS.tool_schemas:
        raise InvalidArgumentError(f"{len(tools)} tools; at most {LIMITS.tool_schemas}")
    names: set[str] = set()
    size = 0
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
            raise InvalidArgumentError(
                f'{where}: write {{"type": "function", "function": {{"name": ...}}}}'
            )
        function = tool["function"]
        name = function.get("name")
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise InvalidArgumentError(
                f"{where}: a name has 1 to 128 letters, digits, underscores, dots or hyphens"
            )
        if name in names:
            raise InvalidArgumentError(f"{where}: the name {name!r} occurs twice")
        names.add(name)
        if not isinstance(function.get("description", ""), str | None):
            raise InvalidArgumentError(f"{where} ({name}): the description is not text")
        size += _schema_size(f"{where} ({name})", function.get("parameters"))
        if size > LIMITS.schema_bytes:
            raise InvalidArgumentError(
                f"the tools' parameters exceed {LIMITS.schema_bytes} bytes; describe fewer"
            )


def _schema_size(where: str, schema: object) -> int:
    """Bytes of a parameter schema as compact JSON, after checking its form."""
    if schema is None:
        return 0
    if not isinstance(schema, Mapping):
        raise InvalidArgumentError(f"{where}: parameters must be a JSON schema object")
    if schema.get("type", "object") != "object":
        raise InvalidArgumentError(
            f'{where}: the parameters have type {schema["type"]!r}; it must be "object"'
        )
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            break
    else:
        raise InvalidArgumentError(
            f"{where}: the parameters are nested deeper than {MAX_DEPTH} levels; flatten them"
        )
    try:
        return len(json.dumps(schema, allow_nan=False, separators=(",", ":")).encode())
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{where}: the parameters are not JSON: {error}") from error


def _children(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
