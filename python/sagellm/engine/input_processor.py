"""From a request of the protocol to what the engine keeps of it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from sagellm.engine.grammar import GrammarCompiler
from sagellm.engine.output_text import OutputText
from sagellm.engine.request import PromptScores, RequestState, Sequence, salt_of
from sagellm.engine.sampling import Sampling, derive_seed, mix
from sagellm.engine.validation import check_token_ids, validate_request

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from sagellm.engine.grammar import SequenceGrammar
    from sagellm.engine.validation import Capacity
    from sagellm.protocol import Request
    from sagellm.text import Tokenizer


class InputProcessor:
    """Validates requests and gives them keys, sequences and seeds. Safe on any thread."""

    def __init__(self, tokenizer: Tokenizer, capacity: Capacity, seed: int) -> None:
        """Creates one for a model.

        Args:
            tokenizer: Of the model.
            capacity: What fits.
            seed: Of the engine, for requests without a seed of their own.
        """
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._seed = seed
        self._grammars = GrammarCompiler(tokenizer, capacity.vocab_size)
        self._keys = itertools.count()
        self._sequence_ids = itertools.count()

    def next_sequence_id(self) -> int:
        """An id that no sequence has had."""
        return next(self._sequence_ids)

    def process(
        self, request: Request, prompt_token_ids: Iterable[int], queued_at: float
    ) -> RequestState:
        """Makes the state of a new request.

        Args:
            request: From any front door.
            prompt_token_ids: Its encoded prompt.
            queued_at: When it came, in Unix seconds.

        Raises:
            SagellmError: The request is invalid, not supported, or could never fit.
        """
        prompt = check_token_ids(prompt_token_ids, self._capacity.vocab_size)
        length = validate_request(request, len(prompt), self._capacity)
        form = request.sampling.response_format
        grammar = None if form is None else self._grammars.compile(form)
        state = RequestState(
            key=next(self._keys),
            request=request,
            salt=salt_of(request.cache_salt),
            queued_at=queued_at,
        )
        if request.deadline_ms is not None:
            state.deadline = queued_at + request.deadline_ms / 1000.0
        state.sequences = tuple(
            self._new_sequence(state, index, prompt, length, grammar)
            for index in range(request.sampling.n)
        )
        first = state.sequences[0]
        first.children = state.sequences[1:]
        state.num_unfinished = len(state.sequences)
        if request.sampling.prompt_logprobs is not None:
            state.scores = first.scores = PromptScores(
                num_logprobs=request.sampling.prompt_logprobs, prompt_length=len(prompt)
            )
        return state

    def _new_sequence(
        self,
        state: RequestState,
        index: int,
        prompt: NDArray[np.int32],
        max_length: int,
        grammar: SequenceGrammar | None,
    ) -> Sequence:
        request, text = state.request, OutputText(state.request, self._tokenizer)
        seed = request.sampling.seed
        if seed is None:
            seed = mix(mix(self._seed) + state.key)
        return Sequence(
            sequence_id=next(self._sequence_ids),
            state=state,
            index=index,
            order=(request.priority, state.key, index),
            prompt=prompt,
            max_length=max_length,
            sampling=Sampling(
                request,
                derive_seed(seed, index),
                len(prompt),
                vocab_size=self._capacity.vocab_size,
                end_ids=text.stop_ids,
                grammar=None if grammar is None else grammar.copy(),
            ),
            text=text,
        )
