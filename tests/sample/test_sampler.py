"""The native sampler against its NumPy twin, and both against the rule's mathematics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sagellm.backends import numpy_sampler
from sagellm.backends.interface import SampledRow, SamplingRow
from sagellm.errors import InvalidArgumentError

Floats = NDArray[np.float32]
native = pytest.importorskip("sagellm._core").sample


def sample(logits: Floats, *rows: SamplingRow) -> list[SampledRow]:
    """Runs the native sampler and checks that the twin agrees."""
    got = []
    for token_id, logprob, top_ids, top_logprobs, error in native.sample_rows(logits, rows):
        got.append(
            SampledRow(
                token_id=token_id,
                logprob=logprob,
                top_ids=top_ids,
                top_logprobs=top_logprobs,
                error=error,
            )
        )
    for mine, twin in zip(got, numpy_sampler.sample_rows(logits, rows), strict=True):
        assert (mine.token_id, mine.error, mine.top_ids) == (
            twin.token_id,
            twin.error,
            twin.top_ids,
        )
        assert (mine.logprob is None) == (twin.logprob is None)
        if mine.logprob is not None:
            assert mine.logprob == pytest.approx(twin.logprob, abs=1e-6)
        np.testing.assert_allclose(mine.top_logprobs, twin.top_logprobs, atol=1e-6)
    return got


def sample_one(logits: Floats, **options: Any) -> SampledRow:
    return sample(logits[None], SamplingRow(**options))[0]


def bits(ids: list[int], vocab: int) -> NDArray[np.uint32]:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for i in ids:
        words[i // 32] |= np.uint32(1 << (i % 32))
    return words


@st.composite
def random_case(draw: st.DrawFn) -> tuple[Floats, list[SamplingRow]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab = draw(st.sampled_from([1, 2, 5, 31, 32, 33, 100, 1000]))
    coarse = draw(st.booleans())  # many ties
    count = 8
    logits = rng.standard_normal((count, vocab)) * draw(st.sampled_from([0.1, 2.0, 10.0]))
    logits = np.ascontiguousarray((np.round(logits) if coarse else logits).astype(np.float32))
    rows = []
    for _ in range(count):
        pick = rng.random(12)
        history = rng.integers(0, vocab, rng.integers(0, 40)).astype(np.int32)
        some = rng.integers(0, vocab, rng.integers(0, 6)).astype(np.int32)
        allowed = rng.integers(0, 2**32, -(-vocab // 32), np.uint32)
        rows.append(
            SamplingRow(
                temperature=0.0 if pick[0] < 0.15 else float(rng.choice([0.05, 0.7, 1.0, 3.0])),
                top_k=int(rng.integers(1, vocab + 5)) if pick[1] < 0.5 else 0,
                top_p=float(rng.uniform(1e-6, 1)) if pick[2] < 0.5 else 1.0,
                min_p=float(rng.uniform(0, 0.6)) if pick[3] < 0.4 else 0.0,
                repetition_penalty=float(rng.uniform(0.5, 2)) if pick[4] < 0.4 else 1.0,
                presence_penalty=float(rng.uniform(-2, 2)) if pick[5] < 0.3 else 0.0,
                frequency_penalty=float(rng.uniform(-1, 1)) if pick[6] < 0.3 else 0.0,
                bias_ids=some if pick[7] < 0.4 else None,
                bias_values=(rng.standard_normal(some.size) * 5).astype(np.float32)
                if pick[7] < 0.4
                else None,
                history=history,
                prompt_length=int(rng.integers(0, history.size + 1)),
                allowed=allowed if pick[8] < 0.4 else None,
                seed=int(rng.integers(0, 2**63)),
                position=int(rng.integers(0, 5000)),
                num_logprobs=int(rng.integers(-1, 6)),
            )
        )
    return logits, rows


@given(random_case())
@settings(max_examples=400, deadline=None)
def test_native_equals_the_twin(case: tuple[Floats, list[SamplingRow]]) -> None:
    sample(case[0], *case[1])


def test_huge_vocabulary() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.5, 3.0):
        logits = (rng.standard_normal((1, 262144)) * spread).astype(np.float32)
        for seed in range(3):
            for options in (
                {},
                {"top_k": 50},
                {"top_p": 0.9},
                {"min_p": 0.05},
                {"top_k": 5000, "top_p": 0.3},
            ):
                row = SamplingRow(temperature=0.8, seed=seed, num_logprobs=5, **options)
                assert sample(logits, row)[0].error is None


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = np.zeros(1000, np.float32)
    logits[[700, 33, 900]] = 4.0
    assert sample_one(logits).token_id == 33
    assert sample_one(logits, bias_ids=np.int32([900]), bias_values=np.float32([1])).token_id == 900


def test_top_k_keeps_the_lowest_ids_of_a_tie() -> None:
    logits = np.zeros(500, np.float32)
    drawn = {sample_one(logits, temperature=1.0, top_k=3, seed=s).token_id for s in range(60)}
    assert drawn == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.float32([0.1, 0.5, 0.15, 0.25]))
    for top_p, kept in (
        (1e-9, {1}),
        (0.5, {1}),
        (0.51, {1, 3}),
        (0.76, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
    ):
        drawn = {
            sample_one(logits, temperature=1.0, top_p=top_p, seed=s).token_id for s in range(200)
        }
        assert drawn == kept, top_p


def test_min_p_is_relative_to_the_largest() -> None:
    logits = np.log(np.float32([0.1, 0.5, 0.15, 0.25]))
    drawn = {sample_one(logits, temperature=1.0, min_p=0.29, seed=s).token_id for s in range(200)}
    assert drawn == {1, 2, 3}


def test_allowed_set_of_one_token_always_wins() -> None:
    logits = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    for temperature in (0.0, 1.0, 100.0):
        row = sample_one(logits, temperature=temperature, allowed=bits([617], 1000), num_logprobs=0)
        assert row.token_id == 617
        assert row.logprob is not None and row.logprob < 0  # of the raw distribution


def test_empty_allowed_set_is_an_error_of_the_row() -> None:
    logits = np.zeros((2, 40), np.float32)
    rows = sample(logits, SamplingRow(allowed=bits([], 40)), SamplingRow())
    assert rows[0].error == "no token is allowed"
    assert rows[1].error is None and rows[1].token_id == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_row_only(bad: float, temperature: float) -> None:
    logits = np.random.default_rng(2).standard_normal((3, 77)).astype(np.float32)
    logits[1, 50] = bad
    rows = sample(logits, *[SamplingRow(temperature=temperature, num_logprobs=2)] * 3)
    assert [r.error for r in rows] == [None, "logits are not finite", None]
    assert rows[1].token_id == -1 and rows[1].logprob is None and rows[1].top_ids == ()


def test_penalties_follow_the_rule() -> None:
    logits = np.float32([2.0, 1.9, -1.0, 0.5])
    history = np.int32([0, 1, 1])
    options: dict[str, Any] = {"history": history, "prompt_length": 3}
    # 0.5, 0.475, -1, 0.5: a tie goes to the lowest id; then 0.4, 0.38, -1, 0.5.
    assert sample_one(logits, repetition_penalty=4.0, **options).token_id == 0
    assert sample_one(logits, repetition_penalty=5.0, **options).token_id == 3
    below_zero = np.float32([-1.0, -1.5])
    assert sample_one(below_zero, repetition_penalty=2.0, history=history[:1]).token_id == 1


def test_frequency_penalty_counts_the_output_only() -> None:
    logits = np.float32([2.0, 1.9, -1.0, 0.5])
    history = np.int32([0, 0, 0, 1, 1])
    options: dict[str, Any] = {"frequency_penalty": 1.0, "history": history}
    assert sample_one(logits, prompt_length=3, **options).token_id == 0
    assert sample_one(logits, prompt_length=0, **options).token_id == 3


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}]
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal(12).astype(np.float32) * 1.5
    options = {"temperature": 1.0, **options}
    draws = 6000
    rows = [SamplingRow(seed=99, position=i, **options) for i in range(draws)]
    ids = [r.token_id for r in sample(np.tile(logits, (draws, 1)), *rows)]
    observed = np.bincount(ids, minlength=12)

    p = np.exp(logits.astype(np.float64) / options["temperature"])
    order = np.argsort(-p)
    if "top_k" in options:
        p[order[options["top_k"] :]] = 0
    if "top_p" in options:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= options["top_p"] * p.sum()]] = 0
    if "min_p" in options:
        p[p < options["min_p"] * p.max()] = 0
    expected = p / p.sum() * draws
    assert (observed[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = float(((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    degrees = int(kept.sum()) - 1
    # Wilson-Hilferty: P(chi2 > limit) is about 1e-4 for a correct sampler; the seeds are fixed.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi2 < limit


def test_random_numbers_are_those_of_splitmix64() -> None:
    # First outputs of the published generator for the seed 1234567.
    expected = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    for position, value in enumerate(expected):
        assert numpy_sampler.uniform(1234567, position) == (value >> 11) * 2.0**-53


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.random.default_rng(3).standard_normal(300).astype(np.float32) * 4
    row = sample_one(
        logits,
        temperature=2.0,
        top_k=1,
        bias_ids=np.int32([7]),
        bias_values=np.float32([100]),
        num_logprobs=300,
    )
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert row.token_id == 7 and row.logprob == pytest.approx(exact[7], abs=1e-5)
    assert sum(math.exp(x) for x in row.top_logprobs) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(row.top_logprobs, exact[list(row.top_ids)], atol=1e-5)


def test_the_same_row_gives_the_same_token_in_any_company() -> None:
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((20, 400)).astype(np.float32)
    rows = [SamplingRow(temperature=1.0, top_p=0.9, seed=i, position=i) for i in range(20)]
    together = [r.token_id for r in sample(logits, *rows)]
    assert together == [sample(logits[i : i + 1], rows[i])[0].token_id for i in range(20)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0, "history": np.int32([1])}, "repetition_penalty"),
        ({"repetition_penalty": 2.0}, "history"),
        ({"presence_penalty": math.inf, "history": np.int32([1])}, "presence_penalty"),
        ({"num_logprobs": -2}, "num_logprobs"),
        ({"bias_ids": np.int32([10]), "bias_values": np.float32([1])}, "bias_ids"),
        ({"bias_ids": np.int32([-1]), "bias_values": np.float32([1])}, "bias_ids"),
        ({"bias_ids": np.int32([1]), "bias_values": np.float32([math.nan])}, "bias"),
        ({"bias_ids": np.int32([1]), "bias_values": np.float32([])}, "bias"),
        ({"presence_penalty": 1.0, "history": np.int32([99])}, "history"),
        ({"allowed": np.zeros(2, np.uint32)}, "allowed"),
    ],
)
def test_invalid_rules_are_named(options: dict[str, Any], match: str) -> None:
    logits = np.zeros((1, 10), np.float32)
    for sampler in (native.sample_rows, numpy_sampler.sample_rows):
        with pytest.raises(InvalidArgumentError, match=match):
            sampler(logits, [SamplingRow(**options)])


def test_a_forced_token_is_reported_whatever_the_rule_says() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=200).astype(np.float32)
    raw = logits.astype(np.float64)
    for token in (0, 77, 199):
        row = sample_one(
            logits,
            forced_token=token,
            num_logprobs=2,
            temperature=1.0,
            top_k=1,
            allowed=bits([5], 200),
            bias_ids=np.array([token], np.int32),
            bias_values=np.array([-100.0], np.float32),
        )
        assert row.token_id == token
        assert row.logprob == pytest.approx(raw[token] - np.log(np.exp(raw).sum()), abs=1e-5)
        assert list(row.top_ids) == np.argsort(-raw)[:2].tolist()
    assert sample_one(logits, forced_token=3).logprob is None
    logits[9] = np.nan
    assert sample_one(logits, forced_token=3).error == "logits are not finite"


def test_a_forced_token_outside_the_vocabulary_is_refused() -> None:
    logits = np.zeros((1, 10), np.float32)
    for sampler in (native.sample_rows, numpy_sampler.sample_rows):
        for token in (-2, 10):
            with pytest.raises((ValueError, InvalidArgumentError), match="forced_token"):
                sampler(logits, [SamplingRow(forced_token=token)])


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 100])
def test_masks_of_whole_and_partial_words(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(20):
        logits = rng.normal(size=vocab).astype(np.float32)
        chosen = rng.choice(vocab, size=int(rng.integers(1, vocab + 1)), replace=False).tolist()
        allowed = bits(chosen, vocab)
        if vocab % 32:
            allowed[-1] |= np.uint32((0xFFFFFFFF << vocab % 32) & 0xFFFFFFFF)  # past the end
        row = sample_one(logits, allowed=allowed)
        assert row.token_id == max(chosen, key=lambda i: (logits[i], -i))
