"""Embeddings and relevance scores for asyncio: encoders, and pooled states of a decoder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sagellm.backends.encoder import create_encoder
from sagellm.checkpoint.encoder import is_encoder, open_encoder
from sagellm.checkpoint.resolve import resolve_model
from sagellm.engine.daemon import run_in_daemon
from sagellm.engine.encoder_thread import EncoderThread
from sagellm.engine.validation import check_token_ids
from sagellm.errors import (
    CorruptFileError,
    InvalidArgumentError,
    QueueFullError,
    UnsupportedError,
)
from sagellm.text.pair_tokenizer import PairEncoding, PairTokenizer

if TYPE_CHECKING:
    from sagellm.backends.encoder import EncoderRunner
    from sagellm.engine.async_engine import AsyncEngine

__all__ = [
    "DEFAULT_MAX_QUEUE",
    "DecoderEmbedder",
    "Embedder",
    "EncoderEmbedder",
    "PairEncoding",
    "is_encoder",
    "load_embedder",
]

DEFAULT_MAX_QUEUE = 8192
"""Inputs that may wait for an encoder."""

_MIN_LENGTH = 1e-12  # of a vector to be normalised
Floats = NDArray[np.float32]


class Embedder(Protocol):
    """What makes vectors of texts, and scores of pairs where it can. Serves many tasks at once."""

    @property
    def model_name(self) -> str:
        """Of the checkpoint."""

    @property
    def dimension(self) -> int:
        """Values of a vector."""

    @property
    def max_tokens(self) -> int:
        """Longest input, special tokens included."""

    @property
    def pooling(self) -> Literal["mean", "cls", "last"]:
        """How token states become one vector."""

    @property
    def normalized(self) -> bool:
        """Whether vectors have length 1."""

    @property
    def has_cross_encoder(self) -> bool:
        """Whether ``score`` works."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with the model's own special tokens, not truncated."""

    def encode_pair(self, first: str, second: str) -> PairEncoding:
        """A cross-encoder's input of two texts, such as a query and a document; not truncated."""

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """Vectors of tokenised texts, ``[n, dimension]``.

        Raises:
            InvalidArgumentError: No prompts; one that is empty, longer than ``max_tokens``, or has
                ids outside the vocabulary.
            ResourceExhaustedError: The queue is full.
            UnavailableError: The model is closing or has failed.
        """

    async def score(self, pairs: Sequence[PairEncoding]) -> Floats:
        """Relevance of each pair, ``[n]``: the sigmoid of the cross-encoder's one output.

        Raises:
            UnsupportedError: The model has no cross-encoder head.
            InvalidArgumentError, ResourceExhaustedError, UnavailableError: As ``embed``.
        """

    async def close(self) -> None:
        """Frees the model after the batch at hand; requests that wait get UnavailableError."""


class EncoderEmbedder:
    """An encoder on a thread of its own; what waits at the same time is batched.

    A vector depends on its own tokens only, bitwise, whatever it was batched with. A task that is
    cancelled takes its inputs out of the queue; those in the batch at hand are computed in vain.
    """

    def __init__(
        self,
        runner: EncoderRunner,
        tokenizer: PairTokenizer,
        *,
        max_queue: int = DEFAULT_MAX_QUEUE,
    ) -> None:
        """Starts the thread; ``runner`` belongs to it from now on.

        Args:
            runner: A loaded encoder.
            tokenizer: Of the same model.
            max_queue: Most inputs that may wait, over all requests.
        """
        if max_queue < 1:
            raise InvalidArgumentError(f"max_queue is {max_queue}; choose at least 1")
        config = runner.config
        if tokenizer.size > config.vocab_size:
            raise CorruptFileError(
                f"{config.name}: the tokenizer has {tokenizer.size} tokens, the model only "
                f"{config.vocab_size}; their files do not belong together"
            )
        self._runner = runner
        self._tokenizer = tokenizer
        self._thread = EncoderThread(runner, max_queue)
        self.model_name = config.name
        self.dimension = config.hidden_size
        self.max_tokens = config.max_tokens
        self.pooling: Literal["mean", "cls", "last"] = config.pooling
        self.normalized = config.normalize
        self.has_cross_encoder = config.has_head

    @property
    def device(self) -> str:
        """``cpu`` or ``reference``."""
        return self._runner.device

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive

    @property
    def seconds_since_progress(self) -> float:
        """Since a batch ended or work came; 0 without work. For health checks, from any thread."""
        return self._thread.seconds_since_progress

    def encode(self, text: str, *, truncate_tokens: int | None = None) -> list[int]:
        """See ``Embedder``.

        Args:
            text: Any string.
            truncate_tokens: Cut the text so that it has at most so many tokens.
        """
        return self._tokenizer.encode(text, truncate_tokens=truncate_tokens)

    def encode_pair(
        self, first: str, second: str, *, truncate_tokens: int | None = None
    ) -> PairEncoding:
        """See ``Embedder``.

        Args:
            first: Such as a query.
            second: Such as a document.
            truncate_tokens: Cut the second text so that both have at most so many tokens.
        """
        return self._tokenizer.encode_pair(first, second, truncate_tokens=truncate_tokens)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """See ``Embedder``."""
        inputs = await asyncio.to_thread(self._check_prompts, prompts)
        return await asyncio.wrap_future(self._thread.submit("embed", inputs))

    async def score(self, pairs: Sequence[PairEncoding]) -> Floats:
        """See ``Embedder``."""
        if not self.has_cross_encoder:
            raise UnsupportedError(
                f"{self.model_name} has no cross-encoder head; compare embeddings instead"
            )
        inputs = await asyncio.to_thread(self._check_pairs, pairs)
        logits = await asyncio.wrap_future(self._thread.submit("score", inputs))
        halves = np.tanh(logits.astype(np.float64) / 2)  # sigmoid(x) = (1 + tanh(x / 2)) / 2
        return ((1 + halves) / 2).astype(np.float32)

    async def close(self) -> None:
        """See ``Embedder``."""
        await run_in_daemon(self._thread.close, "sagellm-close")
        self._runner.close()

    def _check_prompts(
        self, prompts: Sequence[Sequence[int]]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        _require_some(prompts)
        checked = [self._check(index, prompt) for index, prompt in enumerate(prompts)]
        return [(ids, np.zeros_like(ids)) for ids in checked]

    def _check_pairs(
        self, pairs: Sequence[PairEncoding]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        _require_some(pairs)
        num_types = self._runner.config.num_token_types
        checked = []
        for index, pair in enumerate(pairs):
            ids = self._check(index, pair.token_ids)
            if len(pair.token_types) != len(ids):
                raise InvalidArgumentError(
                    f"input {index}: {len(ids)} tokens with {len(pair.token_types)} types"
                )
            checked.append((ids, check_token_ids(pair.token_types, num_types)))
        return checked

    def _check(self, index: int, token_ids: Sequence[int]) -> NDArray[np.int32]:
        return _check_prompt(index, token_ids, self._runner.config.vocab_size, self.max_tokens)


class DecoderEmbedder:
    """Pools the last hidden states of a generation model; one prompt at a time, between its steps.

    A prompt is one call to the engine, so it holds up generation for as long as its prefill takes.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        pooling: Literal["last", "mean"] = "last",
        normalize: bool = True,
        *,
        max_queue: int = DEFAULT_MAX_QUEUE,
    ) -> None:
        """Uses ``engine``, which stays its owner's to close.

        Args:
            engine: Runs the model.
            pooling: ``last`` takes the state of the last token, ``mean`` that of all.
            normalize: Whether vectors get length 1.
            max_queue: Most prompts that may wait, over all requests.
        """
        if pooling not in ("last", "mean"):
            raise InvalidArgumentError(f"pooling is {pooling!r}; choose 'last' or 'mean'")
        config = engine.engine.runner.config
        self._async_engine = engine
        self._max_queue = max_queue
        self._num_waiting = 0
        self.model_name = config.name
        self.dimension = config.hidden_size
        self.max_tokens = engine.engine.capacity.max_model_len
        self.pooling: Literal["mean", "cls", "last"] = pooling
        self.normalized = normalize
        self.has_cross_encoder = False

    def encode(self, text: str) -> list[int]:
        """See ``Embedder``."""
        return self._async_engine.engine.tokenizer.encode(text)

    def encode_pair(self, first: str, second: str) -> PairEncoding:
        """Always raises UnsupportedError."""
        raise UnsupportedError(
            f"{self.model_name} has no cross-encoder head; compare embeddings instead"
        )

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """See ``Embedder``."""
        _require_some(prompts)
        vocab_size = self._async_engine.engine.capacity.vocab_size
        checked = [
            _check_prompt(index, prompt, vocab_size, self.max_tokens)
            for index, prompt in enumerate(prompts)
        ]
        if len(checked) > self._max_queue:
            raise InvalidArgumentError(
                f"{len(checked)} inputs in one request; at most {self._max_queue} are taken"
            )
        if self._num_waiting + len(checked) > self._max_queue:
            raise QueueFullError(
                f"{self._num_waiting} inputs are waiting already, at most {self._max_queue} may; "
                "try again later, or raise max_queue"
            )
        waiting = len(checked)
        self._num_waiting += waiting
        try:
            rows = []
            for ids in checked:
                rows.append(await self._embed_one(ids))
                waiting -= 1
                self._num_waiting -= 1
            return np.stack(rows)
        finally:
            self._num_waiting -= waiting

    async def score(self, pairs: Sequence[PairEncoding]) -> Floats:
        """Always raises UnsupportedError."""
        raise UnsupportedError(
            f"{self.model_name} has no cross-encoder head; compare embeddings instead"
        )

    async def close(self) -> None:
        """Nothing: the engine has an owner."""

    async def _embed_one(self, ids: NDArray[np.int32]) -> Floats:
        engine = self._async_engine.engine
        states = await self._async_engine.call(lambda: engine.hidden(ids))
        row = states[-1] if self.pooling == "last" else states.mean(axis=0, dtype=np.float64)
        vector: NDArray[np.float64] = np.array(row, dtype=np.float64)
        if self.normalized:
            vector /= max(float(np.linalg.norm(vector)), _MIN_LENGTH)
        return vector.astype(np.float32)


def load_embedder(
    model: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    isa: str | None = None,
    max_batch_tokens: int | None = None,
    max_queue: int = DEFAULT_MAX_QUEUE,
) -> EncoderEmbedder:
    """Opens an encoder and starts its thread.

    Args:
        model: A catalogue name such as ``minilm``, a pulled Hugging Face repository, or a folder.
        device: ``auto``, ``cpu`` or ``reference``; see ``sagellm.backends.encoder.create_encoder``.
        threads: CPU threads; None takes all of this process.
        isa: Forces an instruction-set path.
        max_batch_tokens: Tokens of one native call.
        max_queue: Most inputs that may wait.

    Raises:
        SagellmError: The model is not found, corrupt or unsupported, or the device cannot run it.
    """
    checkpoint = open_encoder(resolve_model(model))
    tokenizer = PairTokenizer(checkpoint.path, lower_case=checkpoint.config.lower_case)
    runner = create_encoder(
        checkpoint, device, threads=threads, max_batch_tokens=max_batch_tokens, isa=isa
    )
    try:
        return EncoderEmbedder(runner, tokenizer, max_queue=max_queue)
    except BaseException:
        runner.close()
        raise


def _require_some(items: Sequence[object]) -> None:
    if not len(items):
        raise InvalidArgumentError("no input; give at least one text")


def _check_prompt(
    index: int, token_ids: Sequence[int], vocab_size: int, max_tokens: int
) -> NDArray[np.int32]:
    if len(token_ids) > max_tokens:
        raise InvalidArgumentError(
            f"input {index} has {len(token_ids)} tokens, the model takes at most {max_tokens}; "
            "shorten it, or ask for truncation"
        )
    return check_token_ids(token_ids, vocab_size)
