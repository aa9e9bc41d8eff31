"""Tiny models for the command line, and a store of its own."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from models.make_tiny import make_tiny_gguf
from models.tiny_vocab import SPECIALS


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model store for this process and its children."""
    monkeypatch.setenv("SAGELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", "Q8_0")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends a text: the logits of its special tokens are 0, others are larger."""
    path = tmp_path_factory.mktemp("endless") / "endless.gguf"
    make_tiny_gguf(path, "llama", "F32", max_position=200_000)
    reader = gguf.GGUFReader(path, "r+")
    head = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    head.data[: len(SPECIALS)] = 0
    head.data.base.flush()
    return path
