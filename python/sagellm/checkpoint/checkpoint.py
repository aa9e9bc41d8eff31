"""Opening a model: a GGUF file or a Hugging Face folder becomes config, tensors and tokenizer."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.config import ModelConfig, RopeConfig
from sagellm.checkpoint.gguf_config import config_from_gguf, gguf_quantization, main_format
from sagellm.checkpoint.gguf_file import PyGgufFile
from sagellm.checkpoint.hf_config import config_from_hf
from sagellm.checkpoint.names import (
    TensorSource,
    expected_shapes,
    gguf_names,
    hf_names,
    map_tensors,
)
from sagellm.checkpoint.safetensors_file import PySafetensorsFile
from sagellm.checkpoint.tensor_file import TensorFile
from sagellm.checkpoint.tokenizer_source import TokenizerSource
from sagellm.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

_MAX_JSON = 64 << 20  # bytes of config.json or of a shard index


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open model: what backends and the text layer load from.

    Attributes:
        path: The GGUF file or the folder.
        config: The model's shape.
        files: Open tensor files; ``TensorSource.file`` indexes them.
        sources: Canonical tensor name to its place and transform, every shape already checked.
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
            A fresh array of the shape given by ``names.expected_shapes``.
        """
        source = self.sources[name]
        values = self.files[source.file].dequantize(source.tensor)
        if source.unpermute_heads:
            values = unpermute_rope_rows(values, source.unpermute_heads)
        return values + np.float32(1) if source.add_one else values


def unpermute_rope_rows(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Brings rows of q or k, or their bias, from GGUF's interleaved order to the half-split one."""
    rows = values.shape[0]
    half = rows // num_heads // 2
    pairs = values.reshape(num_heads, half, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def open_file(path: str | Path) -> TensorFile:
    """Opens one ``.gguf`` or ``.safetensors`` file, with the native reader where it is built.

    Raises:
        CorruptFileError: The file is damaged.
        UnsupportedError: Another kind of file.
    """
    path = Path(path)
    native = _native_readers()
    if path.suffix == ".gguf":
        return cast(TensorFile, native.GgufFile(str(path))) if native else PyGgufFile(path)
    if path.suffix == ".safetensors":
        return (
            cast(TensorFile, native.SafetensorsFile(str(path)))
            if native
            else PySafetensorsFile(path)
        )
    raise UnsupportedError(f"{path.name}: unknown kind of file; supported: .gguf, .safetensors")


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
    settings = _read_json(config_path)
    paths, owner = _weight_files(folder, source)
    files = [open_file(path) for path in paths]
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for index, file in enumerate(files):
        for name, tensor in file.tensors.items():
            if name in found:
                raise CorruptFileError(f"{source}: tensor {name} is in two files")
            if owner is not None and owner.get(name) != paths[index].name:
                raise CorruptFileError(
                    f"{source}: tensor {name} is in {paths[index].name}, the index says "
                    f"{owner.get(name)}"
                )
            found[name] = (index, tuple(tensor.shape))
    if owner is not None and owner.keys() - found.keys():
        lost = sorted(owner.keys() - found.keys())[0]
        raise CorruptFileError(f"{source}: the index lists {lost}, which is in none of the files")
    config = config_from_hf(settings, source, has_lm_head="lm_head.weight" in found)
    _check_config(config, source)
    return Checkpoint(
        path=folder,
        config=config,
        files=files,
        sources=map_tensors(config, hf_names(config), found, source),
        tokenizer=TokenizerSource.from_folder(folder),
        quantization=main_format(files),
        num_parameters=_count_parameters(config),
    )


def _weight_files(folder: Path, source: str) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder and, when it is sharded, tensor name to file name."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ModelNotFoundError(
                f"{source}: no model.safetensors and no model.safetensors.index.json; other "
                "weight formats "
                "(such as pytorch_model.bin) are not read"
            )
        return [single], None
    owner = _read_json(index_path).get("weight_map")
    if not isinstance(owner, dict) or not owner:
        raise CorruptFileError(f"{source}: {index_path.name} has no weight_map")
    paths = []
    for shard in sorted({str(value) for value in owner.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CorruptFileError(
                f"{source}: {index_path.name} names the file {shard!r}, not one beside it"
            )
        if not (folder / shard).is_file():
            raise CorruptFileError(f"{source}: {shard} is missing; download the whole model folder")
        paths.append(folder / shard)
    return paths, owner


def _read_json(path: Path) -> dict[str, Any]:
    where = f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CorruptFileError(f"{where}: larger than {_MAX_JSON} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptFileError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{where}: not a JSON object")
    return content


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


def _native_readers() -> Any:
    """The ``sagellm._core.checkpoint`` module, or None in a pure-Python install."""
    try:
        return importlib.import_module("sagellm._core").checkpoint
    except ModuleNotFoundError:
        return None
