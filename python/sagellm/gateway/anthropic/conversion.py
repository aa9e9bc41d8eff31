"""From a Messages request to a conversation."""

from __future__ import annotations

from typing import Any

from sagellm.gateway.anthropic.types import (
    AssistantMessage,
    Conversation,
    MessagesRequest,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    Tool,
    ToolChoiceAny,
    ToolChoiceNone,
    ToolChoiceTool,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)
from sagellm.gateway.conversation import ChatOptions, ToolChoice, invalid_values
from sagellm.gateway.errors import ApiError
from sagellm.protocol import ResponseFormat, SamplingParams

_ERROR_PREFIX = "Error: "


def chat_options(query: MessagesRequest) -> ChatOptions:
    """The conversation that a request asks to continue.

    Raises:
        ApiError: Blocks that do not belong together.
    """
    options = _fields(query)
    with invalid_values():
        sampling = SamplingParams(
            top_k=query.top_k or 0,
            min_p=query.min_p or 0.0,
            seed=query.seed,
            stop=query.stop_sequences or [],
            response_format=_response_format(query),
        )
    return ChatOptions(
        **options,
        max_tokens=query.max_tokens,
        temperature=1.0 if query.temperature is None else query.temperature,
        top_p=1.0 if query.top_p is None else query.top_p,
        sampling=sampling,
        priority=query.priority or 0,
        deadline_ms=query.deadline_ms,
        cache_salt=query.cache_salt,
        stream=bool(query.stream),
    )


def counting_options(query: Conversation) -> ChatOptions:
    """The conversation whose prompt is to be counted.

    Raises:
        ApiError: Blocks that do not belong together.
    """
    return ChatOptions(**_fields(query))


def shows_thinking(query: Conversation) -> bool:
    """Whether reasoning is part of the answer."""
    return query.thinking is not None and not isinstance(query.thinking, ThinkingDisabled)


def _fields(query: Conversation) -> dict[str, Any]:
    choice = query.tool_choice
    single = choice is not None and not isinstance(choice, ToolChoiceNone)
    return {
        "messages": _Turns().read(query),
        "model": query.model,
        "tools": [_chat_tool(tool) for tool in query.tools or ()],
        "tool_choice": _tool_choice(query),
        "parallel_tool_calls": not (single and getattr(choice, "disable_parallel_tool_use", False)),
        "template_kwargs": {"enable_thinking": shows_thinking(query)},
    }


class _Turns:
    """Gathers messages to turns of a chat template: neighbours of one role become one turn."""

    def __init__(self) -> None:
        self._turns: list[dict[str, Any]] = []
        self._calls: dict[str, str] = {}  # id of a call -> name of its tool

    def read(self, query: Conversation) -> list[dict[str, Any]]:
        if query.system:
            self._turns.append({"role": "system", "content": _joined(query.system)})
        if isinstance(query.messages[-1], AssistantMessage):
            raise ApiError(
                400,
                "the last message is the assistant's: continuing it (prefill) is not supported by "
                "this server; end with a user's message",
                param=f"messages.{len(query.messages) - 1}",
            )
        for index, message in enumerate(query.messages):
            if isinstance(message, UserMessage):
                self._user(message, f"messages.{index}.content")
            elif isinstance(message, SystemMessage):
                self._text("system", _joined(message.content))
            else:
                self._assistant(message)
        if not self._turns:
            raise ApiError(
                400,
                "messages hold no content; send some text",
                code="invalid_value",
                param="messages",
            )
        return self._turns

    def _user(self, message: UserMessage, param: str) -> None:
        if isinstance(message.content, str):
            self._text("user", message.content)
            return
        for number, block in enumerate(message.content):
            if isinstance(block, TextBlock):
                self._text("user", block.text)
            else:
                self._result(block, f"{param}.{number}.tool_use_id")

    def _result(self, block: ToolResultBlock, param: str) -> None:
        name = self._calls.get(block.tool_use_id)
        if name is None:
            raise ApiError(
                400, f"{param}: no tool_use block with this id comes before it", param=param
            )
        text = _joined(block.content or "")
        self._turns.append(
            {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "name": name,
                "content": f"{_ERROR_PREFIX}{text}" if block.is_error else text,
            }
        )

    def _assistant(self, message: AssistantMessage) -> None:
        if isinstance(message.content, str):
            self._text("assistant", message.content)
            return
        turn = self._turn("assistant")
        for block in message.content:
            if isinstance(block, TextBlock):
                _append(turn, "content", block.text)
            elif isinstance(block, ThinkingBlock):
                _append(turn, "reasoning_content", block.thinking)
            else:
                self._call(turn, block)

    def _call(self, turn: dict[str, Any], block: ToolUseBlock) -> None:
        turn.setdefault("tool_calls", []).append(
            {
                "id": block.id,
                "type": "function",
                "function": {"name": block.name, "arguments": block.input},
            }
        )
        self._calls[block.id] = block.name

    def _text(self, role: str, text: str) -> None:
        _append(self._turn(role), "content", text)

    def _turn(self, role: str) -> dict[str, Any]:
        if not self._turns or self._turns[-1]["role"] != role:
            self._turns.append({"role": role, "content": ""})
        return self._turns[-1]


def _append(turn: dict[str, Any], key: str, text: str) -> None:
    turn[key] = f"{turn[key]}\n{text}" if turn.get(key) else text


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _chat_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(query: Conversation) -> ToolChoice:
    choice = query.tool_choice
    if isinstance(choice, ToolChoiceTool):
        return ToolChoice(mode="named", name=choice.name)
    if isinstance(choice, ToolChoiceAny):
        return ToolChoice(mode="required")
    if isinstance(choice, ToolChoiceNone):
        return ToolChoice(mode="none")
    return ToolChoice(mode="auto")


def _response_format(query: Conversation) -> ResponseFormat | None:
    wanted = None if query.output_config is None else query.output_config.format
    if wanted is None:
        return None
    return ResponseFormat(type="json_schema", json_schema=wanted.schema_)
