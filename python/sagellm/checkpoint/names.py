"""Canonical tensor names, the shape each must have, and where each lives in a checkpoint.

Canonical names: ``embed``, ``final_norm``, ``lm_head`` and, for every layer, ``layers.{i}.`` with
``attn_norm``, ``q k v o``, ``q_bias k_bias v_bias``, ``q_norm k_norm``, ``attn_post_norm``,
``ffn_norm``, ``gate up down``, ``ffn_post_norm``. Matrices are ``[out, in]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.checkpoint.config import ModelConfig
from sagellm.errors import CorruptFileError, UnsupportedError

_LISTED = 8  # names shown in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """Where a canonical tensor comes from, and what must be done to it.

    Attributes:
        file: Index into ``Checkpoint.files``.
        tensor: Name inside that file.
        unpermute_heads: H > 0: rows (or bias values) are in GGUF's interleaved rotary order.
            Output row ``h*D + j`` is input row ``h*D + 2*(j % (D/2)) + j // (D/2)``, for each of H
            heads of D rows.
        add_one: The stored norm weight w means 1 + w.
    """

    file: int
    tensor: str
    unpermute_heads: int = 0
    add_one: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMap:
    """The spelling of canonical names in one kind of checkpoint.

    Attributes:
        top: Canonical name to stored name.
        layer: Canonical suffix after ``layers.{i}.`` to stored suffix after ``layer_prefix``.
        layer_prefix: Contains ``{i}``.
        ignored: Stored names that carry no weights, or copies of others.
        add_one: Norm weights are stored minus one.
        interleaved_rope: q and k are in GGUF's interleaved rotary order.
    """

    top: Mapping[str, str]
    layer: Mapping[str, str]
    layer_prefix: str
    ignored: re.Pattern[str]
    add_one: bool = False
    interleaved_rope: bool = False

    def stored_name(self, canonical: str) -> str:
        """The name of a canonical tensor in the checkpoint."""
        if not canonical.startswith("layers."):
            return self.top[canonical]
        _, index, suffix = canonical.split(".")
        return self.layer_prefix.format(i=index) + self.layer[suffix]


_GGUF_TOP = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_GGUF_LAYER = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
}
_HF_TOP = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_HF_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_HF_POST_NORMS = {  # with norms on both sides of each block, the names shift
    "attn_post_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "ffn_post_norm": "post_feedforward_layernorm.weight",
}


def gguf_names(architecture: str) -> NameMap:
    """The spelling of GGUF files."""
    return NameMap(
        top=_GGUF_TOP,
        layer=_GGUF_LAYER,
        layer_prefix="blk.{i}.",
        ignored=re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd"),
        interleaved_rope=architecture == "llama",
    )


def hf_names(config: ModelConfig) -> NameMap:
    """The spelling of Hugging Face checkpoints."""
    ignored = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    if config.tie_embeddings:
        ignored += r"|lm_head\.weight"  # a copy of the embedding
    return NameMap(
        top=_HF_TOP,
        layer=_HF_LAYER | _HF_POST_NORMS if config.post_norms else _HF_LAYER,
        layer_prefix="model.layers.{i}.",
        ignored=re.compile(ignored),
        add_one=config.architecture.startswith("gemma"),
    )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor that a model of ``config`` has, with its shape."""
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "ffn_norm": (hidden,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    if config.qkv_bias:
        layer |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.qk_norm:
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.post_norms:
        layer |= {"attn_post_norm": (hidden,), "ffn_post_norm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab_size, hidden),
        "final_norm": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{suffix}": shape for suffix, shape in layer.items()}
    return shapes


def map_tensors(
    config: ModelConfig,
    names: NameMap,
    found: Mapping[str, tuple[int, tuple[int, ...]]],
    source: str,
) -> dict[str, TensorSource]:
    """Finds every canonical tensor among the stored ones and checks its shape.

    Args:
        config: The model.
        names: How the checkpoint spells the names.
        found: Stored name to (file index, shape).
        source: Name of the checkpoint, for messages.

    Raises:
        CorruptFileError: A tensor is missing or has the wrong shape.
        UnsupportedError: The checkpoint has tensors that this architecture does not use.
    """
    shapes = expected_shapes(config)
    stored = {canonical: names.stored_name(canonical) for canonical in shapes}
    missing = [name for name in stored.values() if name not in found]
    if missing:
        raise CorruptFileError(
            f"{source}: {_listing(missing)} missing; the file is incomplete or not a "
            f"{config.architecture} model"
        )
    unknown = sorted(found.keys() - set(stored.values()))
    unknown = [name for name in unknown if not names.ignored.match(name)]
    if unknown:
        raise UnsupportedError(
            f"{source}: {_listing(unknown)} not known for {config.architecture}; its tensors are "
            + ", ".join([*names.top.values(), *names.layer.values()])
        )
    sources = {}
    for canonical, shape in shapes.items():
        file, found_shape = found[stored[canonical]]
        if found_shape != shape:
            raise CorruptFileError(
                f"{source}: tensor {stored[canonical]} has shape {found_shape}, expected {shape} "
                "from the model's settings; download or convert the model again"
            )
        sources[canonical] = _source(config, names, canonical, file)
    return sources


def _source(config: ModelConfig, names: NameMap, canonical: str, file: int) -> TensorSource:
    suffix = canonical.rpartition(".")[2]
    heads = 0
    if names.interleaved_rope:
        heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(
            suffix.removesuffix("_bias"), 0
        )
    return TensorSource(
        file=file,
        tensor=names.stored_name(canonical),
        unpermute_heads=heads,
        add_one=names.add_one and suffix.endswith("norm"),
    )


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"
