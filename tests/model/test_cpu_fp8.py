"""FP8 checkpoints on the CPU: against the reference, and against the same weights as float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from models.make_fp8 import (
    Layout,
    e4m3_decode,
    expand_scales,
    make_fp8_hf,
    write_safetensors,
)
from reference.cases import chunked_logits
from sagellm import _core
from sagellm.backends.cpu import CpuRunner
from sagellm.backends.reference import ReferenceRunner
from sagellm.checkpoint import open_checkpoint
from sagellm.checkpoint.safetensors_file import PySafetensorsFile
from sagellm.errors import CorruptFileError

pytestmark = pytest.mark.native

LAYOUTS: tuple[Layout, ...] = ("tensor", "scalar", "channel", "row", "block")
DIMS = {"hidden_size": 144, "intermediate_size": 272, "head_dim": 48}  # ragged blocks of 128
TOKENS = np.random.default_rng(0).integers(0, 320, 40).astype(np.int32)


def as_float32(folder: Path, target: Path) -> Path:
    """The same model with its FP8 weights written out as float32."""
    file = PySafetensorsFile(folder / "model.safetensors")
    tensors = {}
    for name, info in file.tensors.items():
        if "_scale" in name:
            continue
        values = file.dequantize(name)
        if info.format == "F8_E4M3":
            scale = next(name + s for s in ("_scale", "_scale_inv") if name + s in file.tensors)
            codes = file.raw(name).reshape(info.shape)
            exact = e4m3_decode(codes) * expand_scales(file.dequantize(scale), *info.shape)
            values = exact.astype(np.float32)
        tensors[name] = ("F32", info.shape, values.tobytes())
    target.mkdir()
    for other in folder.iterdir():
        if other.suffix == ".json":
            (target / other.name).write_bytes(other.read_bytes())
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    write_safetensors(target / "model.safetensors", tensors)
    return target


def divergence(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence of the rows."""
    p, q = (x.astype(np.float64) - x.max(axis=-1, keepdims=True) for x in (expected, got))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_model_with_its_weights_written_out(
    tmp_path: Path, layout: Layout
) -> None:
    folder = make_fp8_hf(tmp_path / "fp8", layout, lm_head=layout == "row", **DIMS)
    expanded = open_checkpoint(as_float32(folder, tmp_path / "f32"))
    expected = chunked_logits(ReferenceRunner(expanded), TOKENS, 40)
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(chunked_logits(ReferenceRunner(checkpoint), TOKENS, 40), expected)
    got = chunked_logits(CpuRunner(checkpoint, threads=1), TOKENS, 40, block_size=16)
    native = chunked_logits(CpuRunner(expanded, threads=1), TOKENS, 40, block_size=16)
    assert divergence(expected, got) < 1e-4  # keys and values are bfloat16
    assert divergence(native, got) < 1e-6


def test_results_do_not_depend_on_chunks_or_threads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_fp8_hf(tmp_path / "fp8", "block", **DIMS))
    results = {
        chunked_logits(
            CpuRunner(checkpoint, threads=threads), TOKENS, chunk, block_size=16
        ).tobytes()
        for threads, chunk in ((1, 40), (2, 40), (2, 7), (1, 1))
    }
    assert len(results) == 1


@pytest.mark.parametrize("isa", _core.kernels.available_isas())
def test_every_isa_agrees_with_the_reference(tmp_path: Path, isa: str) -> None:
    checkpoint = open_checkpoint(make_fp8_hf(tmp_path / "fp8", "channel", "qwen3"))
    expected = chunked_logits(ReferenceRunner(checkpoint), TOKENS, 40)
    got = chunked_logits(CpuRunner(checkpoint, threads=1, isa=isa), TOKENS, 40, block_size=16)
    assert divergence(expected, got) < 1e-4


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    folder = make_fp8_hf(tmp_path / "fp8", "channel")
    path = folder / "model.safetensors"
    source = open_checkpoint(folder).sources["layers.1.up"]
    info = PySafetensorsFile(path).tensors[source.tensor]
    raw = bytearray(path.read_bytes())
    raw[info.offset + 5] = 0x7F
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"mlp.up_proj.weight' has weights that are NaN"):
        CpuRunner(open_checkpoint(folder), threads=1)


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = make_fp8_hf(tmp_path / "fp8", "channel")
    path = folder / "model.safetensors"
    info = PySafetensorsFile(path).tensors["model.layers.0.mlp.up_proj.weight_scale"]
    raw = bytearray(path.read_bytes())
    raw[info.offset : info.offset + 4] = np.float32(np.inf).tobytes()
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"up_proj.weight_scale' has a scale that is not"):
        CpuRunner(open_checkpoint(folder), threads=1)
