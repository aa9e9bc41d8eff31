"""Tools in the prompt of a model whose chat template knows none.

Only for models that the operator assigns a tool call format by hand; templates that describe tools
themselves are always better, because the model was trained on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sagellm.text.tool_formats import ARGS_MARKER, tool_format

_EXPLANATION = (
    "You can call the functions described below, one JSON object per line. Call a function only "
    "when it helps to answer, and only with arguments that its parameters allow."
)


def tool_system_prompt(format_name: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """Text for the system message: what the tools are and how to call them.

    Args:
        format_name: Name of a format in ``TOOL_CALL_FORMATS``.
        tools: Descriptions that ``validate_tools`` accepts.
    """
    example = call_text(format_name, [("NAME", {"PARAMETER": "VALUE"})])
    lines = [
        _EXPLANATION,
        "",
        *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools),
        "",
        "To call a function, answer with nothing but this, with its name and arguments filled in:",
        example,
    ]
    return "\n".join(lines)


def call_text(format_name: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Calls, as name and arguments, as the model would have written them.

    For the turns of a conversation in which the assistant called tools.
    """
    format = tool_format(format_name)
    if format.name == "mistral_args":
        return "".join(
            f"{format.marker}{name}{ARGS_MARKER}{_json(arguments)}" for name, arguments in calls
        )
    objects = [_json({"name": name, format.arguments_key: arguments}) for name, arguments in calls]
    if format.name == "mistral":
        return f"{format.marker}[{', '.join(objects)}]"
    if format.name == "hermes":
        return "\n".join(f"{format.marker}\n{item}\n{format.end}" for item in objects)
    return ("; " if format.separator else "\n").join(objects)


def result_text(name: str, content: str) -> str:
    """What a tool answered, as the text of a message to the model."""
    return f"<tool_response>\n{_json({'name': name, 'content': content})}\n</tool_response>"


def messages_with_tools(
    format_name: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A conversation in which tools, their calls and their results are text.

    For chat templates that know nothing but roles and contents.

    Args:
        format_name: Name of a format in ``TOOL_CALL_FORMATS``.
        messages: Turns as chat templates take them.
        tools: What the model may call now; without any, only calls and results become text.

    Returns:
        Turns of ``system``, ``user`` and ``assistant``. The tools stand at the end of the system
        message, which is added where there is none. Results are the user's, since not every
        template has a role for them; those of one turn are one message.
    """
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the functions, by the ids of calls
    answers = False  # the last turn holds results
    for message in messages:
        turn = dict(message)
        calls = turn.pop("tool_calls", None) or ()
        if calls:
            functions = [call["function"] for call in calls]
            names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
            text = call_text(format_name, [(f["name"], f["arguments"]) for f in functions])
            turn["content"] = "\n".join(filter(None, (turn.get("content"), text)))
        is_answer = turn["role"] == "tool"
        if is_answer:
            name = turn.get("name") or names.get(turn.get("tool_call_id") or "") or "unknown"
            turn = {"role": "user", "content": result_text(name, turn.get("content") or "")}
        if is_answer and answers:
            turns[-1]["content"] += "\n" + turn["content"]
        else:
            turns.append(turn)
        answers = is_answer
    if tools:
        if not turns or turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": ""})
        parts = (turns[0].get("content"), tool_system_prompt(format_name, tools))
        turns[0]["content"] = "\n\n".join(filter(None, parts))
    return turns


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
