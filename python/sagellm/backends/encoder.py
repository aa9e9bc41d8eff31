"""Encoders on a device: the native core, or NumPy, which is also what the native one is tested by.

Both take ragged batches: sequences of any lengths one after another, nothing padded.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sagellm.backends.cpu import available_threads
from sagellm.backends.devices import select_device
from sagellm.errors import DeviceUnavailableError, InvalidArgumentError, UnsupportedError
from sagellm.native import load_core

if TYPE_CHECKING:
    from sagellm.checkpoint.encoder import EncoderCheckpoint, EncoderConfig

logger = logging.getLogger(__name__)

ENCODER_DEVICES = ("auto", "cpu", "reference")
DEFAULT_BATCH_TOKENS = 1024
"""Tokens of one native call: enough that the weights are read at no cost, few enough that the
activations stay in the caches."""

Floats = NDArray[np.float32]
Tokens = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderBatch:
    """Sequence ``s`` owns the tokens ``query_starts[s]:query_starts[s + 1]``; all int32."""

    token_ids: NDArray[np.int32]
    token_types: NDArray[np.int32]
    query_starts: NDArray[np.int32]

    @classmethod
    def of(
        cls,
        token_ids: Sequence[Tokens],
        token_types: Sequence[Tokens] | None = None,
    ) -> EncoderBatch:
        """Lays sequences one after another.

        Args:
            token_ids: At least one sequence.
            token_types: As many of the same lengths; None makes all of type 0.
        """
        lengths = [len(sequence) for sequence in token_ids]
        ids = np.concatenate([np.asarray(sequence, dtype=np.int32) for sequence in token_ids])
        if token_types is None:
            types = np.zeros_like(ids)
        else:
            types = np.concatenate([np.asarray(each, dtype=np.int32) for each in token_types])
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(token_ids=ids, token_types=types, query_starts=starts)

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch."""
        return len(self.query_starts) - 1


class EncoderRunner(Protocol):
    """A loaded encoder. Calls must not overlap."""

    @property
    def config(self) -> EncoderConfig:
        """Shape of the model."""

    @property
    def device(self) -> str:
        """``cpu`` or ``reference``."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that one call takes."""

    @property
    def memory(self) -> dict[str, int]:
        """Ledger of bytes: ``weights``, ``workspace``."""

    def hidden(self, batch: EncoderBatch) -> Floats:
        """The last layer's states, ``[tokens, hidden]``."""

    def embed(self, batch: EncoderBatch) -> Floats:
        """Pooled, and normalised where the config says so: ``[sequences, hidden]``."""

    def score(self, batch: EncoderBatch) -> Floats:
        """The cross-encoder head's output before any activation, ``[sequences]``."""

    def close(self) -> None:
        """Frees the weights; the runner is unusable afterwards."""


class NativeEncoder:
    """``_core.encoder.Encoder``.

    A sequence's result depends on its own tokens only, bitwise: not on the rest of the batch nor
    on the number of threads.

    Args:
        checkpoint: An opened encoder; its files stay mapped while the runner lives.
        threads: Worker threads; None takes every CPU of the process.
        max_batch_tokens: Tokens of one call; raised to the model's longest sequence.
        isa: Forces an instruction-set path; None takes the best (or ``SAGELLM_CPU_ISA``).

    Raises:
        DeviceUnavailableError: This install has no native core.
        UnsupportedError: The model or the path cannot run here.
    """

    device = "cpu"

    def __init__(
        self,
        checkpoint: EncoderCheckpoint,
        *,
        threads: int | None = None,
        max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
        isa: str | None = None,
    ) -> None:
        core = load_core()
        self.config = config = checkpoint.config
        self.max_batch_tokens = max(max_batch_tokens, config.max_tokens)
        native = core.encoder.EncoderConfig()
        for name in _NATIVE_FIELDS:
            setattr(native, name, getattr(config, name))
        self._encoder = core.encoder.Encoder(
            native,
            [
                (name, checkpoint.files[file], stored)
                for name, (file, stored) in checkpoint.sources.items()
            ],
            num_threads=available_threads() if threads is None else threads,
            max_batch_tokens=self.max_batch_tokens,
            isa=isa or "",
        )

    @property
    def isa(self) -> str:
        """Instruction-set path in use."""
        return str(self._encoder.isa)

    @property
    def threads(self) -> int:
        """Threads of the pool."""
        return int(self._encoder.num_threads)

    @property
    def memory(self) -> dict[str, int]:
        """Ledger of bytes: ``weights``, ``workspace``."""
        return {
            "weights": int(self._encoder.weight_bytes),
            "workspace": int(self._encoder.workspace_bytes),
        }

    def hidden(self, batch: EncoderBatch) -> Floats:
        """See ``EncoderRunner``."""
        states: Floats = self._encoder.hidden(
            batch.token_ids, batch.token_types, batch.query_starts
        )
        return states

    def embed(self, batch: EncoderBatch) -> Floats:
        """See ``EncoderRunner``."""
        pooled: Floats = self._encoder.embed(
            batch.token_ids,
            batch.token_types,
            batch.query_starts,
            self.config.pooling,
            self.config.normalize,
        )
        return pooled

    def score(self, batch: EncoderBatch) -> Floats:
        """See ``EncoderRunner``."""
        scores: Floats = self._encoder.score(batch.token_ids, batch.token_types, batch.query_starts)
        return scores

    def close(self) -> None:
        """See ``EncoderRunner``."""
        del self._encoder


_NATIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_positions",
    "position_offset",
    "num_token_types",
    "norm_eps",
    "has_head",
)
_erf = np.frompyfunc(math.erf, 1, 1)


class ReferenceEncoder:
    """The encoder in plain NumPy: correct, not fast.

    Args:
        checkpoint: An opened encoder.
        dtype: Of the arithmetic; float64 makes it the oracle of tests.
    """

    device = "reference"

    def __init__(
        self,
        checkpoint: EncoderCheckpoint,
        *,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        self.config = checkpoint.config
        self.max_batch_tokens = max(DEFAULT_BATCH_TOKENS, checkpoint.config.max_tokens)
        self._weights = {
            name: checkpoint.load_f32(name).astype(dtype, copy=False) for name in checkpoint.sources
        }

    @property
    def memory(self) -> dict[str, int]:
        """Ledger of bytes: ``weights``, ``workspace``."""
        weights = sum(values.nbytes for values in self._weights.values())
        return {"weights": weights, "workspace": 0}

    def hidden(self, batch: EncoderBatch) -> Any:
        """See ``EncoderRunner``; of the dtype in use."""
        return np.concatenate(self._states(batch))

    def embed(self, batch: EncoderBatch) -> Any:
        """See ``EncoderRunner``; of the dtype in use."""
        mean = self.config.pooling == "mean"
        pooled = np.stack([x.mean(axis=0) if mean else x[0] for x in self._states(batch)])
        if self.config.normalize:
            pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled

    def score(self, batch: EncoderBatch) -> Any:
        """See ``EncoderRunner``; of the dtype in use."""
        if not self.config.has_head:
            raise UnsupportedError("this model has no cross-encoder head")
        first = np.stack([x[0] for x in self._states(batch)])
        dense = np.tanh(self._linear(first, "head.dense"))
        return self._linear(dense, "head.out")[:, 0]

    def close(self) -> None:
        """See ``EncoderRunner``."""
        self._weights.clear()

    def _states(self, batch: EncoderBatch) -> list[NDArray[Any]]:
        """One array of states per sequence."""
        _check(batch, self.config, self.max_batch_tokens)
        starts = batch.query_starts
        return [
            self._forward(batch.token_ids[begin:end], batch.token_types[begin:end])
            for begin, end in itertools.pairwise(starts)
        ]

    def _forward(self, ids: NDArray[np.int32], types: NDArray[np.int32]) -> NDArray[Any]:
        config, w = self.config, self._weights
        positions = config.position_offset + np.arange(len(ids))
        x = w["embed.word"][ids] + w["embed.type"][types] + w["embed.position"][positions]
        x = self._norm(x, "embed.norm")
        for layer in range(config.num_layers):
            at = f"layers.{layer}."
            x = self._norm(x + self._attention(x, at), f"{at}attn_norm")
            inner = self._linear(x, f"{at}up")
            inner = inner * 0.5 * (1 + np.asarray(_erf(inner / math.sqrt(2)), inner.dtype))
            x = self._norm(x + self._linear(inner, f"{at}down"), f"{at}ffn_norm")
        return x

    def _attention(self, x: NDArray[Any], at: str) -> NDArray[Any]:
        heads = (len(x), self.config.num_heads, self.config.head_dim)
        q, k, v = (self._linear(x, at + name).reshape(heads).swapaxes(0, 1) for name in "qkv")
        scores = q @ k.swapaxes(1, 2) / math.sqrt(self.config.head_dim)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = scores / scores.sum(axis=-1, keepdims=True) @ v
        return self._linear(mixed.swapaxes(0, 1).reshape(x.shape), f"{at}o")

    def _linear(self, x: NDArray[Any], name: str) -> NDArray[Any]:
        result: NDArray[Any] = x @ self._weights[name].T + self._weights[f"{name}_bias"]
        return result

    def _norm(self, x: NDArray[Any], name: str) -> NDArray[Any]:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.config.norm_eps)
        result: NDArray[Any] = centred / deviation
        return result * self._weights[name] + self._weights[f"{name}_bias"]


def create_encoder(
    checkpoint: EncoderCheckpoint,
    device: str = "auto",
    *,
    threads: int | None = None,
    max_batch_tokens: int | None = None,
    isa: str | None = None,
) -> EncoderRunner:
    """Loads an encoder on a device.

    Args:
        checkpoint: An opened encoder.
        device: ``cpu`` (native), ``reference`` (NumPy), or ``auto``, which takes the first of the
            two that runs here and says so in one log line.
        threads: CPU threads of ``cpu``; None takes all of this process.
        max_batch_tokens: Tokens of one call on ``cpu``.
        isa: Forces an instruction-set path of ``cpu``.

    Raises:
        InvalidArgumentError: Another device, or an option that the device does not have.
        DeviceUnavailableError: The device cannot run here.
    """
    if device not in ENCODER_DEVICES:
        raise InvalidArgumentError(
            f"encoders do not run on device {device!r}; choose one of {', '.join(ENCODER_DEVICES)}"
        )
    reason = ""
    if device != "reference":
        try:
            select_device("cpu")
            runner = NativeEncoder(
                checkpoint,
                threads=threads,
                max_batch_tokens=max_batch_tokens or DEFAULT_BATCH_TOKENS,
                isa=isa,
            )
        except DeviceUnavailableError as error:
            if device == "cpu":
                raise
            reason = f"; not cpu: {error}"
        else:
            logger.info("device cpu: native encoder, %s", runner.isa)
            return runner
    given = {"threads": threads, "max_batch_tokens": max_batch_tokens, "isa": isa}
    unknown = [name for name, value in given.items() if value is not None]
    if unknown and device == "reference":
        raise InvalidArgumentError(f"device 'reference' has no option {', '.join(unknown)}")
    logger.info("device reference: NumPy encoder, correct and slow%s", reason)
    return ReferenceEncoder(checkpoint)


def _check(batch: EncoderBatch, config: EncoderConfig, max_batch_tokens: int) -> None:
    """The conditions of the native encoder, for the NumPy one."""
    ids, types, starts = batch.token_ids, batch.token_types, batch.query_starts
    if not 1 <= len(ids) <= max_batch_tokens or len(types) != len(ids):
        raise InvalidArgumentError(
            f"a batch of {len(ids)} tokens and {len(types)} types; at most {max_batch_tokens}"
        )
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != len(ids) or (np.diff(starts) < 1).any():
        raise InvalidArgumentError(
            "query_starts must ascend from 0 to the number of tokens, no sequence being empty"
        )
    longest = int(np.diff(starts).max())
    if longest > config.num_positions - config.position_offset:
        raise InvalidArgumentError(
            f"a sequence of {longest} tokens; the model takes "
            f"{config.num_positions - config.position_offset}"
        )
    for name, values, size in (
        ("token id", ids, config.vocab_size),
        ("token type", types, config.num_token_types),
    ):
        if values.min() < 0 or values.max() >= size:
            raise InvalidArgumentError(f"a {name} is outside the {size} of the model")
