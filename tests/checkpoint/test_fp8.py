"""FP8 checkpoints: every layout of scales read, everything else refused with its name and a way
out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.make_fp8 import (
    Layout,
    e4m3_codes,
    e4m3_decode,
    e4m3_values,
    expand_scales,
    make_fp8_hf,
    quantization_config,
    quantize,
    write_safetensors,
)
from models.make_tiny import tiny_dims, tiny_weights
from sagellm.checkpoint import open_checkpoint
from sagellm.checkpoint.dequantize import dequantize
from sagellm.checkpoint.fp8 import check_quantization
from sagellm.checkpoint.safetensors_file import PySafetensorsFile
from sagellm.errors import CorruptFileError, UnsupportedError

LAYOUTS: tuple[Layout, ...] = ("tensor", "scalar", "channel", "row", "block")
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
DIMS = {"hidden_size": 144, "intermediate_size": 272, "head_dim": 48}  # ragged blocks of 128


def test_every_code_has_the_value_that_the_definition_gives() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = dequantize("F8_E4M3", codes, (256,))
    numbers = (codes & 0x7F) != 0x7F
    np.testing.assert_array_equal(values[numbers], e4m3_decode(codes[numbers]))
    assert np.isnan(values[~numbers]).all()
    assert values.max(where=numbers, initial=0) == 448 and values[1] == 2.0**-9
    np.testing.assert_array_equal(np.signbit(values[numbers]), codes[numbers] >= 128)


def test_the_rounding_of_the_tests_is_to_nearest_even() -> None:
    table = e4m3_values()
    np.testing.assert_array_equal(e4m3_codes(table), np.arange(127))
    middles = (table[:-1] + table[1:]) / 2
    np.testing.assert_array_equal(e4m3_codes(middles) % 2, 0)
    np.testing.assert_array_equal(e4m3_codes(np.array([-449.0, 1e9])), [0xFE, 0x7E])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_codes_times_scales(tmp_path: Path, layout: Layout) -> None:
    checkpoint = open_checkpoint(make_fp8_hf(tmp_path / "m", layout, static=True, **DIMS))
    weights = tiny_weights("llama", tiny_dims("llama", **DIMS), 0)
    for suffix in LINEAR:
        name = f"layers.1.{suffix}"
        codes, scales = quantize(weights[name], layout)
        expected = (e4m3_decode(codes) * expand_scales(scales, *codes.shape)).astype(np.float32)
        np.testing.assert_array_equal(checkpoint.load_f32(name), expected)
        assert checkpoint.load_f32(name + "_scale").shape == scales.shape
    assert checkpoint.sources.keys() - weights.keys() == {
        f"layers.{i}.{suffix}_scale" for i in range(2) for suffix in LINEAR
    }
    assert checkpoint.num_parameters == sum(values.size for values in weights.values())


def test_the_python_reader_reads_the_same_codes(tmp_path: Path) -> None:
    folder = make_fp8_hf(tmp_path / "m", "channel")
    file = PySafetensorsFile(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    codes, _ = quantize(tiny_weights("llama", tiny_dims("llama"), 0)["layers.0.up"], "channel")
    assert file.tensors[name].format == "F8_E4M3"
    np.testing.assert_array_equal(file.raw(name).reshape(codes.shape), codes)
    np.testing.assert_array_equal(file.dequantize(name), e4m3_decode(codes))


def test_an_output_head_may_be_fp8(tmp_path: Path) -> None:
    folder = make_fp8_hf(tmp_path / "m", "channel", lm_head=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization == "F8_E4M3"
    assert "lm_head_scale" in checkpoint.sources


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def change(folder: Path, edit: Callable[[Tensors], Any]) -> Path:
    """Rewrites the tensors of a folder."""
    path = folder / "model.safetensors"
    file = PySafetensorsFile(path)
    tensors = {
        name: (info.format, info.shape, file.raw(name).tobytes())
        for name, info in file.tensors.items()
    }
    edit(tensors)
    path.unlink()  # the old one is mapped
    write_safetensors(path, tensors)
    return folder


def floats(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, np.ones(shape, np.float32).tobytes()


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(WEIGHT + "_scale"), CorruptFileError, "q_proj.weight has no scale"),
        (
            lambda t: t.update({WEIGHT + "_scale_inv": floats(1)}),
            CorruptFileError,
            "q_proj.weight_scale and .*q_proj.weight_scale_inv",
        ),
        (
            lambda t: t.update({WEIGHT + "_scale": floats(3, 1)}),
            CorruptFileError,
            r"shape \(3, 1\) does not fit a matrix of \(64, 64\).*one per block of 128 x 128",
        ),
        (
            lambda t: t.update({WEIGHT: ("BF16", (64, 64), bytes(8192))}),
            CorruptFileError,
            "q_proj.weight_scale scales no FP8 matrix",
        ),
        (
            lambda t: t.update({"model.norm.weight": ("F8_E4M3", (64,), bytes(64))}),
            UnsupportedError,
            "model.norm.weight is stored in FP8; only matrices of linear layers.*BF16 checkpoint",
        ),
        (
            lambda t: t.update({WEIGHT + "_zero_point": floats(64)}),
            UnsupportedError,
            "weight_zero_point not known",
        ),
    ],
)
def test_tensors_that_do_not_go_together_are_named(
    tmp_path: Path, edit: Callable[[Tensors], Any], error: type[Exception], message: str
) -> None:
    folder = change(make_fp8_hf(tmp_path / "m", "channel"), edit)
    with pytest.raises(error, match=message):
        open_checkpoint(folder)


def compressed(**changes: Any) -> dict[str, Any]:
    """compressed-tensors settings; ``weights__num_bits`` changes the only group."""
    config: dict[str, Any] = json.loads(json.dumps(quantization_config("channel")))
    for key, value in changes.items():
        at: Any = config
        *path, last = key.split("__")
        for part in ["config_groups", "group_0", *path] if path else []:
            at = at[part]
        at[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quantized with quant_method 'gptq'.*use an FP8 checkpoint"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"block of \[64, 64\].*128 x 128"),
        (compressed(format="pack-quantized"), "format 'pack-quantized'"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed(transform_config={"R1": {}}), "transform_config"),
        (compressed(weights__num_bits=4), "weights of 4-bit float"),
        (compressed(weights__type="int"), "weights of 8-bit int"),
        (compressed(weights__symmetric=False), "weights with zero points"),
        (compressed(weights__strategy="group"), "weights with strategy 'group'"),
        (
            compressed(weights__strategy="block", weights__block_structure=[1, 128]),
            r"block of \[1, 128\]",
        ),
        (compressed(input_activations__type="int"), "input_activations of 8-bit int"),
    ],
)
def test_other_quantizations_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_quantization({"quantization_config": config}, "model")


@pytest.mark.parametrize(
    "config",
    [
        3,
        {},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": None}}},
        compressed(weights__num_bits="8"),
    ],
)
def test_settings_that_make_no_sense_are_corrupt(config: Any) -> None:
    with pytest.raises(CorruptFileError, match=r"model/config.json"):
        check_quantization({"quantization_config": config}, "model")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_settings_are_accepted(layout: Layout) -> None:
    check_quantization({"quantization_config": quantization_config(layout)}, "model")
    check_quantization({}, "model")
