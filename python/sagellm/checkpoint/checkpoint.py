"""Opening a model: a GGUF file or a Hugging Face folder becomes config, tensors and tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.config import ModelConfig, RopeConfig
from sagellm.checkpoint.files import open_file, open_weights, read_json
from sagellm.checkpoint.fp8 import apply_scales, scale_sources, split_scales
from sagellm.checkpoint.gguf_config import config_from_gguf, gguf_quantization, main_format
from sagellm.checkpoint.hf_config import config_from_hf
from sagellm.checkpoint.names import (
    TensorSource,
    expected_shapes,
    gguf_names,
    hf_names,
    map_tensors,
)
from sagellm.checkpoint.tensor_file import TensorFile
from sagellm.checkpoint.tokenizer_source import TokenizerSource
from sagellm.errors import CorruptFileError, ModelNotFoundError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open model: what backends and the text layer load from.

    Attributes:
        path: The GGUF file or the folder.
        config: The model's shape.
        files: Open tensor files; ``TensorSource.file`` indexes them.
        sources: Canonical tensor name to its place and transform, every shape already checked. An
            FP8 matrix has its scales beside it, as ``layers.3.q_scale``.
        tokenizer: Where the tokenizer comes from.
        quantization: Such as ``Q4_K_M`` or ``BF16``.
        num_parameters: Weights of the model, a tied head counted once.
    """

    path: Path
    config: ModelConfig
    files: list[TensorFile] = field(repr=False)
    sources: Mapping[str, TensorSource] = field(repr=False)
    tokenizer: TokenizerSource = field(repr=False)
    quantization: str
    num_parameters: int

    def load_f32(self, name: str) -> NDArray[np.float32]:
        """Decodes a tensor to float32 with its transform applied.

        Args:
            name: A canonical name, a key of ``sources``.

        Returns:
            A fresh array of the shape given by ``names.expected_shapes``; an FP8 matrix times its
            scales.
        """
        source = self.sources[name]
        values = self.files[source.file].dequantize(source.tensor)
        if name + "_scale" in self.sources:
            values = apply_scales(values, self.load_f32(name + "_scale"))
        if source.unpermute_heads:
            values = unpermute_rope_rows(values, source.unpermute_heads)
        return values + np.float32(1) if source.add_one else values


def unpermute_rope_rows(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Brings rows of q or k, or their bias, from GGUF's interleaved order to the half-split one."""
    rows = values.shape[0]
    half = rows // num_heads // 2
    pairs = values.reshape(num_heads, half, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a model for loading; weights stay on disk until they are asked for.

    Args:
        path: A ``.gguf`` file, or a folder with ``config.json``, ``*.safetensors`` and
            ``tokenizer.json``.

    Raises:
        ModelNotFoundError: Nothing is there.
        CorruptFileError: Files are damaged or contradict each other.
        UnsupportedError: An architecture, format or variant that is not covered.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = _open_folder(path)
    elif path.is_file():
        checkpoint = _open_gguf(path)
    else:
        raise ModelNotFoundError(f"no model at {path}; give a .gguf file or a Hugging Face folder")
    return checkpoint


def _open_gguf(path: Path) -> Checkpoint:
    if path.suffix != ".gguf":
        raise UnsupportedError(
            f"{path.name}: a model file must be .gguf (or give the model's folder)"
        )
    file = open_file(path)
    config = config_from_gguf(file, path.name)
    _check_config(config, path.name)
    found = {name: (0, tuple(tensor.shape)) for name, tensor in file.tensors.items()}
    return Checkpoint(
        path=path,
        config=config,
        files=[file],
        sources=map_tensors(config, gguf_names(config.architecture), found, path.name),
        tokenizer=TokenizerSource.from_gguf(file.metadata),
        quantization=gguf_quantization(file),
        num_parameters=_count_parameters(config),
    )


def _open_folder(folder: Path) -> Checkpoint:
    source = folder.resolve().name
    config_path = folder / "config.json"
    if not config_path.is_file():
        ggufs = sorted(entry.name for entry in folder.glob("*.gguf"))
        hint = f"; give one of its files: {', '.join(ggufs)}" if ggufs else "; not a model folder"
        raise ModelNotFoundError(f"{source}: no config.json{hint}")
    settings = read_json(config_path)
    files, found = open_weights(folder, source)
    config = config_from_hf(settings, source, has_lm_head="lm_head.weight" in found)
    _check_config(config, source)
    weights, scales = split_scales(found)
    sources = map_tensors(config, hf_names(config), weights, source)
    return Checkpoint(
        path=folder,
        config=config,
        files=files,
        sources=sources | scale_sources(files, sources, scales, source),
        tokenizer=TokenizerSource.from_folder(folder),
        quantization=main_format(files),
        num_parameters=_count_parameters(config),
    )


def _check_config(config: ModelConfig, source: str) -> None:
    """Relations between settings that no single field can break alone."""
    if config.num_heads % config.num_kv_heads:
        raise CorruptFileError(
            f"{source}: {config.num_heads} query heads are not a multiple of "
            f"{config.num_kv_heads} kv heads"
        )
    for rope in filter(None, (config.rope, config.rope_local)):
        _check_rope(rope, config.head_dim, source)


def _check_rope(rope: RopeConfig, head_dim: int, source: str) -> None:
    if rope.dim <= 0 or rope.dim % 2 or rope.dim > head_dim:
        raise CorruptFileError(
            f"{source}: rotation of {rope.dim} of {head_dim} values per head is impossible"
        )
    if rope.kind == "yarn" and rope.theta <= 1.0:
        raise CorruptFileError(f"{source}: yarn needs a rope theta above 1, found {rope.theta}")


def _count_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())
