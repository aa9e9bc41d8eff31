"""Tiny random encoders on disk, for tests: the folders of BERT, RoBERTa and sentence-transformers.

Weights are a pure function of (seed, tensor name), as in ``make_tiny``. The WordPiece vocabulary
has the five specials, letters, digits and a few words.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from models.make_tiny import _write_safetensors, random_values
from sagellm.checkpoint.encoder import EncoderConfig, _stored_names, expected_shapes

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("the", "cat", "dog", "sat", "on", "mat", "what", "is", "a")


@dataclass(frozen=True, kw_only=True)
class TinyEncoder:
    """What to make; fields as in ``EncoderConfig``."""

    architecture: str = "bert"
    vocab_size: int = 128
    hidden_size: int = 64
    intermediate_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    num_positions: int = 160
    norm_eps: float = 1e-12
    has_head: bool = False
    dtype: str = "F32"
    seed: int = 0


def make_tiny_encoder(
    folder: str | Path,
    *,
    prefix: str = "",
    modules: tuple[str, ...] = (),
    pooling: str = "mean_tokens",
    max_seq_length: int | None = None,
    settings: dict[str, Any] | None = None,
    **dims: Any,
) -> Path:
    """Writes the folder of an encoder.

    Args:
        folder: Created.
        prefix: Before tensor names: ``bert.`` or ``roberta.``, as checkpoints with a head have.
        modules: Of sentence-transformers; with ``Pooling`` the folder says how to pool.
        pooling: The mode that is on.
        max_seq_length: Of ``sentence_bert_config.json``.
        settings: Overrides of ``config.json``.
        **dims: Fields of ``TinyEncoder``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiny = TinyEncoder(**dims)
    roberta = tiny.architecture != "bert"
    config = EncoderConfig(
        name="tiny",
        position_offset=2 if roberta else 0,
        num_token_types=1 if roberta else 2,
        max_tokens=tiny.num_positions,
        **{
            name: getattr(tiny, name)
            for name in TinyEncoder.__dataclass_fields__
            if name not in ("dtype", "seed")
        },
    )
    names = _stored_names(config, {f"{prefix}x": None})
    tensors = {}
    for canonical, shape in expected_shapes(config).items():
        std = 0.4 if canonical.startswith("embed") else 1.6 / shape[-1] ** 0.5
        values = random_values(shape, 0.2 if len(shape) == 1 else std, canonical, tiny.seed)
        if canonical.endswith("norm"):
            values = values + np.float32(1)
        tensors[names[canonical]] = values
    _write_safetensors(folder, tensors, tiny.dtype, 1)
    _write_json(folder / "config.json", _hf_config(config) | (settings or {}))
    write_wordpiece(folder / "tokenizer.json", tiny.vocab_size)
    if modules:
        paths = ["", "1_Pooling", "2_Normalize"]
        listed = [
            {
                "idx": i,
                "name": str(i),
                "path": paths[i],
                "type": f"sentence_transformers.models.{m}",
            }
            for i, m in enumerate(modules)
        ]
        _write_json(folder / "modules.json", listed)
        (folder / "1_Pooling").mkdir()
        modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens"), False) | {pooling: True}
        _write_json(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": tiny.hidden_size}
            | {f"pooling_mode_{mode}": on for mode, on in modes.items()},
        )
    if max_seq_length is not None:
        _write_json(
            folder / "sentence_bert_config.json",
            {"max_seq_length": max_seq_length, "do_lower_case": False},
        )
    return folder


def write_wordpiece(path: Path, vocab_size: int = 128) -> None:
    """A ``tokenizer.json`` with BERT's pipeline, and its settings for truncation and padding."""
    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIALS, *WORDS, *(c for c in letters if c not in WORDS)]
    pieces += [f"##{c}" for c in letters]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    for index in range(len(vocab), vocab_size):
        vocab[f"[unused{index}]"] = index
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.enable_truncation(8)  # files carry such settings; they must not act
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))


def _hf_config(config: EncoderConfig) -> dict[str, Any]:
    stem = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[config.architecture]
    out: dict[str, Any] = {
        "architectures": [stem + ("ForSequenceClassification" if config.has_head else "Model")],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.num_positions,
        "type_vocab_size": config.num_token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "pad_token_id": 0 if config.architecture == "bert" else 1,
    }
    if config.has_head:
        out |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return out


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
