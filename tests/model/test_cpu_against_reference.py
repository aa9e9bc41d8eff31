"""The native decoder against the NumPy reference on the same files: every architecture, every
format."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from make_tiny import make_tiny_gguf, make_tiny_hf

from sagellm import LLM

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
EXACT_FORMATS = ("F32", "F16", "BF16")
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
TOKENS = 200  # crosses tiles of 64 and blocks of 32


def logits(path: Path, device: str, **options: object) -> NDArray[np.float32]:
    with LLM(path, device=device, kv_cache_tokens=2048, **options) as llm:
        vocab = llm.engine.capacity.vocab_size
        length = min(TOKENS, llm.engine.capacity.max_model_len)
        return llm.logits(np.random.default_rng(1).integers(0, vocab, length))


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float_weights_agree_with_the_reference(tmp_path: Path, arch: str) -> None:
    # Float32 throughout but for the KV cache, which is bfloat16 in the native core.
    path = make_tiny_gguf(tmp_path / "tiny.gguf", arch)
    assert relative_error(logits(path, "cpu"), logits(path, "reference")) < 1e-2


@pytest.mark.parametrize("arch", ("llama", "qwen3", "gemma3"))
def test_hugging_face_folders_agree_with_the_reference(tmp_path: Path, arch: str) -> None:
    path = make_tiny_hf(tmp_path / "tiny", arch)
    assert relative_error(logits(path, "cpu"), logits(path, "reference")) < 1e-2


@pytest.mark.parametrize("format", (*EXACT_FORMATS[1:], *QUANTIZED))
def test_every_format_agrees_with_the_reference(tmp_path: Path, format: str) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf", "llama", format)
    expected = logits(path, "reference")
    assert relative_error(logits(path, "cpu"), expected) < 0.04
    if format in QUANTIZED:
        assert relative_error(logits(path, "cpu", precision="a15"), expected) < 8e-3


@pytest.mark.parametrize("isa", ("generic", "avx2", "avx512", "avx512_bf16"))
def test_every_isa_agrees_with_the_reference(tmp_path: Path, isa: str) -> None:
    from sagellm import _core

    if isa not in _core.kernels.available_isas():
        pytest.skip(f"this machine cannot run {isa}")
    for arch, format in (("llama", "Q4_1"), ("gemma3", "BF16")):
        path = make_tiny_gguf(tmp_path / f"{arch}.gguf", arch, format)
        expected = logits(path, "reference")
        assert relative_error(logits(path, "cpu", isa=isa), expected) < 0.04, arch
        # Random weights make random keys and values, of which int8 loses more.
        assert relative_error(logits(path, "cpu", isa=isa, kv_dtype="int8"), expected) < 0.06, arch
