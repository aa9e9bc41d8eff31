"""Model files: readers, the model's shape, named tensors, tokenizer source, the model store."""

from __future__ import annotations

from sagellm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from sagellm.checkpoint.config import ModelConfig, RopeConfig
from sagellm.checkpoint.files import open_file
from sagellm.checkpoint.names import TensorSource, expected_shapes
from sagellm.checkpoint.rope import inverse_frequencies
from sagellm.checkpoint.tensor_file import TensorFile, TensorInfo
from sagellm.checkpoint.tokenizer_source import TokenizerSource

__all__ = [
    "Checkpoint",
    "ModelConfig",
    "RopeConfig",
    "TensorFile",
    "TensorInfo",
    "TensorSource",
    "TokenizerSource",
    "expected_shapes",
    "inverse_frequencies",
    "open_checkpoint",
    "open_file",
]
