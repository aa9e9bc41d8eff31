"""The files of a model folder: tensor files with the reader of this install, and settings."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, cast

from sagellm.checkpoint.tensor_file import TensorFile
from sagellm.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

_MAX_JSON = 64 << 20  # bytes of config.json or of a shard index

# By suffix: the native reader's name, and where its twin is for installs without the core.
_READERS = {
    ".gguf": ("GgufFile", "sagellm.checkpoint.gguf_file"),
    ".safetensors": ("SafetensorsFile", "sagellm.checkpoint.safetensors_file"),
}


def open_file(path: str | Path) -> TensorFile:
    """Opens one ``.gguf`` or ``.safetensors`` file, with the native reader where it is built.

    Raises:
        CorruptFileError: The file is damaged.
        UnsupportedError: Another kind of file.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise UnsupportedError(f"{path.name}: unknown kind of file; supported: .gguf, .safetensors")
    name, twin = _READERS[path.suffix]
    native = _native_readers()
    if native is None:
        return cast(TensorFile, getattr(importlib.import_module(twin), f"Py{name}")(path))
    return cast(TensorFile, getattr(native, name)(str(path)))


def open_weights(
    folder: Path, source: str
) -> tuple[list[TensorFile], dict[str, tuple[int, tuple[int, ...]]]]:
    """Opens the safetensors files of a model folder.

    Args:
        folder: Holds ``model.safetensors``, or shards with their index.
        source: Name of the model, for messages.

    Returns:
        The open files, and tensor name to (file index, shape).

    Raises:
        ModelNotFoundError: There are none.
        CorruptFileError: They are damaged or contradict their index.
    """
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
    return files, found


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
    owner = read_json(index_path).get("weight_map")
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a settings file.

    Raises:
        CorruptFileError: The file cannot be read, is too large, or holds something else.
    """
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


def _native_readers() -> Any:
    """The ``sagellm._core.checkpoint`` module, or None in a pure-Python install."""
    try:
        return importlib.import_module("sagellm._core").checkpoint
    except ModuleNotFoundError:
        return None
