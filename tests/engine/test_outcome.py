"""What a finished sequence tells of itself: why it stopped, when, and what was cached."""

from __future__ import annotations

import pytest

from engine.support import (
    Clock,
    answers,
    expected_tokens,
    make_engine,
    make_request,
    random_prompt,
    run_all,
)
from sagellm.backends.mock import BOS_ID, EOS_ID
from sagellm.engine.engine import Engine
from sagellm.engine.output import response_of
from sagellm.protocol import Request, Response


def respond(engine: Engine, request: Request, prompt: list[int]) -> Response:
    key = engine.add_request(request, prompt)
    ends = [o for o in run_all(engine) if o.key == key and o.finished is not None]
    assert len(ends) == 1
    return response_of(ends[0])


def test_matched_stop_names_what_the_request_asked_for() -> None:
    to_a = {ord("a"): 100.0}
    engine = make_engine()
    by_string = respond(engine, make_request(stop=["b", "aa"], logit_bias=to_a), [1])
    assert (by_string.finish_reason, by_string.matched_stop) == ("stop", "aa")
    by_token = respond(engine, make_request(stop_token_ids=[ord("a")], logit_bias=to_a), [1])
    assert (by_token.finish_reason, by_token.matched_stop) == ("stop", ord("a"))
    by_end = respond(engine, make_request(logit_bias={EOS_ID: 100.0}), [1])
    assert (by_end.finish_reason, by_end.matched_stop) == ("stop", None)
    named_end = make_request(stop_token_ids=[EOS_ID], logit_bias={EOS_ID: 100.0}, ignore_eos=True)
    assert respond(engine, named_end, [1]).matched_stop == EOS_ID
    by_length = respond(engine, make_request(max_tokens=2, logit_bias=to_a), [1])
    assert (by_length.finish_reason, by_length.matched_stop) == ("length", None)


def test_a_failed_sequence_matched_nothing_and_has_no_stages() -> None:
    engine = make_engine(clock=Clock(1.0))
    answer = respond(engine, make_request(deadline_ms=0.5, stop=["x"]), [1])
    assert answer.finish_reason == "error"
    assert answer.matched_stop is None
    assert answer.timestamps is None


def test_stages_are_in_order_and_agree_with_the_metrics() -> None:
    engine = make_engine(clock=Clock(0.001))
    answer = respond(engine, make_request(max_tokens=5, ignore_eos=True), [1, 2])
    stages = answer.timestamps
    assert stages is not None
    assert stages.queued_at < stages.scheduled_at < stages.executed_at < stages.completed_at
    assert stages.ttft_ms == pytest.approx(answer.metrics.ttft_ms)


def test_prompt_and_cached_tokens_are_reported() -> None:
    prompt = random_prompt(2, 40)
    engine = make_engine()
    first, second = (respond(engine, make_request(max_tokens=1), prompt) for _ in range(2))
    assert (first.prompt_tokens, first.cached_tokens) == (40, 0)
    assert (second.prompt_tokens, second.cached_tokens) == (40, 32)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_min_tokens_holds_every_end_back(temperature: float | None) -> None:
    bias = {EOS_ID: 50.0, 65: 49.0}
    engine = make_engine()
    options = {"logit_bias": bias, "temperature": temperature, "max_tokens": 20, "seed": 3}
    free = respond(engine, make_request(**options, stop_token_ids=[65]), [1])
    assert len(free.output_tokens) == 1
    held = respond(engine, make_request(**options, stop_token_ids=[65], min_tokens=6), [1])
    assert len(held.output_tokens) == 7
    assert not {EOS_ID, 65} & set(held.output_tokens[:6])
    assert held.output_tokens[6] in (EOS_ID, 65)


def test_min_tokens_reached_leaves_no_trace() -> None:
    prompt = random_prompt(8, 9)
    engine = make_engine()
    request = make_request(max_tokens=30, min_tokens=30, stop_token_ids=[255])
    key = engine.add_request(request, prompt)
    tokens = answers(run_all(engine))[key, 0]
    assert len(tokens) == 30
    plain = expected_tokens(prompt, make_request(max_tokens=30))
    cut = next((i for i, t in enumerate(plain) if t in (EOS_ID, 255)), 30)
    assert tokens[:cut] == plain[:cut]


def test_control_tokens_show_when_asked_but_never_the_one_that_ends() -> None:
    engine = make_engine()
    bias = {BOS_ID: 100.0}
    hidden = make_request(max_tokens=2, logit_bias=bias)
    assert respond(engine, hidden, [1]).output_text == ""
    shown = make_request(max_tokens=2, logit_bias=bias, skip_special_tokens=False)
    assert respond(engine, shown, [1]).output_text == "<bos><bos>"
    ends = make_request(logit_bias={EOS_ID: 100.0}, skip_special_tokens=False)
    assert respond(engine, ends, [1]).output_text == ""
    goes_on = make_request(
        max_tokens=1, logit_bias={EOS_ID: 100.0}, skip_special_tokens=False, ignore_eos=True
    )
    assert respond(engine, goes_on, [1]).output_text == "<eos>"
