"""A real model from the store to text: SmolLM2-135M-Instruct answers, streams, shares a pool that
is too small, repeats itself exactly, and is as accurate as an independent implementation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sagellm import LLM
from sagellm.protocol import Response, StreamEventDelta, StreamEventEnd, StreamEventStart

pytestmark = [pytest.mark.native, pytest.mark.model, pytest.mark.slow]

TEXT = (Path(__file__).parents[1] / "accuracy" / "text.txt").read_text(encoding="utf-8")
TEXT_TOKENS = 879
# Perplexity of that text in float32 Hugging Face transformers on the same (dequantized) weights:
# `ppl_reference` of tests/accuracy/compare_transformers.py for the model file of the store.
REFERENCE_PERPLEXITY = 26.0067

NUM_REQUESTS = 64
POOL_TOKENS = 1024
MAX_MODEL_LEN = 512


def load(model: str, **options: Any) -> LLM:
    return LLM(model, device="cpu", **{"threads": 2, "kv_cache_tokens": 2048, **options})


@pytest.fixture(scope="module")
def llm(smollm2: str) -> Iterator[LLM]:
    with load(smollm2) as llm:
        yield llm


# ------------------------------------------------------------------------------------- answers


def test_a_greedy_continuation_knows_the_capital_of_france(llm: LLM) -> None:
    response = llm.generate("The capital of France is", max_tokens=8)[0]
    assert "Paris" in response.output_text
    assert response.finish_reason == "length"
    assert len(response.output_tokens) == 8


def test_a_conversation_is_answered_through_the_chat_template(llm: LLM) -> None:
    assert llm.has_chat_template
    question = [{"role": "user", "content": "Name the capital of France."}]
    response = llm.chat(question, max_tokens=32)
    assert "Paris" in response.output_text
    assert "<|im_" not in response.output_text
    assert response.finish_reason == "stop"  # the model ends its turn by itself


@pytest.mark.parametrize("temperature", (None, 0.8))
def test_streamed_deltas_concatenate_to_the_output(llm: LLM, temperature: float | None) -> None:
    # Snowmen and clocks take several tokens each, so some tokens bring no text of their own.
    prompt = "Emoji: \u2603\ufe0f \U0001f570\ufe0f \u2603\ufe0f \U0001f570\ufe0f \u2603\ufe0f"
    options: dict[str, Any] = {"max_tokens": 40, "temperature": temperature, "seed": 11}
    start, *deltas, end = llm.stream(prompt, **options)
    assert isinstance(start, StreamEventStart)
    assert isinstance(end, StreamEventEnd)
    chunks = [delta for delta in deltas if isinstance(delta, StreamEventDelta)]
    assert len(chunks) == len(deltas) > 4  # guesses that hold bring several tokens at once
    assert "".join(chunk.chunk for chunk in chunks) == end.output_text
    assert [token for chunk in chunks for token in chunk.chunk_tokens] == end.output_tokens
    whole = llm.generate(prompt, **options)[0]
    assert (whole.output_text, whole.output_tokens) == (end.output_text, end.output_tokens)


# -------------------------------------------------------------------------- many at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: a slice of the text and how to continue it."""

    prompt: list[int]
    options: dict[str, Any]

    def answer(self, llm: LLM) -> Response:
        return llm.generate(self.prompt, **self.options)[0]


@pytest.fixture(scope="module")
def jobs(llm: LLM) -> list[Job]:
    """Prompts of 5 to 300 tokens, outputs of 8 to 48, every other one sampled."""
    rng = np.random.default_rng(0)
    text = llm.tokenizer.encode(TEXT, add_special=True)
    prompts = rng.permutation(np.geomspace(5, 300.5, NUM_REQUESTS).astype(int))
    outputs = rng.permutation(np.linspace(8, 48, NUM_REQUESTS).astype(int))
    jobs = []
    for i, (length, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True)):
        start = int(rng.integers(0, len(text) - length))
        sampled = {"temperature": 0.9, "top_p": 0.95, "seed": i} if i % 2 else {}
        options = {"max_tokens": output, "ignore_eos": True, **sampled}
        jobs.append(Job(prompt=text[start : start + length], options=options))
    return jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What 64 callers were answered, and the engine afterwards."""

    responses: list[Response]
    llm: LLM


@pytest.fixture(scope="module")
def crowd(smollm2: str, jobs: list[Job]) -> Iterator[Crowd]:
    with (
        load(smollm2, kv_cache_tokens=POOL_TOKENS, max_model_len=MAX_MODEL_LEN) as llm,
        ThreadPoolExecutor(NUM_REQUESTS) as callers,
    ):
        yield Crowd(responses=list(callers.map(lambda job: job.answer(llm), jobs)), llm=llm)


def test_64_concurrent_requests_complete_in_a_pool_too_small_for_them(
    crowd: Crowd, jobs: list[Job]
) -> None:
    demand = sum(len(job.prompt) + job.options["max_tokens"] for job in jobs)
    assert demand > 6 * POOL_TOKENS
    assert (min(len(j.prompt) for j in jobs), max(len(j.prompt) for j in jobs)) == (5, 300)
    for job, response in zip(jobs, crowd.responses, strict=True):
        assert response.error is None
        assert response.finish_reason == "length"
        assert len(response.output_tokens) == job.options["max_tokens"]
    assert crowd.llm.stats().num_preemptions > 0


def test_the_pool_is_empty_and_intact_after_64_requests(crowd: Crowd) -> None:
    stats = crowd.llm.stats()
    assert stats.kv.num_blocks == POOL_TOKENS // crowd.llm.engine.config.block_size
    assert stats.kv.free_blocks == stats.kv.num_blocks
    assert (stats.num_running, stats.num_waiting, stats.num_failed_steps) == (0, 0, 0)
    assert crowd.llm.engine.unfinished == []
    crowd.llm.engine.kv.check_integrity()


def test_answers_among_64_equal_those_computed_alone_and_with_one_thread(
    smollm2: str, llm: LLM, crowd: Crowd, jobs: list[Job]
) -> None:
    by_length = sorted(range(NUM_REQUESTS), key=lambda i: len(jobs[i].prompt))
    sampled = next(i for i in by_length[NUM_REQUESTS // 2 : -1] if "seed" in jobs[i].options)
    chosen = (by_length[0], sampled, by_length[-1])
    with load(smollm2, threads=1) as single:
        for i in chosen:
            expected = crowd.responses[i].output_tokens
            assert jobs[i].answer(llm).output_tokens == expected
            assert jobs[i].answer(single).output_tokens == expected


# -------------------------------------------------------------------------------------- accuracy


def perplexity(logits: NDArray[np.float32], ids: list[int]) -> float:
    """Of each token given those before it, in float64."""
    shifted = logits[:-1].astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    chosen = shifted[np.arange(len(ids) - 1), ids[1:]]
    return float(np.exp(np.mean(np.log(np.exp(shifted).sum(axis=-1)) - chosen)))


def test_perplexity_is_that_of_an_independent_implementation(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT, add_special=True)
    assert len(ids) == TEXT_TOKENS
    logits = llm.logits(ids)
    assert logits.shape == (TEXT_TOKENS, llm.engine.capacity.vocab_size)
    assert perplexity(logits, ids) == pytest.approx(REFERENCE_PERPLEXITY, rel=0.005)


def test_logits_are_the_same_bytes_in_another_process(smollm2: str) -> None:
    def logits_hash(threads: int) -> str:
        command = [sys.executable, "-m", "sagellm.bench", "offline", "--model", smollm2, "--json"]
        command += ["--prompt-tokens", "8", "--output-tokens", "2", "--repeat", "1"]
        command += ["--streams", "1", "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["logits_hash"])

    first = logits_hash(2)
    assert len(first) >= 16
    assert logits_hash(2) == first
    assert logits_hash(1) == first
