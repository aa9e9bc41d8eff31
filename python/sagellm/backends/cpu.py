"""The native CPU backend: a thin face of ``_core.model.Decoder``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sagellm.backends.interface import ForwardBatch, SampledRow, SamplingRow, StepOutput
from sagellm.checkpoint.rope import inverse_frequencies
from sagellm.errors import InvalidArgumentError
from sagellm.kv import create_kv_cache, plan_kv_groups
from sagellm.native import load_core

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from sagellm.checkpoint import Checkpoint
    from sagellm.checkpoint.config import ModelConfig, RopeConfig
    from sagellm.kv.interface import KvCache, KvGroup

Precision = Literal["a8", "a15"]
KvDtype = Literal["auto", "bf16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """Time inside the native step.

    Attributes:
        steps: How many.
        seconds: Wall time of all of them.
        threads: Per thread, phase to seconds; ``wait`` is for the other threads. They add up to
            ``seconds``.
    """

    steps: int
    seconds: float
    threads: list[dict[str, float]]


def available_threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


_as_row = partial(tuple.__new__, SampledRow)  # of a tuple of its fields; no Python per row


def as_rows(tuples: tuple[tuple[Any, ...], ...]) -> tuple[SampledRow, ...]:
    """The rows of a native step."""
    return tuple(map(_as_row, tuples))


def arrays_of(batch: ForwardBatch) -> tuple[NDArray[np.int32], ...]:
    """What a native decoder takes of every step, in its order."""
    return (
        batch.token_ids,
        batch.positions,
        batch.query_starts,
        batch.block_tables,
        batch.block_copies,
        batch.logit_rows,
    )


class NativeStep:
    """``ModelRunner.step`` on a native module's ``model.Decoder``."""

    _decoder: Any

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        *,
        return_logits: bool = False,
        return_hidden: bool = False,
    ) -> StepOutput:
        """Runs one forward pass in one native call; see ``ModelRunner.step``."""
        rows, logits, hidden = self._decoder.step(
            *arrays_of(batch), sampling, return_logits, return_hidden
        )
        return StepOutput(rows=as_rows(rows), logits=logits, hidden=hidden)


class CpuRunner(NativeStep):
    """Runs a checkpoint on the CPU kernels of ``_core``.

    Args:
        checkpoint: An opened model; its files stay mapped while the runner lives.
        threads: Worker threads; None takes every CPU of the process.
        max_batch_tokens: Largest number of tokens in one step.
        precision: ``a8`` multiplies quantized weights with int8 activations (one scale per 32
            values); ``a15`` with
            15-bit ones, closer to float32 at about half the prefill speed.
        isa: Forces an instruction-set path; None takes the best (or ``SAGELLM_CPU_ISA``).
        kv_dtype: What keys and values are stored as: ``bf16`` (also ``auto``), or ``int8``, codes
            with one scale per token and head in about half of the memory.

    Raises:
        DeviceUnavailableError: This install has no native core.
        UnsupportedError: The model or the path cannot run here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        max_batch_tokens: int = 512,
        precision: Precision = "a8",
        isa: str | None = None,
        kv_dtype: KvDtype = "auto",
    ) -> None:
        if kv_dtype not in ("auto", "bf16", "int8"):
            raise InvalidArgumentError(f"kv_dtype is {kv_dtype!r}; choose 'auto', 'bf16' or 'int8'")
        if precision not in ("a8", "a15"):
            raise InvalidArgumentError(f"precision is {precision!r}; choose 'a8' or 'a15'")
        if threads is not None and not isinstance(threads, int):
            raise InvalidArgumentError(f"threads is {threads!r}; choose a whole number")
        self._core = load_core()
        self._config = checkpoint.config
        self._groups = plan_kv_groups(checkpoint.config.layer_windows)
        self._decoder = self._core.model.Decoder(
            native_config(self._core, checkpoint.config, self._groups),
            [
                (name, checkpoint.files[s.file], s.tensor, s.unpermute_heads, s.add_one)
                for name, s in checkpoint.sources.items()
            ],
            num_threads=available_threads() if threads is None else threads,
            max_batch_tokens=max_batch_tokens,
            accurate=precision == "a15",
            isa=isa or "",
        )
        self._precision = precision
        self._kv_dtype = "bf16" if kv_dtype == "auto" else kv_dtype
        self._kv_bytes = 0

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._config

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Layers that share block tables."""
        return self._groups

    @property
    def device(self) -> str:
        """``cpu``."""
        return "cpu"

    @property
    def isa(self) -> str:
        """Instruction-set path in use."""
        return str(self._decoder.isa)

    @property
    def threads(self) -> int:
        """Threads of the pool."""
        return int(self._decoder.num_threads)

    @property
    def precision(self) -> str:
        """``a8`` or ``a15``."""
        return self._precision

    @property
    def weight_bytes_per_token(self) -> int:
        """Weight bytes read to decode one token at batch 1."""
        return int(self._decoder.weight_bytes_per_token)

    @property
    def memory(self) -> dict[str, int]:
        """Ledger of bytes: ``weights``, ``kv``, ``workspace``."""
        return {
            "weights": int(self._decoder.weight_bytes),
            "kv": self._kv_bytes,
            "workspace": int(self._decoder.workspace_bytes),
        }

    @property
    def kv_dtype(self) -> str:
        """``bf16`` or ``int8``."""
        return self._kv_dtype

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV block of ``block_size`` tokens, scales included."""
        return int(
            self._core.kv.bytes_per_block(
                num_slots=max(len(group.layers) for group in self._groups),
                num_kv_heads=self._config.num_kv_heads,
                head_dim=self._config.head_dim,
                block_size=block_size,
                dtype=self._kv_dtype,
            )
        )

    def allocate_kv(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> KvCache:
        """Creates the KV pages and the cache that manages them. Called once."""
        storage = self._core.kv.KvStorage(
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=max(len(group.layers) for group in self._groups),
            num_kv_heads=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
            dtype=self._kv_dtype,
        )
        self._decoder.attach_kv(storage)
        self._kv_bytes = int(storage.bytes)
        return create_kv_cache(
            num_blocks,
            block_size,
            tuple(group.window for group in self._groups),
            native=True,
            enable_prefix_caching=enable_prefix_caching,
        )

    def time_phases(self, enabled: bool) -> None:
        """Starts timing the phases of steps from zero, or stops. Not while a step runs."""
        self._decoder.time_phases(enabled)

    def phase_times(self) -> PhaseTimes:
        """Where the steps since ``time_phases(True)`` spent their time."""
        return PhaseTimes(**self._decoder.phase_times())

    def close(self) -> None:
        """Frees weights and KV pages; the runner is unusable afterwards."""
        del self._decoder


def native_config(core: ModuleType, config: ModelConfig, groups: tuple[KvGroup, ...]) -> Any:
    """The ModelConfig of a native module that has a ``model`` part."""
    native = core.model.ModelConfig()
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_position",
        "norm_eps",
        "attention_scale",
        "attention_softcap",
        "final_softcap",
        "embedding_scale",
        "qkv_bias",
        "qk_norm",
        "post_norms",
        "tie_embeddings",
    ):
        setattr(native, name, getattr(config, name))
    native.gelu_tanh = config.activation == "gelu_tanh"

    ropes: list[RopeConfig] = [config.rope]
    if config.rope_local is not None:
        ropes.append(config.rope_local)
    for rope in ropes:
        frequencies, factor = inverse_frequencies(rope)
        native.add_rope(np.asarray(frequencies, dtype=np.float64).tolist(), float(factor))

    place = {
        layer: (group_index, slot)
        for group_index, group in enumerate(groups)
        for slot, layer in enumerate(group.layers)
    }
    for layer, window in enumerate(config.layer_windows):
        group_index, slot = place[layer]
        local = window > 0 and config.rope_local is not None
        native.add_layer(window=window, group=group_index, slot=slot, rope=int(local))
    return native
