"""Sampling on a device against the NumPy form of the rule."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sagellm.backends import numpy_sampler
from sagellm.backends.interface import SamplingRow

VOCAB = 1500


def logits_of(count: int, vocab: int = VOCAB, spread: float = 3.0) -> NDArray[np.float32]:
    rng = np.random.default_rng((count, vocab))
    return (rng.standard_normal((count, vocab)) * spread).astype(np.float32)


def assert_same(cuda: ModuleType, logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> None:
    got = cuda.sample(cuda.array(logits), rows)
    for i, (mine, wanted) in enumerate(
        zip(got, numpy_sampler.sample_rows(logits, rows), strict=True)
    ):
        token_id, logprob, top_ids, top_logprobs, error = mine
        assert (token_id, error) == (wanted.token_id, wanted.error), (i, rows[i])
        assert top_ids == wanted.top_ids
        if wanted.logprob is not None:
            assert logprob == pytest.approx(wanted.logprob, abs=2e-6)
            assert top_logprobs == pytest.approx(wanted.top_logprobs, abs=2e-6)


def test_greedy_is_the_lowest_of_the_largest(cuda: ModuleType, orders: range) -> None:
    logits = logits_of(3)
    logits[1] = 0.0
    logits[1, 5] = -0.0
    logits[2, [700, 1300, 41]] = 20.0
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        assert_same(cuda, logits, [SamplingRow(num_logprobs=3)] * 3)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 100.0},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 1},
        {"temperature": 1.2, "top_k": 40},
        {"temperature": 1.2, "top_k": 300},
        {"temperature": 1.2, "top_k": VOCAB + 1},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 5.0, "top_p": 0.95},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 3.0, "top_k": 1200, "top_p": 0.9, "min_p": 0.001},
    ],
)
def test_draws_follow_the_rule(cuda: ModuleType, options: dict[str, Any]) -> None:
    rows = [SamplingRow(**options, seed=11, position=i) for i in range(6)]
    assert_same(cuda, np.repeat(logits_of(1), 6, axis=0), rows)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.3}, {"top_k": 9, "top_p": 0.5}])
def test_ties_are_kept_lowest_id_first(
    cuda: ModuleType, orders: range, options: dict[str, Any]
) -> None:
    logits = np.zeros((5, 1000), np.float32)  # everything is equal
    logits[1, ::7] = 1.0
    logits[2, 900:] = 2.0
    logits[3] = -np.arange(1000) // 100
    logits[4, ::2] = -0.0
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        rows = [SamplingRow(temperature=1.0, seed=seed, position=i, **options) for i in range(5)]
        assert_same(cuda, logits, rows)


def test_bias_penalties_and_mask(cuda: ModuleType) -> None:
    rng = np.random.default_rng(2)
    logits = logits_of(7)
    history = rng.integers(0, VOCAB, 60).astype(np.int32)
    history[40:50] = np.argsort(-logits[3])[:10]
    top = np.argsort(-logits[0])[:3].astype(np.int32)
    bias: dict[str, Any] = {
        "bias_ids": np.array([top[0], top[1], top[0], VOCAB - 1], np.int32),
        "bias_values": np.array([-3.0, -1.5, 0.25, 2.0], np.float32),
    }
    allowed = rng.integers(0, 2**32, -(-VOCAB // 32), dtype=np.uint32)
    penalties: dict[str, Any] = {
        "history": history,
        "prompt_length": 45,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
    }
    rows = [
        SamplingRow(**bias, num_logprobs=5),
        SamplingRow(temperature=1.0, **bias, seed=1),
        SamplingRow(allowed=allowed, num_logprobs=0),
        SamplingRow(**penalties, num_logprobs=20),
        SamplingRow(temperature=0.7, top_p=0.9, **penalties, **bias, allowed=allowed, seed=4),
        SamplingRow(temperature=2.0, top_k=30, allowed=allowed, seed=9, position=2**40),
        SamplingRow(forced_token=77, temperature=1.0, num_logprobs=2),
    ]
    assert_same(cuda, logits, rows)


def test_a_mask_of_few_tokens_leaves_only_them(cuda: ModuleType) -> None:
    allowed = np.zeros(-(-VOCAB // 32), np.uint32)
    allowed[3] = 0b101
    rows = [SamplingRow(temperature=1.0, allowed=allowed, top_k=10, seed=i) for i in range(3)] + [
        SamplingRow(temperature=1.0, allowed=allowed, top_p=0.9, seed=7)
    ]
    assert_same(cuda, logits_of(4), rows)


def test_rows_without_an_answer_say_why(cuda: ModuleType) -> None:
    logits = logits_of(5)
    logits[0, 1499] = np.nan
    logits[1, 3] = -np.inf
    logits[4, 7] = 3e38
    nothing = np.zeros(-(-VOCAB // 32), np.uint32)
    huge: dict[str, Any] = {
        "bias_ids": np.array([7], np.int32),
        "bias_values": np.array([3e38], np.float32),
    }
    rows = [
        SamplingRow(temperature=1.0, top_p=0.5),
        SamplingRow(forced_token=1, num_logprobs=1),
        SamplingRow(allowed=nothing, temperature=1.0),
        SamplingRow(num_logprobs=0),
        SamplingRow(temperature=1.0, **huge),
    ]
    assert_same(cuda, logits, rows)
    assert numpy_sampler.sample_rows(logits, rows)[4].error is not None


@pytest.mark.parametrize("vocab", [4, 129, 130, 4097])
def test_vocabularies_of_any_length(cuda: ModuleType, vocab: int) -> None:
    logits = logits_of(1, vocab)
    choices: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.8},
    ]
    for options in choices:
        assert_same(cuda, logits, [SamplingRow(**options, seed=3, num_logprobs=4)])


def test_a_row_does_not_depend_on_its_batch(cuda: ModuleType) -> None:
    logits = logits_of(4)
    rows = [SamplingRow(temperature=1.0, top_p=0.8, seed=i, num_logprobs=2) for i in range(4)]
    together = cuda.sample(cuda.array(logits), rows)
    for i, row in enumerate(rows):
        assert cuda.sample(cuda.array(logits[i : i + 1]), [row]) == (together[i],)
