"""/v1/completions through the official client and raw, against real servers on the mock model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from gateway.support import (
    ScriptedRunner,
    assert_pool_is_empty,
    mock_gateway,
    serve_in_thread,
    serving,
)
from sagellm.backends.mock import BOS_ID, MockRunner
from sagellm.engine.config import EngineConfig
from sagellm.engine.engine import Engine
from sagellm.engine.loading import mock_tokenizer
from sagellm.gateway.app import create_server
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.openai.completions import merge

PROMPTS = ["one", "another prompt", "the third"]


@contextmanager
def client_of(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with (
        serve_in_thread(create_server(gateway)) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def free() -> Iterator[openai.OpenAI]:
    """A model that writes noise."""
    with client_of(mock_gateway()) as client:
        yield client


@pytest.fixture(scope="module")
def scripted() -> Iterator[openai.OpenAI]:
    """A model that continues every prompt with its length, so that answers are told apart."""
    gateway = mock_gateway(script=lambda prompt: f" has {len(prompt)} bytes.")
    with client_of(gateway) as client:
        yield client


def create(client: openai.OpenAI, prompt: Any = "hello", **options: Any) -> Any:
    return client.completions.create(
        **{"model": "mock", "prompt": prompt, "temperature": 0, **options}
    )


def raw(client: openai.OpenAI, **body: Any) -> httpx.Response:
    return httpx.post(f"{client.base_url}completions", json=body)


# ---- prompts


def test_a_text_is_continued(scripted: openai.OpenAI) -> None:
    answer = create(scripted, max_tokens=40)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == (" has 5 bytes.", "stop", 0)
    assert choice.logprobs is None
    assert (answer.object, answer.model) == ("text_completion", "mock")
    assert answer.usage.prompt_tokens == 6  # begin of text and five bytes
    assert answer.usage.completion_tokens == len(" has 5 bytes.") + 1


def test_the_default_is_16_tokens(scripted: openai.OpenAI) -> None:
    answer = create(scripted, "x" * 1000)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def test_token_ids_are_taken_as_they_are(scripted: openai.OpenAI) -> None:
    answer = create(scripted, list(b"hello"), max_tokens=40)
    assert answer.choices[0].text == " has 5 bytes."
    assert answer.usage.prompt_tokens == 5


@pytest.mark.parametrize("encoded", [False, True])
def test_several_prompts_are_answered_in_order(scripted: openai.OpenAI, encoded: bool) -> None:
    prompts = [list(prompt.encode()) for prompt in PROMPTS] if encoded else PROMPTS
    answer = create(scripted, prompts, max_tokens=40)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [c.text for c in answer.choices] == [f" has {len(p)} bytes." for p in PROMPTS]
    extra = 0 if encoded else len(PROMPTS)
    assert answer.usage.prompt_tokens == sum(map(len, PROMPTS)) + extra


def test_completions_of_a_prompt_stand_together(free: openai.OpenAI) -> None:
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    both = create(free, PROMPTS[:2], n=2, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for number, prompt in enumerate(PROMPTS[:2]):
        alone = create(free, prompt, n=2, **options)
        texts = [choice.text for choice in both.choices[2 * number : 2 * number + 2]]
        assert [choice.text for choice in alone.choices] == texts
        assert texts[0] != texts[1]


# ---- streams


@pytest.mark.parametrize("echo", [False, True])
def test_streams_of_several_prompts_equal_the_whole(free: openai.OpenAI, echo: bool) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 20, "n": 2, "echo": echo, "logprobs": 2}
    body = {"model": "mock", "prompt": PROMPTS, **options}
    whole = raw(free, **body).json()
    with httpx.stream(
        "POST", f"{free.base_url}completions", json={**body, "stream": True}
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    found: list[dict[str, Any]] = [{"text": "", "rows": {}} for _ in range(6)]
    for choice in (json.loads(line)["choices"][0] for line in lines):
        kept = found[choice["index"]]
        kept["text"] += choice["text"]
        kept["reason"] = choice["finish_reason"]
        for name, values in (choice["logprobs"] or {}).items():
            kept["rows"].setdefault(name, []).extend(values)
    for choice, kept in zip(whole["choices"], found, strict=True):
        assert kept["text"] == choice["text"]
        assert kept["rows"] == choice["logprobs"]
        assert kept["reason"] == choice["finish_reason"]


def test_stream_usage_comes_last(scripted: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = raw(scripted, prompt=PROMPTS, max_tokens=40, temperature=0, **options)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    *chunks, last = map(json.loads, events[:-2])
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    whole = create(scripted, PROMPTS, max_tokens=40)
    assert last["usage"] == whole.usage.model_dump(exclude_unset=True)


def test_every_chunk_tells_the_usage_so_far_on_demand(scripted: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = raw(
        scripted, prompt="text", max_tokens=8, temperature=0, stream=True, stream_options=options
    )
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    usage = [json.loads(event)["usage"]["completion_tokens"] for event in events[:-2]]
    assert usage == sorted(usage)
    assert usage[0] >= 1 and usage[-1] == 8


# ---- echo and logprobs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(axis=-1, keepdims=True))


def test_echo_scores_the_prompt(free: openai.OpenAI) -> None:
    """What evaluation harnesses ask for, against logits computed without any server."""
    ids = list(b"score these bytes")
    engine = Engine(
        MockRunner(), mock_tokenizer(), EngineConfig(block_size=16, kv_cache_tokens=1024)
    )
    expected = log_softmax(engine.logits(ids))
    for max_tokens in (0, 1):
        body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        answer = raw(free, model="mock", temperature=0, seed=1234, **body).json()
        (choice,) = answer["choices"]
        rows = choice["logprobs"]
        assert choice["text"].startswith("score these bytes")
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens
        assert {len(values) for values in rows.values()} == {len(ids) + max_tokens}
        assert rows["token_logprobs"][0] is None and rows["top_logprobs"][0] is None
        for place in range(1, len(ids)):
            row = expected[place - 1]
            assert rows["token_logprobs"][place] == pytest.approx(row[ids[place]], abs=1e-4)
            likely = rows["top_logprobs"][place]
            assert max(likely.values()) == pytest.approx(row.max(), abs=1e-4)
            greedy = int(row.argmax()) == ids[place]
            assert (rows["token_logprobs"][place] == max(likely.values())) == greedy


def test_scores_do_not_depend_on_the_cache_or_on_company(free: openai.OpenAI) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": 0}
    prompt = "a prompt that is longer than one block of the cache"
    first = raw(free, prompt=prompt, **body).json()
    again = raw(free, prompt=[prompt, "x", prompt], **body).json()
    assert again["choices"][0]["logprobs"] == first["choices"][0]["logprobs"]
    assert again["choices"][2]["logprobs"] == first["choices"][0]["logprobs"]


def test_echo_of_several_completions_repeats_the_prompt(free: openai.OpenAI) -> None:
    body = {"echo": True, "logprobs": 0, "n": 2, "seed": 1, "max_tokens": 4, "ignore_eos": True}
    choices = raw(free, prompt="twice", **body).json()["choices"]
    assert all(choice["text"].startswith("twice") for choice in choices)
    length = len("twice") + 1  # and the begin of text
    first, second = (choice["logprobs"] for choice in choices)
    assert first["token_logprobs"][:length] == second["token_logprobs"][:length]
    assert len(first["tokens"]) == len(second["tokens"]) == length + 4


def test_offsets_lead_to_the_tokens(scripted: openai.OpenAI) -> None:
    body = {"prompt": "grüße", "echo": True, "logprobs": 1, "max_tokens": 40, "temperature": 0}
    choice = raw(scripted, **body).json()["choices"][0]
    rows = choice["logprobs"]
    for token, offset in zip(rows["tokens"], rows["text_offset"], strict=True):
        if token not in ("<bos>", "<eos>") and not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token
    assert rows["tokens"][0] == "<bos>"
    assert "bytes:\\xc3" in rows["tokens"]


def test_logprobs_of_the_output_alone(scripted: openai.OpenAI) -> None:
    rows = create(scripted, logprobs=1, max_tokens=40).choices[0].logprobs
    assert "".join(rows.tokens) == " has 5 bytes.<eos>"
    assert rows.text_offset == [*range(14)]
    assert [max(likely, key=likely.get) for likely in rows.top_logprobs] == rows.tokens


# ---- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "end"),
        ("best_of", 2),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", ["a", ""]),
        ("prompt", [-1]),
        ("prompt", [1.5]),
        ("prompt", [2**40]),
        ("prompt", [99999]),
        ("prompt", None),
        ("prompt", {"a": 1}),
        ("prompt", ["x"] * 257),
        ("max_tokens", -1),
        ("logprobs", True),
        ("logprobs", 21),
        ("echo", "yes"),
        ("n", 65),
        ("messages", [{"role": "user", "content": "x"}]),
        ("prompt_logprobs", 1),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_a_field_that_is_not_served_is_a_400_that_names_it(
    free: openai.OpenAI, field: str, value: Any
) -> None:
    response = raw(free, **{"prompt": "x", field: value})
    assert response.status_code == 400, response.text
    assert any(word in response.json()["error"]["message"] for word in (field, "token id"))


def test_too_many_completions_in_all_are_refused(free: openai.OpenAI) -> None:
    response = raw(free, prompt=["x"] * 200, n=2, max_tokens=1)
    assert response.status_code == 400
    assert "400 completions" in response.json()["error"]["message"]


def test_when_the_queue_is_full_nothing_of_a_request_runs() -> None:
    gateway = mock_gateway(max_queue=2)
    with serving(gateway) as client:
        body = {"prompt": ["x"] * 200, "max_tokens": 1000}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 429
        assert response.headers["retry-after"]
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert_pool_is_empty(gateway)


def test_one_failing_prompt_ends_the_others() -> None:
    gateway = mock_gateway(ScriptedRunner("writes on", nan_on_token=ord("#")))
    with serving(gateway) as client:
        body = {"prompt": ["good", "bad#"], "max_tokens": 2000, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).status_code == 503
        text = client.post("/v1/completions", json={**body, "stream": True}).text
        assert "event: error\n" in text and "[DONE]" not in text
        assert client.post("/v1/completions", json={"prompt": "good"}).status_code == 200
        assert_pool_is_empty(gateway)


def test_leaving_a_merge_leaves_no_task() -> None:
    async def numbers(first: int) -> Any:
        yield first
        await asyncio.Event().wait()

    async def main() -> None:
        merged = merge([numbers(1), numbers(2)])  # type: ignore[list-item]
        found: list[Any] = []
        while len(found) < 2:
            found += await anext(merged)
        assert sorted(found) == [(0, 1), (1, 2)]
        await merged.aclose()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_the_begin_of_text_is_not_part_of_an_echo(free: openai.OpenAI) -> None:
    for prompt in ("abc", [[BOS_ID, *b"abc"]]):
        body = {"prompt": prompt, "echo": True, "max_tokens": 0}
        text = raw(free, **body).json()["choices"][0]["text"]
        assert text == ("abc" if isinstance(prompt, str) else "<bos>abc")
