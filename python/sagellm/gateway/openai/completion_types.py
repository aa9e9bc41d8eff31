"""What ``/v1/completions`` takes and gives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from sagellm.gateway.openai.common import GenerationFields, TokenId, UsageInfo
from sagellm.gateway.request_model import WHOLE, explained, unsupported
from sagellm.protocol import LIMITS

DEFAULT_MAX_TOKENS = 16

_Prompts = Field(min_length=1, max_length=LIMITS.prompts_per_request)
_TokenIds = Annotated[list[TokenId], Field(min_length=1), WHOLE]


class CompletionRequest(GenerationFields):
    """Prompts to continue.

    Defaults: ``temperature`` 1 (0 is greedy), a random ``seed``, ``max_tokens`` 16. With ``echo``
    the answer begins with the prompt, and its log-probabilities with those of the prompt's tokens;
    with ``max_tokens`` 0 as well, that is all of it.
    """

    prompt: Annotated[
        str | _TokenIds | Annotated[list[str], _Prompts] | Annotated[list[_TokenIds], _Prompts],
        explained(
            "a string, a list of token ids, or a list of at most "
            f"{LIMITS.prompts_per_request} of either, none of them empty"
        ),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=LIMITS.token_id), WHOLE] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=LIMITS.logprobs), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=LIMITS.n), WHOLE] | None = None
    suffix: Annotated[
        None, unsupported("models here continue text and do not fill gaps; leave it out")
    ] = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities, one entry per token; None for the first token of a prompt.

    A token that is no valid text by itself is spelt ``bytes:`` with its bytes in hexadecimal.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """One completion; in a stream, what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageInfo | None = None
