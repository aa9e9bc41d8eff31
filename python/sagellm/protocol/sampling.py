"""How the next token is chosen, beyond temperature and top_p."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from sagellm.protocol._model import Count, ProtocolModel, Ratio, check_finite
from sagellm.protocol.limits import LIMITS

TokenId = Annotated[int, Field(ge=0, le=LIMITS.token_id)]
StopString = Annotated[str, Field(min_length=1, max_length=LIMITS.stop_string_chars)]
Bias = Annotated[float, Field(ge=-LIMITS.logit_bias, le=LIMITS.logit_bias)]
Penalty = Annotated[float, Field(ge=-LIMITS.additive_penalty, le=LIMITS.additive_penalty)]


class ResponseFormat(ProtocolModel):
    """The form that the output must have.

    Attributes:
        type: ``text`` is free, ``json_object`` any JSON object, ``json_schema`` a given schema.
        json_schema: The JSON schema itself; set if and only if ``type`` is ``json_schema``.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be set if and only if type is 'json_schema'")
        if self.json_schema is not None:
            check_finite(self.json_schema)
            try:
                text = json.dumps(self.json_schema, separators=(",", ":"), ensure_ascii=False)
                size = len(text.encode())
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"json_schema is not JSON: {error}") from error
            if size > LIMITS.schema_bytes:
                raise ValueError(f"json_schema has {size} bytes; at most {LIMITS.schema_bytes}")
        return self


class SamplingParams(ProtocolModel):
    """Optional rules of sampling; the defaults leave the distribution alone.

    Attributes:
        top_k: Keep the k most likely tokens; 0 keeps all.
        min_p: Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens already in
            prompt or output; 1 is off.
        presence_penalty: Subtracted once from logits of tokens already in the output.
        frequency_penalty: Subtracted per occurrence in the output.
        stop: Generation ends before the first of these strings.
        stop_token_ids: Generation ends at any of these tokens, which are not part of the text.
        seed: Makes sampling repeatable; None draws one.
        logprobs: None for none; otherwise the chosen token's and this many alternatives'.
        logit_bias: Token id to value added to its logit.
        n: Independent completions of the prompt.
        ignore_eos: Generate on past the end-of-sequence token.
        response_format: Constrains the output's form.
    """

    top_k: Count = 0
    min_p: Ratio = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=LIMITS.repetition_penalty)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    stop: list[StopString] = Field(default_factory=list, max_length=LIMITS.stop_strings)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=LIMITS.stop_token_ids)
    seed: Annotated[int, Field(ge=0, le=LIMITS.seed)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=LIMITS.logprobs)] | None = None
    logit_bias: dict[TokenId, Bias] = Field(
        default_factory=dict, max_length=LIMITS.logit_bias_entries
    )
    n: Annotated[int, Field(ge=1, le=LIMITS.n)] = 1
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
