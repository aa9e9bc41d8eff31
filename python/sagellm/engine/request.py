"""What the engine keeps of a request: one ``RequestState`` and its ``Sequence`` objects.

A sequence moves between three states::

    WAITING --admitted--> RUNNING --stop, length, error, cancel--> FINISHED
       ^                     |
       +------preempted------+        (blocks given back; its tokens are computed again)

The other sequences of a request with ``n > 1`` are WAITING outside the queue (``Sequence.children``
of the first) until the prompt is computed; then they share its blocks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from sagellm.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    UnsupportedError,
)
from sagellm.protocol import ErrorCode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.backends.interface import SampledRow
    from sagellm.engine.output_text import OutputText
    from sagellm.engine.prompt_lookup import PromptLookup
    from sagellm.engine.sampling import Sampling
    from sagellm.protocol import FinishReason, Request


class Status(IntEnum):
    """Where a sequence stands."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request is answered with an error, in the terms of the protocol."""

    code: ErrorCode
    message: str
    retryable: bool

    @classmethod
    def from_exception(cls, error: BaseException) -> Failure:
        """Finds the code of an exception; what is not the request's fault is ``unavailable``."""
        message = str(error) or type(error).__name__
        if isinstance(error, (ResourceExhaustedError, MemoryError)):
            return cls(code=ErrorCode.RESOURCE_EXHAUSTED, message=message, retryable=True)
        if isinstance(error, InvalidArgumentError):
            return cls(code=ErrorCode.INVALID_ARGUMENT, message=message, retryable=False)
        if isinstance(error, (UnsupportedError, NotImplementedError)):
            return cls(code=ErrorCode.NOT_IMPLEMENTED, message=message, retryable=False)
        return cls(
            code=ErrorCode.UNAVAILABLE,
            message=f"the engine failed on this request: {message}",
            retryable=True,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """A request inside the engine.

    Attributes:
        key: The engine's own id, in order of arrival; ``request.request_id`` is the client's label.
        salt: Separates cached prefixes; 0 without ``cache_salt``.
        queued_at, scheduled_at: Unix seconds; ``scheduled_at`` is None until first admitted.
        deadline: Unix seconds after which the request fails, or None.
        num_unfinished: Sequences without an answer yet.
        scores: What the request asked to know of its prompt, if anything.
    """

    key: int
    request: Request
    salt: int
    queued_at: float
    deadline: float | None = None
    scheduled_at: float | None = None
    sequences: tuple[Sequence, ...] = ()
    num_unfinished: int = 0
    scores: PromptScores | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class PromptScores:
    """Log-probabilities of a prompt's tokens, collected while the prompt is computed.

    Attributes:
        num_logprobs: Alternatives per token.
        prompt_length: Tokens of the prompt.
        rows: One per token from the start on; None for the first, which follows nothing.
        is_sent: They have gone out with an output.
    """

    num_logprobs: int
    prompt_length: int
    rows: list[SampledRow | None] = field(default_factory=lambda: [None])
    is_sent: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every token has its row."""
        return len(self.rows) == self.prompt_length

    def positions(self, start: int, stop: int) -> range:
        """Those of ``start .. stop - 1`` whose logits score a prompt token not scored before."""
        first = max(start, len(self.rows) - 1)
        return range(first, max(first, min(stop, self.prompt_length - 1)))


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One completion of a request.

    Attributes:
        sequence_id: Id in the KV cache.
        index: Which of the request's ``n`` completions.
        order: Sorts sequences: priority, arrival, index; smaller runs first and is preempted last.
        num_prompt_tokens, num_tokens: Prompt, and prompt with output.
        num_computed: Leading tokens whose KV is in the cache.
        num_reserved: Positions below are writable (whole blocks).
        num_committed: ``num_computed`` as last told to the cache, at a block boundary.
        max_length: Finish with ``length`` at this many tokens.
        children: Sequences to fork from this one when its prompt is computed.
        num_cached: Prompt tokens found in the prefix cache when first admitted.
        scores: The request's, on the sequence that computes the prompt first.
        num_preemptions: Times its blocks were taken away.
        peak_blocks: Most blocks held, as seen when they were given back.
        lookup: What speculation keeps of it; None until it is asked.
        num_drafted, num_accepted: Guesses computed, and those among them that the sampler drew.
    """

    sequence_id: int
    state: RequestState
    index: int
    order: tuple[int, int, int]
    prompt: NDArray[np.int32]
    max_length: int
    sampling: Sampling
    text: OutputText
    status: Status = Status.WAITING
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_computed: int = 0
    num_reserved: int = 0
    num_committed: int = 0
    children: tuple[Sequence, ...] = ()
    scores: PromptScores | None = None
    num_cached: int = 0
    num_preemptions: int = 0
    peak_blocks: int = 0
    peak_tokens: int = 0
    lookup: PromptLookup | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    output_tokens: list[int] = field(default_factory=list)
    logprobs: list[SampledRow] = field(default_factory=list)
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reason: FinishReason | None = None
    failure: Failure | None = None
    num_sent_tokens: int = 0
    _buffer: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_tokens = len(self.prompt)
        self._buffer = self.prompt

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string or named stop token that ended the output; None while it goes on."""
        return self.text.matched_stop(self.output_tokens[-1] if self.output_tokens else None)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and output so far, ``[num_tokens]``: a view, valid until the next ``append``."""
        return self._buffer[: self.num_tokens]

    def slice(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens ``start .. stop - 1``, a view; guesses are behind the last token."""
        return self._buffer[start:stop]

    def set_draft(self, token_ids: list[int]) -> None:
        """Writes guesses behind the last token, for ``slice``; appended tokens replace them."""
        end = self.num_tokens + len(token_ids)
        self._make_room(end)
        self._buffer[self.num_tokens : end] = token_ids

    def append(self, token_id: int) -> None:
        """Adds one output token."""
        position = self.num_tokens
        self._make_room(position + 1)
        self._buffer[position] = token_id
        self.num_tokens = position + 1
        self.output_tokens.append(token_id)

    def accept(self, rows: list[SampledRow], now: float) -> FinishReason | None:
        """Adds sampled tokens up to one that ends the sequence.

        Args:
            rows: The tokens in their order, none with an error.
            now: Unix seconds.

        Returns:
            Why the sequence ends; None if it goes on.

        Raises:
            InvalidArgumentError: The grammar outgrows its limits.
        """
        for row in rows:
            reason = self._accept(row, now)
            if reason is not None:
                return reason
        return None

    def _accept(self, row: SampledRow, now: float) -> FinishReason | None:
        token_id, text = row.token_id, self.text
        self.append(token_id)
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
        if row.logprob is not None:
            self.logprobs.append(row)
        if token_id in text.stop_ids:
            text.finish()
            return "stop"
        grammar = self.sampling.grammar
        is_complete = grammar is not None and grammar.accept(token_id)
        if text.push(token_id):
            return "stop"
        if is_complete:
            text.finish()
            return "stop"
        if self.num_tokens >= self.max_length:
            return "stop" if text.finish() else "length"
        return None

    def failure_of(self, error: str) -> Failure:
        """Why the request fails if the sampler found no token for this sequence."""
        grammar = self.sampling.grammar
        if grammar is not None and grammar.error is not None:
            return Failure(
                code=ErrorCode.INVALID_ARGUMENT,
                message=f"the response_format cannot be followed: {grammar.error}",
                retryable=False,
            )
        return Failure(
            code=ErrorCode.UNAVAILABLE,
            message=(
                f"no token could be chosen: {error}; check the model file, or try another "
                "precision or other sampling parameters"
            ),
            retryable=False,
        )

    def _make_room(self, size: int) -> None:
        if size > len(self._buffer) or self._buffer is self.prompt:
            grown = np.empty(min(2 * size + 64, self.max_length + 1), dtype=np.int32)
            grown[: self.num_tokens] = self._buffer[: self.num_tokens]
            self._buffer = grown


def salt_of(cache_salt: str | None) -> int:
    """The 64-bit salt of a ``cache_salt``; 0 for None."""
    if cache_salt is None:
        return 0
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
