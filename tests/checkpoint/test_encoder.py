"""Encoder folders: what sentence-transformers' files say, and what is no encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.make_tiny import make_tiny_gguf, make_tiny_hf
from models.make_tiny_encoder import make_tiny_encoder
from sagellm.checkpoint import open_checkpoint
from sagellm.checkpoint.encoder import is_encoder, open_encoder
from sagellm.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

ALL = ("Transformer", "Pooling", "Normalize")


def test_encoders_are_told_from_other_paths(tmp_path: Path) -> None:
    assert is_encoder(make_tiny_encoder(tmp_path / "encoder"))
    assert not is_encoder(make_tiny_hf(tmp_path / "decoder"))
    assert not is_encoder(make_tiny_gguf(tmp_path / "tiny.gguf"))
    assert not is_encoder(tmp_path / "absent")
    for content in (b"", b"[]", b"\xff", b'{"model_type": []}', b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        assert not is_encoder(tmp_path)


def test_sentence_transformers_settings_are_read(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", modules=ALL, max_seq_length=50)
    config = open_encoder(folder).config
    assert (config.pooling, config.normalize, config.max_tokens) == ("mean", True, 50)
    folder = make_tiny_encoder(tmp_path / "cls", modules=ALL[:2], pooling="cls_token")
    config = open_encoder(folder).config
    assert (config.pooling, config.normalize, config.max_tokens) == ("cls", False, 160)
    plain = open_encoder(make_tiny_encoder(tmp_path / "plain"))
    assert (plain.config.pooling, plain.config.normalize) == ("mean", False)
    assert plain.quantization == "F32" and plain.config.head_dim == 16


def test_positions_begin_after_the_padding_id_in_roberta(tmp_path: Path) -> None:
    config = open_encoder(make_tiny_encoder(tmp_path / "m", architecture="roberta")).config
    assert (config.position_offset, config.max_tokens) == (2, 158)


def test_modules_that_would_change_the_vector_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", modules=("Transformer", "Pooling", "Dense"))
    with pytest.raises(UnsupportedError, match="Dense"):
        open_encoder(folder)
    folder = make_tiny_encoder(tmp_path / "max", modules=ALL, pooling="max_tokens")
    with pytest.raises(UnsupportedError, match="max_tokens"):
        open_encoder(folder)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", modules=ALL)
    modules = json.loads((folder / "modules.json").read_text())
    for content in ("", "{", '["x"]', "{}", "[" * 100_000):
        (folder / "modules.json").write_text(content)
        with pytest.raises((CorruptFileError, UnsupportedError), match="modules"):
            open_encoder(folder)
    modules[1]["path"] = "../../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CorruptFileError, match="elsewhere"):
        open_encoder(folder)
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        open_encoder(tmp_path)


def test_a_generation_command_says_that_this_is_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"encoder.*load_embedder"):
        open_checkpoint(make_tiny_encoder(tmp_path / "m"))
