"""A model under a steady load of decoding streams, for benchmarks that watch single steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from sagellm.checkpoint.resolve import resolve_model
from sagellm.engine.config import EngineConfig
from sagellm.engine.engine import Engine
from sagellm.engine.llm import new_request
from sagellm.engine.loading import load_engine
from sagellm.engine.request import RequestState
from sagellm.errors import InvalidArgumentError, SagellmError
from sagellm.terminal import pull_progress


@contextmanager
def loaded_engine(
    model: str, *, streams: int, length: int, threads: int | None, precision: str | None = None
) -> Iterator[Engine]:
    """An engine on the CPU with room for ``streams`` sequences of ``length`` tokens.

    Raises:
        InvalidArgumentError: ``length`` exceeds the model's context.
        SagellmError: The model cannot be loaded.
    """
    with pull_progress(model) as progress:
        path = resolve_model(model, auto_pull=True, progress=progress)
    config = EngineConfig(
        max_num_seqs=streams,
        max_batch_tokens=max(512, streams),
        kv_cache_tokens=streams * (length + 64),
        speculation="off",  # a step makes one token of each stream
    )
    engine = load_engine(path, config, device="cpu", threads=threads, precision=precision)
    try:
        if length > engine.capacity.max_model_len:
            raise InvalidArgumentError(
                f"{length} tokens exceed the model's context of {engine.capacity.max_model_len}; "
                "choose less context"
            )
        yield engine
    finally:
        engine.close()


class Streams:
    """Random prompts, never the same twice, that decode until they are told to stop.

    Attributes:
        prefill_seconds: From submission to the first token of the last stream.
    """

    def __init__(
        self,
        engine: Engine,
        rng: np.random.Generator,
        *,
        streams: int,
        context: int,
        tokens: int,
        temperature: float = 0.0,
    ) -> None:
        self._engine = engine
        self._states: list[RequestState] = []
        start = time.perf_counter()
        for _ in range(streams):
            request = new_request(max_tokens=tokens, ignore_eos=True, temperature=temperature)
            prompt = rng.integers(0, engine.capacity.vocab_size, context, dtype=np.int32)
            state = engine.prepare(request, prompt)
            engine.add(state)
            self._states.append(state)
        while any(state.sequences[0].first_token_at is None for state in self._states):
            self.step()
        self.prefill_seconds = time.perf_counter() - start

    def step(self) -> None:
        """Advances the engine.

        Raises:
            SagellmError: A request failed.
        """
        for output in self._engine.step():
            if output.finished is not None and output.finished.failure is not None:
                raise SagellmError(output.finished.failure.message)

    @property
    def num_output_tokens(self) -> int:
        """Of all streams, so far."""
        return sum(len(state.sequences[0].output_tokens) for state in self._states)

    def stop(self) -> None:
        """Drops the requests."""
        for state in self._states:
            self._engine.cancel(state.key)
