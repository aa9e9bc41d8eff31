"""Requests, responses, metrics and stream events."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from sagellm.protocol._model import (
    Count,
    NonEmpty,
    NonNegative,
    PositiveInt,
    ProtocolModel,
    Ratio,
    check_finite,
)
from sagellm.protocol.errors import Error
from sagellm.protocol.limits import LIMITS
from sagellm.protocol.sampling import SamplingParams
from sagellm.protocol.timestamps import Timestamps

FinishReason = Literal["stop", "length", "error"]


class Message(ProtocolModel):
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: The text; None only for an assistant turn made of tool calls.
        name: Name of the speaker or of the tool that answers.
        tool_calls: Calls that the assistant made, in the form that its chat template expects.
        tool_call_id: The call that a tool turn answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None
    name: NonEmpty | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: NonEmpty | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.tool_calls is not None:
            if self.role != "assistant":
                raise ValueError("only an assistant message has tool_calls")
            check_finite({"tool_calls": self.tool_calls})
        if self.content is None and not self.tool_calls:
            raise ValueError("content may be null only beside tool_calls")
        return self


class Request(ProtocolModel):
    """A request for a completion.

    Attributes:
        request_id: The caller's label of this request.
        trace_id: Ties the request to a trace across parts.
        model: Name of the model to run.
        prompt: Text to continue; the empty string when ``messages`` is given.
        max_tokens: Most tokens to generate.
        stream: Whether the answer is wanted as stream events.
        temperature: None is greedy.
        top_p: Keep the most likely tokens that reach this mass; None keeps all.
        kv_budget_tokens: The request may hold at most this many KV tokens.
        metadata: Returned untouched.
        messages: A conversation for the model's chat template, instead of ``prompt``.
        sampling: Further rules of sampling.
        priority: Smaller runs first; equal priorities run in order of arrival.
        deadline_ms: Time from arrival after which the request fails with ``deadline_exceeded``.
        cache_salt: Requests share cached prefixes only with requests of the same salt.
    """

    request_id: NonEmpty
    trace_id: NonEmpty
    model: NonEmpty
    prompt: str
    max_tokens: PositiveInt
    stream: bool
    temperature: Annotated[float, Field(gt=0.0, le=LIMITS.temperature)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    kv_budget_tokens: PositiveInt | None = None
    metadata: dict[str, Any] | None = None

    messages: Annotated[list[Message], Field(min_length=1, max_length=LIMITS.messages)] | None = (
        None
    )
    sampling: SamplingParams = Field(default_factory=SamplingParams)
    priority: Annotated[int, Field(ge=-LIMITS.priority, le=LIMITS.priority)] = 0
    deadline_ms: Annotated[float, Field(gt=0.0)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=LIMITS.cache_salt_chars)] | None = (
        None
    )

    _check_metadata = field_validator("metadata")(check_finite)

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if self.messages is not None and self.prompt:
            raise ValueError("prompt and messages exclude each other: with messages, prompt is ''")
        return self


class Metrics(ProtocolModel):
    """Measured figures of one request. What was not measured is None, never 0.

    Attributes:
        ttft_ms: Arrival to first token, in milliseconds.
        tbt_ms: Mean time between tokens, in milliseconds.
        tpot_ms: Mean time per output token after the first, in milliseconds.
        throughput_tps: Output tokens per second.
        peak_mem_mb: Largest resident memory, in MB.
        error_rate: Failed share of what was attempted.
        kv_used_tokens, kv_used_bytes: Largest KV cache in use.
        evict_count, evict_ms: Evictions and the time they took.
        prefix_hit_rate: Share of prompt tokens found in the prefix cache.
        spec_accept_rate: Share of drafted tokens that were accepted.
    """

    ttft_ms: NonNegative
    tbt_ms: NonNegative | None = None
    tpot_ms: NonNegative | None = None
    throughput_tps: NonNegative
    peak_mem_mb: Count
    error_rate: Ratio
    kv_used_tokens: Count | None = None
    kv_used_bytes: Count | None = None
    prefix_hit_rate: Ratio | None = None
    evict_count: Count | None = None
    evict_ms: NonNegative | None = None
    spec_accept_rate: Ratio | None = None

    @model_validator(mode="after")
    def _check_pace(self) -> Self:
        if self.tbt_ms is None and self.tpot_ms is None:
            raise ValueError("one of tbt_ms and tpot_ms must be set")
        return self


class TokenLogprobs(ProtocolModel):
    """Log-probabilities (natural, of the raw logits) at one token of the output or of the prompt.

    Attributes:
        token_id, logprob: The token that stands there.
        top_ids, top_logprobs: The most likely tokens, best first; as many as were asked for.
    """

    token_id: Count
    logprob: float
    top_ids: list[Count] = Field(default_factory=list)
    top_logprobs: list[float] = Field(default_factory=list)


class _Outcome(ProtocolModel):
    """What a finished request leaves behind.

    Attributes:
        index: Which of the ``n`` completions this is.
        logprobs: One entry per output token when ``sampling.logprobs`` asked for them.
        prompt_logprobs: One entry per prompt token when ``sampling.prompt_logprobs`` asked for
            them; None for the first, which follows nothing.
        prompt_tokens: Length of the prompt.
        cached_tokens: How much of the prompt was found in the prefix cache.
        timestamps: When the output passed each stage; None if it ended without a token.
        matched_stop: The stop string or the member of ``stop_token_ids`` that ended the output;
            None when something else did, the end-of-sequence token included.
    """

    request_id: NonEmpty
    trace_id: NonEmpty
    output_text: str
    output_tokens: list[Count]
    finish_reason: FinishReason
    metrics: Metrics
    error: Error | None = None
    index: Count = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_tokens: Count | None = None
    cached_tokens: Count | None = None
    timestamps: Timestamps | None = None
    matched_stop: str | int | None = None

    @model_validator(mode="after")
    def _check_error(self) -> Self:
        if (self.finish_reason == "error") != (self.error is not None):
            raise ValueError("finish_reason is 'error' if and only if error is set")
        return self


class Response(_Outcome):
    """The whole answer to a request."""


class StreamEventStart(ProtocolModel):
    """The request has begun; ``prompt_tokens`` is None when not yet known."""

    event: Literal["start"] = "start"
    request_id: NonEmpty
    trace_id: NonEmpty
    prompt_tokens: Count | None = None


class StreamEventDelta(ProtocolModel):
    """A piece of output. Chunks concatenate to the output text, chunk tokens to its tokens.

    Attributes:
        index: Which of the ``n`` completions this belongs to.
        chunk_logprobs: One entry per chunk token when asked for.
    """

    event: Literal["delta"] = "delta"
    request_id: NonEmpty
    trace_id: NonEmpty
    chunk: str
    chunk_tokens: list[Count]
    index: Count = 0
    chunk_logprobs: list[TokenLogprobs] | None = None


class StreamEventEnd(_Outcome):
    """The request is over; carries the whole outcome."""

    event: Literal["end"] = "end"


StreamEvent = Annotated[
    StreamEventStart | StreamEventDelta | StreamEventEnd, Field(discriminator="event")
]
"""Any stream event; validate with ``pydantic.TypeAdapter(StreamEvent)``."""
