"""The dense decoder written once, plainly, over the array API.

It is the oracle of the tests, the mode without a build, and the way onto devices that have torch
but no kernels of ours. Weights and activations are float32; keys and values live in paged arrays
that the same block tables address as the native core's. Those are float32 too, or float16 on an
Ascend device whose fused paged attention serves the model (``npu_attention``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sagellm.backends.array_ops import Array, ArrayNamespace, ArrayOps
from sagellm.backends.interface import ForwardBatch, SampledRow, SamplingRow, StepOutput
from sagellm.backends.npu_attention import choose_paged_attention, pages_refusal
from sagellm.backends.numpy_sampler import sample_rows
from sagellm.checkpoint.checkpoint import Checkpoint
from sagellm.checkpoint.config import ModelConfig, RopeConfig
from sagellm.checkpoint.rope import inverse_frequencies
from sagellm.errors import InvalidArgumentError, ResourceExhaustedError
from sagellm.kv import KvCache, KvGroup, create_kv_cache, plan_kv_groups

logger = logging.getLogger(__name__)

_QUERY_TILE = 256  # query tokens scored at once; bounds the score matrix
_HEAD_TILE = 64  # rows of logits at once


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer's weights by canonical suffix, its window, and its place in the KV arrays."""

    weights: Mapping[str, Array]
    window: int
    rope: int
    group: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decodes:
    """The sequences of a step that bring one token, as the fused attention wants them.

    Attributes:
        rows: ``[D]`` indices into the step's tokens.
        lengths: Tokens of each sequence, the new one included.
        tables: Block tables ``[D, B]`` int32, by group.
    """

    rows: Array
    lengths: tuple[int, ...]
    tables: tuple[Array, ...]


class ReferenceRunner:
    """``ModelRunner`` on NumPy or on a torch device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        array_namespace: ArrayNamespace = "numpy",
        device: str | None = None,
    ) -> None:
        """Loads every weight as float32.

        Args:
            checkpoint: An open model.
            array_namespace: ``numpy``, or ``torch`` (imported only then).
            device: A torch device such as ``cpu`` or ``npu:0``; None is ``cpu``.

        Raises:
            DeviceUnavailableError: torch or its device is not there.
            ResourceExhaustedError: The weights do not fit into memory.
        """
        self._ops = ArrayOps(array_namespace, device)
        self._paged_attention = choose_paged_attention(self._ops, checkpoint.config)
        self._kv_dtype = self._paged_attention.dtype if self._paged_attention else None
        self._device = "reference" if array_namespace == "numpy" else f"torch:{self._ops.device}"
        self._config = checkpoint.config
        self._groups = plan_kv_groups(self._config.layer_windows)
        self._num_slots = max(len(group.layers) for group in self._groups)
        try:
            weights = {
                name: self._ops.array(checkpoint.load_f32(name)) for name in checkpoint.sources
            }
        except (MemoryError, RuntimeError) as error:  # torch has no single error for it
            raise ResourceExhaustedError(
                f"the weights need {4 * checkpoint.num_parameters >> 20} MiB as float32, which "
                f"did not load on {self._ops.device} ({str(error).partition(chr(10))[0]}); use a "
                "smaller model or the native backend"
            ) from error
        self._memory = {"weights": 4 * checkpoint.num_parameters, "kv": 0, "workspace": 0}
        self._embed: Array = weights["embed"]
        self._final_norm: Array = weights["final_norm"]
        self._lm_head: Array = weights.get("lm_head", self._embed)
        self._ropes = _distinct_ropes(self._config)
        self._layers = self._place_layers(weights)
        self._keys: Array = None  # [slots, blocks, block_size, kv_heads, head_dim]
        self._values: Array = None
        self._block_size = 0
        self._num_blocks = 0

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._config

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Layers by block table."""
        return self._groups

    @property
    def device(self) -> str:
        """``reference``, or ``torch:`` and the torch device."""
        return self._device

    @property
    def memory(self) -> dict[str, int]:
        """Bytes held, by purpose."""
        return dict(self._memory)

    @property
    def kv_dtype(self) -> str:
        """``float32``, unless a device's own attention reads another type."""
        return "float32" if self._kv_dtype is None else str(self._kv_dtype).rpartition(".")[2]

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of one KV block of ``block_size`` tokens."""
        row = self._config.num_kv_heads * self._config.head_dim
        width = 4 if self._kv_dtype is None else int(self._kv_dtype.itemsize)
        return 2 * width * block_size * self._num_slots * row

    def allocate_kv(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> KvCache:
        """Creates KV storage and the cache that manages it. Called once.

        Raises:
            ResourceExhaustedError: The storage does not fit into memory.
        """
        if self._keys is not None:
            raise InvalidArgumentError("allocate_kv was already called on this runner")
        cache = create_kv_cache(
            num_blocks,
            block_size,
            [group.window for group in self._groups],
            native=False,
            enable_prefix_caching=enable_prefix_caching,
        )
        heads, dim = self._config.num_kv_heads, self._config.head_dim
        shape = (self._num_slots, num_blocks + 1, block_size, heads, dim)
        nbytes = (num_blocks + 1) * self.kv_bytes_per_block(block_size)  # block 0 is padding
        try:
            self._keys = self._ops.zeros(shape, self._kv_dtype)
            self._values = self._ops.zeros(shape, self._kv_dtype)
        except (MemoryError, RuntimeError) as error:
            self._keys = self._values = None
            raise ResourceExhaustedError(
                f"{num_blocks} KV blocks need {nbytes >> 20} MiB, more than is free; lower the KV "
                "memory budget"
            ) from error
        self._block_size, self._num_blocks = block_size, num_blocks
        self._memory["kv"] = nbytes
        refusal = self._paged_attention and pages_refusal(num_blocks + 1, block_size, heads, dim)
        if refusal:
            logger.info("%s: decode uses plain attention: %s", self._ops.device, refusal)
            self._paged_attention = None
        return cache

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        *,
        return_logits: bool = False,
        return_hidden: bool = False,
    ) -> StepOutput:
        """Runs one forward pass; see ``ModelRunner.step``.

        Raises:
            InvalidArgumentError: An array of the batch is inconsistent or out of range.
        """
        self._check(batch, sampling)
        for source, target in batch.block_copies.tolist():
            self._keys[:, target] = self._keys[:, source]
            self._values[:, target] = self._values[:, source]
        hidden = self._forward(batch)
        parts: list[NDArray[np.float32]] = []
        rows: list[SampledRow] = []
        for first in range(
            0, len(batch.logit_rows) if sampling or return_logits else 0, _HEAD_TILE
        ):
            tile = slice(first, first + _HEAD_TILE)
            logits = self._head(hidden[tile])
            if sampling:
                rows += sample_rows(logits, sampling[tile])
            if return_logits:
                parts.append(logits)
        return StepOutput(
            rows=tuple(rows),
            logits=np.concatenate(parts) if parts else None,
            hidden=self._ops.numpy(hidden) if return_hidden else None,
        )

    def close(self) -> None:
        """Frees weights and KV storage; the runner is unusable afterwards."""
        self._layers = ()
        self._embed = self._final_norm = self._lm_head = self._keys = self._values = None
        self._memory = {"weights": 0, "kv": 0, "workspace": 0}

    def _place_layers(self, weights: Mapping[str, Array]) -> tuple[_Layer, ...]:
        place = {
            layer: (group, slot)
            for group, members in enumerate(self._groups)
            for slot, layer in enumerate(members.layers)
        }
        by_layer: list[dict[str, Array]] = [{} for _ in range(self._config.num_layers)]
        for name, values in weights.items():
            if name.startswith("layers."):
                _, index, suffix = name.split(".")
                by_layer[int(index)][suffix] = values
        return tuple(
            _Layer(
                weights=by_layer[index],
                window=window,
                rope=1 if window and len(self._ropes) > 1 else 0,
                group=place[index][0],
                slot=place[index][1],
            )
            for index, window in enumerate(self._config.layer_windows)
        )

    def _head(self, hidden: Array) -> NDArray[np.float32]:
        """Logits ``[rows, vocab]``."""
        ops = self._ops
        return ops.numpy(ops.softcap(ops.linear(hidden, self._lm_head), self._config.final_softcap))

    def _forward(self, batch: ForwardBatch) -> Array:
        """The wanted rows ``[R, hidden]`` after the final norm.

        Writes keys and values of all T tokens.
        """
        ops, config = self._ops, self._config
        rotations = [self._rotation(rope, batch.positions) for rope in self._ropes]
        # Where each token's keys and values go, by group: block ids and offsets, [T] each.
        places = [self._places(batch, table) for table in batch.block_tables]
        decodes = self._decodes(batch)
        x = self._embed[ops.indices(batch.token_ids)] * config.embedding_scale
        for layer in self._layers:
            w = layer.weights
            h = ops.rms_norm(x, w["attn_norm"], config.norm_eps)
            rotation, place = rotations[layer.rope], places[layer.group]
            # The fused attention has no window.
            h = self._attention(h, layer, batch, rotation, place, None if layer.window else decodes)
            if config.post_norms:
                h = ops.rms_norm(h, w["attn_post_norm"], config.norm_eps)
            x = x + h
            h = ops.rms_norm(x, w["ffn_norm"], config.norm_eps)
            gate = ops.activation(config.activation, ops.linear(h, w["gate"]))
            h = ops.linear(gate * ops.linear(h, w["up"]), w["down"])
            if config.post_norms:
                h = ops.rms_norm(h, w["ffn_post_norm"], config.norm_eps)
            x = x + h
        return ops.rms_norm(x[ops.indices(batch.logit_rows)], self._final_norm, config.norm_eps)

    def _attention(
        self,
        x: Array,
        layer: _Layer,
        batch: ForwardBatch,
        rotation: tuple[Array, Array],
        places: tuple[Array, Array],
        decodes: _Decodes | None,
    ) -> Array:
        """Self-attention of all sequences, ``[T, hidden]`` to ``[T, hidden]``.

        ``decodes`` take the fused attention, everything else the plain one.
        """
        ops, config, w = self._ops, self._config, layer.weights
        shape = (x.shape[0], -1, config.head_dim)
        q = ops.xp.reshape(ops.linear(x, w["q"], w.get("q_bias")), shape)
        k = ops.xp.reshape(ops.linear(x, w["k"], w.get("k_bias")), shape)
        v = ops.xp.reshape(ops.linear(x, w["v"], w.get("v_bias")), shape)
        if config.qk_norm:
            q = ops.rms_norm(q, w["q_norm"], config.norm_eps)
            k = ops.rms_norm(k, w["k_norm"], config.norm_eps)
        q, k = ops.rope(q, *rotation), ops.rope(k, *rotation)
        keys, values = self._keys[layer.slot], self._values[layer.slot]
        keys[places], values[places] = ops.cast(k, self._kv_dtype), ops.cast(v, self._kv_dtype)
        out = ops.zeros((x.shape[0], config.num_heads * config.head_dim))
        if decodes is not None and self._paged_attention is not None:
            rows, table = decodes.rows, decodes.tables[layer.group]
            out[rows] = self._paged_attention(
                q[rows], keys, values, table, decodes.lengths, config.attention_scale
            )
        for s, (begin, end) in enumerate(_spans(batch)):
            if decodes is not None and end - begin == 1:
                continue
            table = batch.block_tables[layer.group, s]
            for first in range(begin, end, _QUERY_TILE):
                tile = slice(first, min(first + _QUERY_TILE, end))
                out[tile] = self._attend(q[tile], batch.positions[tile], table, layer)
        return ops.linear(out, w["o"])

    def _decodes(self, batch: ForwardBatch) -> _Decodes | None:
        """The sequences for the fused attention; None when there are none or it is not used."""
        sequences = np.flatnonzero(np.diff(batch.query_starts) == 1)
        if self._paged_attention is None or not len(sequences):
            return None
        rows = batch.query_starts[sequences]
        return _Decodes(
            rows=self._ops.indices(rows),
            lengths=tuple((batch.positions[rows] + 1).tolist()),
            tables=tuple(self._ops.array(table[sequences]) for table in batch.block_tables),
        )

    def _attend(
        self, q: Array, positions: NDArray[np.int32], table: NDArray[np.int32], layer: _Layer
    ) -> Array:
        """Attention of consecutive tokens of one sequence.

        ``q [n, heads, head_dim]`` becomes ``[n, heads * head_dim]``.
        """
        ops, xp, config = self._ops, self._ops.xp, self._config
        n, kv_heads, dim = q.shape[0], config.num_kv_heads, config.head_dim
        group = config.num_heads // kv_heads
        start = max(0, int(positions[0]) - layer.window + 1) if layer.window else 0
        seen = np.arange(start, int(positions[-1]) + 1)
        visible = seen <= positions[:, None]
        if layer.window:
            visible &= seen > positions[:, None] - layer.window
        place = (ops.indices(table[seen // self._block_size]), ops.indices(seen % self._block_size))
        keys = ops.cast(self._keys[layer.slot][place])  # [seen, kv_heads, dim]
        values = ops.cast(self._values[layer.slot][place])
        keys = xp.permute_dims(keys, (1, 2, 0))  # [kv_heads, dim, seen]
        values = xp.permute_dims(values, (1, 0, 2))  # [kv_heads, seen, dim]
        # Query head h reads kv head h // group: rows of one kv head are its group's heads, then
        # tokens.
        q = xp.reshape(xp.permute_dims(q, (1, 0, 2)), (kv_heads, group * n, dim))
        scores = ops.softcap(q @ keys * config.attention_scale, config.attention_softcap)
        scores = xp.reshape(scores, (kv_heads, group, n, len(seen)))
        weights = ops.softmax(scores, ops.array(visible))
        out = xp.reshape(weights, (kv_heads, group * n, len(seen))) @ values
        out = xp.permute_dims(xp.reshape(out, (config.num_heads, n, dim)), (1, 0, 2))
        return xp.reshape(out, (n, config.num_heads * dim))

    def _rotation(self, rope: RopeConfig, positions: NDArray[np.int32]) -> tuple[Array, Array]:
        """Cos and sin ``[T, dim / 2]``, angles in float64."""
        inv_freq, factor = inverse_frequencies(rope)
        angles = positions[:, None].astype(np.float64) * inv_freq
        cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
        return self._ops.array(cos.astype(np.float32)), self._ops.array(sin.astype(np.float32))

    def _places(self, batch: ForwardBatch, table: NDArray[np.int32]) -> tuple[Array, Array]:
        """Block ids and offsets of all T tokens in one group."""
        offsets = batch.positions % self._block_size
        return self._ops.indices(self._blocks_of(batch, table)), self._ops.indices(offsets)

    def _blocks_of(self, batch: ForwardBatch, table: NDArray[np.int32]) -> NDArray[np.int32]:
        """Block id of each of the T tokens; ``table`` is one group's ``[S, B]``."""
        lengths = np.diff(batch.query_starts)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        return table[owner, batch.positions // self._block_size]

    def _check(self, batch: ForwardBatch, sampling: tuple[SamplingRow, ...]) -> None:
        """Rejects a batch that would read or write outside its blocks."""
        if self._keys is None:
            raise InvalidArgumentError("allocate_kv must come before step")
        tokens, starts = len(batch.token_ids), batch.query_starts
        tables, blocks = batch.block_tables, self._num_blocks + 1
        _require(tokens > 0 and len(batch.positions) == tokens, "positions do not match the tokens")
        _require(
            starts[0] == 0 and starts[-1] == tokens and bool((np.diff(starts) > 0).all()),
            "query_starts do not cut the tokens into sequences",
        )
        for begin, end in _spans(batch):
            steps = np.diff(batch.positions[begin:end])
            _require(bool((steps == 1).all()), "positions are not consecutive within a sequence")
        _require(_within(batch.token_ids, self._config.vocab_size), "a token id is out of range")
        _require(
            tables.shape[:2] == (len(self._groups), len(starts) - 1),
            "block_tables have the wrong shape",
        )
        _require(
            _within(tables, blocks) and _within(batch.block_copies, blocks),
            "a block id is out of range",
        )
        limit = min(tables.shape[2] * self._block_size, self._config.max_position)
        _require(
            _within(batch.positions, limit),
            "a position is past its block table or the model's context",
        )
        blocks_used = [self._blocks_of(batch, table) for table in tables]
        _require(
            all(bool((ids > 0).all()) for ids in blocks_used),
            "a token has no block to be written to",
        )
        _require(_within(batch.logit_rows, tokens), "a logit row is out of range")
        _require(
            len(sampling) in (0, len(batch.logit_rows)), "sampling rows do not match the logit rows"
        )


def _distinct_ropes(config: ModelConfig) -> tuple[RopeConfig, ...]:
    return (config.rope,) if config.rope_local is None else (config.rope, config.rope_local)


def _spans(batch: ForwardBatch) -> list[tuple[int, int]]:
    """Begin and end of every sequence's tokens."""
    starts = batch.query_starts.tolist()
    return list(pairwise(starts))


def _within(values: NDArray[np.int32], limit: int) -> bool:
    return values.size == 0 or bool(values.min() >= 0 and values.max() < limit)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgumentError(f"forward batch: {message}")
