"""A step is queued while the one before is computed, and no answer can tell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
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
from sagellm.backends.mock import QueueingMockRunner
from sagellm.engine.engine import Engine
from sagellm.engine.output import response_of
from sagellm.engine.request import Sequence
from sagellm.protocol import ErrorCode, Request

MakeRunner = Callable[..., QueueingMockRunner]


@pytest.fixture(params=[False, True], ids=["as-late-as-possible", "at-once"])
def make_runner(request: pytest.FixtureRequest) -> MakeRunner:
    return partial(QueueingMockRunner, at_once=request.param)


def start(engine: Engine, count: int, **options: Any) -> tuple[list[int], list[list[int]]]:
    """Brings requests to where two steps are queued; returns their keys and wanted answers."""
    requests = [make_request(temperature=1.0, seed=i, **options) for i in range(count)]
    prompts = [random_prompt(i, 5 + 3 * i) for i in range(count)]
    keys = [engine.add_request(r, p) for r, p in zip(requests, prompts, strict=True)]
    engine.step()
    engine.step()
    return keys, [expected_tokens(p, r) for r, p in zip(requests, prompts, strict=True)]


def most_queued(engine: Engine) -> int:
    assert isinstance(engine.runner, QueueingMockRunner)
    return engine.runner.most_queued


def test_decoding_sequences_keep_two_steps_queued(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(), speculation="off")
    keys, wanted = start(engine, 3, max_tokens=20, ignore_eos=True)
    assert most_queued(engine) == 2
    outputs = run_all(engine)
    assert answers(outputs) == {(k, 0): w for k, w in zip(keys, wanted, strict=True)}
    assert engine.num_steps == 20  # the last one is known, and none is computed behind it
    assert_pool_empty(engine)


@pytest.mark.parametrize("option", ["stop_token_ids", "stop"])
def test_what_was_queued_behind_a_stop_is_dropped(make_runner: MakeRunner, option: str) -> None:
    ascii_only = {i: -100.0 for i in range(258) if not 32 <= i < 127}
    free = make_request(max_tokens=30, logit_bias=ascii_only)
    prompt = random_prompt(3, 14)
    wanted = expected_tokens(prompt, free)
    place = next(i for i in range(5, 30) if wanted[i] not in wanted[:i])
    stop = [wanted[place]] if option == "stop_token_ids" else [chr(wanted[place])]
    engine = make_engine(make_runner(), speculation="off")
    request = make_request(max_tokens=30, logit_bias=ascii_only, stream=True, **{option: stop})
    other = make_request(max_tokens=25, logit_bias=ascii_only)
    keys = [engine.add_request(request, prompt), engine.add_request(other, random_prompt(4, 9))]
    outputs = run_all(engine)
    tokens = answers(outputs)
    assert tokens[keys[0], 0] == wanted[: place + 1]
    assert tokens[keys[1], 0] == expected_tokens(random_prompt(4, 9), other)
    streamed = [t for o in outputs if o.key == keys[0] for t in o.token_ids]
    assert streamed == wanted[: place + 1]
    assert most_queued(engine) == 2
    assert_pool_empty(engine)


def test_the_last_sequence_ends_while_a_step_is_queued(make_runner: MakeRunner) -> None:
    prompt = random_prompt(3, 14)
    wanted = expected_tokens(prompt, make_request(max_tokens=30, ignore_eos=True))
    stop = next(i for i in range(3, 30) if wanted[i] not in wanted[:i])
    engine = make_engine(make_runner(), speculation="off")
    engine.add_request(
        make_request(max_tokens=30, ignore_eos=True, stop_token_ids=[wanted[stop]]), prompt
    )
    outputs = run_all(engine)
    assert next(iter(answers(outputs).values())) == wanted[: stop + 1]
    assert engine.num_steps == stop + 2  # the one that was queued in vain
    assert_pool_empty(engine)


def test_a_request_is_cancelled_while_its_step_is_queued(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(), speculation="off")
    keys, wanted = start(engine, 4, max_tokens=20, ignore_eos=True)
    assert engine.cancel(keys[1])
    outputs = run_all(engine)
    assert all(output.key != keys[1] for output in outputs)
    rest = [0, 2, 3]
    assert answers(outputs) == {(keys[i], 0): wanted[i] for i in rest}
    assert_pool_empty(engine)


def test_everything_is_cancelled_while_a_step_is_queued(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(), speculation="off")
    keys, _ = start(engine, 2, max_tokens=20, ignore_eos=True)
    for key in keys:
        engine.cancel(key)
    assert engine.has_work  # the device still computes
    assert run_all(engine) == []
    assert_pool_empty(engine)


def test_who_arrives_while_a_step_is_queued_joins_the_one_behind_it(
    make_runner: MakeRunner,
) -> None:
    engine = make_engine(make_runner(), speculation="off")
    keys, wanted = start(engine, 2, max_tokens=12, ignore_eos=True)
    request = make_request(max_tokens=5)
    late = engine.add_request(request, [1, 2, 3])
    assert [output.key for output in engine.step()] == []  # nobody streams
    assert engine.stats().num_running == 2
    engine.step()
    assert engine.stats().num_running == 3
    found = answers(run_all(engine))
    assert found[late, 0] == expected_tokens([1, 2, 3], request)
    assert [found[key, 0] for key in keys] == wanted


def test_those_who_wait_for_a_place_do_not_slow_the_others(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(), speculation="off", max_num_seqs=2)
    requests = [make_request(max_tokens=6 + i, seed=i, temperature=1.0) for i in range(5)]
    prompts = [random_prompt(i, 7) for i in range(5)]
    keys = [engine.add_request(r, p) for r, p in zip(requests, prompts, strict=True)]
    engine.step()
    engine.step()
    assert engine.num_waiting == 3
    assert most_queued(engine) == 2
    found = answers(run_all(engine))
    for key, request, prompt in zip(keys, requests, prompts, strict=True):
        assert found[key, 0] == expected_tokens(prompt, request)


@pytest.mark.parametrize("launch", range(1, 6))
def test_a_step_that_cannot_be_queued_is_computed_later(
    make_runner: MakeRunner, launch: int
) -> None:
    runner = make_runner(fail_at_launches=frozenset({launch}))
    engine = make_engine(runner, speculation="off")
    keys, wanted = start(engine, 3, max_tokens=10, ignore_eos=True)
    found = answers(run_all(engine))
    assert [found[key, 0] for key in keys] == wanted
    assert engine.stats().num_failed_steps == 1
    assert_pool_empty(engine)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_step_that_fails_takes_the_one_behind_it_along(
    make_runner: MakeRunner, step: int
) -> None:
    engine = make_engine(make_runner(fail_at_steps=frozenset({step})), speculation="off")
    keys, wanted = start(engine, 3, max_tokens=10, ignore_eos=True)
    found = answers(run_all(engine))
    assert [found[key, 0] for key in keys] == wanted
    assert engine.stats().num_failed_steps == 1
    assert_pool_empty(engine)


def test_both_queued_steps_fail_and_the_engine_goes_on(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(fail_at_steps=frozenset({2, 3})), speculation="off")
    keys, wanted = start(engine, 3, max_tokens=10, ignore_eos=True)
    found = answers(run_all(engine))
    assert [found[key, 0] for key in keys] == wanted


def test_a_fault_between_two_steps_leaves_nothing_queued(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_runner(), speculation="off")
    keys, _ = start(engine, 2, max_tokens=10, ignore_eos=True)

    def broken(*_: object) -> None:
        raise KeyError("lost")

    for part in ("schedule_ahead", "commit"):
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler, part, broken)
            outputs = engine.step()
        failed = [o.finished.failure for o in outputs if o.finished is not None]
        assert [f.code for f in failed if f is not None] == [ErrorCode.UNAVAILABLE] * len(keys)
        keys, wanted = start(engine, 3, max_tokens=10, ignore_eos=True)
    found = answers(run_all(engine))
    assert [found[key, 0] for key in keys] == wanted
    assert_pool_empty(engine)


def test_a_row_without_a_token_fails_its_request_alone(make_runner: MakeRunner) -> None:
    prompts = [random_prompt(i, 6) for i in range(3)]
    requests = [make_request(max_tokens=12, ignore_eos=True) for _ in prompts]
    wanted = [expected_tokens(p, r) for p, r in zip(prompts, requests, strict=True)]
    others = {token for w in (*wanted[1:], *prompts) for token in w}
    broken = next(t for t in wanted[0][3:] if t not in others)
    engine = make_engine(make_runner(nan_on_token=broken), speculation="off")
    keys = [engine.add_request(r, p) for r, p in zip(requests, prompts, strict=True)]
    finals = {o.key: o.finished for o in run_all(engine) if o.finished is not None}
    failed = finals[keys[0]]
    assert failed.failure is not None and "not finite" in failed.failure.message
    assert failed.token_ids == wanted[0][: wanted[0].index(broken) + 1]
    assert [finals[key].token_ids for key in keys[1:]] == wanted[1:]
    assert_pool_empty(engine)


class NeverRepeats:
    """A drafter that looks for guesses and has none, or has one at some lengths."""

    def __init__(self, lengths: frozenset[int] = frozenset()) -> None:
        self.lengths = lengths

    def draft(self, sequence: Sequence, room: int, num_decodes: int, num_tokens: int) -> list[int]:
        del room, num_decodes, num_tokens
        return [7] if sequence.num_tokens in self.lengths else []


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}],
    ids=lambda options: next(iter(options)),
)
def test_a_rule_that_needs_the_token_waits_for_it(
    make_runner: MakeRunner, options: dict[str, Any]
) -> None:
    engine = make_engine(make_runner(), speculation="off")
    keys, wanted = start(engine, 2, max_tokens=12, ignore_eos=True, **options)
    found = answers(run_all(engine))
    assert [found[key, 0] for key in keys] == wanted
    assert most_queued(engine) == 1


def test_guesses_wait_for_the_token_and_only_they(make_runner: MakeRunner) -> None:
    request = make_request(max_tokens=20, ignore_eos=True)
    wanted = expected_tokens([1, 2, 3, 4], request)
    for lengths, queued in ((frozenset(range(99)), 1), (frozenset({9, 10}), 2)):
        engine = make_engine(make_runner(), drafter=NeverRepeats(lengths))
        key = engine.add_request(request, [1, 2, 3, 4])
        assert answers(run_all(engine))[key, 0] == wanted
        assert engine.stats().num_draft_tokens > 0
        assert most_queued(engine) == queued


def test_logprobs_bias_and_a_least_length_do_not_wait(make_runner: MakeRunner) -> None:
    option: dict[str, Any] = {
        "max_tokens": 12,
        "min_tokens": 6,
        "logprobs": 2,
        "logit_bias": {65: 3.0, 257: 2.0},
    }
    plain = make_engine(speculation="off")
    ahead = make_engine(make_runner(), speculation="off")
    found = []
    for engine in (plain, ahead):
        keys = [engine.add_request(make_request(**option), random_prompt(i, 9)) for i in range(3)]
        finals = {o.key: o.finished for o in run_all(engine) if o.finished is not None}
        found.append([(finals[key].token_ids, finals[key].logprobs) for key in keys])
    assert found[0] == found[1]
    assert most_queued(ahead) == 2


def test_a_deadline_passes_while_a_step_is_queued(make_runner: MakeRunner) -> None:
    clock = Clock()
    engine = make_engine(make_runner(), clock=clock, speculation="off")
    hurried = engine.add_request(make_request(max_tokens=40, deadline_ms=50.0), [1, 2])
    other = make_request(max_tokens=10)
    calm = engine.add_request(other, [3, 4])
    engine.step()
    engine.step()
    clock.now += 0.06
    outputs = run_all(engine)
    error = response_of(next(o for o in outputs if o.key == hurried and o.finished)).error
    assert error is not None and error.code is ErrorCode.DEADLINE_EXCEEDED
    final = next(o.finished for o in outputs if o.key == calm and o.finished is not None)
    assert final.token_ids == expected_tokens([3, 4], other)
    assert_pool_empty(engine)


def test_a_full_pool_preempts_as_without_a_queue(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(), speculation="off", kv_cache_tokens=192)
    requests: list[Request] = []
    prompts = [random_prompt(i, 20) for i in range(6)]
    for i in range(6):
        requests.append(make_request(max_tokens=40, temperature=1.0, seed=i, ignore_eos=True))
    keys = [engine.add_request(r, p) for r, p in zip(requests, prompts, strict=True)]
    found = answers(run_all(engine))
    for key, request, prompt in zip(keys, requests, prompts, strict=True):
        assert found[key, 0] == expected_tokens(prompt, request)
    assert engine.stats().num_preemptions > 0
    assert most_queued(engine) == 2
    assert_pool_empty(engine)


def test_logits_between_two_steps_wait_and_lose_no_output(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(), speculation="off")
    plain = make_engine(speculation="off")
    keys, wanted = start(engine, 2, max_tokens=10, ignore_eos=True, stream=True)
    tokens = random_prompt(9, 30)
    assert np.array_equal(engine.logits(tokens), plain.logits(tokens))
    outputs = run_all(engine)
    found = answers(outputs)
    assert [found[key, 0] for key in keys] == wanted
    for key, expected in zip(keys, wanted, strict=True):
        streamed = [t for o in outputs if o.key == key for t in o.token_ids]
        assert streamed == expected[len(expected) - len(streamed) :]
        assert len(streamed) >= 8  # two steps went out before
    assert_pool_empty(engine)


def test_an_engine_closes_while_a_step_is_queued(make_runner: MakeRunner) -> None:
    engine = make_engine(make_runner(), speculation="off")
    start(engine, 2, max_tokens=10)
    engine.close()
    assert engine.unfinished == []
