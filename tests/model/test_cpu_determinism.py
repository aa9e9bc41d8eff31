"""The determinism contract on the native core, byte for byte: a request's logits and tokens do not
depend on
what runs beside it, on chunking, on cached prefixes, on preemption or on the number of threads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from make_tiny import make_tiny_gguf

from sagellm import LLM

OUTPUT_TOKENS = 12
CASES = (
    ("llama", "Q4_1", "bf16"),
    ("qwen2", "Q8_0", "bf16"),
    ("gemma3", "BF16", "bf16"),
    ("gemma2", "Q5_0", "bf16"),
    ("llama", "Q4_K", "bf16"),
    ("llama", "Q4_1", "int8"),
    ("gemma3", "BF16", "int8"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model file and what its keys and values are stored as."""

    path: Path
    kv_dtype: str


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    arch, format, kv_dtype = request.param
    path = make_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", arch, format)
    return Model(path=path, kv_dtype=kv_dtype)


def load(model: Model, **options: Any) -> LLM:
    options.setdefault("kv_cache_tokens", 8192)
    return LLM(model.path, device="cpu", kv_dtype=model.kv_dtype, **{"threads": 2, **options})


def prompts(llm: LLM, count: int) -> list[NDArray[np.int64]]:
    """Random prompts of 1 to 150 tokens: shorter and longer than tiles, blocks and chunks."""
    rng = np.random.default_rng(3)
    vocab = llm.engine.capacity.vocab_size
    return [rng.integers(0, vocab, int(rng.integers(1, 150))) for _ in range(count)]


def answers(
    llm: LLM, batch: list[NDArray[np.int64]], max_tokens: int = OUTPUT_TOKENS
) -> list[tuple[list[int], str]]:
    """Sampled (not greedy) tokens: they differ as soon as a probability differs visibly."""
    responses = llm.generate(
        batch, max_tokens=max_tokens, temperature=1.0, top_p=0.95, seed=5, ignore_eos=True
    )
    assert all(r.error is None for r in responses)
    return [(r.output_tokens, r.output_text) for r in responses]


def test_logits_do_not_depend_on_chunks_or_threads(model: Model) -> None:
    ids = np.random.default_rng(0).integers(0, 200, 180)
    with load(model, threads=1) as llm:
        expected = llm.logits(ids).tobytes()
    for options in (
        {"threads": 2},
        {"max_chunk_tokens": 1},
        {"max_chunk_tokens": 7},
        {"max_chunk_tokens": 64},
        {"block_size": 64},
    ):
        with load(model, **options) as llm:
            assert llm.logits(ids).tobytes() == expected, options


def test_logits_do_not_depend_on_a_cached_prefix(model: Model) -> None:
    ids = np.random.default_rng(0).integers(0, 200, 180)
    with load(model) as llm:
        cold = llm.logits(ids[:100]).tobytes()
        llm.generate([ids[:150]], max_tokens=4, ignore_eos=True)
        first, again = llm.generate(
            [ids, ids], max_tokens=OUTPUT_TOKENS, logprobs=3, ignore_eos=True
        )
        assert first.output_tokens == again.output_tokens
        assert llm.stats().kv.prefix_hit_tokens > 0
        assert llm.logits(ids[:100]).tobytes() == cold


@pytest.mark.parametrize("size", (8, 32))
def test_answers_do_not_depend_on_the_batch(model: Model, size: int) -> None:
    with load(model) as llm:
        batch = prompts(llm, size)
        alone = [answers(llm, [prompt])[0] for prompt in batch[:8]]
    with load(model) as llm:
        together = answers(llm, batch)
    assert together[: len(alone)] == alone


@pytest.mark.parametrize("chunk", (1, 7, 64))
def test_answers_do_not_depend_on_chunks(model: Model, chunk: int) -> None:
    with load(model, enable_prefix_caching=False) as llm:
        batch = prompts(llm, 6)
        expected = answers(llm, batch)
    with load(model, max_chunk_tokens=chunk, threads=1) as llm:
        assert answers(llm, batch) == expected


def test_answers_do_not_depend_on_preemption(model: Model) -> None:
    with load(model) as llm:  # short prompts all fit; their long outputs do not
        batch = [prompt[:20] for prompt in prompts(llm, 12)]
        expected = answers(llm, batch, max_tokens=90)
    with load(model, kv_cache_tokens=512, max_model_len=256, enable_prefix_caching=False) as llm:
        assert answers(llm, batch, max_tokens=90) == expected
        assert llm.stats().num_preemptions > 0


def test_answers_repeat_with_a_warm_prefix(model: Model) -> None:
    with load(model) as llm:
        batch = prompts(llm, 6)
        cold = answers(llm, batch)
        hits = llm.stats().kv.prefix_hit_tokens
        assert answers(llm, batch) == cold
        assert llm.stats().kv.prefix_hit_tokens > hits
