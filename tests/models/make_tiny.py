"""Tiny random models on disk, for tests: every supported architecture as GGUF or as a Hugging Face
folder.

Usage::

    from models.make_tiny import make_tiny_gguf, make_tiny_hf

    path = make_tiny_gguf(tmp_path / "tiny.gguf", "qwen3", "Q5_0", seed=1, num_layers=3)
    folder = make_tiny_hf(tmp_path / "tiny", "gemma3", dtype="BF16", shards=2)

* ``arch`` is one of ``ARCHITECTURES``. Mistral is a llama with a sliding window on every layer.
* ``format`` of a GGUF is any of ``sagellm.checkpoint.tensor_file.BLOCKS`` but FP8; norms and biases
  stay F32. Super-block
  formats (``Q4_K``, ...) need rows of 256, so their default dimensions are larger.
* ``dims`` override fields of ``TinyDims``.
* The same ``arch``, ``seed`` and dims give the same F32 weights in both kinds of file, on any
machine and with
  any NumPy: numbers come from an integer hash of (seed, tensor name, index).

The vocabulary has 320 tokens: three specials, the 256 bytes, a few merges, and unused ones. GGUF
files of the Gemma kinds have a SentencePiece vocabulary instead (byte tokens, letters, a few
pieces). All have a ChatML-like template and end a turn with ``<|im_end|>``.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from models.tiny_vocab import (
    CHAT_TEMPLATE,
    SPECIALS,
    VOCAB_SIZE,
    bpe_merges,
    bpe_vocab,
    spm_vocab,
)
from sagellm.checkpoint.tensor_file import BLOCKS

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


@dataclass(frozen=True, kw_only=True)
class TinyDims:
    """Dimensions of a tiny model.

    Attributes:
        sliding_window: 0 for none.
        query_scalar: Gemma's ``query_pre_attn_scalar``; 0 means head_dim.
        rope_scaling: Hugging Face ``rope_scaling`` settings; a GGUF takes ``linear`` and ``yarn``.
        rope_freqs: Write these numbers as GGUF ``rope_freqs.weight``.
    """

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 64
    intermediate_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    max_position: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int = 0
    query_scalar: float = 0.0
    tie_embeddings: bool = True
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    rope_freqs: tuple[float, ...] = ()


_DIMS = {
    "llama": TinyDims(tie_embeddings=False),
    "mistral": TinyDims(tie_embeddings=False, sliding_window=8),
    "qwen2": TinyDims(rope_theta=1e6),
    "qwen3": TinyDims(head_dim=32, rope_theta=1e6),
    "gemma2": TinyDims(head_dim=32, num_layers=4, sliding_window=8),
    "gemma3": TinyDims(head_dim=32, num_layers=7, sliding_window=8, rope_theta=1e6),
}


def tiny_dims(arch: str, format: str = "F32", **dims: Any) -> TinyDims:
    """Default dimensions of ``arch`` for a GGUF ``format``, with overrides."""
    base = _DIMS[arch]
    if BLOCKS[format][0] == 256:
        base = replace(base, hidden_size=256, intermediate_size=256, head_dim=64)
    return replace(base, **dims)


def random_values(shape: tuple[int, ...], std: float, key: str, seed: int) -> NDArray[np.float32]:
    """Uniform numbers of deviation ``std``, a pure function of the arguments (splitmix64)."""
    start = np.uint64((zlib.crc32(key.encode()) << 32) + seed * 0x51ED27)
    with np.errstate(over="ignore"):
        z = (np.arange(math.prod(shape), dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0  # 24 bits, in [-1, 1)
    return (unit * (std * math.sqrt(3.0))).astype(np.float32).reshape(shape)


def tiny_weights(arch: str, dims: TinyDims, seed: int) -> dict[str, NDArray[np.float32]]:
    """Canonical names to float32 weights; norm weights are what multiplies (Gemma's 1 + w)."""
    gemma = arch.startswith("gemma")
    hidden, width = dims.hidden_size, dims.intermediate_size
    queries, keys = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (dims.vocab_size, hidden),
        "final_norm": (hidden,),
    }
    if not dims.tie_embeddings:
        shapes["lm_head"] = (dims.vocab_size, hidden)
    for i in range(dims.num_layers):
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
        if arch == "qwen2":
            layer |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
        if arch in ("qwen3", "gemma3"):
            layer |= {"q_norm": (dims.head_dim,), "k_norm": (dims.head_dim,)}
        if gemma:
            layer |= {"attn_post_norm": (hidden,), "ffn_post_norm": (hidden,)}
        shapes |= {f"layers.{i}.{suffix}": shape for suffix, shape in layer.items()}

    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm"):
            weights[name] = 1 + random_values(shape, 0.2, name, seed)
        elif name.endswith("bias"):
            weights[name] = random_values(shape, 0.3, name, seed)
        else:
            std = 1.0 / math.sqrt(shape[-1])
            if name.endswith((".q", ".k")):
                std *= 1.5  # attention that looks at something
            weights[name] = random_values(shape, std, name, seed)
    return weights


# ----------------------------------------------------------------------------------------------
# GGUF

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


def make_tiny_gguf(
    path: str | Path, arch: str = "llama", format: str = "F32", seed: int = 0, **dims: Any
) -> Path:
    """Writes a GGUF file; returns its path."""
    shape = tiny_dims(arch, format, **dims)
    gguf_arch = "llama" if arch == "mistral" else arch
    writer = gguf.GGUFWriter(str(path), gguf_arch)
    _write_gguf_settings(writer, gguf_arch, shape)
    _write_gguf_tokenizer(writer, "spm" if arch.startswith("gemma") else "bpe", shape.vocab_size)
    if shape.rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.asarray(shape.rope_freqs, np.float32))
    for name, values in tiny_weights(arch, shape, seed).items():
        heads = {"q": shape.num_heads, "k": shape.num_kv_heads}.get(
            name.split(".")[-1].removesuffix("_bias")
        )
        if gguf_arch == "llama" and heads:
            values = _interleave_rows(values, heads)
        stored = _GGUF_TOP.get(name) or _gguf_layer_name(name)
        if values.ndim == 1 or format == "F32":
            writer.add_tensor(stored, values)
        elif format == "F16":
            writer.add_tensor(stored, values.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[format]
            writer.add_tensor(stored, quantized_rows(format, values, seed), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _gguf_layer_name(name: str) -> str:
    _, index, suffix = name.split(".")
    return f"blk.{index}.{_GGUF_LAYER[suffix]}"


def _interleave_rows(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """A llama's q or k rows as GGUF stores them: row i of a head beside row i + head_dim/2."""
    dim = values.shape[0] // heads
    order = [h * dim + j for h in range(heads) for i in range(dim // 2) for j in (i, i + dim // 2)]
    return np.ascontiguousarray(values[order])


def quantized_rows(format: str, values: NDArray[np.float32], seed: int) -> NDArray[np.uint8]:
    """Bytes ``[rows, row_bytes]`` of a matrix in a block format.

    Simple formats quantize ``values``. For the others the bytes are random and the scales are set
    so that the decoded weights have about the spread of ``values``.
    """
    if format in ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        kind = gguf.GGMLQuantizationType[format]
        return np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)
    rows, columns = values.shape
    elements, block_bytes = BLOCKS[format]
    count = rows * columns // elements
    rng = np.random.default_rng([seed, rows, columns])
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    # Byte offset of d, spread of the codes at d = 1, byte offset of dmin, dmin / d (a mean of
    # about 0).
    at, spread, min_at, ratio = {
        "Q2_K": (80, 14.0, 82, 1.5),
        "Q3_K": (108, 45.0, None, 0.0),
        "Q4_K": (0, 220.0, 2, 7.5),
        "Q5_K": (0, 450.0, 2, 15.5),
        "Q6_K": (208, 1400.0, None, 0.0),
        "IQ4_NL": (0, 65.0, None, 0.0),
    }[format]
    scale = (float(values.std()) / spread * rng.uniform(0.8, 1.2, count)).astype(np.float16)
    blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    if min_at is not None:
        minimum = (scale.astype(np.float32) * ratio).astype(np.float16)
        blocks[:, min_at : min_at + 2] = minimum.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def _write_gguf_settings(writer: gguf.GGUFWriter, arch: str, dims: TinyDims) -> None:
    writer.add_name(f"tiny {arch}")
    writer.add_context_length(dims.max_position)
    writer.add_embedding_length(dims.hidden_size)
    writer.add_block_count(dims.num_layers)
    writer.add_feed_forward_length(dims.intermediate_size)
    writer.add_head_count(dims.num_heads)
    writer.add_head_count_kv(dims.num_kv_heads)
    writer.add_layer_norm_rms_eps(dims.norm_eps)
    writer.add_rope_freq_base(dims.rope_theta)
    writer.add_rope_dimension_count(dims.head_dim)
    if dims.head_dim * dims.num_heads != dims.hidden_size:
        writer.add_key_length(dims.head_dim)
        writer.add_value_length(dims.head_dim)
    if dims.sliding_window:
        writer.add_sliding_window(dims.sliding_window)
    if dims.query_scalar:
        writer.add_float32(f"{arch}.attention.scale", dims.query_scalar**-0.5)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    scaling = dims.rope_scaling
    if scaling:
        writer.add_string(f"{arch}.rope.scaling.type", scaling["rope_type"])
        writer.add_float32(f"{arch}.rope.scaling.factor", scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            original = scaling["original_max_position_embeddings"]
            writer.add_uint32(f"{arch}.rope.scaling.original_context_length", original)


def _write_gguf_tokenizer(writer: gguf.GGUFWriter, kind: str, size: int) -> None:
    tokens, types = (spm_vocab if kind == "spm" else bpe_vocab)(size)
    writer.add_tokenizer_model("llama" if kind == "spm" else "gpt2")
    writer.add_tokenizer_pre("default" if kind == "spm" else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "spm":
        writer.add_token_scores([-float(i) for i in range(size)])
        writer.add_unk_token_id(tokens.index("<unk>"))
        writer.add_add_space_prefix(False)
    else:
        writer.add_token_merges([" ".join(pair) for pair in bpe_merges()])
    writer.add_bos_token_id(tokens.index("<bos>" if kind == "spm" else SPECIALS[0]))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(kind == "spm")
    writer.add_chat_template(CHAT_TEMPLATE)


# ------------------------------------------------------------------------------------ Hugging Face

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
_HF_GEMMA = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "ffn_post_norm": "post_feedforward_layernorm.weight",
}
_HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def make_tiny_hf(
    folder: str | Path,
    arch: str = "llama",
    dtype: str = "F32",
    seed: int = 0,
    shards: int = 1,
    **dims: Any,
) -> Path:
    """Writes a Hugging Face folder (``dtype`` F32, F16 or BF16); returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = tiny_dims(arch, **dims)
    gemma = arch.startswith("gemma")
    layer = _HF_LAYER | _HF_GEMMA if gemma else _HF_LAYER
    tensors = {}
    for name, values in tiny_weights(arch, shape, seed).items():
        if gemma and name.endswith("norm"):
            values = values - np.float32(1)
        if name in _HF_TOP:
            stored = _HF_TOP[name]
        else:
            _, index, suffix = name.split(".")
            stored = f"model.layers.{index}.{layer[suffix]}"
        tensors[stored] = values
    _write_safetensors(folder, tensors, dtype, shards)
    _write_json(folder / "config.json", hf_config(arch, shape, dtype))
    _write_hf_tokenizer(folder, shape.vocab_size)
    return folder


def hf_config(arch: str, dims: TinyDims, dtype: str = "F32") -> dict[str, Any]:
    """``config.json`` with the names that published checkpoints use."""
    config: dict[str, Any] = {
        "architectures": [_HF_CLASSES[arch]],
        "model_type": "gemma3_text" if arch == "gemma3" else arch,
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_layers,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "max_position_embeddings": dims.max_position,
        "rms_norm_eps": dims.norm_eps,
        "rope_theta": dims.rope_theta,
        "tie_word_embeddings": dims.tie_embeddings,
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if dims.rope_scaling:
        config["rope_scaling"] = dict(dims.rope_scaling)
    if arch != "qwen2":
        config["head_dim"] = dims.head_dim
    if arch.startswith("gemma"):
        config["hidden_activation"] = "gelu_pytorch_tanh"
        config["query_pre_attn_scalar"] = dims.query_scalar or dims.head_dim
        config["sliding_window"] = dims.sliding_window
        config["attn_logit_softcapping"] = 50.0 if arch == "gemma2" else None
        config["final_logit_softcapping"] = 30.0 if arch == "gemma2" else None
        if arch == "gemma3":
            config["sliding_window_pattern"] = 6
            config["rope_local_base_freq"] = 10000.0
    else:
        config["hidden_act"] = "silu"
    if arch in ("mistral", "qwen2", "qwen3"):
        config["sliding_window"] = dims.sliding_window or None
    if arch.startswith("qwen"):
        config["use_sliding_window"] = False
    return config


def _write_safetensors(
    folder: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str, shards: int
) -> None:
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = (
            "model.safetensors"
            if shards == 1
            else f"model-{number:05d}-of-{shards:05d}.safetensors"
        )
        content = {key: tensors[key] for key in part}
        if dtype == "BF16":
            _save_bf16(content, folder / name)
        else:
            cast = np.float16 if dtype == "F16" else np.float32
            save_file({key: value.astype(cast) for key, value in content.items()}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        total = sum(values.nbytes for values in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _save_bf16(tensors: Mapping[str, NDArray[np.float32]], path: Path) -> None:
    """A BF16 safetensors file, values rounded to nearest even (NumPy has no bfloat16)."""
    header: dict[str, Any] = {}
    blobs = []
    offset = 0
    for name, values in tensors.items():
        blob = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def _write_hf_tokenizer(folder: Path, size: int) -> None:
    tokens, _ = bpe_vocab(size)
    specials = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, text in enumerate(SPECIALS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in bpe_merges()],
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [2, 0]})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
