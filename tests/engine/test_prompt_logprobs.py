"""Log-probabilities of prompts: complete and the same, however the prompt was computed."""

from __future__ import annotations

import numpy as np
import pytest

from engine.support import (
    answers,
    assert_pool_empty,
    make_engine,
    make_request,
    random_prompt,
    run_all,
)
from sagellm.backends.interface import SampledRow
from sagellm.backends.mock import MockRunner
from sagellm.engine.engine import Engine
from sagellm.engine.output import SequenceOutput, response_of
from sagellm.protocol import ErrorCode

pytestmark = pytest.mark.usefixtures("every_runner")


def scored(outputs: list[SequenceOutput], key: int) -> list[SampledRow | None]:
    """What came with the first output of a request, and with no other."""
    mine = [output for output in outputs if output.key == key]
    assert mine[0].prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in mine[1:])
    return mine[0].prompt_logprobs


def values(rows: list[SampledRow | None]) -> list[object]:
    return [None if r is None else (r.token_id, r.logprob, r.top_ids, r.top_logprobs) for r in rows]


def expected(prompt: list[int], k: int) -> list[object]:
    """From the logits of every position."""
    logits = make_engine().logits(prompt).astype(np.float64)
    rows: list[object] = [None]
    for position, token in enumerate(prompt[1:]):
        x = logits[position]
        logprobs = x - (x.max() + np.log(np.exp(x - x.max()).sum()))
        top = np.argsort(-x, kind="stable")[:k]
        rows.append(
            (
                token,
                float(logprobs[token]),
                tuple(map(int, top)),
                tuple(float(logprobs[i]) for i in top),
            )
        )
    return rows


def score(engine: Engine, prompt: list[int], k: int = 2, **options: object) -> list[object]:
    key = engine.add_request(make_request(prompt_logprobs=k, **options), prompt)
    return values(scored(run_all(engine), key))


@pytest.mark.parametrize("length", [1, 2, 16, 100])
@pytest.mark.parametrize("k", [0, 3])
def test_every_prompt_token_but_the_first_has_its_row(length: int, k: int) -> None:
    prompt = random_prompt(length, length)
    assert score(make_engine(), prompt, k, max_tokens=2) == expected(prompt, k)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_do_not_change_them(chunk: int) -> None:
    prompt = random_prompt(3, 50)
    engine = make_engine(max_chunk_tokens=chunk)
    assert score(engine, prompt, max_tokens=3) == expected(prompt, 2)


def test_a_cached_prefix_does_not_lose_them() -> None:
    prompt = random_prompt(4, 70)
    engine = make_engine()
    wanted = expected(prompt, 2)
    for _ in range(2):
        assert score(engine, prompt, max_tokens=2) == wanted
    plain = engine.add_request(make_request(max_tokens=1), prompt)
    cached = [o.num_cached_tokens for o in run_all(engine) if o.key == plain]
    assert cached == [64]  # they were published all the same
    assert_pool_empty(engine)


def test_preemption_does_not_change_them() -> None:
    prompts = [random_prompt(i, 60 + i) for i in range(6)]
    engine = make_engine(kv_cache_tokens=256, max_chunk_tokens=16)
    keys = [
        engine.add_request(make_request(prompt_logprobs=1, max_tokens=60, ignore_eos=True), prompt)
        for prompt in prompts
    ]
    outputs = run_all(engine)
    assert engine.stats().num_preemptions > 0
    for key, prompt in zip(keys, prompts, strict=True):
        assert values(scored(outputs, key)) == expected(prompt, 1)
    assert_pool_empty(engine)


def test_completions_share_them() -> None:
    prompt = random_prompt(9, 40)
    engine = make_engine()
    request = make_request(prompt_logprobs=2, n=3, max_tokens=4, temperature=1.0, stream=True)
    key = engine.add_request(request, prompt)
    outputs = run_all(engine)
    assert values(scored(outputs, key)) == expected(prompt, 2)
    ends = [response_of(o) for o in outputs if o.finished is not None]
    assert len(ends) == 3
    for end in ends:
        assert end.prompt_logprobs is not None
        assert end.prompt_logprobs[0] is None
        assert [row.token_id for row in end.prompt_logprobs[1:] if row is not None] == prompt[1:]


def test_they_do_not_change_the_output() -> None:
    prompt = random_prompt(12, 33)
    options = {"max_tokens": 10, "temperature": 1.0, "seed": 5}
    engine = make_engine()
    plain = engine.add_request(make_request(**options), prompt)
    other = engine.add_request(make_request(prompt_logprobs=3, logprobs=1, **options), prompt)
    found = answers(run_all(engine))
    assert found[plain, 0] == found[other, 0]


def test_logits_that_are_not_finite_fail_the_request_that_scores_them() -> None:
    engine = make_engine(MockRunner(nan_on_token=7), max_chunk_tokens=4)
    bad = engine.add_request(make_request(prompt_logprobs=0, max_tokens=2), [1, 2, 7, 3, 4, 5, 6])
    good = engine.add_request(make_request(max_tokens=2), [1, 2, 7, 3, 4, 5, 6])
    ends = {o.key: response_of(o) for o in run_all(engine) if o.finished is not None}
    error = ends[bad].error
    assert error is not None
    assert (error.code, ends[bad].prompt_logprobs) == (ErrorCode.UNAVAILABLE, None)
    assert ends[good].error is None
    assert_pool_empty(engine)
