"""GGUF metadata to ``ModelConfig``."""

from __future__ import annotations

import math
from typing import Any

from sagellm.checkpoint.config import ModelConfig, RopeConfig
from sagellm.checkpoint.fields import Fields
from sagellm.checkpoint.rope import yarn_attention_factor
from sagellm.checkpoint.tensor_file import TensorFile
from sagellm.errors import CorruptFileError, UnsupportedError

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
MAX_LAYERS = 1024

# The 27B Gemma models scale attention by the width of a head in the residual stream, not by
# head_dim.
# GGUF files do not say so; the number of layers tells.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

# general.file_type
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    21: "Q2_K_S",
    25: "IQ4_NL",
    32: "BF16",
}


def config_from_gguf(file: TensorFile, source: str) -> ModelConfig:
    """Reads the model's shape.

    Args:
        file: An open GGUF file.
        source: Its name, for messages.

    Raises:
        CorruptFileError: Keys are missing or impossible.
        UnsupportedError: Another architecture, or a variant of one that is not covered.
    """
    general = Fields(file.metadata, source)
    architecture = general.text("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedError(
            f"{source}: architecture {architecture!r} is not supported; supported: "
            + ", ".join(SUPPORTED_ARCHITECTURES)
        )
    if general.integer("split.count", 1, low=0) > 1:
        raise UnsupportedError(
            f"{source}: one part of a split GGUF; merge the parts into one file first"
        )
    keys = Fields(file.metadata, source, prefix=f"{architecture}.")
    if keys.integer("expert_count", 0, low=0):
        raise UnsupportedError(
            f"{source}: mixture-of-experts models are not supported; use a dense one"
        )
    hidden = keys.integer("embedding_length")
    num_layers = keys.integer("block_count", high=MAX_LAYERS)
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden // num_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{source}: key and value heads of different size are not supported")
    gemma = architecture.startswith("gemma")
    windows = _layer_windows(keys, architecture, num_layers)
    return ModelConfig(
        architecture=architecture,
        name=general.text("general.name", source),
        vocab_size=_vocab_size(file, source),
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=keys.integer("context_length", high=1 << 31),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        rope=_rope(file, keys, architecture, head_dim, source),
        rope_local=_rope_local(keys, head_dim) if architecture == "gemma3" else None,
        layer_windows=windows,
        attention_scale=_attention_scale(
            keys, architecture, num_layers, hidden, num_heads, head_dim
        ),
        attention_softcap=_softcap(keys, architecture, "attn_logit_softcapping", 50.0),
        final_softcap=_softcap(keys, architecture, "final_logit_softcapping", 30.0),
        activation="gelu_tanh" if gemma else "silu",
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        post_norms=gemma,
        tie_embeddings="output.weight" not in file.tensors,
    )


def gguf_quantization(file: TensorFile) -> str:
    """A name such as ``Q4_K_M``: the file's own, else the format that holds most of the bytes."""
    name = _FILE_TYPES.get(file.metadata.get("general.file_type", -1))
    return name if name is not None else main_format([file])


def main_format(files: list[TensorFile]) -> str:
    """The format that holds most of the bytes."""
    totals: dict[str, int] = {}
    for file in files:
        for tensor in file.tensors.values():
            totals[tensor.format] = totals.get(tensor.format, 0) + tensor.nbytes
    return max(totals, key=lambda name: totals[name])


def _vocab_size(file: TensorFile, source: str) -> int:
    """Rows of the embedding: at least the number of tokens, more where the vocabulary is padded."""
    if "token_embd.weight" not in file.tensors:
        raise CorruptFileError(
            f"{source}: tensor token_embd.weight is missing; the file is incomplete"
        )
    rows = file.tensors["token_embd.weight"].shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) > rows:
        raise CorruptFileError(
            f"{source}: {len(tokens)} tokens but {rows} embedding rows; download or convert the "
            "model again"
        )
    return int(rows)


def _layer_windows(keys: Fields, architecture: str, num_layers: int) -> tuple[int, ...]:
    if architecture == "gemma2":
        window, pattern = keys.integer("attention.sliding_window", 4096), 2
    elif architecture == "gemma3":
        window, pattern = keys.integer("attention.sliding_window"), 6
    else:  # every layer or none
        window = keys.integer("attention.sliding_window", 0, low=0, high=1 << 31)
        return (window,) * num_layers
    if keys.has("attention.sliding_window_pattern"):
        stored: Any = keys.value("attention.sliding_window_pattern")
        if not isinstance(stored, int):  # one flag per layer
            flags = [bool(flag) for flag in stored]
            if len(flags) != num_layers:
                raise CorruptFileError(
                    f"{len(flags)} sliding_window_pattern flags for {num_layers} layers"
                )
            return tuple(window if flag else 0 for flag in flags)
        pattern = keys.integer("attention.sliding_window_pattern")
    return pattern_windows(window, pattern, num_layers)


def pattern_windows(window: int, pattern: int, num_layers: int) -> tuple[int, ...]:
    """Windows when every ``pattern``-th layer attends to everything and the others slide."""
    return tuple(window if (i + 1) % pattern else 0 for i in range(num_layers))


def _attention_scale(
    keys: Fields, architecture: str, num_layers: int, hidden: int, num_heads: int, head_dim: int
) -> float:
    if keys.has("attention.scale"):
        return keys.positive("attention.scale")
    if _GEMMA_27B_LAYERS.get(architecture) == num_layers:
        return 1.0 / math.sqrt(hidden / num_heads)
    return 1.0 / math.sqrt(head_dim)


def _softcap(keys: Fields, architecture: str, key: str, gemma2_default: float) -> float:
    return keys.number(key, gemma2_default if architecture == "gemma2" else 0.0)


def _rope_local(keys: Fields, head_dim: int) -> RopeConfig:
    """Sliding layers of Gemma 3: an own base and never scaled."""
    return RopeConfig(theta=keys.positive("rope.freq_base_swa", 10000.0), dim=head_dim)


def _rope(
    file: TensorFile, keys: Fields, architecture: str, head_dim: int, source: str
) -> RopeConfig:
    dim = keys.integer("rope.dimension_count", head_dim, high=head_dim)
    if architecture == "llama" and dim != head_dim:
        raise UnsupportedError(
            f"{source}: rotation of {dim} of {head_dim} values per head is not supported"
        )
    theta = keys.positive("rope.freq_base", 1e6 if architecture == "gemma3" else 10000.0)
    factors: tuple[float, ...] = ()
    if "rope_freqs.weight" in file.tensors:
        values = file.dequantize("rope_freqs.weight")
        if values.shape != (dim // 2,) or not (values > 0).all():
            raise CorruptFileError(f"{source}: rope_freqs.weight is not {dim // 2} numbers above 0")
        factors = tuple(float(value) for value in values)
    kind = keys.text("rope.scaling.type", "linear" if keys.has("rope.scale_linear") else "none")
    factor = keys.positive("rope.scaling.factor", keys.positive("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta, dim=dim, freq_factors=factors)
    if kind == "linear":
        return RopeConfig(theta=theta, dim=dim, kind="linear", factor=factor, freq_factors=factors)
    if kind == "yarn":
        magnitude = keys.positive(
            "rope.scaling.yarn_attn_factor", keys.positive("rope.scaling.attn_factor", 1.0)
        )
        return RopeConfig(
            theta=theta,
            dim=dim,
            kind="yarn",
            factor=factor,
            original_max_position=keys.integer(
                "rope.scaling.original_context_length", high=1 << 31
            ),
            beta_fast=keys.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.positive("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=magnitude * yarn_attention_factor(factor),
            freq_factors=factors,
        )
    raise UnsupportedError(
        f"{source}: rope scaling {kind!r} is not supported; supported: none, linear, yarn"
    )
