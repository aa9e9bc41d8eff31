"""``/v1/chat/completions``."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from sagellm.gateway.context import RequestContext
from sagellm.gateway.conversation import (
    ChatOptions,
    ChatRun,
    ToolChoice,
    invalid_values,
    start_chat,
)
from sagellm.gateway.errors import ApiError
from sagellm.gateway.openai.chat_answer import ChunkWriter, completion, new_header
from sagellm.gateway.openai.chat_types import (
    ChatCompletion,
    ChatCompletionRequest,
    ChatMessage,
    MessageToolCall,
    NamedToolChoice,
    ResponseFormatField,
)
from sagellm.gateway.openai.common import json_answer, sampling_params
from sagellm.gateway.openai.generation_route import Events, generation_routers
from sagellm.protocol import ResponseFormat
from sagellm.serving import RouterDef

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""
    return generation_routers(
        gateway,
        "chat/completions",
        summary="Continue a conversation",
        tag="chat",
        request_model=ChatCompletionRequest,
        response_model=ChatCompletion,
        create=create_completion,
        stream=_stream,
    )


async def create_completion(
    gateway: Gateway, query: ChatCompletionRequest, context: RequestContext
) -> Response:
    """Answers a request that is no stream.

    Raises:
        ApiError: The request cannot be served, or failed while it ran.
    """
    run = await start_chat(gateway, chat_options(gateway, query), context)
    try:
        deltas = [delta async for delta in run]
    finally:
        run.cancel()  # without effect once answered
    header = new_header("chat.completion", gateway.model_name, context)
    return json_answer(completion(header, deltas, run.usage(), gateway.tokenizer, n=query.n or 1))


async def _stream(
    gateway: Gateway, query: ChatCompletionRequest, context: RequestContext
) -> Events:
    run = await start_chat(gateway, chat_options(gateway, query), context)
    header = new_header("chat.completion.chunk", gateway.model_name, context)
    writer = ChunkWriter(header, gateway.tokenizer, with_usage=query.wants_usage)
    return _events(run, writer, query.wants_continuous_usage), run.cancel


async def _events(
    run: ChatRun, writer: ChunkWriter, continuous_usage: bool
) -> AsyncGenerator[bytes, None]:
    async for deltas in run.batches():
        if continuous_usage:
            writer.tell_usage(run.usage())
        yield writer.chunks(deltas)
    yield writer.end(run.usage())


# ------------------------------------------------------------------------------ from the request


def chat_options(gateway: Gateway, query: ChatCompletionRequest) -> ChatOptions:
    """The conversation that a request asks for.

    Raises:
        ApiError: 400; the message names the field.
    """
    query.check_stream_options()
    if query.top_logprobs is not None and not query.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    sampling = sampling_params(
        query,
        response_format=_response_format(query.response_format),
        logprobs=(query.top_logprobs or 0) if query.logprobs else None,
    )
    return ChatOptions(
        messages=[_message(index, message) for index, message in enumerate(query.messages)],
        model=query.model,
        tools=[tool.model_dump(exclude_none=True) for tool in query.tools or ()],
        tool_choice=_tool_choice(query),
        parallel_tool_calls=query.parallel_tool_calls is not False,
        max_tokens=_max_tokens(query),
        temperature=1.0 if query.temperature is None else query.temperature,
        top_p=1.0 if query.top_p is None else query.top_p,
        sampling=sampling,
        priority=query.priority or 0,
        deadline_ms=query.deadline_ms,
        cache_salt=query.cache_salt,
        stream=bool(query.stream),
        template_kwargs=_template_kwargs(gateway, query),
    )


def _max_tokens(query: ChatCompletionRequest) -> int | None:
    old, new = query.max_tokens, query.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens differ; give one of them",
            param="max_tokens",
        )
    return old if new is None else new


def _tool_choice(query: ChatCompletionRequest) -> ToolChoice:
    choice = query.tool_choice
    if isinstance(choice, NamedToolChoice):
        return ToolChoice(mode="named", name=choice.function.name)
    return ToolChoice(mode=choice or "auto")


def _template_kwargs(gateway: Gateway, query: ChatCompletionRequest) -> dict[str, Any]:
    variables = dict(query.chat_template_kwargs or {})
    if query.reasoning_effort is None:
        return variables
    template = gateway.chat_template
    if template is None or "reasoning_effort" not in template.source:
        raise ApiError(
            400,
            "this model has no degrees of reasoning effort; leave reasoning_effort out",
            code="unsupported",
            param="reasoning_effort",
        )
    return {"reasoning_effort": query.reasoning_effort, **variables}


def _response_format(field: ResponseFormatField | None) -> ResponseFormat | None:
    if field is None:
        return None
    if (field.type == "json_schema") != (field.json_schema is not None):
        raise ApiError(
            400,
            "response_format.json_schema must be set if and only if its type is 'json_schema'",
            param="response_format.json_schema",
        )
    if field.json_schema is None:
        return ResponseFormat(type=field.type)
    schema = field.json_schema.schema_
    if schema is None:  # a name alone: any object
        return ResponseFormat(type="json_object")
    with invalid_values():
        return ResponseFormat(type="json_schema", json_schema=schema)


def _message(index: int, message: ChatMessage) -> dict[str, Any]:
    """A turn as chat templates take it."""
    place = f"messages.{index}"
    role, content = message.role, _text(message)
    if message.tool_calls and role != "assistant":
        raise _bad_message(f"{place}.tool_calls", "only an assistant message has tool calls")
    if (role == "tool") != (message.tool_call_id is not None):
        raise _bad_message(
            f"{place}.tool_call_id",
            "a tool message, and no other, names the call that it answers",
        )
    if message.reasoning_content is not None and role != "assistant":
        raise _bad_message(f"{place}.reasoning_content", "only an assistant message has reasoning")
    if content is None and not message.tool_calls:
        raise _bad_message(f"{place}.content", "content may be null only beside tool calls")
    turn: dict[str, Any] = {"role": role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [
            _history_call(f"{place}.tool_calls.{number}", call)
            for number, call in enumerate(message.tool_calls)
        ]
    return turn


def _text(message: ChatMessage) -> str | None:
    if message.content is None or isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


def _history_call(place: str, call: MessageToolCall) -> dict[str, Any]:
    arguments = parse_arguments(call.function.arguments)
    if arguments is None:
        raise _bad_message(
            f"{place}.function.arguments", "the arguments are not the text of a JSON object"
        )
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def parse_arguments(text: str) -> dict[str, Any] | None:
    """A call's arguments as chat templates take them; None for anything but a JSON object.

    No text at all, which some clients send for a function without parameters, is no arguments.
    """
    if not text.strip():
        return {}
    try:
        arguments = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad_message(place: str, problem: str) -> ApiError:
    return ApiError(400, f"{place}: {problem}", code="invalid_value", param=place)
