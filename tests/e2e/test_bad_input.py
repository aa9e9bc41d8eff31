"""Bad files, prompts and options: one clear error that names the cause and the remedy, after which
the same process answers a good request."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import make_tiny
from sagellm import LLM
from sagellm.errors import (
    CorruptFileError,
    InvalidArgumentError,
    ModelNotFoundError,
    ResourceExhaustedError,
    SagellmError,
    UnsupportedError,
)

pytestmark = pytest.mark.native

TENSOR = "blk.0.ffn_up.weight"
BIG = 2**62


def load(model: str | Path, **options: Any) -> LLM:
    return LLM(model, **{"device": "cpu", "threads": 1, "kv_cache_tokens": 1024, **options})


def good_answer(llm: LLM) -> list[int]:
    response = llm.generate("hello the world", max_tokens=8, ignore_eos=True)[0]
    assert response.error is None
    return response.output_tokens


def refusal(action: Callable[[], object], kind: type[SagellmError], *words: str) -> str:
    """The message of the one error of ``kind``: a single short line that says each of ``words``."""
    with pytest.raises(SagellmError) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert [word for word in words if word not in message] == [], message
    assert message.isprintable()
    assert len(message) < 500
    return message


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny.make_tiny_gguf(tmp_path_factory.mktemp("good") / "good.gguf", "llama")


@pytest.fixture(scope="module")
def expected(good: Path) -> list[int]:
    """The answer of the good model before anything has gone wrong."""
    with load(good) as llm:
        tokens = good_answer(llm)
    assert len(tokens) == 8
    return tokens


@pytest.fixture
def still_answers(good: Path, expected: list[int]) -> Iterator[None]:
    """After the test, this process loads the good model and answers as before."""
    yield
    with load(good) as llm:
        assert good_answer(llm) == expected


# ------------------------------------------------------------------------------------ model files


@pytest.mark.usefixtures("still_answers")
@pytest.mark.parametrize("kept", (0.0, 0.00005, 0.0005, 0.01, 0.5, 0.999999))
def test_a_truncated_gguf_is_refused(good: Path, tmp_path: Path, kept: float) -> None:
    raw = good.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw[: int(len(raw) * kept)])
    cause = "truncated" if kept else "empty"
    refusal(lambda: load(path), CorruptFileError, "cut.gguf", cause, "download it again")


def header_of(raw: bytes) -> int:
    """Where the extents of ``TENSOR`` begin in a GGUF file: two of 8 bytes, type, data offset."""
    name = struct.pack("<Q", len(TENSOR)) + TENSOR.encode()
    assert raw.count(name) == 1
    return raw.index(name) + len(name) + 4  # the number of dimensions


def patched(raw: bytes, at: int, data: bytes) -> bytes:
    return raw[:at] + data + raw[at + len(data) :]


HOSTILE = {
    "tensor count": (lambda raw: patched(raw, 8, struct.pack("<Q", BIG)), f"claims {BIG} tensors"),
    "value count": (lambda raw: patched(raw, 16, struct.pack("<Q", BIG)), f"{BIG} metadata values"),
    "key length": (lambda raw: patched(raw, 24, struct.pack("<Q", BIG)), "hostile.gguf"),
    "extents overflow": (
        lambda raw: patched(raw, header_of(raw), struct.pack("<QQ", BIG, BIG)),
        "overflow",
    ),
    "extent beyond the file": (
        lambda raw: patched(raw, header_of(raw), struct.pack("<QQ", 2**20, 2**20)),
        TENSOR,
    ),
    "offset beyond the file": (
        lambda raw: patched(raw, header_of(raw) + 20, struct.pack("<Q", 2**30)),
        TENSOR,
    ),
    "offset near the end of the address space": (
        lambda raw: patched(raw, header_of(raw) + 20, struct.pack("<Q", 2**63 - 32)),
        TENSOR,
    ),
    "offset overflows": (
        lambda raw: patched(raw, header_of(raw) + 20, struct.pack("<Q", 2**64 - 32)),
        "overflow",
    ),
}


@pytest.mark.usefixtures("still_answers")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_gguf_is_refused(good: Path, tmp_path: Path, case: str) -> None:
    spoil, cause = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(spoil(good.read_bytes()))
    refusal(lambda: load(path), CorruptFileError, cause, "download it again")


Weights = dict[str, Any]


def spoilt_model(
    path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Weights], object]
) -> Path:
    """A well-formed GGUF file whose tensors are those of a llama after ``spoil``."""
    make_weights = make_tiny.tiny_weights

    def spoilt_weights(*args: Any) -> Weights:
        weights = make_weights(*args)
        spoil(weights)
        return weights

    monkeypatch.setattr(make_tiny, "tiny_weights", spoilt_weights)
    monkeypatch.setitem(make_tiny._GGUF_TOP, "mystery", "mystery.weight")
    return make_tiny.make_tiny_gguf(path, "llama")


@pytest.mark.usefixtures("still_answers")
@pytest.mark.parametrize("name", ("layers.0.up", "layers.1.attn_norm", "lm_head"))
def test_a_tensor_of_another_shape_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def halve(weights: Weights) -> None:
        weights[name] = weights[name][: len(weights[name]) // 2]

    path = spoilt_model(tmp_path / "shape.gguf", monkeypatch, halve)
    message = refusal(
        lambda: load(path),
        CorruptFileError,
        "shape.gguf",
        "has shape",
        "expected",
        "download or convert the model again",
    )
    assert re.search(r"tensor \S+\.weight has shape", message)


@pytest.mark.usefixtures("still_answers")
def test_a_vocabulary_that_does_not_match_the_embedding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spoilt_model(
        tmp_path / "rows.gguf", monkeypatch, lambda w: w.update(embed=w["embed"][:160])
    )
    words = ("320 tokens but 160 embedding rows", "download or convert the model again")
    refusal(lambda: load(path), CorruptFileError, "rows.gguf", *words)


@pytest.mark.usefixtures("still_answers")
def test_a_model_without_one_of_its_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spoilt_model(tmp_path / "lost.gguf", monkeypatch, lambda w: w.pop("layers.0.up"))
    words = (f"tensor {TENSOR} missing", "the file is incomplete or not a llama model")
    refusal(lambda: load(path), CorruptFileError, "lost.gguf", *words)


@pytest.mark.usefixtures("still_answers")
def test_a_tensor_that_the_architecture_does_not_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spoilt_model(
        tmp_path / "extra.gguf",
        monkeypatch,
        lambda w: w.setdefault("mystery", np.zeros((8, 32), np.float32)),
    )
    words = ("tensor mystery.weight not known for llama", "its tensors are token_embd.weight")
    refusal(lambda: load(path), UnsupportedError, "extra.gguf", *words)


@pytest.mark.usefixtures("still_answers")
def test_an_unknown_architecture_lists_the_known_ones(good: Path, tmp_path: Path) -> None:
    raw, value = good.read_bytes(), struct.pack("<Q", 5) + b"llama"
    path = tmp_path / "other.gguf"
    path.write_bytes(patched(raw, raw.index(value), struct.pack("<Q", 5) + b"mamba"))
    words = ("other.gguf", "'mamba' is not supported", "llama, qwen2, qwen3, gemma2, gemma3")
    refusal(lambda: load(path), UnsupportedError, *words)


@pytest.mark.usefixtures("still_answers")
def test_a_folder_without_one_of_its_shards_is_refused(tmp_path: Path) -> None:
    folder = make_tiny.make_tiny_hf(tmp_path / "sharded", "qwen3", shards=2)
    with load(folder) as llm:
        assert good_answer(llm)
    lost = "model-00002-of-00002.safetensors"
    (folder / lost).unlink()
    words = ("sharded", f"{lost} is missing", "download the whole model folder")
    refusal(lambda: load(folder), CorruptFileError, *words)


# ---------------------------------------------------------------------------------- start options


@pytest.mark.usefixtures("still_answers")
def test_an_unknown_model_name_lists_what_is_known() -> None:
    words = ("no model 'no-such-model'", "smollm2", "gemma3-270m", "org/repo")
    refusal(lambda: load("no-such-model"), ModelNotFoundError, *words)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[SagellmError], tuple[str, ...]]] = {
    "device": (
        {"device": "quantum"},
        InvalidArgumentError,
        ("unknown device 'quantum'", "choose one of auto", "cpu", "reference"),
    ),
    "isa": (
        {"isa": "sse9"},
        UnsupportedError,
        ("no CPU kernels named 'sse9'", "choose one of: generic"),
    ),
    "no threads": (
        {"threads": 0},
        InvalidArgumentError,
        ("threads is 0", "choose between 1 and 1024"),
    ),
    "half a thread": (
        {"threads": 1.5},
        InvalidArgumentError,
        ("threads is 1.5", "choose a whole number"),
    ),
    "precision": ({"precision": "a3"}, InvalidArgumentError, ("'a3'", "choose 'a8' or 'a15'")),
    "max_model_len": (
        {"kv_cache_tokens": 64, "max_model_len": 512},
        ResourceExhaustedError,
        ("max_model_len is 512", "holds 64", "at most 64", "or raise kv_cache_gb to"),
    ),
    "kv_cache_gb is nan": (
        {"kv_cache_tokens": None, "kv_cache_gb": math.nan},
        InvalidArgumentError,
        ("kv_cache_gb is nan", "give GiB above 0"),
    ),
    "unknown": (
        {"kv_cache_gib": 1.0},
        InvalidArgumentError,
        ("unknown option kv_cache_gib", "engine options: max_num_seqs"),
    ),
}


@pytest.mark.usefixtures("still_answers")
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_refused_at_start(good: Path, case: str) -> None:
    options, kind, words = BAD_OPTIONS[case]
    refusal(lambda: load(good, **options), kind, *words)


@pytest.mark.usefixtures("still_answers")
def test_a_kv_cache_beyond_memory_names_the_knob_and_the_largest_value(good: Path) -> None:
    message = refusal(
        lambda: load(good, kv_cache_tokens=None, kv_cache_gb=500_000.0),
        ResourceExhaustedError,
        "the KV pool needs 500000.00 GiB",
        "memory are free",
        "the largest kv_cache_gb that fits is",
    )
    free, largest = (
        float(re.search(pattern, message)[1])  # type: ignore[index]
        for pattern in (r"but ([\d.]+) GiB", r"that fits is ([\d.]+)$")
    )
    assert 0 < largest < free < 500_000


# --------------------------------------------------------------------------------------- requests

BAD_REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "empty text": ({"prompts": ""}, ("the prompt is empty", "give at least one token")),
    "no tokens": ({"prompts": [[]]}, ("the prompt is empty", "give at least one token")),
    "too long": (
        {"prompts": "hello " * 1000},
        ("tokens and the longest sequence is 512", "shorten the prompt or raise max_model_len"),
    ),
    "negative id": (
        {"prompts": [[1, -5]]},
        ("token id -5", "outside the vocabulary of 320", "this model's own tokenizer"),
    ),
    "id beyond the vocabulary": (
        {"prompts": [[1, 320]]},
        ("token id 320", "outside the vocabulary of 320", "this model's own tokenizer"),
    ),
    "temperature": (
        {"prompts": "a", "temperature": math.nan},
        ("temperature", "should be a finite number"),
    ),
    "no output": (
        {"prompts": "a", "max_tokens": 0},
        ("max_tokens", "should be greater than 0"),
    ),
    "unknown option": (
        {"prompts": "a", "temprature": 1.0},
        ("unknown option 'temprature'", "known:", "temperature"),
    ),
}


@pytest.fixture(scope="module")
def llm(good: Path) -> Iterator[LLM]:
    with load(good) as llm:
        yield llm


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_engine_still_answers(
    llm: LLM, expected: list[int], case: str
) -> None:
    options, words = BAD_REQUESTS[case]
    refusal(lambda: llm.generate(**options), InvalidArgumentError, *words)
    assert good_answer(llm) == expected
    llm.engine.kv.check_integrity()


def test_one_bad_prompt_refuses_its_whole_list_before_anything_runs(
    llm: LLM, expected: list[int]
) -> None:
    steps = llm.stats().num_steps
    words = ("token id 320", "outside the vocabulary")
    refusal(lambda: llm.generate(["hello", [320]]), InvalidArgumentError, *words)
    assert llm.stats().num_steps == steps
    assert good_answer(llm) == expected


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], ("the prompt is empty", "give at least one token")),
        ([1, -1], ("token id -1", "outside the vocabulary of 320")),
        ([1] * 513, ("513 tokens are more than max_model_len (512)",)),
    ],
)
def test_logits_of_bad_tokens_are_refused(
    llm: LLM, expected: list[int], ids: list[int], words: tuple[str, ...]
) -> None:
    refusal(lambda: llm.logits(ids), InvalidArgumentError, *words)
    assert good_answer(llm) == expected


def test_a_request_that_the_pool_can_never_hold_says_what_would_fit(
    good: Path, expected: list[int]
) -> None:
    with load(good, kv_cache_tokens=64) as llm:
        words = ("whole KV pool holds 64", "lower max_tokens to at most", "or raise kv_cache_gb")
        refusal(lambda: llm.generate([[1] * 8], max_tokens=200), ResourceExhaustedError, *words)
        assert good_answer(llm) == expected
