"""Opening whole checkpoints: tensors found, checked and transformed; damage and mismatch named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.make_tiny import (
    ARCHITECTURES,
    make_tiny_gguf,
    make_tiny_hf,
    tiny_dims,
    tiny_weights,
)
from sagellm.checkpoint import expected_shapes, open_checkpoint, open_file
from sagellm.checkpoint.tensor_file import BLOCKS
from sagellm.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

GGUF_FORMATS = tuple(name for name in BLOCKS if name != "F8_E4M3")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loaded_tensors_are_the_model_in_both_kinds_of_checkpoint(
    arch: str, tmp_path: Path
) -> None:
    expected = tiny_weights(arch, tiny_dims(arch), 5)
    opened = {
        "gguf": open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf", arch, seed=5)),
        "hf": open_checkpoint(make_tiny_hf(tmp_path / "tiny", arch, seed=5)),
    }
    for kind, checkpoint in opened.items():
        assert checkpoint.sources.keys() == expected.keys()
        assert {n: w.shape for n, w in expected.items()} == expected_shapes(checkpoint.config)
        for name, values in expected.items():
            loaded = checkpoint.load_f32(name)
            assert loaded.dtype == np.float32 and loaded.flags.c_contiguous
            # 1 + w is rounded once more where the stored weight is w
            np.testing.assert_allclose(loaded, values, atol=2e-7, err_msg=f"{kind} {name}")
        assert checkpoint.num_parameters == sum(values.size for values in expected.values())
        assert checkpoint.tokenizer.kind == kind


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_every_format_loads_and_is_named(format: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf", "qwen3", format))
    assert checkpoint.quantization == format
    values = checkpoint.load_f32("layers.1.down")
    assert values.shape == expected_shapes(checkpoint.config)["layers.1.down"]
    assert np.isfinite(values).all() and values.std() > 0.01


def test_transforms_are_described_for_the_native_core(tmp_path: Path) -> None:
    llama = open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf", "llama")).sources
    assert llama["layers.0.q"].unpermute_heads == 4 and llama["layers.0.k"].unpermute_heads == 2
    assert llama["layers.0.v"].unpermute_heads == 0 and llama["layers.0.o"].unpermute_heads == 0
    gemma = open_checkpoint(make_tiny_hf(tmp_path / "tiny", "gemma3")).sources
    assert {n for n, s in gemma.items() if s.add_one} == {n for n in gemma if n.endswith("norm")}
    assert not any(
        s.add_one for s in open_checkpoint(make_tiny_hf(tmp_path / "q", "qwen3")).sources.values()
    )


def test_a_sharded_folder_is_one_model(tmp_path: Path) -> None:
    single = open_checkpoint(make_tiny_hf(tmp_path / "single", "llama"))
    sharded = open_checkpoint(make_tiny_hf(tmp_path / "sharded", "llama", shards=3))
    assert len(sharded.files) == 3
    for name in single.sources:
        np.testing.assert_array_equal(single.load_f32(name), sharded.load_f32(name))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_quantization_of_a_folder_is_its_dtype(dtype: str, tmp_path: Path) -> None:
    assert open_checkpoint(make_tiny_hf(tmp_path / "tiny", dtype=dtype)).quantization == dtype


def test_a_head_that_copies_the_embedding_is_ignored_when_tied(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", "llama", tie_embeddings=True)
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert "lm_head" not in open_checkpoint(folder).sources


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t | {name: np.zeros(8, np.float32)})
    open_checkpoint(folder)


# ------------------------------------------------------------------------------------------ errors


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_wrong_shape_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", "llama")
    edit_config(folder, num_key_value_heads=4)
    with pytest.raises(
        CorruptFileError, match=r"k_proj.weight has shape \(32, 64\), expected \(64, 64\)"
    ):
        open_checkpoint(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", "qwen3")
    lost = "model.layers.1.self_attn.q_norm.weight"
    edit_tensors(folder, lambda t: {n: v for n, v in t.items() if n != lost})
    with pytest.raises(CorruptFileError, match=f"{lost} missing"):
        open_checkpoint(folder)


def test_an_unknown_tensor_is_named_with_the_known_ones(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", "llama")
    edit_tensors(
        folder, lambda t: t | {"model.layers.0.self_attn.o_proj.bias": np.zeros(64, np.float32)}
    )
    with pytest.raises(
        UnsupportedError, match=r"o_proj\.bias not known for llama; .*o_proj\.weight"
    ):
        open_checkpoint(folder)


def test_a_gguf_with_more_layers_than_it_declares_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_tiny_gguf(path, num_layers=3)
    reader = gguf.GGUFReader(path, "r+")
    reader.fields["llama.block_count"].parts[-1][0] = 2
    reader.data.flush()
    with pytest.raises(UnsupportedError, match=r"blk\.2\.attn_k\.weight.*not known"):
        open_checkpoint(path)


@pytest.mark.parametrize("heads", [3, 5])
def test_heads_that_do_not_divide_are_refused(heads: int, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny")
    edit_config(folder, num_key_value_heads=heads)
    with pytest.raises(CorruptFileError, match="not a multiple"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../escape.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin"]
)
def test_an_index_cannot_point_outside_the_folder(name: str, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="not one beside it"):
        open_checkpoint(folder)


def test_an_index_that_contradicts_its_files_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = content["weight_map"]
    shards = sorted(set(weight_map.values()))
    original = weight_map["lm_head.weight"]
    weight_map["lm_head.weight"] = next(shard for shard in shards if shard != original)
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="the index says"):
        open_checkpoint(folder)
    weight_map["lm_head.weight"] = original
    weight_map["phantom.weight"] = original
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="phantom"):
        open_checkpoint(folder)
    (folder / shards[1]).unlink()
    with pytest.raises(CorruptFileError, match=f"{shards[1]} is missing"):
        open_checkpoint(folder)


def test_what_is_not_a_model_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"give a \.gguf file or a Hugging Face folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    make_tiny_gguf(tmp_path / "inside.gguf")
    with pytest.raises(ModelNotFoundError, match=r"inside\.gguf"):
        open_checkpoint(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UnsupportedError, match=r"\.gguf"):
        open_checkpoint(text)
    with pytest.raises(UnsupportedError, match=r"\.safetensors"):
        open_file(text)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model_type": "llama"}', "[" * 100_000])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny")
    (folder / "config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        open_checkpoint(folder)


def test_a_folder_without_safetensors_says_so(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors"):
        open_checkpoint(folder)
