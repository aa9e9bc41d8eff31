"""What ``/v1/responses`` takes and gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from sagellm.gateway.request_model import (
    FUNCTION_NAME,
    WHOLE,
    RequestModel,
    by_shape,
    explained,
    only_types,
    unsupported,
)
from sagellm.protocol import LIMITS

_STATELESS = "this server stores nothing: send the whole conversation as input"
_TEXT_ONLY = "this server reads text only"

Label = Annotated[str, Field(max_length=512)]
Status = Literal["in_progress", "completed", "incomplete"]


# ----------------------------------------------------------------------------------------- input


class InputText(RequestModel):
    """Text of a user, system or developer."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Annotated[
        None, unsupported("prefixes are cached without breakpoints; leave it out")
    ] = None


class OutputText(RequestModel):
    """Text of an earlier answer; annotations and log-probabilities say nothing to the model."""

    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]] = Field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None


class Refusal(RequestModel):
    """A refusal in an earlier answer, read as its text."""

    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[
    InputText | OutputText | Refusal,
    Discriminator("type"),
    only_types("input_text", "output_text", "refusal", remedy=_TEXT_ONLY),
]
OutputPart = Annotated[InputText, only_types("input_text", remedy=_TEXT_ONLY)]


class MessageItem(RequestModel):
    """A turn. ``id``, ``status`` and ``phase`` of earlier answers are taken and not needed."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[ContentPart], Tag("list")], by_shape()
    ]
    id: Label | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(RequestModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=512)]
    name: Annotated[str, Field(min_length=1, max_length=512)]
    arguments: str
    id: Label | None = None
    status: Status | None = None
    namespace: Annotated[None, unsupported("tools have no namespaces here")] = None
    caller: Annotated[None, unsupported("calls come from the model alone")] = None
    async_: Annotated[
        Literal[False] | None, unsupported("calls are answered before the next turn")
    ] = Field(default=None, alias="async")


class FunctionCallOutputItem(RequestModel):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=512)]
    output: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[OutputPart], Tag("list")], by_shape()
    ]
    id: Label | None = None
    status: Status | None = None
    name: Label | None = None
    namespace: Annotated[None, unsupported("tools have no namespaces here")] = None
    caller: Annotated[None, unsupported("calls come from the model alone")] = None


class ReasoningText(RequestModel):
    """Reasoning, whole or summed up."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(RequestModel):
    """Reasoning of an earlier answer; chat templates get it as ``reasoning_content``."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: Annotated[
        None, unsupported("it cannot be decrypted here; send the reasoning as content")
    ] = None
    id: Label | None = None
    status: Status | None = None


def _item_tag(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("type", "message")
    return getattr(value, "type", None)


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_tag),
    only_types(
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        remedy="use message, function_call, function_call_output or reasoning",
    ),
]
InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=LIMITS.messages)]


# --------------------------------------------------------------------------------- tools and format


class FunctionTool(RequestModel):
    """A function that the model may call. Forced calls always satisfy ``parameters``."""

    type: Literal["function"]
    name: Annotated[str, FUNCTION_NAME]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[
        Literal[False] | None, unsupported("all tools are shown to the model")
    ] = None
    allowed_callers: Annotated[
        list[Literal["direct"]] | None, unsupported("calls come from the model alone")
    ] = None
    output_schema: Annotated[None, unsupported("outputs are not checked; leave it out")] = None
    async_: Annotated[
        Literal[False] | None, unsupported("calls are answered before the next turn")
    ] = Field(default=None, alias="async")


Tool = Annotated[
    FunctionTool, only_types("function", remedy="there are no built-in tools: give functions")
]


class NamedTool(RequestModel):
    """The one function that must be called."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]


class TextFormat(RequestModel):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(RequestModel):
    """JSON of a schema, which is always enforced, with and without ``strict``."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(RequestModel):
    """The form of the text."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Discriminator("type")] = (
        Field(default_factory=lambda: TextFormat(type="text"))
    )
    verbosity: Annotated[
        Literal["medium"] | None, unsupported("ask for it in the instructions")
    ] = None


class ReasoningConfig(RequestModel):
    """``effort`` is for models whose chat template has ``reasoning_effort``."""

    effort: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    summary: Annotated[None, unsupported("reasoning is given in full")] = None
    generate_summary: Annotated[None, unsupported("reasoning is given in full")] = None
    context: Annotated[None, unsupported("leave it out")] = None
    mode: Annotated[Literal["standard"] | None, unsupported("leave it out")] = None


class StreamOptions(RequestModel):
    """Options of a stream."""

    include_obfuscation: Annotated[Literal[False] | None, unsupported("streams are not padded")] = (
        None
    )


# --------------------------------------------------------------------------------------- request

Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class CreateResponse(RequestModel):
    """A request for a response. What has no meaning here is listed last, and refused by name.

    Attributes:
        input: Text of a user, or the conversation so far.
        model: Name of the model.
        instructions: A system turn before the input.
        max_output_tokens: Reasoning counts; None is as much as fits.
        temperature, top_p: As in chat completions.
        tools, tool_choice, parallel_tool_calls: Function tools only.
        text: The form of the text.
        stream: Answer with server-sent events.
        store: Taken as it is every client's default; nothing is stored, which answers tell.
        metadata, user, safety_identifier, prompt_cache_key: Given back untouched.
        top_k, min_p, seed, priority, deadline_ms, cache_salt: Additions of this server, as in
            ``protocol.Request``.
    """

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag("text")] | Annotated[InputItems, Tag("list")],
        by_shape(),
    ]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=LIMITS.token_id), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=LIMITS.temperature)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    tools: Annotated[list[Tool], Field(max_length=LIMITS.tool_schemas)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        explained('"none", "auto", "required" or {"type": "function", "name": ...}'),
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    top_k: Annotated[int, Field(ge=0, le=LIMITS.token_id), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=LIMITS.seed + 1), WHOLE] | None = None
    priority: Annotated[int, Field(ge=-LIMITS.priority, le=LIMITS.priority), WHOLE] | None = None
    deadline_ms: Annotated[float, Field(gt=0.0)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=LIMITS.cache_salt_chars)] | None = (
        None
    )

    background: Annotated[Literal[False] | None, unsupported(_STATELESS)] = None
    previous_response_id: Annotated[None, unsupported(_STATELESS)] = None
    conversation: Annotated[None, unsupported(_STATELESS)] = None
    prompt: Annotated[None, unsupported(_STATELESS)] = None
    include: Annotated[
        Annotated[list[str], Field(max_length=0)] | None, unsupported("leave it out")
    ] = None
    top_logprobs: Annotated[
        Literal[0] | None, unsupported("ask /v1/chat/completions for log-probabilities")
    ] = None
    truncation: Annotated[
        Literal["disabled"] | None, unsupported("shorten the input; it is never cut silently")
    ] = None
    max_tool_calls: Annotated[None, unsupported("there are no built-in tools to limit")] = None
    service_tier: Annotated[
        Literal["auto", "default"] | None, unsupported("use priority, which orders the queue")
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory"] | None, unsupported("prefixes are cached in memory only")
    ] = None
    prompt_cache_options: Annotated[None, unsupported("leave it out")] = None
    context_management: Annotated[None, unsupported(_STATELESS)] = None
    moderation: Annotated[None, unsupported("leave it out")] = None
    image: Annotated[None, unsupported(_TEXT_ONLY)] = None
    access_programs: Annotated[None, unsupported("leave it out")] = None


# ---------------------------------------------------------------------------------------- answer


class ResponseInputTokens(BaseModel):
    """``cached_tokens`` came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseOutputTokens(BaseModel):
    """``reasoning_tokens`` are part of the output."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: ResponseInputTokens
    output_tokens: int
    output_tokens_details: ResponseOutputTokens
    total_tokens: int


class ResponseObject(BaseModel):
    """A response; further fields repeat the request."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    store: Literal[False]
    usage: ResponseUsage | None
