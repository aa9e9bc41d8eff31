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
    _num_buffered: int = field(init=False)  # tokens in the buffer; the last ones of the output lag

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_tokens = self._num_buffered = len(self.prompt)
        self._buffer = self.prompt

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string or named stop token that ended the output; None while it goes on."""
        return self.text.matched_stop(self.output_tokens[-1] if self.output_tokens else None)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and output so far, ``[num_tokens]``: a view, valid until the next ``accept``."""
        return self.slice(0, self.num_tokens)

    def slice(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens ``start .. stop - 1``, a view; guesses are behind the last token."""
        if self._num_buffered < self.num_tokens:
            missing = self.output_tokens[self._num_buffered - self.num_prompt_tokens :]
            self._write(self._num_buffered, missing)
            self._num_buffered = self.num_tokens
        return self._buffer[start:stop]

    def ids(self, start: int, stop: int) -> list[int]:
        """``slice`` as a list; those of the output take no NumPy."""
        first = self.num_prompt_tokens
        if start < first or stop > self.num_tokens:
            values: list[int] = self.slice(start, stop).tolist()
            return values
        return self.output_tokens[start - first : stop - first]

    def set_draft(self, token_ids: list[int]) -> None:
        """Writes guesses behind the last token, for ``slice``; appended tokens replace them."""
        self._write(self.num_tokens, token_ids)

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
        text, grammar = self.text, self.sampling.grammar
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
        for row in rows:
            token_id = row.token_id
            self.num_tokens += 1
            self.output_tokens.append(token_id)
            if row.logprob is not None:
                self.logprobs.append(row)
            if token_id in text.stop_ids:
                text.finish()
                return "stop"
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

    def _write(self, start: int, token_ids: list[int]) -> None:
        stop = start + len(token_ids)
        if stop > len(self._buffer) or self._buffer is self.prompt:
            grown = np.empty(min(2 * stop + 64, self.max_length + 1), dtype=np.int32)
            known = self._num_buffered
            grown[:known] = self._buffer[:known]
            self._buffer = grown
        self._buffer[start:stop] = token_ids


def salt_of(cache_salt: str | None) -> int:
    """The 64-bit salt of a ``cache_salt``; 0 for None."""
    if cache_salt is None:
        return 0
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
