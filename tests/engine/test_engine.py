"""Requests come, go, fail and wait; each is answered once and no other notices."""

from __future__ import annotations

import pytest

from engine.support import (
    Clock,
    answers,
    assert_pool_empty,
    expected_tokens,
    make_engine,
    make_request,
    random_prompt,
    run_all,
)
from sagellm.backends.mock import BOS_ID, EOS_ID, MockRunner
from sagellm.engine.engine import Engine
from sagellm.engine.output import SequenceOutput, delta_of, end_of, response_of
from sagellm.errors import InvalidArgumentError, ResourceExhaustedError, UnsupportedError
from sagellm.protocol import ErrorCode, Metrics

pytestmark = pytest.mark.usefixtures("every_runner")


def only(outputs: list[SequenceOutput], key: int) -> SequenceOutput:
    """The one final output of a request."""
    found = [o for o in outputs if o.key == key and o.finished is not None]
    assert len(found) == 1
    return found[0]


def failure_code(outputs: list[SequenceOutput], key: int) -> ErrorCode:
    error = response_of(only(outputs, key)).error
    assert error is not None
    return error.code


# ------------------------------------------------------------------------------------- ends, text


def test_stop_token_ends_the_text_and_counts_as_a_token() -> None:
    prompt = random_prompt(1, 10)
    wanted = expected_tokens(prompt, make_request(max_tokens=8))
    engine = make_engine()
    request = make_request(max_tokens=8, stop_token_ids=[wanted[3]])
    key = engine.add_request(request, prompt)
    response = response_of(only(run_all(engine), key))
    cut = wanted.index(wanted[3]) + 1
    assert response.output_tokens == wanted[:cut]
    assert response.finish_reason == "stop"
    assert response.output_text == engine.tokenizer.decode(wanted[: cut - 1], continuation=True)


def test_end_of_sequence_stops_unless_ignored() -> None:
    bias = {EOS_ID: 100.0}
    engine = make_engine()
    stops = engine.add_request(make_request(max_tokens=3, logit_bias=bias), [1])
    goes_on = engine.add_request(make_request(max_tokens=3, logit_bias=bias, ignore_eos=True), [1])
    found = answers(run_all(engine))
    assert found[stops, 0] == [EOS_ID]
    assert found[goes_on, 0] == [EOS_ID] * 3


def test_stop_string_across_tokens_is_cut_out_and_never_streamed() -> None:
    prompt = random_prompt(7, 12)
    free = make_request(max_tokens=40, logit_bias=ascii_only())
    text = bytes(expected_tokens(prompt, free)).decode()
    stop = text[20:23]
    engine = make_engine()
    request = make_request(max_tokens=40, stop=[stop], stream=True, logit_bias=ascii_only())
    key = engine.add_request(request, prompt)
    outputs = run_all(engine)
    response = response_of(only(outputs, key))
    assert response.finish_reason == "stop"
    assert response.output_text == text[: text.index(stop)]
    assert "".join(o.text for o in outputs) == response.output_text
    assert [t for o in outputs for t in o.token_ids] == response.output_tokens


def ascii_only() -> dict[int, float]:
    return {i: -100.0 for i in range(258) if not 32 <= i < 127}


@pytest.mark.parametrize("stream", [True, False])
def test_deltas_join_to_the_whole(stream: bool) -> None:
    engine = make_engine()
    request = make_request(max_tokens=50, stream=stream, n=2, temperature=1.0, logprobs=2, seed=3)
    engine.add_request(request, random_prompt(4, 9))
    outputs = run_all(engine)
    for index in range(2):
        mine = [o for o in outputs if o.index == index]
        deltas = [d for d in map(delta_of, mine) if d is not None]
        end = end_of(mine[-1])
        assert "".join(d.chunk for d in deltas) == end.output_text
        assert [t for d in deltas for t in d.chunk_tokens] == end.output_tokens
        assert [p for d in deltas for p in d.chunk_logprobs or []] == end.logprobs
        assert [p.token_id for p in end.logprobs or []] == end.output_tokens
        assert all(len(p.top_ids) == 2 for p in end.logprobs or [])
        assert (len(deltas) > 1) == stream
    assert [o.request_finished for o in outputs].count(True) == 1
    assert outputs[-1].request_finished


def test_metrics_are_what_the_clock_saw() -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    first = engine.add_request(make_request(max_tokens=4), random_prompt(0, 33))
    outputs: list[SequenceOutput] = []
    for _ in range(4):
        clock.now += 0.5
        outputs += engine.step()
    metrics = response_of(only(outputs, first)).metrics
    # The token of a step is out when the step is: the clock stands still inside a step.
    assert metrics.ttft_ms == pytest.approx(500.0)
    assert metrics.tpot_ms == metrics.tbt_ms == pytest.approx(500.0)
    assert metrics.throughput_tps == pytest.approx(4 / 2.0)
    assert metrics.kv_used_tokens == 33 + 3
    assert metrics.kv_used_bytes == 3 * 16 * 16
    assert metrics.prefix_hit_rate == 0.0
    assert metrics.evict_count == 0
    assert metrics.peak_mem_mb > 0
    assert metrics.evict_ms is None
    assert metrics.spec_accept_rate is None

    second = engine.add_request(make_request(max_tokens=1), random_prompt(0, 33))
    metrics = response_of(only(run_all(engine), second)).metrics
    assert metrics.prefix_hit_rate == pytest.approx(32 / 33)
    assert metrics.tbt_ms is None


# ----------------------------------------------------------------------------- limits and budgets


def test_kv_budget_bounds_the_tokens_in_the_cache() -> None:
    engine = make_engine()
    key = engine.add_request(
        make_request(max_tokens=100, kv_budget_tokens=20, ignore_eos=True), [5] * 10
    )
    final = only(run_all(engine), key)
    response = response_of(final)
    assert response.finish_reason == "length"
    assert response.metrics.kv_used_tokens == 20
    assert len(response.output_tokens) == 11  # the last one needs no place in the cache


def test_sequence_ends_with_length_at_max_model_len() -> None:
    engine = make_engine(max_model_len=64)
    key = engine.add_request(make_request(max_tokens=500, ignore_eos=True), [5] * 60)
    response = response_of(only(run_all(engine), key))
    assert (response.finish_reason, len(response.output_tokens)) == ("length", 4)


def test_request_that_can_never_fit_is_refused_at_once() -> None:
    engine = make_engine(kv_cache_tokens=64)
    with pytest.raises(
        ResourceExhaustedError, match=r"prompt to at most 64 tokens, or raise kv_cache_gb"
    ):
        engine.add_request(make_request(max_tokens=1), [1] * 65)
    with pytest.raises(ResourceExhaustedError, match=r"lower max_tokens to at most 25"):
        engine.add_request(make_request(max_tokens=26), [1] * 40)
    key = engine.add_request(make_request(max_tokens=25, ignore_eos=True), [1] * 40)
    assert len(answers(run_all(engine))[key, 0]) == 25


def test_request_that_finds_no_room_in_an_idle_pool_is_answered() -> None:
    engine = make_engine(kv_cache_tokens=64)
    engine.kv.add(10**6)  # somebody else holds half of the pool
    assert engine.kv.reserve(10**6, 32)
    big = engine.add_request(make_request(max_tokens=2), [1] * 40)
    small = engine.add_request(make_request(max_tokens=2, ignore_eos=True), [2] * 8)
    grows = engine.add_request(make_request(max_tokens=30, ignore_eos=True), [3] * 20)
    outputs = run_all(engine)
    assert failure_code(outputs, big) is ErrorCode.RESOURCE_EXHAUSTED
    assert len(response_of(only(outputs, small)).output_tokens) == 2
    assert failure_code(outputs, grows) is ErrorCode.RESOURCE_EXHAUSTED
    assert len(response_of(only(outputs, grows)).output_tokens) == 32 + 1 - 20
    engine.kv.release(10**6)
    assert_pool_empty(engine)


def test_full_queue_refuses_at_once() -> None:
    engine = make_engine(max_queue=3, max_num_seqs=1)
    for _ in range(3):
        engine.add_request(make_request(max_tokens=1), [1])
    with pytest.raises(ResourceExhaustedError, match="raise max_queue"):
        engine.add_request(make_request(max_tokens=1), [1])
    assert len(answers(run_all(engine))) == 3


def test_messages_without_chat_template_are_not_supported() -> None:
    request = make_request(messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(UnsupportedError, match="no chat template"):
        make_engine().add_request(request)


def test_text_prompt_is_encoded_with_its_begin_token() -> None:
    engine = make_engine()
    by_text = engine.add_request(make_request("abc", max_tokens=5))
    by_ids = engine.add_request(make_request(max_tokens=5), [BOS_ID, *b"abc"])
    found = answers(run_all(engine))
    assert found[by_text, 0] == found[by_ids, 0]
    with pytest.raises(InvalidArgumentError, match="prompt is empty"):
        engine.add_request(make_request(""))


# -------------------------------------------------------------------------- cancelling, deadlines


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_cancel_frees_blocks_at_once_in_every_state(steps: int) -> None:
    engine = make_engine(max_chunk_tokens=16, max_num_seqs=2)
    stays = engine.add_request(make_request(max_tokens=12, ignore_eos=True), random_prompt(0, 20))
    runs = engine.add_request(make_request(max_tokens=50, n=3), random_prompt(1, 80))
    waits = engine.add_request(make_request(max_tokens=50), random_prompt(2, 80))
    early = [o for _ in range(steps) for o in engine.step()]
    assert engine.cancel(runs)
    assert engine.cancel(waits)
    assert not engine.cancel(runs)
    used = engine.kv.stats().num_blocks - engine.kv.stats().free_blocks
    assert used <= 2 + 1
    outputs = early + run_all(engine)
    assert {o.key for o in outputs} == {stays}
    assert answers(outputs)[stays, 0] == expected_tokens(
        random_prompt(0, 20), make_request(max_tokens=12, ignore_eos=True)
    )
    assert_pool_empty(engine)


def test_deadline_passes_while_waiting_and_while_running() -> None:
    clock = Clock()
    engine = make_engine(max_num_seqs=1, clock=clock)
    runs = engine.add_request(
        make_request(max_tokens=900, deadline_ms=1000.0, ignore_eos=True), [1]
    )
    waits = engine.add_request(make_request(max_tokens=5, deadline_ms=500.0), [2])
    calm = engine.add_request(make_request(max_tokens=5), [3])
    early = [engine.step() for _ in range(4)]
    clock.now += 0.6
    second = engine.step() + engine.step()  # the first may have been queued before
    assert failure_code(second, waits) is ErrorCode.DEADLINE_EXCEEDED
    clock.now += 0.6
    third = engine.step() + engine.step()
    late = response_of(only(third, runs))
    assert late.error is not None
    assert late.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert len(late.output_tokens) in (6, 7)
    assert not any(o.finished for outputs in early for o in outputs)
    assert (calm, 0) in answers(run_all(engine))
    assert_pool_empty(engine)


# ------------------------------------------------------------------------------- order of service


def order_of_answers(engine: Engine) -> list[int]:
    return [o.key for o in run_all(engine) if o.finished is not None]


def test_equal_priorities_run_in_order_of_arrival_and_urgent_ones_first() -> None:
    engine = make_engine(max_num_seqs=1)
    keys = [
        engine.add_request(make_request(max_tokens=2, priority=priority), [1])
        for priority in (0, 5, 0, -5, 5)
    ]
    assert order_of_answers(engine) == [keys[i] for i in (3, 0, 2, 1, 4)]


def test_least_urgent_and_latest_sequence_is_preempted_first() -> None:
    engine = make_engine(kv_cache_tokens=128)
    options = {"max_tokens": 60, "ignore_eos": True}
    urgent = engine.add_request(make_request(priority=-1, **options), random_prompt(0, 30))
    normal = engine.add_request(make_request(**options), random_prompt(1, 30))
    late = engine.add_request(make_request(**options), random_prompt(2, 30))
    outputs = run_all(engine)
    evictions = {
        k: response_of(only(outputs, k)).metrics.evict_count for k in (urgent, normal, late)
    }
    assert evictions[urgent] == 0
    assert evictions[late] and evictions[late] > 0
    assert [o.key for o in outputs if o.finished] == [urgent, normal, late]


@pytest.mark.parametrize("priority", [0, -1])
def test_decoding_goes_on_while_a_long_prompt_is_computed(priority: int) -> None:
    engine = make_engine(max_batch_tokens=64, max_num_seqs=8)
    option = {"max_tokens": 40, "stream": True, "logit_bias": ascii_only()}
    decodes = engine.add_request(make_request(**option), [1])
    engine.step()
    request = make_request(max_tokens=1, priority=priority)
    prompt = engine.add_request(request, random_prompt(0, 63 * 9 + 10))
    num_steps = 0
    outputs = engine.step()
    while all(output.key != prompt for output in outputs):
        assert [(o.key, len(o.token_ids)) for o in outputs] == [(decodes, 1)]
        outputs = engine.step()
        num_steps += 1
    assert {o.key for o in outputs} == {decodes, prompt}
    assert num_steps in (9, 10)  # one more if a step was queued when the prompt came
    run_all(engine)


def test_waiting_request_is_admitted_as_soon_as_blocks_come_back() -> None:
    engine = make_engine(kv_cache_tokens=96)
    option = {"ignore_eos": True}
    short = engine.add_request(make_request(max_tokens=3, **option), random_prompt(0, 40))
    long = engine.add_request(make_request(max_tokens=15, **option), random_prompt(1, 10))
    waits = engine.add_request(make_request(max_tokens=3, **option), random_prompt(2, 40))
    assert order_of_answers(engine) == [short, waits, long]


def test_64_requests_in_a_pool_for_a_few() -> None:
    engine = make_engine(kv_cache_tokens=320)
    wanted = {}
    for i in range(64):
        prompt = random_prompt(i % 9, 3 + (37 * i) % 120)
        request = make_request(max_tokens=4 + i % 40, temperature=1.0, seed=i)
        wanted[engine.add_request(request, prompt), 0] = expected_tokens(prompt, request)
    assert answers(run_all(engine)) == wanted
    assert engine.stats().num_preemptions > 0
    assert_pool_empty(engine)


# ----------------------------------------------------------------------------------------- faults


def test_failing_token_fails_its_own_request_only() -> None:
    engine = make_engine(MockRunner(fail_on_token=7))
    option = {"max_tokens": 6, "logit_bias": {7: -100.0}}
    good = [engine.add_request(make_request(**option), [i, i + 1]) for i in (20, 40, 60)]
    bad = engine.add_request(make_request(**option), [1, 7, 2])
    forks = engine.add_request(
        make_request(n=3, temperature=1.0, seed=1, **option), random_prompt(5, 20)[:20]
    )
    outputs = run_all(engine)
    assert failure_code(outputs, bad) is ErrorCode.UNAVAILABLE
    for key, i in zip(good, (20, 40, 60), strict=True):
        assert only(outputs, key).finished.token_ids == expected_tokens(  # type: ignore[union-attr]
            [i, i + 1], make_request(**option)
        )
    request = make_request(n=3, temperature=1.0, seed=1, **option)
    for index in range(3):
        mine = [o for o in outputs if o.key == forks and o.index == index and o.finished]
        wanted = expected_tokens(random_prompt(5, 20), request, index=index)
        assert mine[0].finished.token_ids == wanted  # type: ignore[union-attr]
    assert_pool_empty(engine)


@pytest.mark.parametrize("step", range(6))
def test_step_that_fails_once_is_repeated_without_a_trace(step: int) -> None:
    prompts = [random_prompt(i, 20) for i in range(3)]
    request = make_request(max_tokens=5, temperature=1.0, seed=2, n=2)
    engine = make_engine(MockRunner(fail_at_steps=frozenset({step})), max_chunk_tokens=16)
    keys = [engine.add_request(request, prompt) for prompt in prompts]
    found = answers(run_all(engine))
    for key, prompt in zip(keys, prompts, strict=True):
        for index in range(2):
            assert found[key, index] == expected_tokens(prompt, request, index=index)
    assert engine.stats().num_failed_steps == 1
    assert_pool_empty(engine)


def test_broken_device_answers_everyone() -> None:
    engine = make_engine(MockRunner(fail_at_steps=frozenset(range(1000))))
    keys = [engine.add_request(make_request(max_tokens=5), [i]) for i in range(10)]
    outputs = run_all(engine, max_steps=50)
    assert [failure_code(outputs, key) for key in keys] == [ErrorCode.UNAVAILABLE] * 10
    assert_pool_empty(engine)


def test_logits_that_are_not_finite_fail_one_request_and_publish_nothing() -> None:
    engine = make_engine(MockRunner(nan_on_token=9))
    bad = engine.add_request(make_request(max_tokens=5), [1] * 31 + [9])
    good = engine.add_request(make_request(max_tokens=5), [1] * 32)
    outputs = run_all(engine)
    response = response_of(only(outputs, bad))
    assert response.error is not None
    assert "not finite" in response.error.message
    assert response.output_tokens == []
    assert isinstance(response.metrics, Metrics)
    assert len(response_of(only(outputs, good)).output_tokens) > 0
    assert engine.kv.stats().cached_blocks == 2  # those of the good one
    assert_pool_empty(engine)


def test_fault_outside_any_request_fails_those_that_ran_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(max_num_seqs=2)
    ran = [engine.add_request(make_request(max_tokens=9), [i]) for i in range(2)]
    waited = engine.add_request(make_request(max_tokens=9), [5])
    engine.step()

    def broken(*_: object) -> None:
        raise KeyError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "commit", broken)
        outputs = engine.step()
    assert [failure_code(outputs, key) for key in ran] == [ErrorCode.UNAVAILABLE] * 2
    assert (waited, 0) in answers(run_all(engine))
    assert_pool_empty(engine)


def test_mock_notices_a_lost_page() -> None:
    engine = make_engine(max_chunk_tokens=16)
    key = engine.add_request(make_request(max_tokens=5), random_prompt(0, 40))
    engine.step()
    engine.runner._pages[:] = 0  # type: ignore[attr-defined]
    outputs = run_all(engine)
    error = response_of(only(outputs, key)).error
    assert error is not None
    assert "lost" in error.message
