"""The shape of a model, independent of the file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ENCODER_TYPES = ("bert", "roberta", "xlm-roberta")
"""``model_type`` of ``config.json`` of encoders; see ``sagellm.checkpoint.encoder``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer (NeoX pairing: i with i + dim/2).

    Attributes:
        theta: Base of the geometric frequency sequence.
        dim: Rotated values per head; even, at most head_dim.
        kind: Scaling rule. ``linear`` divides frequencies by ``factor``; ``llama3`` and ``yarn``
            follow
            Meta's Llama 3.1 reference and Peng et al. 2023 (arXiv 2309.00071).
        factor: Context extension factor.
        original_max_position: Context length before extension (llama3, yarn).
        low_freq_factor, high_freq_factor: llama3 band limits.
        beta_fast, beta_slow: yarn band limits, in rotations.
        attention_factor: Multiplies cos and sin (yarn mscale); 1 otherwise.
        freq_factors: Per-frequency divisors stored in a checkpoint (GGUF ``rope_freqs``); empty if
            none.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    freq_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder: what the native core and the reference backend need to run it.

    Attributes:
        architecture: ``llama``, ``qwen2``, ``qwen3``, ``gemma2`` or ``gemma3`` (Mistral is
            ``llama``).
        name: Human-readable model name from the checkpoint.
        max_position: Longest context, in tokens.
        layer_windows: Per layer, 0 for full attention or the sliding window in tokens.
        rope: Rotation of full-attention layers; ``rope_local`` of sliding ones (None: the same).
        attention_scale: Multiplies q.k.
        attention_softcap, final_softcap: 0 for none.
        activation: Gate activation of the feed-forward block.
        embedding_scale: Multiplies embeddings (sqrt(hidden_size) for Gemma).
        qkv_bias, qk_norm, post_norms: Presence of those tensors.
        tie_embeddings: The output head is the embedding matrix.
    """

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    rope_local: RopeConfig | None = None
    layer_windows: tuple[int, ...] = field(default=())
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tie_embeddings: bool = False
