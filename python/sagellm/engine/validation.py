"""The one validator that every front door uses, before a request reaches the queue."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sagellm.engine.memory import blocks_needed, tokens_that_fit
from sagellm.errors import InvalidArgumentError, ResourceExhaustedError
from sagellm.protocol import LIMITS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from sagellm.kv.interface import KvGroup
    from sagellm.protocol import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the engine can hold.

    Attributes:
        vocab_size: Of the model.
        max_model_len: Longest sequence, prompt and output.
        groups, block_size, num_blocks, chunk_tokens: Shape of the KV pool.
    """

    vocab_size: int
    max_model_len: int
    groups: tuple[KvGroup, ...]
    block_size: int
    num_blocks: int
    chunk_tokens: int

    @property
    def pool_tokens(self) -> int:
        """Longest sequence that has the pool to itself."""
        return tokens_that_fit(self.groups, self.block_size, self.num_blocks, self.chunk_tokens)

    def holds(self, num_tokens: int) -> bool:
        """Whether a sequence of that length fits in the pool alone."""
        needed = blocks_needed(self.groups, self.block_size, num_tokens, self.chunk_tokens)
        return needed <= self.num_blocks

    def max_output_tokens(self, num_prompt_tokens: int, n: int = 1) -> int:
        """Most output tokens that each completion of such a prompt can have; 0 without room.

        Args:
            num_prompt_tokens: Length of the prompt.
            n: Completions; it does not matter, for those that do not fit together take turns.
        """
        del n
        # A last token is never written to the cache, so it needs no place there.
        length = min(self.max_model_len, self.pool_tokens + 1)
        return max(0, length - num_prompt_tokens)


def check_token_ids(token_ids: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    """Turns token ids into an int32 array.

    Raises:
        InvalidArgumentError: Not whole numbers, empty, or outside the vocabulary.
    """
    try:
        listed = token_ids if isinstance(token_ids, np.ndarray) else list(token_ids)
        ids = np.asarray(listed)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(
            f"token ids must be a flat list of whole numbers: {error}"
        ) from None
    if ids.size == 0:
        raise InvalidArgumentError("the prompt is empty; give at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidArgumentError("token ids must be a flat list of whole numbers")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InvalidArgumentError(
            f"token id {wrong} is outside the vocabulary of {vocab_size}; encode the text with "
            "this model's own tokenizer"
        )
    return np.ascontiguousarray(ids, dtype=np.int32)


def validate_request(request: Request, num_prompt_tokens: int, capacity: Capacity) -> int:
    """Checks a request against the model and the limits.

    Args:
        request: Its fields; a request built around pydantic's checks is caught here as well.
        num_prompt_tokens: Length of its encoded prompt.
        capacity: Of the engine.

    Returns:
        The length at which the sequence ends with ``length``: the least of prompt + max_tokens,
        ``max_model_len``, and what ``kv_budget_tokens`` allows to each completion (a last token is
        never written to the cache, so it needs no place there).

    Raises:
        InvalidArgumentError: A value that the caller may correct.
        ResourceExhaustedError: The request could never run in this KV pool.
    """
    _check_numbers(request)
    _check_tokens(request, capacity.vocab_size)
    if num_prompt_tokens < 1:
        raise InvalidArgumentError("the prompt is empty; give a text or at least one token")
    if num_prompt_tokens >= capacity.max_model_len:
        raise InvalidArgumentError(
            f"the prompt has {num_prompt_tokens} tokens and the longest sequence is "
            f"{capacity.max_model_len}, which leaves no room for output; shorten the prompt or "
            "raise max_model_len (up to the model's own limit)"
        )
    length = min(num_prompt_tokens + request.max_tokens, capacity.max_model_len)
    if request.kv_budget_tokens is not None:
        length = min(length, _budget_length(request, num_prompt_tokens))
    if not capacity.holds(length - 1):
        room = capacity.pool_tokens
        remedy = (
            f"lower max_tokens to at most {room - num_prompt_tokens + 1}"
            if room >= num_prompt_tokens
            else f"shorten the prompt to at most {room} tokens"
        )
        raise ResourceExhaustedError(
            f"the request needs room for {length - 1} tokens ({num_prompt_tokens} of prompt) and "
            f"the whole KV pool holds {room}; {remedy}, or raise kv_cache_gb"
        )
    return length


def _budget_length(request: Request, num_prompt_tokens: int) -> int:
    budget, n = request.kv_budget_tokens or 0, request.sampling.n
    spare = (budget - num_prompt_tokens) // n  # the prompt is shared, outputs are not
    if budget < num_prompt_tokens:
        raise ResourceExhaustedError(
            f"kv_budget_tokens is {budget} and the prompt alone takes {num_prompt_tokens}; raise "
            f"it to at least {num_prompt_tokens}"
        )
    return num_prompt_tokens + spare + 1


def _check_numbers(request: Request) -> None:
    params = request.sampling
    _within("temperature", request.temperature, 0.0, LIMITS.temperature, above=True)
    _within("top_p", request.top_p, 0.0, 1.0, above=True)
    _within("min_p", params.min_p, 0.0, 1.0)
    _within(
        "repetition_penalty", params.repetition_penalty, 0.0, LIMITS.repetition_penalty, above=True
    )
    for name in ("presence_penalty", "frequency_penalty"):
        bound = LIMITS.additive_penalty
        _within(name, getattr(params, name), -bound, bound)
    _within("deadline_ms", request.deadline_ms, 0.0, math.inf, above=True)
    _within("n", params.n, 1, LIMITS.n)
    _within("max_tokens", request.max_tokens, 1, math.inf)
    _within("logprobs", params.logprobs, 0, LIMITS.logprobs)
    _within("prompt_logprobs", params.prompt_logprobs, 0, LIMITS.logprobs)
    _within("min_tokens", params.min_tokens, 0, request.max_tokens)
    _within("the number of stop strings", len(params.stop), 0, LIMITS.stop_strings)
    _within(
        "the number of logit_bias entries", len(params.logit_bias), 0, LIMITS.logit_bias_entries
    )
    for value in params.logit_bias.values():
        _within("logit_bias", value, -LIMITS.logit_bias, LIMITS.logit_bias)
    form = params.response_format
    if form is not None and form.type != "text" and params.ignore_eos:
        raise InvalidArgumentError(
            f"response_format {form.type!r} ends the output when it is complete, which ignore_eos "
            "forbids; leave ignore_eos out"
        )


def _check_tokens(request: Request, vocab_size: int) -> None:
    named = (
        ("logit_bias", request.sampling.logit_bias),
        ("stop_token_ids", request.sampling.stop_token_ids),
    )
    for name, ids in named:
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidArgumentError(
                    f"{name} names token {token_id}, outside the vocabulary of {vocab_size}"
                )


def _within(
    name: str, value: float | None, low: float, high: float, *, above: bool = False
) -> None:
    if value is None:
        return
    if math.isnan(value) or value > high or value < low or (above and value == low):
        interval = f"{'(' if above else '['}{low:g}, {high:g}]"
        raise InvalidArgumentError(f"{name} is {value}; choose a value in {interval}")
