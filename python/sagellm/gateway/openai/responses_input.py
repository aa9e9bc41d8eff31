"""From a Responses request to a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sagellm.gateway.conversation import ChatOptions, ToolChoice, invalid_values
from sagellm.gateway.errors import ApiError
from sagellm.gateway.openai.chat import parse_arguments
from sagellm.gateway.openai.responses_types import (
    CreateResponse,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    InputText,
    JsonObjectFormat,
    JsonSchemaFormat,
    MessageItem,
    NamedTool,
    OutputText,
    ReasoningItem,
    Refusal,
)
from sagellm.protocol import ResponseFormat, SamplingParams

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway


def chat_options(gateway: Gateway, query: CreateResponse) -> ChatOptions:
    """The conversation that a request asks to continue.

    Raises:
        ApiError: Items that do not belong together, or what this model does not know.
    """
    messages: list[dict[str, Any]] = []
    if query.instructions is not None:
        messages.append({"role": "system", "content": query.instructions})
    if isinstance(query.input, str):
        messages.append({"role": "user", "content": query.input})
    else:
        messages += _Turns().read(query.input)
    if not messages:
        raise ApiError(
            400, "input holds no turn; send a message", code="invalid_value", param="input"
        )
    return ChatOptions(
        messages=messages,
        model=query.model,
        tools=[_chat_tool(tool) for tool in query.tools or ()],
        tool_choice=_tool_choice(query),
        parallel_tool_calls=query.parallel_tool_calls is not False,
        max_tokens=query.max_output_tokens,
        temperature=1.0 if query.temperature is None else query.temperature,
        top_p=1.0 if query.top_p is None else query.top_p,
        sampling=_sampling(query),
        priority=query.priority or 0,
        deadline_ms=query.deadline_ms,
        cache_salt=query.cache_salt,
        stream=bool(query.stream),
        template_kwargs=_template_kwargs(gateway, query),
    )


class _Turns:
    """Gathers items to turns: reasoning, text and calls in a row are one assistant turn."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._reasoning = ""
        self._calls: dict[str, str] = {}  # id of a call -> name of its function

    def read(
        self, items: list[MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem]
    ) -> list[dict[str, Any]]:
        for index, item in enumerate(items):
            if isinstance(item, MessageItem):
                self._message(item)
            elif isinstance(item, FunctionCallItem):
                self._call(item, f"input.{index}.arguments")
            elif isinstance(item, FunctionCallOutputItem):
                self._output(item, f"input.{index}.call_id")
            else:
                parts = item.content or item.summary
                self._reasoning += "".join(part.text for part in parts)
        if self._reasoning:  # of an answer that was cut off
            self._assistant(None)
        return self._messages

    def _message(self, item: MessageItem) -> None:
        text = _text(item.content)
        if item.role == "assistant":
            self._assistant(text)
            return
        self._flush_reasoning()
        self._messages.append({"role": item.role, "content": text})

    def _assistant(self, text: str | None) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": "assistant", "content": text or ""}
        if self._reasoning:
            turn["reasoning_content"], self._reasoning = self._reasoning, ""
        self._messages.append(turn)
        return turn

    def _flush_reasoning(self) -> None:
        if self._reasoning:
            self._assistant(None)

    def _call(self, item: FunctionCallItem, param: str) -> None:
        arguments = parse_arguments(item.arguments)
        if arguments is None:
            raise ApiError(400, f"{param} is not a JSON object", param=param)
        last = self._messages[-1] if self._messages else None
        if self._reasoning or last is None or last["role"] != "assistant":
            last = self._assistant(None)
        last.setdefault("tool_calls", []).append(
            {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": arguments},
            }
        )
        self._calls[item.call_id] = item.name

    def _output(self, item: FunctionCallOutputItem, param: str) -> None:
        name = self._calls.get(item.call_id)
        if name is None:
            raise ApiError(
                400,
                f"{param}: no function_call with this call_id comes before it; this server stores "
                "nothing, so send the call as well",
                param=param,
            )
        self._flush_reasoning()
        self._messages.append(
            {
                "role": "tool",
                "tool_call_id": item.call_id,
                "name": name,
                "content": _text(item.output),
            }
        )


def _text(content: str | list[InputText] | list[InputText | OutputText | Refusal]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(query: CreateResponse) -> ToolChoice:
    if isinstance(query.tool_choice, NamedTool):
        return ToolChoice(mode="named", name=query.tool_choice.name)
    return ToolChoice(mode=query.tool_choice or "auto")


def _template_kwargs(gateway: Gateway, query: CreateResponse) -> dict[str, Any]:
    effort = None if query.reasoning is None else query.reasoning.effort
    if effort is None:
        return {}
    template = gateway.chat_template
    if template is None or "reasoning_effort" not in template.source:
        raise ApiError(
            400,
            "this model has no degrees of reasoning effort; leave reasoning.effort out",
            code="unsupported",
            param="reasoning.effort",
        )
    return {"reasoning_effort": effort}


def _sampling(query: CreateResponse) -> SamplingParams:
    with invalid_values():
        return SamplingParams(
            top_k=query.top_k or 0,
            min_p=query.min_p or 0.0,
            seed=query.seed,
            response_format=_response_format(query),
        )


def _response_format(query: CreateResponse) -> ResponseFormat | None:
    wanted = None if query.text is None else query.text.format
    if isinstance(wanted, JsonObjectFormat):
        return ResponseFormat(type="json_object")
    if isinstance(wanted, JsonSchemaFormat):
        return ResponseFormat(type="json_schema", json_schema=wanted.schema_)
    return None
