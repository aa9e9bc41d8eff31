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
    """The form that the output must have. Each type but the first two has one field of its own.

    A constrained output ends when its form is complete. It may be cut short by ``max_tokens`` and
    by ``stop`` rules, and is then a prefix of something in that form.

    Attributes:
        type: ``text`` is free, ``json_object`` any JSON object, ``json_schema`` JSON of a given
            schema, ``regex`` a full match of an expression, ``choice`` one of some strings,
            ``lark`` a sentence of a context-free grammar.
        json_schema: The JSON schema itself; set if and only if ``type`` is ``json_schema``.
        regex: A regular expression in the syntax of Rust's ``regex`` crate.
        choices: The permitted outputs, exactly.
        grammar: A grammar in llguidance's variant of the Lark syntax; its start rule is ``start``.
    """

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "lark"]
    json_schema: dict[str, Any] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choices: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=LIMITS.choices),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        for name, kind in _FIELD_OF_TYPE.items():
            if (self.type == kind) != (getattr(self, name) is not None):
                raise ValueError(f"{name} must be set if and only if type is '{kind}'")
        self._check_schema()
        for name, texts in (
            ("regex", [self.regex or ""]),
            ("choices", self.choices or []),
            ("grammar", [self.grammar or ""]),
        ):
            try:
                size = sum(len(text.encode()) for text in texts)
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} is not valid Unicode: lone surrogate") from error
            if size > LIMITS.grammar_bytes:
                raise ValueError(f"{name} has {size} bytes; at most {LIMITS.grammar_bytes}")
        return self

    def _check_schema(self) -> None:
        if self.json_schema is None:
            return
        check_finite(self.json_schema)
        try:
            text = json.dumps(self.json_schema, separators=(",", ":"), ensure_ascii=False)
            size = len(text.encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json_schema is not JSON: {error}") from error
        if size > LIMITS.schema_bytes:
            raise ValueError(f"json_schema has {size} bytes; at most {LIMITS.schema_bytes}")


_FIELD_OF_TYPE = {
    "json_schema": "json_schema",
    "regex": "regex",
    "choices": "choice",
    "grammar": "lark",
}


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
        prompt_logprobs: None for none; otherwise the log-probability of every prompt token but the
            first, given the tokens before it, and this many alternatives.
        skip_special_tokens: Leave control tokens out of the text. The token that ends the output
            is never part of the text.
        min_tokens: Until this many tokens are out, end-of-sequence and ``stop_token_ids`` are not
            chosen, unless the ``response_format`` leaves nothing else. Stop strings still count.
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
    prompt_logprobs: Annotated[int, Field(ge=0, le=LIMITS.logprobs)] | None = None
    skip_special_tokens: bool = True
    min_tokens: Count = 0
