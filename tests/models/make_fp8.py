"""Tiny Hugging Face folders with FP8 weights, in the layouts of published checkpoints.

The codes are rounded here, from the definition of e4m3, independently of the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from models.make_tiny import make_tiny_hf

Layout = Literal["tensor", "scalar", "channel", "row", "block"]


def e4m3_values() -> NDArray[np.float64]:
    """The values of codes 0 .. 126, ascending: 3 fraction bits, exponents from -6 to 8."""
    low = np.arange(8) / 8 * 2.0**-6
    return np.concatenate(
        [low, *[(1 + np.arange(8) / 8) * 2.0**exponent for exponent in range(-6, 9)]]
    )[:127]


def e4m3_codes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Nearest codes, ties to even, beyond 448 the largest."""
    table = e4m3_values()
    middles = (table[:-1] + table[1:]) / 2
    magnitude = np.abs(values.astype(np.float64))
    codes = np.searchsorted(middles, magnitude, side="left")  # a tie takes the lower code
    tie = magnitude == middles[np.minimum(codes, len(middles) - 1)]
    codes += tie & (codes % 2 == 1)
    return (codes | (np.signbit(values).astype(np.int64) << 7)).astype(np.uint8)


def e4m3_decode(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values of codes that are not NaN."""
    magnitude = e4m3_values()[codes & 0x7F]
    return np.where(codes < 128, magnitude, -magnitude)


def expand_scales(scales: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float64]:
    """One scale per weight, from any of the layouts."""
    if scales.size == 1:
        return np.full((rows, columns), scales.reshape(-1)[0], np.float64)
    if scales.size == rows:
        return np.repeat(scales.reshape(rows, 1), columns, axis=1).astype(np.float64)
    r, c = np.arange(rows) // 128, np.arange(columns) // 128
    return scales[np.ix_(r, c)].astype(np.float64)


def quantize(
    values: NDArray[np.float32], layout: Layout
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and scales of a matrix; every scale maps its largest weight to 448."""
    magnitude = np.abs(values)
    if layout in ("tensor", "scalar"):
        scales = np.float32(magnitude.max() / 448).reshape((1,) if layout == "tensor" else ())
    elif layout in ("channel", "row"):
        scales = (magnitude.max(axis=1, keepdims=layout == "channel") / 448).astype(np.float32)
    else:
        rows, columns = values.shape
        scales = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
        for i, j in np.ndindex(*scales.shape):
            part = magnitude[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scales[i, j] = part.max() / 448
    return e4m3_codes(values / expand_scales(np.asarray(scales), *values.shape)), scales


def quantization_config(layout: Layout) -> dict[str, Any]:
    """``quantization_config`` as published checkpoints of that layout have it."""
    if layout == "scalar":
        return {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": None}
    if layout == "block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    strategy = "tensor" if layout == "tensor" else "channel"
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme | {"strategy": strategy, "dynamic": False},
                "input_activations": scheme | {"strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


def make_fp8_hf(
    folder: str | Path,
    layout: Layout = "channel",
    arch: str = "llama",
    *,
    dtype: str = "BF16",
    lm_head: bool = False,
    static: bool = False,
    skip: tuple[str, ...] = (),
    **options: Any,
) -> Path:
    """Writes a folder whose linear layers are FP8 and whose other tensors are 16 bits wide.

    Args:
        folder: Where to.
        layout: ``tensor`` [1], ``channel`` [n, 1] and ``row`` [n] are compressed-tensors;
            ``scalar`` [] and ``block`` are quant_method fp8.
        arch: A key of ``make_tiny.ARCHITECTURES``.
        dtype: ``BF16`` or ``F16``, of what is not FP8.
        lm_head: The output head is FP8 too.
        static: With scales of activations, keys and values, which are not read.
        skip: Endings of names that stay as they are, such as ``q_proj.weight``.
        options: Of ``make_tiny_hf``: seed, dims.
    """
    folder = make_tiny_hf(folder, arch, **options)
    source = folder / "model.safetensors"
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, values in load_file(source).items():
        linear = name.endswith("_proj.weight") or (lm_head and name == "lm_head.weight")
        if not linear or name.endswith(skip):
            tensors[name] = (dtype, values.shape, _stored(values, dtype))
            continue
        codes, scales = quantize(values, layout)
        tensors[name] = ("F8_E4M3", codes.shape, codes.tobytes())
        suffix = "_scale_inv" if layout == "block" else "_scale"
        tensors[name + suffix] = ("F32", scales.shape, scales.tobytes())
        if static:
            one = ("F32", (), np.float32(1).tobytes())
            tensors[name.removesuffix("weight") + "input_scale"] = one
    if static:
        tensors["model.layers.0.self_attn.k_scale"] = ("F32", (), np.float32(1).tobytes())
    write_safetensors(source, tensors)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["quantization_config"] = quantization_config(layout)
    config_path.write_text(json.dumps(config))
    return folder


def _stored(values: NDArray[np.float32], dtype: str) -> bytes:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Writes tensors given as (dtype, shape, bytes)."""
    header, offset = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        place = [offset, offset + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
        offset += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(raw for _, _, raw in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
