"""Streams on event loops, one engine thread behind them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from engine.support import (
    assert_pool_empty,
    expected_tokens,
    make_engine,
    make_request,
    random_prompt,
)
from sagellm.backends.interface import ForwardBatch, SamplingRow, StepOutput
from sagellm.backends.mock import MockRunner
from sagellm.engine import thread as thread_module
from sagellm.engine.async_engine import SHORT_TEXT_CHARS, AsyncEngine
from sagellm.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    UnsupportedError,
)
from sagellm.protocol import ErrorCode, Request, StreamEventDelta, StreamEventEnd, StreamEventStart

TIMEOUT = 30.0


class GatedRunner(MockRunner):
    """A mock whose steps wait until ``gate`` is open; a fatal error ends the engine's thread."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fatal = False

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        *,
        return_logits: bool = False,
        return_hidden: bool = False,
    ) -> StepOutput:
        self.entered.set()
        assert self.gate.wait(TIMEOUT)
        if self.fatal:
            raise SystemExit("the device is gone")
        return super().step(
            batch, sampling, return_logits=return_logits, return_hidden=return_hidden
        )


async def collect(
    engine: AsyncEngine, request: Request, prompt: list[int]
) -> list[StreamEventStart | StreamEventDelta | StreamEventEnd]:
    return [event async for event in engine.generate(request, prompt)]


def end(events: list[Any]) -> StreamEventEnd:
    assert isinstance(events[0], StreamEventStart)
    ends = [event for event in events if isinstance(event, StreamEventEnd)]
    assert len(ends) == 1
    assert events[-1] is ends[0]
    return ends[0]


def test_many_streams_at_once_get_their_own_answers() -> None:
    async def main() -> None:
        engine = AsyncEngine(make_engine(kv_cache_tokens=320))
        prompts = [random_prompt(i, 5 + i) for i in range(64)]
        requests = [
            make_request(max_tokens=10 + i % 7, temperature=1.0, seed=i, stream=i % 2 == 0)
            for i in range(64)
        ]
        results = await asyncio.gather(
            *(collect(engine, r, p) for r, p in zip(requests, prompts, strict=True))
        )
        for request, prompt, events in zip(requests, prompts, results, strict=True):
            final = end(events)
            assert final.output_tokens == expected_tokens(prompt, request)
            deltas = [e for e in events if isinstance(e, StreamEventDelta)]
            assert [t for d in deltas for t in d.chunk_tokens] == final.output_tokens
            assert "".join(d.chunk for d in deltas) == final.output_text
        stats = await engine.stats()
        assert stats.num_steps == engine.num_steps > 0
        assert await engine.close() == 0
        assert_pool_empty(engine.engine)

    asyncio.run(main())


def test_leaving_a_stream_frees_its_blocks_before_the_next_step() -> None:
    async def main() -> None:
        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner))
        request = make_request(max_tokens=2000, stream=True, ignore_eos=True)
        async with aclosing(engine.generate(request, [1, 2, 3])) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta):
                    break
        stats = await engine.stats()
        assert stats.num_running == 0
        assert stats.kv.free_blocks == stats.kv.num_blocks

        task = asyncio.create_task(collect(engine, request, [4, 5]))
        runner.entered.clear()
        await asyncio.to_thread(runner.entered.wait, TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = await engine.stats()
        assert stats.num_running == stats.num_waiting == 0
        await engine.close()
        assert_pool_empty(engine.engine)

    asyncio.run(main())


def test_bad_and_excess_requests_raise_before_any_event() -> None:
    async def main() -> None:
        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner, max_queue=2, max_num_seqs=1))
        with pytest.raises(InvalidArgumentError, match="outside the vocabulary"):
            await collect(engine, make_request(), [-1])
        runner.gate.clear()
        first = asyncio.create_task(collect(engine, make_request(max_tokens=1), [1]))
        await asyncio.to_thread(runner.entered.wait, TIMEOUT)
        queued = [engine.generate(make_request(max_tokens=1), [2]) for _ in range(2)]
        for stream in queued:
            assert isinstance(await anext(stream), StreamEventStart)
        with pytest.raises(ResourceExhaustedError, match="max_queue"):
            await collect(engine, make_request(max_tokens=1), [3])
        runner.gate.set()
        assert end(await first).error is None
        for stream in queued:
            rest = [event async for event in stream]
            assert isinstance(rest[-1], StreamEventEnd)
        await engine.close()

    asyncio.run(main())


def test_death_of_the_engine_thread_answers_everyone_unavailable() -> None:
    async def main() -> None:
        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner, max_num_seqs=2))
        runner.gate.clear()
        request = make_request(max_tokens=50, stream=True)
        tasks = [asyncio.create_task(collect(engine, request, [i])) for i in range(5)]
        await asyncio.to_thread(runner.entered.wait, TIMEOUT)
        runner.fatal = True
        runner.gate.set()
        for task in tasks:
            error = end(await asyncio.wait_for(task, TIMEOUT)).error
            assert error is not None
            assert error.code is ErrorCode.UNAVAILABLE
        assert not engine.is_alive
        with pytest.raises(UnavailableError, match="has failed"):
            await collect(engine, request, [1])
        with pytest.raises(UnavailableError):
            await engine.stats()
        await engine.close()

    asyncio.run(main())


def test_close_drains_what_it_can_and_reports_what_it_cut() -> None:
    async def main() -> None:
        engine = AsyncEngine(make_engine())
        request = make_request(max_tokens=20, ignore_eos=True)
        streams = [engine.generate(request, [i]) for i in range(4)]
        starts = [await anext(stream) for stream in streams]
        assert await engine.close(drain_timeout=TIMEOUT) == 0
        for start, stream in zip(starts, streams, strict=True):
            rest = [event async for event in stream]
            assert len(end([start, *rest]).output_tokens) == 20
        with pytest.raises(UnavailableError):
            await collect(engine, request, [1])

        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner))
        runner.gate.clear()
        task = asyncio.create_task(
            collect(engine, make_request(max_tokens=3000, ignore_eos=True), [1])
        )
        await asyncio.to_thread(runner.entered.wait, TIMEOUT)
        closing = asyncio.create_task(engine.close(drain_timeout=0.0))
        await asyncio.sleep(0)
        runner.gate.set()
        assert await closing == 1
        error = end(await task).error
        assert error is not None
        assert (error.code, error.retryable) == (ErrorCode.UNAVAILABLE, True)
        assert_pool_empty(engine.engine)

    asyncio.run(main())


def test_one_engine_serves_loops_that_come_and_go() -> None:
    engine = AsyncEngine(make_engine())
    request = make_request(max_tokens=5)
    answers = [end(asyncio.run(collect(engine, request, [7]))).output_tokens for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    asyncio.run(engine.close())


# ------------------------------------------------------------------------------ output streams


def test_an_output_stream_gives_every_output_and_ends() -> None:
    async def main() -> None:
        engine = AsyncEngine(make_engine())
        request = make_request(max_tokens=12, ignore_eos=True, stream=True, n=2, prompt_logprobs=0)
        prompt = random_prompt(5, 20)
        stream = await engine.start(request, prompt)
        assert stream.num_prompt_tokens == 20
        outputs = [output async for output in stream]
        assert {output.key for output in outputs} == {stream.key}
        assert [o.request_finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert [o.prompt_logprobs is not None for o in outputs] == [True] + [False] * (
            len(outputs) - 1
        )
        for index in range(2):
            mine = [o for o in outputs if o.index == index]
            tokens = [t for o in mine for t in o.token_ids]
            assert len(tokens) == 12
            final = mine[-1].finished
            assert final is not None
            assert final.token_ids == tokens
            assert "".join(o.text for o in mine) == final.text
        stream.cancel()
        assert [output async for output in stream] == []
        await engine.close()

    asyncio.run(main())


def test_cancelling_a_stream_ends_it_and_frees_its_blocks() -> None:
    async def main() -> None:
        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner))
        request = make_request(max_tokens=3000, ignore_eos=True, stream=True)
        stream = await engine.start(request, [1])
        await anext(stream)
        runner.gate.clear()

        async def drain() -> int:
            return len([output async for output in stream])

        reader = asyncio.create_task(drain())
        await asyncio.sleep(0)
        stream.cancel()
        await stream.aclose()  # again, without effect
        await asyncio.wait_for(reader, TIMEOUT)
        runner.gate.set()
        stats = await engine.stats()
        assert stats.num_running == 0
        assert stats.kv.free_blocks == stats.kv.num_blocks
        await engine.close()

    asyncio.run(main())


def test_a_reader_that_is_cancelled_may_read_on() -> None:
    async def main() -> None:
        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner))
        runner.gate.clear()
        stream = await engine.start(make_request(max_tokens=5, ignore_eos=True), [1])
        reader = asyncio.create_task(anext(stream))
        await asyncio.to_thread(runner.entered.wait, TIMEOUT)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        runner.gate.set()
        outputs = [output async for output in stream]
        assert outputs[-1].finished is not None
        assert len(outputs[-1].finished.token_ids) == 5
        await engine.close()

    asyncio.run(main())


def test_a_bad_grammar_is_refused_and_a_good_one_is_followed() -> None:
    async def main() -> None:
        engine = AsyncEngine(make_engine())
        with pytest.raises(InvalidArgumentError, match="unclosed"):
            await engine.start(make_request(response_format={"type": "regex", "regex": "("}), [1])
        request = make_request(response_format={"type": "choice", "choices": ["north"]})
        assert end(await collect(engine, request, [1])).output_text == "north"
        await engine.close()
        with pytest.raises(UnavailableError):
            await engine.start(request, [1])

    asyncio.run(main())


# ---------------------------------------------------------------------------- drain and progress


def test_draining_refuses_requests_and_finishes_those_at_hand() -> None:
    async def main() -> None:
        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner))
        runner.gate.clear()
        request = make_request(max_tokens=20, ignore_eos=True)
        stream = await engine.start(request, [1])
        engine.begin_drain()
        with pytest.raises(UnavailableError, match="shutting down"):
            await engine.start(request, [2])
        assert engine.is_alive
        runner.gate.set()
        outputs = [output async for output in stream]
        assert outputs[-1].finished is not None
        assert len(outputs[-1].finished.token_ids) == 20
        assert (await engine.stats()).num_running == 0  # still answers
        assert await engine.close() == 0

    asyncio.run(main())


def test_a_hanging_step_shows_as_work_without_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(thread_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def main() -> None:
        runner = GatedRunner()
        engine = AsyncEngine(make_engine(runner))
        await engine.stats()
        now[0] += 500.0  # idle for long
        while engine.progress().has_work:
            await asyncio.sleep(0)
        assert engine.progress().seconds_since_progress == 0.0

        runner.gate.clear()
        stream = await engine.start(make_request(max_tokens=3, ignore_eos=True), [1])
        assert engine.progress().seconds_since_progress == 0.0  # the idle time does not count
        await asyncio.to_thread(runner.entered.wait, TIMEOUT)
        for waited in (10.0, 60.0):
            now[0] = 1500.0 + waited
            progress = engine.progress()
            assert progress.has_work
            assert progress.seconds_since_progress == waited
        assert progress.num_steps == engine.num_steps == 0
        runner.gate.set()
        assert [o async for o in stream]
        await engine.stats()
        assert engine.num_steps == 3
        assert engine.progress().seconds_since_progress == 0.0
        await engine.close()
        assert not engine.progress().has_work

    asyncio.run(main())


def test_a_short_prompt_does_not_wait_for_threads_that_encode_long_ones() -> None:
    async def main() -> None:
        engine = AsyncEngine(make_engine(MockRunner()))
        release = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            asyncio.get_running_loop().set_default_executor(pool)
            busy = asyncio.get_running_loop().run_in_executor(None, release.wait, TIMEOUT)
            short = await engine.start(make_request(prompt="Hi", max_tokens=2))
            given = await engine.start(make_request(max_tokens=2), [1, 2, 3])
            assert [o async for o in short] and [o async for o in given]
            text = "a" * (SHORT_TEXT_CHARS + 1)
            long = asyncio.create_task(engine.start(make_request(prompt=text, max_tokens=2)))
            await engine.stats()
            assert not long.done()  # it would hold up the event loop
            release.set()
            assert [o async for o in await long]
            await busy
            await engine.close()

    asyncio.run(main())


def test_call_runs_between_steps_and_passes_errors_on() -> None:
    async def main() -> None:
        engine = AsyncEngine(make_engine())
        name = await engine.call(lambda: threading.current_thread().name)
        assert name == "sagellm-engine"
        with pytest.raises(InvalidArgumentError, match="vocabulary"):
            await engine.call(lambda: engine.engine.logits([-1]))
        with pytest.raises(UnsupportedError, match="hidden states"):
            await engine.call(lambda: engine.engine.hidden([1]))
        await engine.close()

    asyncio.run(main())
