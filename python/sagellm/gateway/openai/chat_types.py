"""What ``/v1/chat/completions`` takes and gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Tag

from sagellm.gateway.openai.common import GenerationFields, Label, UsageInfo
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

_TEXT_ONLY = "this server reads text only"
_STORES_NOTHING = "this server stores nothing; leave it out"
_TOOLS_INSTEAD = "use tools"

Name = Annotated[str, Field(min_length=1, max_length=512)]
ToolName = Annotated[str, Field(min_length=1, max_length=64), FUNCTION_NAME]

# ---------------------------------------------------------------------------------------- messages


class TextPart(RequestModel):
    """Text."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Annotated[
        None, unsupported("prefixes are cached without breakpoints; leave it out")
    ] = None


TextParts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[Annotated[TextPart, only_types("text", remedy=_TEXT_ONLY)]],
        Field(min_length=1, max_length=LIMITS.messages),
        Tag("list"),
    ],
    by_shape(),
]


class CalledFunction(RequestModel):
    """A function's name and its arguments, a JSON object as text."""

    name: Name
    arguments: str


class MessageToolCall(RequestModel):
    """A call that the model made."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, WHOLE] | None = None  # streaming clients send back what they collected


class ChatMessage(RequestModel):
    """A turn. Fields that only describe an earlier answer are taken when they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextParts | None = None
    name: Name | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=LIMITS.tool_schemas)] | None = (
        None
    )
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    refusal: Annotated[None, unsupported("send it as content")] = None
    audio: Annotated[None, unsupported(_TEXT_ONLY)] = None
    function_call: Annotated[None, unsupported("use tool_calls")] = None
    annotations: Annotated[
        Annotated[list[Any], Field(max_length=0)] | None,
        unsupported("annotations say nothing to the model; leave them out"),
    ] = None


# ------------------------------------------------------------------------------------------- tools


class FunctionDefinition(RequestModel):
    """A function that the model may call; ``strict`` holds whenever the call is forced."""

    name: ToolName
    description: Annotated[str, Field(max_length=64 * 1024)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestModel):
    """The function to call."""

    name: ToolName


class NamedToolChoice(RequestModel):
    """Forces a call of one function."""

    type: Literal["function"]
    function: NamedFunction


# ----------------------------------------------------------------------------------------- request


class JsonSchemaFormat(RequestModel):
    """A JSON schema that the answer satisfies, with ``strict`` or without."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormatField(RequestModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatCompletionRequest(GenerationFields):
    """A conversation to continue.

    Defaults: ``temperature`` 1 (0 is greedy), a random ``seed``, ``max_tokens`` as much as fits.
    Known fields that are refused unless they ask for nothing: ``store``, ``modalities``,
    ``audio``, ``prediction``, ``web_search_options``, ``functions``, ``function_call``,
    ``service_tier``, ``verbosity``, ``reasoning_effort`` (unless the chat template has it).
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=LIMITS.messages)]
    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.token_id), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=LIMITS.token_id), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LIMITS.logprobs), WHOLE] | None = None
    response_format: ResponseFormatField | None = None
    tools: Annotated[list[Tool], Field(max_length=LIMITS.tool_schemas)] | None = None
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | NamedToolChoice | None,
        explained(
            "'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}}; other "
            "choices are not supported"
        ),
    ] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    metadata: Annotated[dict[str, Label], Field(max_length=16)] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Annotated[
        Literal["in_memory", "in-memory"] | None,
        unsupported("prefixes are cached in memory while there is room; leave it out"),
    ] = None
    store: Annotated[Literal[False] | None, unsupported(_STORES_NOTHING)] = None
    service_tier: Annotated[
        Literal["auto", "default"] | None, unsupported("there is one tier; use priority")
    ] = None
    modalities: Annotated[
        list[Literal["text"]] | None, unsupported("this server writes text only")
    ] = None
    audio: Annotated[None, unsupported("this server writes text only")] = None
    prediction: Annotated[None, unsupported("leave it out")] = None
    web_search_options: Annotated[None, unsupported("it fetches nothing; use tools")] = None
    functions: Annotated[None, unsupported(_TOOLS_INSTEAD)] = None
    function_call: Annotated[None, unsupported("use tool_choice")] = None
    verbosity: Annotated[
        Literal["medium"] | None, unsupported("say in a message how long the answer should be")
    ] = None
    moderation: Annotated[None, unsupported("it moderates nothing; leave it out")] = None
    prompt_cache_options: Annotated[
        None, unsupported("prefixes are cached without options; leave it out")
    ] = None


# ------------------------------------------------------------------------------------------ answer


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that was chosen, and the most likely ones, best first."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """One entry per token of the answer, reasoning and tool calls included."""

    content: list[TokenLogprob] | None
    refusal: None = None


class FunctionCall(BaseModel):
    """A function's name and its arguments, JSON as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None


class ChatChoice(BaseModel):
    """One completion."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageInfo


class FunctionCallDelta(BaseModel):
    """A piece of a call; the name comes once."""

    name: str | None = None
    arguments: str


class ToolCallChunk(BaseModel):
    """A piece of the call with this index; id and type come once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class Delta(BaseModel):
    """What is new in a turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallChunk] | None = None


class ChunkChoice(BaseModel):
    """What is new in one completion."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageInfo | None = None
