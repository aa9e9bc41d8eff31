"""Sampling without a sort, at the edges: extreme temperatures, ties, masks and large vocabularies.

Every case runs on every instruction set of this machine and must give the tokens of the NumPy twin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sagellm.backends import numpy_sampler
from sagellm.backends.interface import SamplingRow

Floats = NDArray[np.float32]
core = pytest.importorskip("sagellm._core")
BLOCK = 512  # tokens per partial sum of the native sampler


@pytest.fixture(params=core.kernels.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tokens(logits: Floats, rows: list[SamplingRow], isa: str) -> list[int]:
    """The tokens of every row, after checking them against the twin."""
    got = core.sample.sample_rows(logits, rows, isa)
    assert [r[4] for r in got] == [None] * len(rows)
    twin = [r.token_id for r in numpy_sampler.sample_rows(logits, rows)]
    assert [r[0] for r in got] == twin
    return twin


def draws(logits: Floats, isa: str, count: int = 40, **options: Any) -> list[int]:
    rows = [SamplingRow(seed=17, position=i, **options) for i in range(count)]
    return tokens(np.tile(logits, (count, 1)), rows, isa)


RULES: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_p": 0.7, "min_p": 0.2},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-6, 0.01, 100.0, 1e30, 1e308])
def test_extreme_temperatures(isa: str, temperature: float, rule: dict[str, Any]) -> None:
    logits = (np.random.default_rng(3).standard_normal(3000) * 4).astype(np.float32)
    draws(logits, isa, temperature=temperature, **rule)
    allowed = np.zeros(94, np.uint32)
    allowed[::3] = 0x10101
    draws(logits, isa, temperature=temperature, allowed=allowed, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("low", [-3e38, -50.0, -1.0])
def test_one_logit_far_above_the_rest(isa: str, low: float, rule: dict[str, Any]) -> None:
    for place in (0, 511, 512, 999):
        logits = np.full(1000, low, np.float32)
        logits[place] = 3e38
        assert set(draws(logits, isa, 5, temperature=1.0, **rule)) == {place}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_allowed_token(isa: str, rule: dict[str, Any]) -> None:
    logits = np.random.default_rng(4).standard_normal(2000).astype(np.float32)
    allowed = np.zeros(63, np.uint32)
    allowed[1234 // 32] = 1 << (1234 % 32)
    assert set(draws(logits, isa, 5, temperature=0.7, allowed=allowed, **rule)) == {1234}


@pytest.mark.parametrize("vocab", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2000])
@pytest.mark.parametrize("top_p", [1e-9, 0.25, 0.5, 1 - 2**-53, 1.0])
def test_equal_logits_are_kept_lowest_id_first(isa: str, vocab: int, top_p: float) -> None:
    drawn = draws(np.full(vocab, -7.25, np.float32), isa, 200, temperature=0.3, top_p=top_p)
    kept = max(1, int(np.ceil(top_p * vocab)))
    assert max(drawn) < kept
    if kept >= 500:
        assert max(drawn) > 0.9 * kept


def test_ties_at_the_threshold_of_top_p(isa: str) -> None:
    # 4 tokens of weight 1, then 3000 of weight 1/2: a target of 4.75 + ... ends inside the ties.
    logits = np.full(3004, -np.log(2), np.float32)
    logits[[5, 700, 1500, 3003]] = 0.0
    half = float(np.exp(np.float64(logits[0])))
    for ties in (1, 2, 699, 1400, 2999):
        top_p = (4 + (ties - 0.5) * half) / (4 + 3000 * half)
        drawn = set(draws(logits, isa, 300, temperature=1.0, top_p=top_p))
        kept = {5, 700, 1500, 3003} | set(np.flatnonzero(logits < 0)[:ties].tolist())
        assert drawn <= kept


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_min_p_keeps_a_logit_at_its_bound(isa: str, temperature: float) -> None:
    # The weight of -1 is the bound itself; the next float below is not kept.
    logits = np.full(600, -1.0, np.float32)
    logits[::2] = np.nextafter(np.float32(-1), np.float32(-2))
    logits[599] = 0.0
    min_p = float(np.exp(-1.0 / temperature))
    drawn = draws(logits, isa, 300, temperature=temperature, min_p=min_p)
    assert all(token % 2 for token in drawn) and len(set(drawn)) > 100


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, BLOCK - 1, BLOCK, 1500, 5000]),
    st.sampled_from([0.0, 1e-3, 0.3, 3.0, 40.0]),
    st.sampled_from([0.02, 0.6, 1.0, 7.0]),
    st.sampled_from([1.0, 1e-6, 0.1, 0.5, 0.95, 0.9999999]),
    st.sampled_from([0.0, 1e-12, 0.02, 0.5]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_native_equals_the_twin_without_top_k(
    seed: int,
    vocab: int,
    spread: float,
    temperature: float,
    top_p: float,
    min_p: float,
    coarse: bool,
    masked: bool,
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((4, vocab)) * spread
    logits = (np.round(logits * 4) / 4 if coarse else logits).astype(np.float32)
    allowed = rng.integers(0, 2**32, -(-vocab // 32), np.uint32)
    allowed[0] |= 1
    rows = [
        SamplingRow(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            position=i,
            allowed=allowed if masked else None,
        )
        for i in range(4)
    ]
    for isa in core.kernels.available_isas():
        tokens(logits, rows, isa)


@pytest.mark.parametrize("spread", [0.0, 0.01, 2.0, 12.0])
def test_a_vocabulary_of_262144(isa: str, spread: float) -> None:
    rng = np.random.default_rng(9)
    logits = (rng.standard_normal(262144) * spread).astype(np.float32)
    rows = [SamplingRow(temperature=0.8, seed=5, position=i, **r) for i, r in enumerate(RULES)]
    tokens(np.tile(logits, (len(rows), 1)), rows, isa)


def test_the_token_does_not_depend_on_earlier_rows(isa: str) -> None:
    """Working memory carries nothing over: large and small rows, with and without top-p."""
    rng = np.random.default_rng(2)
    rows = [
        SamplingRow(temperature=0.9, top_p=p, min_p=m, seed=i)
        for i, (p, m) in enumerate([(0.9, 0.0), (1.0, 0.0), (0.2, 0.0), (1.0, 0.1), (0.99, 0.05)])
    ]
    logits = rng.standard_normal((len(rows), 1777)).astype(np.float32)
    together = tokens(logits, rows, isa)
    backwards = tokens(logits[::-1].copy(), rows[::-1], isa)
    assert backwards[::-1] == together
