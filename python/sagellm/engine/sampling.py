"""From a request's sampling parameters to the ``SamplingRow`` of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sagellm.backends.interface import SamplingRow

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from sagellm.engine.grammar import SequenceGrammar
    from sagellm.protocol import Request

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """The splitmix64 finalizer: 64 bits in, 64 well-mixed bits out."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(seed: int, index: int) -> int:
    """The seed of completion ``index``. Completion 0 has the request's own seed.

    The sampler draws from ``seed + k * golden``, so seeds that differ by a multiple of ``golden``
    would give shifted copies of one stream; mixing keeps the streams apart.
    """
    return seed & _MASK if index == 0 else mix(mix(seed) + index * _GOLDEN)


class Sampling:
    """The sampling rule of one sequence; ``rows`` is what the next step needs of it.

    Attributes:
        seed: Of this sequence, 64 bits.
        grammar: What the output must follow, if anything.
        needs_tokens: Whether the rule looks at the tokens so far.
    """

    __slots__ = (
        "_barred",
        "_bias_ids",
        "_bias_values",
        "_fixed",
        "_frequency",
        "_min_length",
        "_min_p",
        "_needs_history",
        "_num_logprobs",
        "_presence",
        "_prompt_length",
        "_repetition",
        "_temperature",
        "_top_k",
        "_top_p",
        "grammar",
        "needs_tokens",
        "seed",
    )

    def __init__(
        self,
        request: Request,
        seed: int,
        prompt_length: int,
        *,
        vocab_size: int = 0,
        end_ids: Collection[int] = (),
        grammar: SequenceGrammar | None = None,
    ) -> None:
        """Reads a validated request.

        Args:
            request: Temperature None is greedy.
            seed: Of this sequence, 64 bits.
            prompt_length: Tokens before the first output.
            vocab_size: Needed with ``min_tokens``, as are
            end_ids: the tokens that end the output.
            grammar: What the output must follow, its own copy.
        """
        params = request.sampling
        self.seed = seed
        self.grammar = grammar
        self._min_length = prompt_length + params.min_tokens
        self._barred: NDArray[np.uint32] | None = None  # before that length
        if params.min_tokens and end_ids:
            self._barred = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
            for token_id in end_ids:
                self._barred[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._temperature = request.temperature or 0.0
        self._top_k = params.top_k
        self._top_p = 1.0 if request.top_p is None else request.top_p
        self._min_p = params.min_p
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._prompt_length = prompt_length
        self._num_logprobs = -1 if params.logprobs is None else params.logprobs
        self._needs_history = (self._repetition, self._presence, self._frequency) != (1.0, 0.0, 0.0)
        self._bias_ids: NDArray[np.int32] | None = None
        self._bias_values: NDArray[np.float32] | None = None
        if params.logit_bias:
            ids = sorted(params.logit_bias)
            self._bias_ids = np.array(ids, dtype=np.int32)
            self._bias_values = np.array([params.logit_bias[i] for i in ids], dtype=np.float32)
        self.needs_tokens = self._needs_history or grammar is not None
        # Without penalties and a set of allowed tokens, only the position changes.
        self._fixed = self._build(None, 0, None) if not self._needs_history else None

    def rows(
        self, length: int, tokens: NDArray[np.int32] | None, num_drafted: int = 0
    ) -> list[SamplingRow]:
        """How to draw the token behind the last one that is sure, and behind each guess.

        Valid until the next call.

        Args:
            length: Prompt and output so far, and behind them
            num_drafted: tokens that are guessed; the grammar, if there is one, permits them.
            tokens: All of these; may be None unless ``needs_tokens``.
        """
        if num_drafted == 0:
            fixed = self._fixed
            if fixed is None or self.grammar is not None or length < self._min_length:
                return [self._row(tokens, length, self.grammar)]
            fixed.position = length
            return [fixed]
        first = length - num_drafted
        positions = range(first, length + 1)
        if self.grammar is None:
            return [self._row(tokens, position, None) for position in positions]
        assert tokens is not None
        ahead = self.grammar.copy()
        rows: list[SamplingRow] = []
        for position in positions:
            if position > first:
                ahead.accept(int(tokens[position - 1]))
            row = self._row(tokens, position, ahead)
            assert row.allowed is not None
            row.allowed = row.allowed.copy()  # the grammar writes the next one to the same array
            rows.append(row)
        return rows

    def _row(
        self, tokens: NDArray[np.int32] | None, position: int, grammar: SequenceGrammar | None
    ) -> SamplingRow:
        barred = self._barred if position < self._min_length else None
        allowed = None
        if grammar is not None:
            allowed = grammar.allowed(barred)
        elif barred is not None:
            allowed = ~barred
        history = None
        if self._needs_history:
            assert tokens is not None
            history = tokens[:position]
        return self._build(history, position, allowed)

    def _build(
        self,
        history: NDArray[np.int32] | None,
        position: int,
        allowed: NDArray[np.uint32] | None,
    ) -> SamplingRow:
        return SamplingRow(
            temperature=self._temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=self._min_p,
            repetition_penalty=self._repetition,
            presence_penalty=self._presence,
            frequency_penalty=self._frequency,
            bias_ids=self._bias_ids,
            bias_values=self._bias_values,
            history=history,
            prompt_length=self._prompt_length,
            allowed=allowed,
            seed=self.seed,
            position=position,
            num_logprobs=self._num_logprobs,
        )
