"""/v1/chat/completions through the official client, against a real server on scripted models."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from gateway.support import (
    BlockingRunner,
    ScriptedRunner,
    assert_pool_is_empty,
    mock_gateway,
    serve_in_thread,
    serving,
)
from sagellm.gateway.app import create_server
from sagellm.gateway.gateway import Gateway

USER = [{"role": "user", "content": "hello"}]
TEXT = 'Grüße, 世界! \u2028 "quoted" \\ and\tmore 🙂.'


@contextmanager
def clients_of(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with (
        serve_in_thread(create_server(gateway)) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def free() -> Iterator[openai.OpenAI]:
    """A model that writes noise, so that seeds and temperatures show."""
    with clients_of(mock_gateway()) as client:
        yield client


@pytest.fixture(scope="module")
def scripted() -> Iterator[openai.OpenAI]:
    with clients_of(mock_gateway(script=TEXT)) as client:
        yield client


def create(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "mock", "messages": USER, "temperature": 0, **options}
    )


def refused(client: openai.OpenAI, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(
            "/chat/completions",
            body={"model": "mock", "messages": USER, **options},
            cast_to=object,
        )
    return caught.value


# ---- whole answers


def test_a_completion_has_text_reason_and_usage(scripted: openai.OpenAI) -> None:
    answer = create(scripted)
    choice = answer.choices[0]
    assert choice.message.content == TEXT
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "mock")
    usage = answer.usage
    assert usage.completion_tokens == len(TEXT.encode()) + 1  # bytes, and the end
    assert usage.prompt_tokens == len("<|user|>hello<|assistant|>")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_cached_tokens_are_told(scripted: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "a prompt of several blocks " * 4}]
    create(scripted, messages=messages, max_tokens=1)
    usage = create(scripted, messages=messages, max_tokens=1).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    salted = create(scripted, messages=messages, max_tokens=1, extra_body={"cache_salt": "other"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_max_tokens_cuts_and_says_so(scripted: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = create(scripted, **{name: 2})
        assert answer.choices[0].message.content == TEXT[:2]
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2


def test_without_max_tokens_an_answer_takes_what_fits() -> None:
    gateway = mock_gateway(script="x" * 10_000, max_model_len=128)
    with clients_of(gateway) as client:
        answer = create(client)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 128


def test_stop_strings_end_the_text(scripted: openai.OpenAI) -> None:
    for stop in ("quoted", ["nowhere", "quoted"]):
        answer = create(scripted, stop=stop)
        assert answer.choices[0].message.content == TEXT[: TEXT.index("quoted")]
        assert answer.choices[0].finish_reason == "stop"


def test_stop_token_ids_and_min_tokens(scripted: openai.OpenAI) -> None:
    answer = create(scripted, extra_body={"stop_token_ids": [ord(",")]})
    assert answer.choices[0].message.content == TEXT[: TEXT.index(",")]
    longer = create(scripted, max_tokens=200, extra_body={"min_tokens": 150})
    assert longer.usage.completion_tokens >= 150


def test_ignore_eos_goes_on(scripted: openai.OpenAI) -> None:
    answer = create(scripted, max_tokens=150, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 150
    assert answer.choices[0].finish_reason == "length"


def test_n_completions_differ_and_repeat_with_their_seed(free: openai.OpenAI) -> None:
    options = {"n": 3, "temperature": 1.5, "seed": 11, "max_tokens": 24}
    first, again = (create(free, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in again.choices] == texts
    other = create(free, **{**options, "seed": -11})
    assert [choice.message.content for choice in other.choices] != texts


def test_without_a_seed_every_answer_is_drawn_anew(free: openai.OpenAI) -> None:
    options = {"temperature": 2, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    texts = {create(free, **options).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3


def test_greedy_needs_no_seed_and_top_p_0_is_greedy(free: openai.OpenAI) -> None:
    greedy = create(free, max_tokens=24).choices[0].message.content
    assert create(free, max_tokens=24).choices[0].message.content == greedy
    narrow = create(free, temperature=1, top_p=0, max_tokens=24)
    assert narrow.choices[0].message.content == greedy
    tiny = create(free, temperature=5e-324, max_tokens=24)
    assert tiny.choices[0].message.content == greedy
    single = create(free, temperature=1, max_tokens=24, extra_body={"top_k": 1})
    assert single.choices[0].message.content == greedy


def test_logit_bias_reaches_the_sampler(scripted: openai.OpenAI) -> None:
    answer = create(scripted, logit_bias={str(ord("z")): 100}, max_tokens=4)
    assert answer.choices[0].message.content == "zzzz"


def test_developer_messages_and_text_parts_reach_the_template() -> None:
    seen: list[str] = []

    def script(prompt: str) -> str:
        seen.append(prompt)
        return "ok"

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "rule"}, {"role": "user", "content": parts}]
    with clients_of(mock_gateway(script=script)) as client:
        create(client, messages=messages)
    assert seen[-1] == "<|system|>rule<|user|>one\ntwo<|assistant|>"


# ---- streams


@pytest.mark.parametrize("n", [1, 3])
def test_stream_equals_the_whole_answer(free: openai.OpenAI, n: int) -> None:
    options = {"n": n, "temperature": 1.2, "seed": 5, "max_tokens": 40}
    whole = create(free, **options)
    texts, reasons = [""] * n, [None] * n
    for chunk in create(free, **options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_events_come_in_order() -> None:
    body = {"messages": USER, "stream": True, "temperature": 0}
    with serving(mock_gateway(script="abc")) as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[1:-1] == [{"content": "a"}, {"content": "b"}, {"content": "c"}]
    assert deltas[-1] == {}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_stream_usage_comes_last_and_equals_that_of_the_whole(scripted: openai.OpenAI) -> None:
    salt = {"cache_salt": "usage"}
    create(scripted, extra_body=salt)
    whole = create(scripted, extra_body=salt)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = create(scripted, extra_body=salt, **options)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage == whole.usage


def test_every_chunk_tells_the_usage_so_far_on_demand(scripted: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(create(scripted, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == create(scripted).usage.completion_tokens
    assert len({chunk.usage.prompt_tokens for chunk in chunks}) == 1


def test_no_character_of_a_stream_breaks_lines(scripted: openai.OpenAI) -> None:
    """Clients that split at every Unicode line boundary see whole events as well."""
    with httpx.stream(
        "POST",
        f"{scripted.base_url}chat/completions",
        json={"messages": USER, "stream": True, "temperature": 0},
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == TEXT


# ---- log-probabilities


def test_logprobs_are_the_same_in_a_stream(free: openai.OpenAI) -> None:
    options = {"logprobs": True, "top_logprobs": 3, "max_tokens": 20, "seed": 3, "temperature": 1}
    whole = create(free, **options).choices[0]
    rows, text = [], ""
    for chunk in create(free, **options, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        rows += choice.logprobs.content if choice.logprobs else []
    assert text == whole.message.content
    assert rows == whole.logprobs.content
    assert all(len(row.top_logprobs) == 3 for row in rows)
    assert all(row.logprob <= 0 for row in rows)


def test_logprobs_spell_the_text_without_its_end(scripted: openai.OpenAI) -> None:
    choice = create(scripted, logprobs=True).choices[0]
    data = bytes(byte for row in choice.logprobs.content for byte in row.bytes)
    assert data.decode() == TEXT
    assert all(row.top_logprobs == [] for row in choice.logprobs.content)


# ---- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("service_tier", "flex"),
        ("verbosity", "low"),
        ("reasoning_effort", "high"),
        ("prompt_cache_retention", "24h"),
        ("moderation", {}),
        ("prompt_cache_options", {}),
        ("best_of", 2),
        ("use_beam_search", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 65),
        ("seed", 2**64),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", -1),
        ("logprobs", 3),
        ("top_logprobs", 3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"007": 1}),
        ("logit_bias", {"99999": 1}),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-300),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [99999]),
        ("stream_options", {"include_usage": True}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "xml"}),
        ("tool_choice", "required"),
        ("tools", [{"type": "web_search"}]),
        ("cache_salt", ""),
        ("priority", 10_000),
        ("deadline_ms", 0),
        ("messages", []),
        ("messages", "hello"),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"self": 1}),
        ("chat_template_kwargs", {"a": "x" * 70_000}),
        ("structured_outputs", {}),
        ("guided_json", "no schema"),
    ],
)
def test_a_field_that_is_not_served_is_a_400_that_names_it(
    scripted: openai.OpenAI, field: str, value: Any
) -> None:
    error = refused(scripted, **{field: value})
    assert error.status_code == 400
    assert error.type == "invalid_request_error"
    assert field in error.body["message"]  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    "options",
    [
        {"store": False, "service_tier": "auto", "modalities": ["text"], "verbosity": "medium"},
        {"metadata": {"a": "b"}, "user": "me", "safety_identifier": "x", "prompt_cache_key": "k"},
        {"tools": None, "tool_choice": None, "n": None, "stop": None, "logprobs": False},
        {"tool_choice": "auto", "parallel_tool_calls": False, "tools": []},
        {"response_format": {"type": "text"}, "logit_bias": {}, "stream_options": None},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1, "skip_special_tokens": True},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(
    scripted: openai.OpenAI, options: dict[str, Any]
) -> None:
    assert create(scripted, extra_body=options).choices[0].message.content == TEXT


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ['"temperature": {}', '"chat_template_kwargs": {{"a": {}}}'])
def test_numbers_that_json_has_not_are_a_400(
    scripted: openai.OpenAI, place: str, literal: str
) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], {place.format(literal)}}}'
    response = httpx.post(
        f"{scripted.base_url}chat/completions",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert create(scripted).choices[0].message.content == TEXT


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "text"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "input_audio"),
        ({"role": "robot", "content": "x"}, "role"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user"}, "content"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "tool_call_id"),
        ({"role": "user", "content": "x", "name": ""}, "name"),
        ({"role": "user", "content": "x", "colour": "red"}, "colour"),
        ({"role": "user", "content": "\ud800"}, ""),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
                ],
            },
            "messages.1.tool_calls.0.function.arguments",
        ),
    ],
)
def test_a_bad_message_is_a_400_that_says_which(
    scripted: openai.OpenAI, message: dict[str, Any], told: str
) -> None:
    response = httpx.post(
        f"{scripted.base_url}chat/completions",
        content=json.dumps({"messages": [*USER, message]}),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400, response.text
    assert told in response.json()["error"]["message"]


def test_an_unknown_model_is_a_404(scripted: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        create(scripted, model="other")


def test_a_model_without_chat_template_says_where_to_go() -> None:
    with clients_of(mock_gateway(chat_template=None)) as client:
        error = refused(client)
    assert error.status_code == 400
    assert "/v1/completions" in error.message


def test_a_prompt_that_is_too_long_is_a_400(scripted: openai.OpenAI) -> None:
    error = refused(scripted, messages=[{"role": "user", "content": "x" * 5000}])
    assert error.status_code == 400
    assert "shorten the prompt" in error.message


# ---- failures on the way


def test_a_failure_inside_a_stream_is_its_last_event() -> None:
    runner = ScriptedRunner("some text", nan_on_token=ord("t"))
    body = {"messages": USER, "stream": True, "temperature": 0}
    with serving(mock_gateway(runner)) as client:
        events = client.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
        whole = client.post("/v1/chat/completions", json={**body, "stream": False})
        normal = client.post(
            "/v1/chat/completions", json={**body, "stream": False, "max_tokens": 2}
        )
    name, data = events[-1].split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert error["code"] == "unavailable" and "no token could be chosen" in error["message"]
    assert "[DONE]" not in "".join(events)
    assert whole.status_code == 503
    assert normal.status_code == 200


def test_the_client_raises_on_an_error_inside_a_stream() -> None:
    runner = ScriptedRunner("some text", nan_on_token=ord("t"))
    with clients_of(mock_gateway(runner)) as client:
        stream = create(client, stream=True)
        with pytest.raises(openai.APIError, match="no token could be chosen"):
            list(stream)


def test_a_deadline_is_a_504(free: openai.OpenAI) -> None:
    error = refused(free, deadline_ms=0.001)
    assert error.status_code == 504


def wait_until_empty(gateway: Gateway) -> None:
    """Waits until the engine has no request, by asking it between steps."""
    engine = gateway.engine
    assert engine is not None
    gone = threading.Event()

    def look() -> None:
        if not engine.engine.unfinished:
            gone.set()

    for _ in range(20_000):
        engine._thread.call(look).result(30)
        if gone.is_set():
            return
    raise AssertionError("the request was not cancelled")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled(stream: bool) -> None:
    runner = BlockingRunner()
    gateway = mock_gateway(runner)
    body = {
        "messages": USER,
        "stream": stream,
        "max_tokens": 4000,
        "ignore_eos": True,
        "temperature": 0,
    }
    with serving(gateway) as client:
        client.get("/ready")
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            runner.gate.clear()
            thread = threading.Thread(target=_give_up, args=(client, body, runner))
            thread.start()
            thread.join(60)
            runner.gate.set()
        wait_until_empty(gateway)
        assert_pool_is_empty(gateway)
        answer = client.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 2})
        assert answer.status_code == 200


def _give_up(client: httpx.Client, body: dict[str, Any], runner: BlockingRunner) -> None:
    """Sends a request and leaves without its answer, which never comes: the model is blocked."""
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=0.5))
    assert runner.entered.is_set()
