"""A request's tokens depend on the request alone."""

from __future__ import annotations

from typing import Any

import pytest

from engine.support import (
    answers,
    assert_pool_empty,
    expected_tokens,
    make_engine,
    make_request,
    random_prompt,
    run_all,
    serve,
)
from sagellm.backends.mock import MockRunner

pytestmark = pytest.mark.usefixtures("every_runner")

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 150, 7)


def workload(count: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Prompts that share prefixes, sampled in every way."""
    shared = random_prompt(99, 80)
    prompts, options = [], []
    for i in range(count):
        own = random_prompt(i, LENGTHS[i % len(LENGTHS)])
        prompts.append(shared[: 16 * (i % 5)] + own)
        option: dict[str, Any] = {"max_tokens": 5 + 3 * (i % 7), "seed": 1000 + i}
        if i % 3:
            option |= {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
        if i % 4 == 1:
            option |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
        if i % 5 == 2:
            option |= {"logit_bias": {i: 5.0}}
        options.append(option)
    return prompts, options


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    prompts, options = workload(32)
    return [expected_tokens(p, make_request(**o)) for p, o in zip(prompts, options, strict=True)]


def test_alone_equals_recomputing_everything(expected: list[list[int]]) -> None:
    prompts, options = workload(32)
    for prompt, option, tokens in zip(prompts, options, expected, strict=True):
        assert serve(make_engine(), [prompt], [option]) == [tokens]


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_batch_and_chunk_size_change_nothing(
    batch: int, chunk: int | None, expected: list[list[int]]
) -> None:
    prompts, options = workload(batch)
    engine = make_engine(max_chunk_tokens=chunk)
    assert serve(engine, prompts, options) == expected[:batch]


@pytest.mark.parametrize("caching", [True, False])
def test_warm_prefix_cache_changes_nothing(caching: bool, expected: list[list[int]]) -> None:
    prompts, options = workload(16)
    engine = make_engine(enable_prefix_caching=caching)
    for _ in range(2):
        assert serve(engine, prompts, options) == expected[:16]
    hits = engine.kv.stats().prefix_hit_tokens
    assert (hits > 0) == caching


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_preemption_changes_nothing(chunk: int | None, expected: list[list[int]]) -> None:
    prompts, options = workload(32)
    engine = make_engine(kv_cache_tokens=272, max_chunk_tokens=chunk)
    assert serve(engine, prompts, options) == expected
    assert engine.stats().num_preemptions > 0


def test_small_token_budget_changes_nothing(expected: list[list[int]]) -> None:
    prompts, options = workload(32)
    engine = make_engine(max_num_seqs=6, max_batch_tokens=9)
    assert serve(engine, prompts, options) == expected


@pytest.mark.native
def test_native_kv_cache_changes_nothing(expected: list[list[int]]) -> None:
    prompts, options = workload(32)
    engine = make_engine(MockRunner(native_kv=True), kv_cache_tokens=272)
    assert serve(engine, prompts, options) == expected


@pytest.mark.parametrize("windows", [(24,), (0, 24), (5, 0, 40)])
@pytest.mark.parametrize("pool", [4096, 400])
def test_sliding_windows(windows: tuple[int, ...], pool: int) -> None:
    prompts, options = workload(16)
    wanted = [
        expected_tokens(p, make_request(**o), windows=windows)
        for p, o in zip(prompts, options, strict=True)
    ]
    engine = make_engine(MockRunner(windows=windows), kv_cache_tokens=pool, max_chunk_tokens=32)
    for _ in range(2):
        assert serve(engine, prompts, options) == wanted


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 70])
@pytest.mark.parametrize(
    "limits", [{}, {"max_num_seqs": 3}, {"kv_cache_tokens": 160}, {"max_chunk_tokens": 1}]
)
def test_completions_of_one_prompt_share_it_and_equal_separate_requests(
    length: int, limits: dict[str, int]
) -> None:
    prompt = random_prompt(length, length)
    request = make_request(max_tokens=20, temperature=1.0, seed=5, n=5)
    wanted = [expected_tokens(prompt, request, index=i) for i in range(5)]
    assert len({tuple(tokens) for tokens in wanted}) == 5
    engine = make_engine(**limits)
    for _ in range(2):
        key = engine.add_request(request, prompt)
        found = answers(run_all(engine))
        assert [found[key, i] for i in range(5)] == wanted
        assert_pool_empty(engine)


def test_forked_completions_copy_a_shared_tail_and_never_the_whole_prompt() -> None:
    engine = make_engine()
    request = make_request(max_tokens=4, temperature=1.0, n=4, ignore_eos=True)
    engine.add_request(request, random_prompt(0, 40))  # two full blocks and a half
    for _ in range(2):
        engine.step()
    stats = engine.kv.stats()
    assert stats.copied_blocks == 3
    assert stats.num_blocks - stats.free_blocks == 2 + 4
    run_all(engine)


def test_seedless_requests_differ_and_repeat_with_the_engine() -> None:
    def sample() -> list[list[int]]:
        option = {"max_tokens": 12, "temperature": 1.0}
        return serve(make_engine(), [[1, 2, 3]] * 3, [option] * 3)

    first = sample()
    assert len({tuple(tokens) for tokens in first}) == 3
    assert sample() == first


def test_logits_of_every_position_match_across_chunks_and_leave_no_trace() -> None:
    tokens = random_prompt(3, 200)
    whole = make_engine().logits(tokens)
    engine = make_engine(max_chunk_tokens=7)
    assert whole.shape == (200, 258)
    assert (engine.logits(tokens) == whole).all()
    assert_pool_empty(engine)
    greedy = serve(engine, [tokens], [{"max_tokens": 1}])
    assert greedy == [[int(whole[-1].argmax())]]
