"""The door for scripts."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sagellm
from engine.support import (
    assert_pool_empty,
    expected_tokens,
    make_engine,
    make_request,
    mock_tokenizer,
    random_prompt,
)
from sagellm import LLM, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from sagellm.backends.interface import ForwardBatch, SamplingRow, StepOutput
from sagellm.backends.mock import MockRunner
from sagellm.engine.engine import Engine
from sagellm.engine.llm import new_request
from sagellm.protocol import StreamEventDelta, StreamEventEnd, StreamEventStart
from sagellm.text import ChatTemplate


@pytest.fixture
def llm() -> Any:
    with LLM(make_engine()) as llm:
        yield llm
    assert_pool_empty(llm.engine)


def test_every_form_of_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    wanted = expected_tokens(ids, make_request(max_tokens=6))
    request = make_request("hello", max_tokens=6)
    prompts: list[Any] = ["hello", ids, tuple(ids), np.array(ids), request]
    for prompt in prompts:
        (response,) = llm.generate(prompt, **({} if prompt is request else {"max_tokens": 6}))
        assert response.output_tokens == wanted
    responses = llm.generate(prompts[:4], max_tokens=6)
    assert [r.output_tokens for r in responses] == [wanted] * 4
    assert llm.generate([request])[0].request_id == request.request_id


def test_answers_keep_the_order_of_prompts_and_completions(llm: LLM) -> None:
    prompts = [random_prompt(i, 4 + i) for i in range(20)]
    responses = llm.generate(prompts, max_tokens=8, n=2, temperature=1.0, seed=4)
    request = make_request(max_tokens=8, n=2, temperature=1.0, seed=4)
    wanted = [expected_tokens(p, request, index=i) for p in prompts for i in range(2)]
    assert [r.output_tokens for r in responses] == wanted
    assert [r.index for r in responses] == [0, 1] * 20


def test_more_prompts_than_queue_places() -> None:
    with LLM(make_engine(max_queue=3, max_num_seqs=2)) as llm:
        responses = llm.generate([[i] for i in range(30)], max_tokens=2)
    assert all(r.error is None for r in responses)
    assert len(responses) == 30


def test_bad_prompt_among_good_ones_runs_nothing(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt is empty"):
        llm.generate(["fine", ""], max_tokens=3)
    with pytest.raises(InvalidArgumentError, match="prompt is empty"):
        llm.generate([[1], []], max_tokens=3)
    assert llm.stats().num_steps == 0
    assert len(llm.generate("fine", max_tokens=3)) == 1


def test_options_are_named_when_wrong(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown option 'max_token'.*max_tokens"):
        llm.generate("x", max_token=3)
    with pytest.raises(InvalidArgumentError, match="temperature"):
        llm.generate("x", temperature=float("nan"))
    with pytest.raises(InvalidArgumentError, match="do not apply to a Request"):
        llm.generate(make_request("x"), max_tokens=3)
    with pytest.raises(InvalidArgumentError, match="unknown option kv_cache_mb"):
        LLM("any", device="mock", kv_cache_mb=3)
    with pytest.raises(ResourceExhaustedError, match="the largest kv_cache_gb that fits"):
        LLM("any", device="mock", kv_cache_gb=1e5)


def test_zero_temperature_is_greedy() -> None:
    assert new_request(prompt="x", temperature=0).temperature is None


def test_stream_yields_start_deltas_and_end(llm: LLM) -> None:
    events = list(llm.stream("abc", max_tokens=30, ignore_eos=True))
    assert isinstance(events[0], StreamEventStart)
    assert events[0].prompt_tokens == 4
    assert isinstance(events[-1], StreamEventEnd)
    deltas = [e for e in events if isinstance(e, StreamEventDelta)]
    assert len(deltas) > 1
    assert "".join(d.chunk for d in deltas) == events[-1].output_text
    assert (
        events[-1].output_tokens
        == llm.generate("abc", max_tokens=30, ignore_eos=True)[0].output_tokens
    )


def test_leaving_a_stream_early_cancels_it(llm: LLM) -> None:
    for event in llm.stream("abc", max_tokens=3000, ignore_eos=True):
        if isinstance(event, StreamEventDelta):
            break
    del event
    stats = llm.stats()
    assert stats.num_running == stats.num_waiting == 0


def test_chat_goes_through_the_template() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    engine = Engine(MockRunner(), mock_tokenizer(), chat_template=template)
    with LLM(engine) as llm:
        answer = llm.chat([{"role": "user", "content": "hi"}], max_tokens=4)
        assert answer.output_tokens == expected_tokens(
            list(b"<user>hi<assistant>"), make_request(max_tokens=4)
        )
        request = new_request(messages=[{"role": "user", "content": "hi"}])
        assert llm.count_prompt_tokens(request) == len(b"<user>hi<assistant>")
        with pytest.raises(InvalidArgumentError, match="role"):
            llm.chat([{"role": "nobody", "content": "hi"}])


class InterruptingRunner(MockRunner):
    """Presses Ctrl-C in the main thread during its third step."""

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        *,
        return_logits: bool = False,
        return_hidden: bool = False,
    ) -> StepOutput:
        if self.num_steps == 2:
            _thread.interrupt_main()
        return super().step(
            batch, sampling, return_logits=return_logits, return_hidden=return_hidden
        )


def test_interrupt_cancels_what_runs_and_leaves_the_engine_usable() -> None:
    assert threading.current_thread() is threading.main_thread()
    with LLM(make_engine(InterruptingRunner())) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1], [2]], max_tokens=3900, ignore_eos=True)
        stats = llm.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.kv.free_blocks == stats.kv.num_blocks
        assert len(llm.generate([3], max_tokens=2, ignore_eos=True)[0].output_tokens) == 2


def test_logits_have_one_row_per_token(llm: LLM) -> None:
    got = llm.logits([1, 2, 3])
    assert got.shape == (3, 258)
    assert got.dtype == np.float32
    assert (sagellm.logits("mock", [1, 2, 3], device="mock") == got).all()
    with pytest.raises(InvalidArgumentError, match="outside the vocabulary"):
        llm.logits([999])
    with pytest.raises(InvalidArgumentError, match="max_model_len"):
        llm.logits([1] * 5000)


def test_closed_llm_says_so() -> None:
    llm = LLM(make_engine())
    llm.close()
    llm.close()
    for use in (lambda: llm.generate("x"), lambda: llm.logits([1]), lambda: llm.stream("x")):
        with pytest.raises(UnavailableError, match="closed"):
            use()


def test_a_model_that_names_itself_nowhere_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(make_engine(), name="mine") as llm:
        assert llm.model_name == "mock"
    monkeypatch.setattr(MockRunner, "config", replace(MockRunner().config, name=""))
    for model, name in ((make_engine(), "model"), ("somewhere", "somewhere")):
        with LLM(model, device="mock") as llm:
            assert llm.model_name == name
    with LLM(make_engine(), name="mine") as llm:
        assert llm.model_name == "mine"


def test_importing_the_protocol_does_not_load_the_engine() -> None:
    code = "import sys, sagellm.protocol; print({'numpy', 'sagellm.engine'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"
