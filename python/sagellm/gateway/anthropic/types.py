"""What ``/v1/messages`` and ``/v1/messages/count_tokens`` take and give."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag

from sagellm.gateway.request_model import (
    FUNCTION_NAME,
    WHOLE,
    RequestModel,
    by_shape,
    only_types,
    unsupported,
)
from sagellm.protocol import LIMITS

_TEXT_ONLY = "this server reads text only"
_STATELESS = "this server stores nothing; leave it out"
_FUNCTIONS_ONLY = "only tools with an input_schema, which the client runs, are supported"

Name = Annotated[str, Field(min_length=1, max_length=512)]


class CacheControl(RequestModel):
    """A hint without effect: every prefix is cached, as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


# ----------------------------------------------------------------------------------------- content


class TextBlock(RequestModel):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[
        Annotated[list[dict[str, Any]], Field(max_length=0)] | None,
        unsupported("there are no documents to cite; leave it out"),
    ] = None


OnlyText: TypeAlias = Annotated[TextBlock, only_types("text", remedy=_TEXT_ONLY)]
TextOrBlocks: TypeAlias = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[OnlyText], Tag("list")], by_shape()
]


class ToolUseBlock(RequestModel):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None
    toolset_name: Annotated[None, unsupported("there are no toolsets")] = None


class ToolResultBlock(RequestModel):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: TextOrBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: Annotated[None, unsupported("there are no toolsets")] = None


class ThinkingBlock(RequestModel):
    """Reasoning of an earlier answer; chat templates get it as ``reasoning_content``."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


UserBlock: TypeAlias = Annotated[
    TextBlock | ToolResultBlock,
    Discriminator("type"),
    only_types(
        "text", "tool_result", remedy=f"a user's turn has text and tool_result; {_TEXT_ONLY}"
    ),
]
AssistantBlock: TypeAlias = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock,
    Discriminator("type"),
    only_types(
        "text",
        "tool_use",
        "thinking",
        remedy="an assistant's turn has text, tool_use and thinking",
    ),
]


class UserMessage(RequestModel):
    """A user's turn, with the results of tools."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[UserBlock], Tag("list")], by_shape()
    ]


class AssistantMessage(RequestModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[AssistantBlock], Tag("list")], by_shape()
    ]


class SystemMessage(RequestModel):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: TextOrBlocks


AnyMessage: TypeAlias = Annotated[
    UserMessage | AssistantMessage | SystemMessage, Discriminator("role")
]


# ------------------------------------------------------------------------------------------ tools


class Tool(RequestModel):
    """A tool that the client runs. Forced calls always satisfy ``input_schema``."""

    name: Annotated[str, Field(min_length=1, max_length=64), FUNCTION_NAME]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None
    input_examples: Annotated[None, unsupported("put examples into the description")] = None
    eager_input_streaming: bool | None = None
    defer_loading: Annotated[
        Literal[False] | None, unsupported("all tools are shown to the model")
    ] = None
    allowed_callers: Annotated[
        list[Literal["direct"]] | None, unsupported("calls come from the model alone")
    ] = None


AnyTool: TypeAlias = Annotated[Tool, only_types("custom", remedy=_FUNCTIONS_ONLY)]


class ToolChoiceAuto(RequestModel):
    """The model decides."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceAny(RequestModel):
    """Some tool must be called."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(RequestModel):
    """One tool must be called."""

    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(RequestModel):
    """The tools are hidden from the model."""

    type: Literal["none"]


AnyToolChoice: TypeAlias = Annotated[
    ToolChoiceAuto | ToolChoiceAny | ToolChoiceTool | ToolChoiceNone, Discriminator("type")
]


# ------------------------------------------------------------------------------- thinking, output

_DISPLAY = "thinking is shown whole; to hide it, set thinking to disabled"


class ThinkingEnabled(RequestModel):
    """Thinking is shown. ``budget_tokens`` is a target; what is enforced is ``max_tokens``."""

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1), WHOLE]
    display: Annotated[Literal["summarized"] | None, unsupported(_DISPLAY)] = None


class ThinkingAdaptive(RequestModel):
    """Thinking is shown, if the model thinks."""

    type: Literal["adaptive"]
    display: Annotated[Literal["summarized"] | None, unsupported(_DISPLAY)] = None


class ThinkingDisabled(RequestModel):
    """Thinking is not wanted, and not shown."""

    type: Literal["disabled"]


Thinking: TypeAlias = Annotated[
    ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled,
    Discriminator("type"),
    only_types("enabled", "adaptive", "disabled", remedy="use enabled, adaptive or disabled"),
]


class JsonFormat(RequestModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    """The form of the answer."""

    format: JsonFormat | None = None
    effort: Annotated[Literal["high"] | None, unsupported("ask for it in the system prompt")] = None


class RequestMetadata(RequestModel):
    """``user_id`` is a label without effect."""

    user_id: str | None = None


# ---------------------------------------------------------------------------------------- request


class Conversation(RequestModel):
    """What messages and the counting of their tokens have in common.

    Attributes:
        messages: Turns; neighbours of one role are one turn. The last one is not the assistant's.
        model: Name of the model.
        system: Instructions.
        tools, tool_choice: Tools that the client runs.
        thinking: Enabled or adaptive: the model's reasoning comes as thinking blocks. Else it is
            not shown, though its tokens count. Templates that can switch reasoning (through
            ``enable_thinking``) switch it.
        output_config: The form of the answer.
    """

    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=LIMITS.messages)]
    model: Name
    system: TextOrBlocks | None = None
    tools: Annotated[list[AnyTool], Field(max_length=LIMITS.tool_schemas)] | None = None
    tool_choice: AnyToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Annotated[
        Literal["standard"] | None, unsupported("there is one speed; use priority")
    ] = None
    user_profile_id: Annotated[None, unsupported(_STATELESS)] = None
    workspace_id: Annotated[None, unsupported(_STATELESS)] = None
    context_management: Annotated[None, unsupported(_STATELESS)] = None
    mcp_servers: Annotated[
        Annotated[list[Any], Field(max_length=0)] | None,
        unsupported("it fetches nothing; run tools in the client"),
    ] = None


class CountTokensRequest(Conversation):
    """A conversation whose prompt is to be measured."""


class MessagesRequest(Conversation):
    """A conversation to continue.

    Attributes:
        max_tokens: Most tokens of the answer; thinking counts.
        stop_sequences: The answer ends before the first of these.
        stream: Answer with server-sent events.
        temperature, top_p, top_k: As in ``protocol.Request``; 1, 1 and 0 leave the model alone.
        metadata: A label.
        min_p, seed, priority, deadline_ms, cache_salt: Additions of this server, as in
            ``protocol.Request``.
    """

    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.token_id), WHOLE]
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LIMITS.stop_string_chars)]],
            Field(max_length=LIMITS.stop_strings),
        ]
        | None
    ) = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=LIMITS.temperature)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=LIMITS.token_id), WHOLE] | None = None
    metadata: RequestMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Annotated[None, unsupported(_STATELESS)] = None
    diagnostics: Annotated[None, unsupported(_STATELESS)] = None
    inference_geo: Annotated[None, unsupported("the model runs where the server does")] = None

    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=LIMITS.seed + 1), WHOLE] | None = None
    priority: Annotated[int, Field(ge=-LIMITS.priority, le=LIMITS.priority), WHOLE] | None = None
    deadline_ms: Annotated[float, Field(gt=0.0)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=LIMITS.cache_salt_chars)] | None = (
        None
    )


# ----------------------------------------------------------------------------------------- answer


class OutputTokensDetails(BaseModel):
    """``thinking_tokens`` are part of the output."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Tokens of an answer.

    ``input_tokens`` are those that had to be computed, ``cache_read_input_tokens`` came from the
    prefix cache; their sum is the prompt. Caching is automatic and free, so no token counts as a
    creation.
    """

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens_details: OutputTokensDetails
    service_tier: Literal["standard"]


class AnswerMessage(BaseModel):
    """The model's turn: blocks of type ``text``, ``thinking`` and ``tool_use``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """Tokens of a conversation, as the model would read it."""

    input_tokens: int
