"""Encoders of the BERT family: the folder of one becomes config and named tensors.

A sentence-transformers folder says in ``modules.json`` what becomes of the token states: pooling
(``1_Pooling/config.json``) and normalisation. A plain folder has the usual default, the mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.config import ENCODER_TYPES
from sagellm.checkpoint.fields import Fields
from sagellm.checkpoint.files import open_weights, read_json
from sagellm.checkpoint.gguf_config import MAX_LAYERS, main_format
from sagellm.checkpoint.tensor_file import TensorFile
from sagellm.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

Pooling = Literal["mean", "cls"]

_MAX_SETTINGS = 1 << 20
_IGNORED = re.compile(r"(\w+\.)?(embeddings\.position_ids|pooler\.)|cls\.|lm_head\.")
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The shape of an encoder, and what becomes of its token states.

    Attributes:
        architecture: One of ``ENCODER_TYPES``.
        name: Of the folder.
        num_positions: Rows of the position table.
        position_offset: Row of a sequence's first token (RoBERTa begins after its padding id).
        num_token_types: Rows of the token-type table.
        max_tokens: Longest sequence, special tokens included: what the positions allow, or less
            when the sentence-transformers settings say so.
        has_head: A cross-encoder: dense + tanh over the first token, then one output.
        pooling: How token states become one vector.
        normalize: Whether vectors get length 1.
        lower_case: Texts are lower-cased before the tokenizer sees them.
    """

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    position_offset: int
    num_token_types: int
    norm_eps: float
    max_tokens: int
    has_head: bool = False
    pooling: Pooling = "mean"
    normalize: bool = False
    lower_case: bool = False

    @property
    def head_dim(self) -> int:
        """Values per attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderCheckpoint:
    """An open encoder.

    Attributes:
        path: The folder; the tokenizer's files are in it.
        config: The model's shape.
        files: Open tensor files.
        sources: Canonical tensor name to (file index, stored name), every shape already checked.
        quantization: Such as ``F32``.
        num_parameters: Weights of the model.
    """

    path: Path
    config: EncoderConfig
    files: list[TensorFile] = field(repr=False)
    sources: Mapping[str, tuple[int, str]] = field(repr=False)
    quantization: str
    num_parameters: int

    def load_f32(self, name: str) -> NDArray[np.float32]:
        """Decodes a tensor to float32.

        Args:
            name: A canonical name, a key of ``sources``.
        """
        file, stored = self.sources[name]
        return self.files[file].dequantize(stored)


def is_encoder(path: str | Path) -> bool:
    """Whether a path is the folder of an encoder, by the ``model_type`` of its ``config.json``."""
    try:
        settings = json.loads((Path(path) / "config.json").read_bytes()[:_MAX_SETTINGS])
        return settings.get("model_type") in ENCODER_TYPES
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def open_encoder(path: str | Path) -> EncoderCheckpoint:
    """Opens an encoder for loading; weights stay on disk until they are asked for.

    Args:
        path: A folder with ``config.json``, ``*.safetensors`` and ``tokenizer.json``.

    Raises:
        ModelNotFoundError: Nothing is there.
        CorruptFileError: Files are damaged or contradict each other.
        UnsupportedError: Not an encoder, or a variant that is not covered.
    """
    folder = Path(path)
    source = folder.resolve().name
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{source}: no config.json; give the folder of an encoder")
    settings = read_json(folder / "config.json")
    files, found = open_weights(folder, source)
    config = _read_config(folder, settings, source)
    names = _stored_names(config, found)
    return EncoderCheckpoint(
        path=folder,
        config=config,
        files=files,
        sources=_map_tensors(config, names, found, source),
        quantization=main_format(files),
        num_parameters=sum(math.prod(shape) for shape in expected_shapes(config).values()),
    )


def expected_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor that an encoder of ``config`` has, with its shape."""
    hidden, width = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed.word": (config.vocab_size, hidden),
        "embed.position": (config.num_positions, hidden),
        "embed.type": (config.num_token_types, hidden),
        "embed.norm": (hidden,),
        "embed.norm_bias": (hidden,),
    }
    rows = {"up": width} | dict.fromkeys(("q", "k", "v", "o", "down"), hidden)
    for index in range(config.num_layers):
        for name in _LAYER:
            at = f"layers.{index}.{name}"
            columns = width if name == "down" else hidden
            shapes[at] = (rows[name], columns) if name in rows else (hidden,)
            shapes[f"{at}_bias"] = shapes[at][:1]
    if config.has_head:
        shapes |= {"head.dense": (hidden, hidden), "head.dense_bias": (hidden,)}
        shapes |= {"head.out": (1, hidden), "head.out_bias": (1,)}
    return shapes


def _read_config(folder: Path, settings: Mapping[str, Any], source: str) -> EncoderConfig:
    fields = Fields(settings, f"{source}/config.json")
    architecture = fields.text("model_type")
    if architecture not in ENCODER_TYPES:
        raise UnsupportedError(
            f"{source}: model_type {architecture!r} is not an encoder that is supported; "
            f"supported: {', '.join(ENCODER_TYPES)}"
        )
    _refuse_variants(fields, source)
    hidden = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    if hidden % num_heads:
        raise CorruptFileError(f"{source}: {hidden} values do not divide into {num_heads} heads")
    num_positions = fields.integer("max_position_embeddings")
    pad_id = fields.integer("pad_token_id", 0 if architecture == "bert" else 1, low=0)
    offset = 0 if architecture == "bert" else pad_id + 1
    if offset >= num_positions:
        raise CorruptFileError(f"{source}: {num_positions} positions leave none after {offset}")
    limit, lower_case = _sentence_settings(folder, source)
    pooling, normalize = _modules(folder, source)
    return EncoderConfig(
        architecture=architecture,
        name=source,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=num_heads,
        num_positions=num_positions,
        position_offset=offset,
        num_token_types=fields.integer("type_vocab_size", 2),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        max_tokens=min(num_positions - offset, limit),
        has_head=_has_head(fields, source),
        pooling=pooling,
        normalize=normalize,
        lower_case=lower_case,
    )


def _refuse_variants(fields: Fields, source: str) -> None:
    for key, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        value = fields.text(key, expected)
        if value != expected:
            raise UnsupportedError(
                f"{source}: {key} {value!r} is not supported for encoders; supported: {expected}"
            )
    for key in ("is_decoder", "add_cross_attention"):
        if fields.flag(key, False):
            raise UnsupportedError(f"{source}: {key} is not supported for encoders")


def _has_head(fields: Fields, source: str) -> bool:
    """Whether the folder is a cross-encoder; a classifier with several labels is refused."""
    names = fields.value("architectures", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptFileError(f"{source}: architectures is not a list of names")
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return False
    labels = fields.value("id2label", {"0": "LABEL_0"})
    if not isinstance(labels, dict) or len(labels) != 1:
        count = len(labels) if isinstance(labels, dict) else "no"
        raise UnsupportedError(
            f"{source}: a classifier of {count} labels; a cross-encoder for ranking has 1"
        )
    return True


def _sentence_settings(folder: Path, source: str) -> tuple[int, bool]:
    """Longest sequence and lower-casing of ``sentence_bert_config.json``."""
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return 1 << 24, False
    fields = Fields(read_json(path), f"{source}/{path.name}")
    return fields.integer("max_seq_length", 1 << 24), fields.flag("do_lower_case", False)


def _modules(folder: Path, source: str) -> tuple[Pooling, bool]:
    """Pooling and normalisation of ``modules.json``."""
    path = folder / "modules.json"
    if not path.is_file():
        return "mean", False
    try:
        modules = json.loads(path.read_bytes()[:_MAX_SETTINGS])
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        places = [str(module["path"]) for module in modules]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{source}/modules.json: not a list of modules: {error}") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"{source}: modules {', '.join(kinds)} are not supported; supported: Transformer, "
            "Pooling and, optionally, Normalize"
        )
    place = places[1]
    if Path(place).name != place:
        raise CorruptFileError(f"{source}/modules.json: {place!r} is not a folder beside it")
    return _pooling(read_json(folder / place / "config.json"), f"{source}/{place}"), len(kinds) == 3


def _pooling(settings: Mapping[str, Any], source: str) -> Pooling:
    prefix = "pooling_mode_"
    on = [key for key, value in settings.items() if value is True]
    modes = [key.removeprefix(prefix) for key in on if key.startswith(prefix)]
    if modes == ["mean_tokens"]:
        return "mean"
    if modes == ["cls_token"]:
        return "cls"
    raise UnsupportedError(
        f"{source}: pooling by {' and '.join(modes) or 'nothing'} is not supported; supported: "
        "mean_tokens or cls_token"
    )


def _stored_names(config: EncoderConfig, found: Mapping[str, object]) -> dict[str, str]:
    """Canonical name to the name in the checkpoint, which may carry the model's prefix."""
    prefix = "bert." if config.architecture == "bert" else "roberta."
    at = prefix if any(name.startswith(prefix) for name in found) else ""
    modules = {
        "embed.word": f"{at}embeddings.word_embeddings",
        "embed.position": f"{at}embeddings.position_embeddings",
        "embed.type": f"{at}embeddings.token_type_embeddings",
        "embed.norm": f"{at}embeddings.LayerNorm",
    }
    for index in range(config.num_layers):
        for canonical, stored in _LAYER.items():
            modules[f"layers.{index}.{canonical}"] = f"{at}encoder.layer.{index}.{stored}"
    if config.has_head and config.architecture == "bert":
        modules |= {"head.dense": f"{at}pooler.dense", "head.out": "classifier"}
    elif config.has_head:
        modules |= {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}
    names = {}
    for canonical in expected_shapes(config):
        base = canonical.removesuffix("_bias")
        names[canonical] = modules[base] + (".weight" if base == canonical else ".bias")
    return names


def _map_tensors(
    config: EncoderConfig,
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, tuple[int, ...]]],
    source: str,
) -> dict[str, tuple[int, str]]:
    missing = sorted(name for name in names.values() if name not in found)
    if missing:
        raise CorruptFileError(
            f"{source}: tensor {missing[0]} missing ({len(missing)} in all); the file is incomplete"
            f" or not a {config.architecture} encoder"
        )
    known = set(names.values())
    unknown = sorted(name for name in found if name not in known and not _IGNORED.match(name))
    if unknown:
        raise UnsupportedError(
            f"{source}: tensor {unknown[0]} is not known for {config.architecture} encoders"
        )
    sources = {}
    for canonical, shape in expected_shapes(config).items():
        file, found_shape = found[names[canonical]]
        if found_shape != shape:
            raise CorruptFileError(
                f"{source}: tensor {names[canonical]} has shape {found_shape}, expected {shape} "
                "from the model's settings; download or convert the model again"
            )
        sources[canonical] = (file, names[canonical])
    return sources
