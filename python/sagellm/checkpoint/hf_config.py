"""Hugging Face ``config.json`` to ``ModelConfig``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sagellm.checkpoint.config import ENCODER_TYPES, ModelConfig, RopeConfig
from sagellm.checkpoint.fields import Fields
from sagellm.checkpoint.fp8 import check_quantization
from sagellm.checkpoint.gguf_config import MAX_LAYERS, pattern_windows
from sagellm.checkpoint.rope import yarn_attention_factor
from sagellm.errors import CorruptFileError, UnsupportedError

MODEL_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""``model_type`` of ``config.json`` to architecture."""


def config_from_hf(values: Mapping[str, Any], source: str, *, has_lm_head: bool) -> ModelConfig:
    """Reads the model's shape.

    Args:
        values: Content of ``config.json``.
        source: Name of the folder, for messages.
        has_lm_head: The checkpoint stores an output head; decides where ``tie_word_embeddings`` is
            absent.

    Raises:
        CorruptFileError: Settings are missing or impossible.
        UnsupportedError: Another model type, or a variant of one that is not covered.
    """
    fields = Fields(values, f"{source}/config.json")
    model_type = fields.text("model_type")
    if model_type in ENCODER_TYPES:
        raise UnsupportedError(
            f"{source} is an encoder ({model_type}), which makes embeddings and scores, not text; "
            "serve it with `sagellm serve`, or open it with sagellm.engine.embedding.load_embedder"
        )
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"{source}: model_type {model_type!r} is not supported; supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    check_quantization(values, source)
    _refuse_variants(fields, model_type, source)
    architecture = MODEL_TYPES[model_type]
    gemma = architecture.startswith("gemma")
    hidden = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", 128 if architecture == "qwen3" else hidden // num_heads)
    scalar = fields.positive("query_pre_attn_scalar", 256.0) if gemma else float(head_dim)
    rope, rope_local, extended = _ropes(fields, values, architecture, head_dim, source)
    return ModelConfig(
        architecture=architecture,
        name=source,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position=max(fields.integer("max_position_embeddings", high=1 << 31), extended),
        norm_eps=fields.positive("rms_norm_eps"),
        rope=rope,
        rope_local=rope_local,
        layer_windows=_layer_windows(fields, model_type, num_layers, source),
        attention_scale=scalar**-0.5,
        attention_softcap=_softcap(fields, values, architecture, "attn_logit_softcapping", 50.0),
        final_softcap=_softcap(fields, values, architecture, "final_logit_softcapping", 30.0),
        activation="gelu_tanh" if gemma else "silu",
        # In float32; a checkpoint run in bfloat16 by its authors' code rounds this to 8 bits.
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture in ("qwen3", "gemma3"),
        post_norms=gemma,
        tie_embeddings=fields.flag("tie_word_embeddings", not has_lm_head),
    )


def _refuse_variants(fields: Fields, model_type: str, source: str) -> None:
    """Raises for settings that would change the arithmetic in a way that is not covered."""
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if fields.flag(key, False) and model_type != "qwen2":
            raise UnsupportedError(f"{source}: {key} is not supported for {model_type}")
    gemma = model_type.startswith("gemma")
    key, expected = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    name = fields.text(key, expected)
    if name != expected:
        raise UnsupportedError(
            f"{source}: {key} {name!r} is not supported for {model_type}; supported: {expected}"
        )


def _softcap(
    fields: Fields, values: Mapping[str, Any], architecture: str, key: str, gemma2_default: float
) -> float:
    """A cap; 0 and an explicit null are none. Gemma 2 has caps unless its file says otherwise."""
    default = gemma2_default if architecture == "gemma2" and key not in values else 0.0
    return fields.number(key, default)


def _layer_windows(
    fields: Fields, model_type: str, num_layers: int, source: str
) -> tuple[int, ...]:
    """Windows by layer: from ``layer_types``, else from the rule of the model type."""
    window = fields.integer("sliding_window", 0, low=0, high=1 << 31)
    if fields.has("layer_types"):
        kinds = fields.value("layer_types")
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise CorruptFileError(
                f"{source}/config.json: layer_types does not name {num_layers} layers"
            )
        for kind in kinds:
            if kind not in known:
                raise UnsupportedError(
                    f"{source}: layer type {kind!r}; supported: {', '.join(known)}"
                )
            if kind == "sliding_attention" and window == 0:
                raise CorruptFileError(
                    f"{source}/config.json: sliding layers but no sliding_window"
                )
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if model_type == "mistral":
        return (window,) * num_layers
    if model_type == "gemma2":
        return pattern_windows(window or 4096, 2, num_layers)
    if model_type == "gemma3_text":
        return pattern_windows(
            window or 4096, fields.integer("sliding_window_pattern", 6), num_layers
        )
    if model_type.startswith("qwen") and fields.flag("use_sliding_window", False) and window:
        first = fields.integer("max_window_layers", low=0)
        return tuple(window if i >= first else 0 for i in range(num_layers))
    return (0,) * num_layers


def _ropes(
    fields: Fields, values: Mapping[str, Any], architecture: str, head_dim: int, source: str
) -> tuple[RopeConfig, RopeConfig | None, int]:
    """Rotations of full and sliding layers, and the context that yarn scaling reaches (else 0).

    Newer files have ``rope_parameters`` (for Gemma 3 one set per layer type); older ones have
    ``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq``.
    """
    nested = values.get("rope_parameters")
    old = values.get("rope_scaling")
    for name, value in (("rope_parameters", nested), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise CorruptFileError(f"{source}/config.json: {name} is not an object")
    default_theta = 1e6 if architecture == "gemma3" else 10000.0
    theta = fields.positive("rope_theta", default_theta)
    if architecture != "gemma3":
        rope, extended = _rope(nested or old or {}, values, theta, head_dim, source)
        return rope, None, extended
    local_theta = fields.positive("rope_local_base_freq", 10000.0)
    if nested is not None and "full_attention" in nested:
        rope, extended = _rope(nested["full_attention"] or {}, values, theta, head_dim, source)
        local, _ = _rope(
            nested.get("sliding_attention") or {}, values, local_theta, head_dim, source
        )
        return rope, local, extended
    rope, extended = _rope(nested or old or {}, values, theta, head_dim, source)
    return rope, RopeConfig(theta=local_theta, dim=head_dim), extended


def _rope(
    parameters: Mapping[str, Any],
    values: Mapping[str, Any],
    theta: float,
    head_dim: int,
    source: str,
) -> tuple[RopeConfig, int]:
    if not isinstance(parameters, dict):
        raise CorruptFileError(f"{source}/config.json: rope settings are not an object")
    rope = Fields(parameters, f"{source}/config.json rope")
    top = Fields(values, f"{source}/config.json")
    theta = rope.positive("rope_theta", theta)
    share = rope.positive("partial_rotary_factor", top.positive("partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta, dim=dim), 0
    if kind == "linear":
        return RopeConfig(theta=theta, dim=dim, kind="linear", factor=rope.positive("factor")), 0
    context = top.integer("max_position_embeddings", high=1 << 31)
    original = rope.integer("original_max_position_embeddings", context, high=1 << 31)
    if kind == "llama3":
        low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
        if high <= low:
            raise CorruptFileError(
                f"{source}/config.json: rope high_freq_factor {high} <= low_freq_factor {low}"
            )
        return RopeConfig(
            theta=theta,
            dim=dim,
            kind="llama3",
            factor=rope.positive("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        ), 0
    if kind == "yarn":
        return _yarn(rope, theta, dim, original, context, source)
    raise UnsupportedError(
        f"{source}: rope type {kind!r} is not supported; supported: default, linear, llama3, yarn"
    )


def _yarn(
    rope: Fields, theta: float, dim: int, original: int, context: int, source: str
) -> tuple[RopeConfig, int]:
    if rope.has("mscale") or rope.has("mscale_all_dim") or not rope.flag("truncate", True):
        raise UnsupportedError(f"{source}: yarn with mscale or without truncate is not supported")
    factor = rope.positive("factor", context / original)
    config = RopeConfig(
        theta=theta,
        dim=dim,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        attention_factor=rope.positive("attention_factor", yarn_attention_factor(factor)),
    )
    extended = int(original * factor) if rope.has("original_max_position_embeddings") else 0
    return config, extended
