"""What the engine asks of a device: one call per step, arrays in, sampled tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.config import ModelConfig
from sagellm.kv.interface import KvCache, KvGroup


@dataclass(slots=True, kw_only=True)  # not frozen: built for every step
class ForwardBatch:
    """The tokens of one engine step. S sequences, T tokens, R rows whose logits are wanted.

    Attributes:
        token_ids: ``[T]`` int32, sequences one after another.
        positions: ``[T]`` int32, consecutive within a sequence.
        query_starts: ``[S + 1]`` int32; sequence ``s`` owns tokens
            ``query_starts[s]:query_starts[s+1]``.
        block_tables: ``[G, S, B]`` int32, 0-padded, one plane per KV group.
        block_copies: ``[C, 2]`` int32 (source, destination), run before anything else.
        logit_rows: ``[R]`` int32 indices into the T tokens, ascending.
        token_sources: ``[T]`` int32: the row of the step queued before whose token stands here, -1
            for ``token_ids``. None unless that step is not finished; see ``QueueingRunner``.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    block_copies: NDArray[np.int32]
    logit_rows: NDArray[np.int32]
    token_sources: NDArray[np.int32] | None = None


@dataclass(slots=True, kw_only=True)  # not frozen: built for every token
class SamplingRow:
    """How to choose one token, from validated values. The rule, in order.

    1. ``bias_ids/bias_values`` are added to the logits.
    2. ``repetition_penalty`` p: for ids in ``history`` (prompt and output), a positive logit is
       divided by p, another one multiplied.
    3. ``presence_penalty`` and ``frequency_penalty`` over ``history[prompt_length:]`` (output).
    4. ``allowed``: bits of permitted ids (grammar), uint32 ``[ceil(vocab/32)]``, little-endian bit
       order; None allows all.
    5. ``temperature`` 0 is greedy: the largest logit, lowest id on a tie. Otherwise the logits are
       divided by it.
    6. ``top_k`` (0 = off; ties at the threshold are kept lowest id first), ``top_p`` over the
       renormalised rest (smallest set of largest probabilities whose sum reaches top_p; at least
       one), ``min_p`` times the largest.
    7. Inverse-CDF draw over the survivors in ascending id order, in float64, with
       ``u = (splitmix64(seed + 0x9E3779B97F4A7C15 * (position + 1)) >> 11) * 2**-53``, position
       being the index of the token drawn. The first id whose cumulative weight exceeds u * total
       is taken.

    ``forced_token`` skips all of this: the row reports that token, with its log-probability.

    Log-probabilities are those of the raw logits (before step 1), natural logarithm.

    Attributes:
        num_logprobs: -1 none; 0 the chosen token's only; n > 0 also the n most likely (ties: lowest
        id).
        history: May be None when no penalty needs it.
        forced_token: -1, or the token to report instead of choosing one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias_ids: NDArray[np.int32] | None = None
    bias_values: NDArray[np.float32] | None = None
    history: NDArray[np.int32] | None = None
    prompt_length: int = 0
    allowed: NDArray[np.uint32] | None = None
    seed: int = 0
    position: int = 0
    num_logprobs: int = -1
    forced_token: int = -1


class SampledRow(NamedTuple):
    """The outcome of one SamplingRow."""

    token_id: int
    logprob: float | None = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    error: str | None = None  # e.g. "logits are not finite"; fails this request only


@dataclass(slots=True, kw_only=True)  # not frozen: built for every step
class StepOutput:
    """Result of one step.

    Attributes:
        rows: One per logit row; empty when no sampling was asked.
        logits: ``[R, vocab]`` float32 when asked for.
        hidden: ``[R, hidden]`` float32 when asked for: what the output head reads, after the final
            norm.
    """

    rows: tuple[SampledRow, ...] = ()
    logits: NDArray[np.float32] | None = None
    hidden: NDArray[np.float32] | None = None


class ModelRunner(Protocol):
    """A loaded model on a device, with its KV storage."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Layers that share block tables."""

    @property
    def device(self) -> str:
        """Such as ``cpu``, ``cuda:0``, ``reference``, ``mock``."""

    @property
    def memory(self) -> dict[str, int]:
        """Ledger of bytes: ``weights``, ``kv``, ``workspace``."""

    @property
    def kv_dtype(self) -> str:
        """What keys and values are stored as, such as ``bf16``, ``int8`` or ``float32``."""

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV block of ``block_size`` tokens, all that it stores included."""

    def allocate_kv(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> KvCache:
        """Creates storage of ``num_blocks`` usable blocks and the cache that manages it. Once."""

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        *,
        return_logits: bool = False,
        return_hidden: bool = False,
    ) -> StepOutput:
        """Runs one forward pass. ``sampling`` is empty or has one entry per logit row.

        Raises:
            UnsupportedError: ``return_hidden`` on a device without hidden states.
        """

    def close(self) -> None:
        """Frees device memory; the runner is unusable afterwards."""


@runtime_checkable
class QueueingRunner(ModelRunner, Protocol):
    """A runner whose device works on its own: the host prepares a step while one is computed.

    ``launch`` queues a step, ``finish`` waits for the oldest that is queued, at most two at a time.
    Steps run in the order in which they were queued, each as if those before were done, so that the
    second may read tokens that the first has yet to choose. ``step`` is for an empty queue.
    """

    def launch(self, batch: ForwardBatch, sampling: tuple[SamplingRow, ...]) -> None:
        """Queues a step; the arguments may change as soon as this returns.

        A row that chose no token, because of an error, gives token 0 to the step behind it.

        Raises:
            InvalidArgumentError: A malformed batch, or two steps are queued already. As after any
                other exception, the queue is what it was.
        """

    def finish(self) -> StepOutput:
        """Waits for the oldest queued step, and takes it off the queue even when it failed."""
