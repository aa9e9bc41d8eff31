"""What chat completions and completions have in common: sampling fields, usage, event bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator
from starlette.responses import Response

from sagellm import __version__
from sagellm.gateway.answers import encode
from sagellm.gateway.conversation import Usage, invalid_values
from sagellm.gateway.errors import ApiError
from sagellm.gateway.request_model import WHOLE, RequestModel, explained, unsupported
from sagellm.protocol import LIMITS, ResponseFormat, SamplingParams

if TYPE_CHECKING:
    from sagellm.gateway.context import RequestContext

SYSTEM_FINGERPRINT = f"sagellm-{__version__}"
DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for; OpenAI's API does the same."""

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")  # no vocabulary is larger
_MIN_SEED = -(2**63)
_TOP_K_OFF = -1
_MIN_REPETITION_PENALTY = 0.01  # dividing by less leaves the range of single precision

Label = Annotated[str, Field(max_length=512)]
StopString = Annotated[str, Field(min_length=1, max_length=LIMITS.stop_string_chars)]
RepetitionPenalty = Annotated[
    float, Field(ge=_MIN_REPETITION_PENALTY, le=LIMITS.repetition_penalty)
]
Penalty = Annotated[float, Field(ge=-LIMITS.additive_penalty, le=LIMITS.additive_penalty)]
TokenId = Annotated[int, Field(ge=0, le=LIMITS.token_id)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=LIMITS.choices)
]
LogitBias = Annotated[
    dict[str, float],
    Field(
        max_length=LIMITS.logit_bias_entries,
        json_schema_extra={
            "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
            "additionalProperties": {
                "type": "number",
                "minimum": -LIMITS.logit_bias,
                "maximum": LIMITS.logit_bias,
            },
        },
    ),
]


# ---------------------------------------------------------------------------------------- requests


class StreamOptions(RequestModel):
    """What a stream holds besides text.

    Attributes:
        include_usage: A last chunk tells the usage.
        continuous_usage_stats: Beside it, every chunk tells the usage so far; not in OpenAI's API.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[
        Literal[False] | None, unsupported("chunks are not padded; leave it out")
    ] = None


class StructuredOutputs(RequestModel):
    """A form for the output; exactly one field is set."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Choices | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None


class GenerationFields(RequestModel):
    """Fields of both routes. Null is the same as leaving a field out.

    Beyond OpenAI's API: ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``,
    ``ignore_eos``, ``min_tokens``, ``skip_special_tokens``, ``priority``, ``cache_salt``,
    ``deadline_ms``, ``structured_outputs`` and its short forms ``guided_*``.
    """

    model: Annotated[str, Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=LIMITS.temperature)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=_TOP_K_OFF, le=LIMITS.token_id), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n: Annotated[int, Field(ge=1, le=LIMITS.n), WHOLE] | None = None
    seed: Annotated[int, Field(ge=_MIN_SEED, lt=LIMITS.seed + 1), WHOLE] | None = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=LIMITS.stop_strings)] | None,
        explained(
            f"a string or at most {LIMITS.stop_strings} strings, none of them empty or longer than "
            f"{LIMITS.stop_string_chars} characters"
        ),
    ] = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=LIMITS.stop_token_ids), WHOLE] | None
    ) = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LIMITS.token_id), WHOLE] | None = None
    skip_special_tokens: bool | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-LIMITS.priority, le=LIMITS.priority), WHOLE] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=LIMITS.cache_salt_chars)] | None = (
        None
    )
    deadline_ms: Annotated[float, Field(gt=0.0)] | None = None
    user: Label | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: Choices | None = None
    guided_grammar: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key, value in (bias or {}).items():
            if not _TOKEN_ID.fullmatch(key):
                raise ValueError("the keys are token ids, such as '50256'")
            if not -LIMITS.logit_bias <= value <= LIMITS.logit_bias:
                raise ValueError(
                    f"the values lie between -{LIMITS.logit_bias:g} and {LIMITS.logit_bias:g}"
                )
        return bias

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        options = self.stream_options
        return self.wants_usage and options is not None and bool(options.continuous_usage_stats)

    def check_stream_options(self) -> None:
        """Refuses ``stream_options`` of an answer that is no stream.

        Raises:
            ApiError: 400.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options is only for streams; set stream", param="stream_options"
            )


def sampling_params(
    query: GenerationFields, *, response_format: ResponseFormat | None = None, **fields: Any
) -> SamplingParams:
    """The rules of sampling that a request asks for.

    Args:
        query: The request.
        response_format: In the request's own form, if it has one.
        **fields: Further fields of ``SamplingParams``.

    Raises:
        ApiError: 400 for an illegal value; it names the field.
    """
    for name in (
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "n",
        "stop_token_ids",
        "ignore_eos",
        "min_tokens",
        "skip_special_tokens",
    ):
        value = getattr(query, name)
        if value is not None:
            fields[name] = value
    if query.top_k is not None and query.top_k != _TOP_K_OFF:
        fields["top_k"] = query.top_k
    if query.seed is not None:
        fields["seed"] = query.seed & LIMITS.seed  # negative seeds: two's complement
    if query.stop is not None:
        fields["stop"] = [query.stop] if isinstance(query.stop, str) else query.stop
    if query.logit_bias:
        fields["logit_bias"] = {int(key): value for key, value in query.logit_bias.items()}
    with invalid_values():
        fields["response_format"] = _only_format(query, response_format)
        return SamplingParams(**fields)


def _only_format(query: GenerationFields, own: ResponseFormat | None) -> ResponseFormat | None:
    """The one form that the output must have."""
    given: list[tuple[str, ResponseFormat]] = []
    if own is not None and own.type != "text":
        given.append(("response_format", own))
    outputs = query.structured_outputs or StructuredOutputs()
    prefix = "structured_outputs."
    schemas = ((f"{prefix}json", outputs.json_), ("guided_json", query.guided_json))
    for name, schema in schemas:
        if schema is not None:
            value = _schema(name, schema)
            given.append((name, ResponseFormat(type="json_schema", json_schema=value)))
    if outputs.json_object:
        given.append((f"{prefix}json_object", ResponseFormat(type="json_object")))
    for name, regex in ((f"{prefix}regex", outputs.regex), ("guided_regex", query.guided_regex)):
        if regex is not None:
            given.append((name, ResponseFormat(type="regex", regex=regex)))
    for name, choices in (
        (f"{prefix}choice", outputs.choice),
        ("guided_choice", query.guided_choice),
    ):
        if choices is not None:
            given.append((name, ResponseFormat(type="choice", choices=choices)))
    for name, grammar in (
        (f"{prefix}grammar", outputs.grammar),
        ("guided_grammar", query.guided_grammar),
    ):
        if grammar is not None:
            given.append((name, ResponseFormat(type="lark", grammar=grammar)))
    if len(given) > 1:
        names = " and ".join(name for name, _ in given)
        raise ApiError(400, f"{names} exclude each other; give one", param=given[1][0])
    if query.structured_outputs is not None and not any(n.startswith(prefix) for n, _ in given):
        raise ApiError(
            400,
            "structured_outputs needs one of json, json_object, regex, choice and grammar",
            param="structured_outputs",
        )
    return given[0][1] if given else None


def _schema(name: str, schema: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ApiError(400, f"{name} must be a JSON schema: an object, or its text", param=name)
    return parsed


# ----------------------------------------------------------------------------------------- answers


class PromptTokensDetails(BaseModel):
    """Part of the prompt that was found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Part of the completion that is reasoning."""

    reasoning_tokens: int


class UsageInfo(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage_info(usage: Usage) -> UsageInfo:
    """Usage in OpenAI's form."""
    return UsageInfo(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=usage.reasoning_tokens),
    )


def finite_logprob(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return 0.0 if logprob is None else max(logprob, LOWEST_LOGPROB)


def json_answer(model: BaseModel) -> Response:
    """A whole answer. Fields that were not set are left out."""
    return Response(model.model_dump_json(exclude_unset=True), media_type="application/json")


def completion_id(prefix: str, context: RequestContext) -> str:
    """The id of an answer; it leads to the request's id in logs and headers."""
    return f"{prefix}-{context.request_id.removeprefix('req-')}"


# ------------------------------------------------------------------------------------------ events


def quote(text: str) -> str:
    """A JSON string, in ASCII: no client can take a character in it for the end of a line."""
    return encode_basestring_ascii(text)


def data_event(body: BaseModel | Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    if isinstance(body, BaseModel):
        body = body.model_dump(exclude_unset=True)
    return b"data: %b\n\n" % encode(body).encode()
