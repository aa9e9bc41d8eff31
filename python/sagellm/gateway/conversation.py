"""From a conversation to typed deltas: what chat completions, responses and messages share.

The wire formats differ; the work between them does not. ``start_chat`` renders and submits a
conversation, and ``ChatRun`` splits what comes back into text, reasoning and tool calls.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ValidationError

from sagellm.gateway.chat_deltas import (
    ChatDelta,
    ChatFinishReason,
    ChoiceEnd,
    ChoiceReader,
    ReadingPlan,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from sagellm.gateway.errors import ApiError, describe_validation
from sagellm.protocol import Message, Request, ResponseFormat, SamplingParams
from sagellm.text.reasoning import ReasoningTags, detect_reasoning
from sagellm.text.tool_calls import (
    TOOL_CALL_FORMATS,
    detect_tool_format,
    needs_special_tokens,
    validate_tools,
)
from sagellm.text.tool_formats import control_token
from sagellm.text.tool_grammar import tool_call_grammar
from sagellm.text.tool_prompt import messages_with_tools

if TYPE_CHECKING:
    from sagellm.engine.output import SequenceOutput
    from sagellm.gateway.config import GatewayConfig
    from sagellm.gateway.context import RequestContext
    from sagellm.gateway.gateway import Gateway
    from sagellm.gateway.generation import GatewayStream
    from sagellm.text import ChatTemplate, Tokenizer

__all__ = [
    "ChatDelta",
    "ChatFinishReason",
    "ChatOptions",
    "ChatRun",
    "ChoiceEnd",
    "ReasoningDelta",
    "TextDelta",
    "ToolCallDelta",
    "ToolChoice",
    "Usage",
    "build_request",
    "encode_chat",
    "start_chat",
]


_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Whether and which tools are called.

    Attributes:
        mode: ``auto`` leaves it to the model, ``none`` hides the tools, ``required`` forces a call
            of any of them, ``named`` of one.
        name: The tool of ``named``.
    """

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """A conversation to continue, in the terms of no particular API.

    Attributes:
        messages: Turns as chat templates take them: ``role``, ``content`` (text or None), and where
            they apply ``tool_calls`` (``{"id", "type": "function", "function": {"name",
            "arguments": <object>}}``), ``tool_call_id``, ``name``, ``reasoning_content``.
        model: As the client named it; None is the server's model.
        tools: Function tools in OpenAI's form.
        tool_choice: Whether and which tools are called.
        parallel_tool_calls: Whether one answer may hold several calls.
        max_tokens: None is as much as fits.
        temperature: 0 is greedy.
        top_p: 1 keeps all; 0 keeps only the most likely token.
        sampling: All other rules; ``response_format`` is replaced when a tool call is forced.
        priority, deadline_ms, cache_salt: As in ``protocol.Request``.
        stream: Whether deltas are wanted while they arrive; otherwise they come at the end.
        template_kwargs: Further variables of the chat template.
        separate_reasoning: Split reasoning blocks off the text.
    """

    messages: Sequence[Mapping[str, Any]]
    model: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    deadline_ms: float | None = None
    cache_salt: str | None = None
    stream: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    separate_reasoning: bool = True


class ChatRun:
    """A conversation that is being answered: iterate over it to the end, or ``cancel``.

    Attributes:
        num_prompt_tokens: Length of the rendered conversation.
        has_tools: Whether the model saw tools.
    """

    def __init__(self, stream: GatewayStream, plan: ReadingPlan, n: int) -> None:
        self.num_prompt_tokens = stream.num_prompt_tokens
        self.has_tools = plan.tool_format is not None
        self._stream = stream
        self._choices = [ChoiceReader(index, plan) for index in range(n)]
        self._completion_tokens = 0
        self._cached_tokens = 0

    async def __aiter__(self) -> AsyncGenerator[ChatDelta, None]:
        """Yields deltas of all completions as they come, and one ``ChoiceEnd`` for each.

        Raises:
            ApiError: The request failed while it ran.
        """
        async for deltas in self.batches():
            for delta in deltas:
                yield delta

    async def batches(self) -> AsyncGenerator[list[ChatDelta], None]:
        """As iterating, with all deltas together that are there at once."""
        try:
            async for output in self._stream:
                deltas = self._take(output)
                while self._stream.num_ready:
                    deltas += self._take(await anext(self._stream))
                if deltas:
                    yield deltas
        finally:
            self.cancel()  # without effect once answered

    def cancel(self) -> None:
        """Stops the work; may be called at any time and more than once."""
        self._stream.cancel()

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=self._cached_tokens,
            reasoning_tokens=sum(choice.reasoning_tokens for choice in self._choices),
        )

    def _take(self, output: SequenceOutput) -> list[ChatDelta]:
        self._completion_tokens += len(output.token_ids)
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens)
        finished = output.finished
        if finished is not None and finished.failure is not None:
            raise ApiError.from_failure(finished.failure)
        return self._choices[output.index].take(output)


async def start_chat(gateway: Gateway, options: ChatOptions, context: RequestContext) -> ChatRun:
    """Renders, encodes, checks and submits a conversation.

    Args:
        gateway: Whose model answers.
        options: The conversation.
        context: Of the HTTP request.

    Raises:
        ApiError: This server or its model cannot do that.
        SagellmError: An illegal value, no room, or no service; nothing is queued then.
    """
    engine = gateway.require_generation(options.model)
    prepared = await _prepared(gateway, options)
    n = options.sampling.n
    max_tokens = options.max_tokens
    if max_tokens is None:
        max_tokens = max(1, engine.engine.capacity.max_output_tokens(len(prepared.prompt), n))
    request = build_request(
        context,
        model=gateway.model_name,
        max_tokens=max_tokens,
        stream=options.stream,
        temperature=options.temperature,
        top_p=options.top_p,
        sampling=prepared.plan.sampling,
        messages=prepared.messages,
        priority=options.priority,
        deadline_ms=options.deadline_ms,
        cache_salt=options.cache_salt,
    )
    return ChatRun(await gateway.start(request, prepared.prompt, context), prepared.plan, n)


class DeltaWriter(Protocol):
    """Puts an answer into the form of one API."""

    def write(self, deltas: Sequence[ChatDelta]) -> bytes:
        """Takes what is new; returns its events."""

    def finish(self, usage: Usage) -> bytes:
        """Ends the answer; returns its last events."""


async def run_to_end(
    gateway: Gateway, options: ChatOptions, writer: DeltaWriter, context: RequestContext
) -> None:
    """Runs a conversation whose answer is no stream into a writer.

    Raises:
        ApiError, SagellmError: It cannot be served, or failed.
    """
    run = await start_chat(gateway, options, context)
    async with aclosing(run.batches()) as batches:
        async for deltas in batches:
            writer.write(deltas)
    writer.finish(run.usage())


async def encode_chat(gateway: Gateway, options: ChatOptions) -> list[int]:
    """The prompt that ``start_chat`` would submit.

    Args:
        gateway: Whose model would answer.
        options: The conversation.

    Raises:
        ApiError, SagellmError: As ``start_chat``, as far as the conversation alone tells.
    """
    gateway.require_generation(options.model)
    return (await _prepared(gateway, options)).prompt


def build_request(
    context: RequestContext,
    *,
    temperature: float,
    top_p: float,
    sampling: SamplingParams,
    **fields: Any,
) -> Request:
    """Makes the engine's request of values in the terms of the HTTP APIs.

    Args:
        context: Gives the ids.
        temperature: 0 is greedy, and so is what single precision cannot divide by.
        top_p: 0 keeps only the most likely token, which is greedy as well.
        sampling: Without a seed, a random one is drawn: equal requests differ, also from one start
            of the server to the next.
        **fields: Other fields of ``protocol.Request``.

    Raises:
        InvalidArgumentError: An illegal value; the message names the field.
    """
    greedy = temperature < _LEAST_TEMPERATURE or top_p == 0.0
    if sampling.seed is None and not greedy:
        sampling = sampling.model_copy(update={"seed": secrets.randbits(63)})
    with invalid_values():
        return Request(
            request_id=context.request_id,
            trace_id=context.trace_id,
            prompt="",
            temperature=None if greedy else temperature,
            top_p=None if greedy or top_p == 1.0 else top_p,
            sampling=sampling,
            **fields,
        )


@contextmanager
def invalid_values() -> Iterator[None]:
    """Turns what the protocol's types refuse into an ``ApiError`` that names the field."""
    try:
        yield
    except ValidationError as error:
        message, param = describe_validation(
            [dict(problem) for problem in error.errors(include_url=False, include_input=False)]
        )
        raise ApiError(400, message, code="invalid_value", param=param) from None


# ------------------------------------------------------------------------------ the conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Features:
    """What a chat template and its vocabulary know, and what the operator says of them.

    Attributes:
        tools_as_text: The template itself shows no tools.
    """

    tool_format: str | None
    tools_as_text: bool
    reasoning: ReasoningTags | None
    has_developer_role: bool


@lru_cache(maxsize=4)
def _features(template: ChatTemplate, tokenizer: Tokenizer, config: GatewayConfig) -> _Features:
    chosen = config.tool_call_format
    reasoning = detect_reasoning(template.source, tokenizer)
    if config.reasoning_tags is not None:
        start, end = config.reasoning_tags
        reasoning = ReasoningTags(
            start=start, end=end, control=control_token(tokenizer, end) is not None
        )
    return _Features(
        tool_format=detect_tool_format(template.source, tokenizer) if chosen == "auto" else chosen,
        tools_as_text=chosen != "auto" and not template.uses("tools"),
        reasoning=reasoning,
        has_developer_role="developer" in template.source,
    )


def template_messages(
    messages: Sequence[Mapping[str, Any]], features: _Features
) -> list[dict[str, Any]]:
    """Turns as this template takes them: ``developer`` is ``system`` where it is not known."""
    if features.has_developer_role:
        return [dict(message) for message in messages]
    return [
        {**message, "role": "system"} if message["role"] == "developer" else dict(message)
        for message in messages
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A conversation ready for the engine."""

    messages: list[Message]
    prompt: list[int]
    plan: ReadingPlan


async def _prepared(gateway: Gateway, options: ChatOptions) -> _Prepared:
    template = gateway.chat_template
    if template is None:
        raise ApiError(
            400,
            f"{gateway.model_name} has no chat template; send a prompt to /v1/completions",
            code="unsupported",
        )
    return await asyncio.to_thread(_prepare, options, template, gateway.tokenizer, gateway.config)


def _prepare(
    options: ChatOptions, template: ChatTemplate, tokenizer: Tokenizer, config: GatewayConfig
) -> _Prepared:
    """Checks, renders and encodes; takes its time, so not on the event loop."""
    features = _features(template, tokenizer, config)
    tool_format = _tool_format(options, features)
    messages = template_messages(options.messages, features)
    check_template_kwargs(options.template_kwargs)
    tools = options.tools if tool_format else None
    if features.tools_as_text and features.tool_format is not None:
        messages = messages_with_tools(features.tool_format, messages, tools or ())
        tools = None
    text = template.render(messages, tools=tools, **options.template_kwargs)
    return _Prepared(
        messages=[_protocol_message(message) for message in messages],
        prompt=tokenizer.encode(text, add_special=False, parse_special=True),
        plan=_plan(options, features, tokenizer, tool_format, text),
    )


def _protocol_message(message: Mapping[str, Any]) -> Message:
    with invalid_values():
        return Message(**{k: v for k, v in message.items() if k in Message.model_fields})


_RESERVED_VARIABLES = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}
)
_MAX_TEMPLATE_KWARGS_BYTES = 64 * 1024


def check_template_kwargs(variables: Mapping[str, Any]) -> None:
    """Checks further variables of a chat template.

    Raises:
        ApiError: One of them is the server's own, they are too large, or not JSON.
    """
    problem = None
    reserved = sorted(_RESERVED_VARIABLES & variables.keys())
    if reserved:
        problem = f"sets {', '.join(reserved)}, which the server sets; leave it out"
    else:
        try:
            size = len(json.dumps(variables, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            problem = "is not JSON: it holds NaN, infinity or too many levels"
        else:
            if size > _MAX_TEMPLATE_KWARGS_BYTES:
                problem = f"has {size} bytes; at most {_MAX_TEMPLATE_KWARGS_BYTES}"
    if problem is not None:
        raise ApiError(
            400,
            f"chat_template_kwargs {problem}",
            code="invalid_value",
            param="chat_template_kwargs",
        )


def _tool_format(options: ChatOptions, features: _Features) -> str | None:
    """The family whose tool calls are parsed; None when the model sees no tools."""
    choice = options.tool_choice
    if not options.tools:
        if choice.mode in ("required", "named"):
            raise ApiError(
                400, f"tool_choice is {choice.mode} and there are no tools", param="tool_choice"
            )
        return None
    validate_tools(options.tools)
    names = [tool["function"]["name"] for tool in options.tools]
    if choice.mode == "named" and choice.name not in names:
        raise ApiError(
            400,
            f"tool_choice names {choice.name!r}, which is not among the tools: {', '.join(names)}",
            param="tool_choice",
        )
    if choice.mode == "none":
        return None
    if features.tool_format is None:
        raise ApiError(
            400,
            "this model's chat template is of no family whose tool calls are known "
            f"({', '.join(TOOL_CALL_FORMATS)}); leave tools out, set tool_choice to 'none', or "
            "start the server with --tool-call-format",
            code="unsupported",
            param="tools",
        )
    response_format = options.sampling.response_format
    if response_format is not None and response_format.type != "text":
        raise ApiError(
            400,
            f"response_format {response_format.type!r} leaves no room for tool calls; leave out "
            "one of both, or set tool_choice to 'none'",
            param="response_format",
        )
    return features.tool_format


def _plan(
    options: ChatOptions,
    features: _Features,
    tokenizer: Tokenizer,
    tool_format: str | None,
    prompt: str,
) -> ReadingPlan:
    sampling, tags = options.sampling, features.reasoning
    starts_inside = tags is not None and tags.open_at_end(prompt)
    updates: dict[str, Any] = {}
    if tool_format is not None and options.tool_choice.mode in ("required", "named"):
        grammar = tool_call_grammar(
            tool_format,
            options.tools,
            name=options.tool_choice.name,
            parallel=options.parallel_tool_calls,
            tokenizer=tokenizer,
            reasoning=tags,
            starts_inside=starts_inside,
        )
        with invalid_values():
            updates["response_format"] = ResponseFormat(type="lark", grammar=grammar)
    elif sampling.response_format is not None and sampling.response_format.type != "text":
        tags = None  # the form leaves no room for reasoning: all of the text is the answer
    reasoning = tags if options.separate_reasoning else None
    if (reasoning is not None and reasoning.control) or (
        tool_format is not None and needs_special_tokens(tool_format, tokenizer)
    ):
        updates["skip_special_tokens"] = False
    ends = frozenset() if sampling.ignore_eos else tokenizer.eos_ids
    return ReadingPlan(
        sampling=sampling.model_copy(update=updates) if updates else sampling,
        tokenizer=tokenizer,
        tool_format=tool_format,
        tool_names=frozenset(tool["function"]["name"] for tool in options.tools),
        parallel_tool_calls=options.parallel_tool_calls,
        reasoning=reasoning,
        starts_inside=starts_inside,
        dropped_ends=ends | frozenset(sampling.stop_token_ids),
    )
