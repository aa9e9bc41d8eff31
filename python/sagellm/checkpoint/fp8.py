"""FP8 (e4m3) weights of Hugging Face checkpoints: what ``config.json`` may say, and the scales.

A linear layer's ``weight`` holds codes. The scales lie beside it as ``weight_scale`` or
``weight_scale_inv``, which both multiply: one number, one per row, or one per block of 128 x 128.
Activation scales are measured when the model runs, so stored ones (``input_scale``) are not read;
neither are those of keys and values (``k_scale``, ``v_scale``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.fields import Fields
from sagellm.checkpoint.names import TensorSource
from sagellm.checkpoint.tensor_file import TensorFile
from sagellm.errors import CorruptFileError, UnsupportedError

FORMAT = "F8_E4M3"
BLOCK = 128  # rows and columns of a block with one scale

_SUFFIXES = ("weight_scale", "weight_scale_inv")
_NOT_READ = re.compile(r".*\.(input_scale|activation_scale|output_scale|[qkv]_scale)")
_LINEAR = re.compile(r"lm_head|layers\.\d+\.(q|k|v|o|gate|up|down)")
_REMEDY = (
    "use an FP8 checkpoint (compressed-tensors float-quantized, or quant_method fp8), the F32, F16 "
    "or BF16 checkpoint, or a quantized GGUF file"
)

Found = Mapping[str, tuple[int, tuple[int, ...]]]


def check_quantization(values: Mapping[str, Any], source: str) -> None:
    """Refuses quantized checkpoints other than FP8 in the layouts that are read.

    Args:
        values: Content of ``config.json``.
        source: Name of the folder, for messages.

    Raises:
        UnsupportedError: Another method or layout; the message names it.
        CorruptFileError: The settings are no settings.
    """
    settings = values.get("quantization_config")
    if settings is None:
        return
    where = f"{source}/config.json quantization_config"
    if not isinstance(settings, dict):
        raise CorruptFileError(f"{where} is not an object")
    fields = Fields(settings, where)
    method = fields.text("quant_method")
    if method == "fp8":
        _check_fp8(fields, source)
    elif method == "compressed-tensors":
        _check_compressed_tensors(fields, where, source)
    else:
        raise _unsupported(source, f"quant_method {method!r}")


def _check_fp8(fields: Fields, source: str) -> None:
    kind = fields.text("fmt", "e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(source, f"fmt {kind!r}")
    if fields.has("weight_block_size"):
        _check_block(fields.value("weight_block_size"), source)


def _check_compressed_tensors(fields: Fields, where: str, source: str) -> None:
    _check_format(fields, source)
    for key in ("sparsity_config", "transform_config"):
        if fields.value(key, None):
            raise _unsupported(source, key)
    groups = fields.value("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CorruptFileError(f"{where}: config_groups is not an object with groups")
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CorruptFileError(f"{where}: {name} says nothing about weights")
        _check_format(Fields(group, f"{where} {name}"), source)
        if group.get("output_activations"):
            raise _unsupported(source, "output_activations")
        for part in ("weights", "input_activations"):
            if group.get(part):
                _check_scheme(group[part], f"{where} {name} {part}", source, part)


def _check_format(fields: Fields, source: str) -> None:
    name = fields.text("format", "float-quantized")
    if name != "float-quantized":
        raise _unsupported(source, f"format {name!r}")


def _check_scheme(scheme: Any, where: str, source: str, part: str) -> None:
    if not isinstance(scheme, dict):
        raise CorruptFileError(f"{where} is not an object")
    fields = Fields(scheme, where)
    kind, bits = fields.text("type", "int"), fields.integer("num_bits", 8)
    if (kind, bits) != ("float", 8):
        raise _unsupported(source, f"{part} of {bits}-bit {kind}")
    if not fields.flag("symmetric", True):
        raise _unsupported(source, f"{part} with zero points")
    if part != "weights":
        return  # scales of activations are measured
    strategy = fields.text("strategy", "tensor")
    if strategy == "block":
        _check_block(fields.value("block_structure"), source)
    elif strategy not in ("tensor", "channel"):
        raise _unsupported(source, f"weights with strategy {strategy!r}")


def _check_block(size: Any, source: str) -> None:
    if size not in ([BLOCK, BLOCK], "128x128"):
        raise _unsupported(source, f"a block of {size} weights per scale (128 x 128 is read)")


def _unsupported(source: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{source}: the checkpoint is quantized with {what}, which is not supported; {_REMEDY}"
    )


def split_scales(found: Found) -> tuple[dict[str, tuple[int, tuple[int, ...]]], Found]:
    """Stored tensors without what a quantizer adds, and the scales of weights among those."""
    scales = {name: place for name, place in found.items() if name.endswith(_SUFFIXES)}
    kept = {
        name: place
        for name, place in found.items()
        if name not in scales and not _NOT_READ.fullmatch(name)
    }
    return kept, scales


def scale_sources(
    files: list[TensorFile], sources: Mapping[str, TensorSource], scales: Found, source: str
) -> dict[str, TensorSource]:
    """Finds the scales of every FP8 matrix and checks their shapes.

    Args:
        files: Open tensor files.
        sources: Canonical names of weights to their places.
        scales: Stored names of scales to (file index, shape).
        source: Name of the checkpoint, for messages.

    Returns:
        ``layers.3.q_scale`` and so on: a weight's canonical name with ``_scale``.

    Raises:
        CorruptFileError: Scales are missing, left over, or have an impossible shape.
        UnsupportedError: FP8 tensors other than matrices of linear layers.
    """
    left = dict(scales)
    result = {}
    for canonical, place in sources.items():
        info = files[place.file].tensors[place.tensor]
        if info.format != FORMAT:
            continue
        if not _LINEAR.fullmatch(canonical):
            raise UnsupportedError(
                f"{source}: tensor {place.tensor} is stored in FP8; only matrices of linear layers "
                f"may be; {_REMEDY}"
            )
        stem = place.tensor.removesuffix("weight")
        names = [stem + suffix for suffix in _SUFFIXES if stem + suffix in left]
        if len(names) != 1:
            raise CorruptFileError(
                f"{source}: FP8 tensor {place.tensor} has {' and '.join(names) or 'no scale'}; "
                f"expected one of {stem}{{{','.join(_SUFFIXES)}}}; download or convert the model "
                "again"
            )
        file, shape = left.pop(names[0])
        if shape not in _shapes(*tuple(info.shape)):
            raise CorruptFileError(
                f"{source}: tensor {names[0]} of shape {shape} does not fit a matrix of "
                f"{tuple(info.shape)}; expected one scale, one per row, or one per block of "
                f"{BLOCK} x {BLOCK}"
            )
        result[canonical + "_scale"] = TensorSource(file=file, tensor=names[0])
    if left:
        raise CorruptFileError(
            f"{source}: tensor {sorted(left)[0]} scales no FP8 matrix; download or convert the "
            "model again"
        )
    return result


def _shapes(rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    return ((), (1,), (1, 1), (rows,), (rows, 1), blocks)


def apply_scales(codes: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights ``[n, k]`` of codes and scales of one of the shapes that are read."""
    rows, columns = codes.shape
    if scales.size == 1:
        return codes * scales.reshape(())
    if scales.size == rows and scales.shape[0] == rows:
        return codes * scales.reshape(rows, 1)
    by_row = np.repeat(scales, BLOCK, axis=0)[:rows]
    return codes * np.repeat(by_row, BLOCK, axis=1)[:, :columns]
