"""Whatever arrives, leaves or runs out: every request is answered once, and blocks come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.support import (
    Clock,
    assert_pool_empty,
    expected_tokens,
    make_engine,
    make_request,
    random_prompt,
)
from sagellm.backends.mock import MockRunner, QueueingMockRunner
from sagellm.engine.output import SequenceOutput
from sagellm.errors import ResourceExhaustedError
from sagellm.protocol import ErrorCode

REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.tuples(st.integers(0, 2), st.integers(1, 70)),
        "max_tokens": st.integers(1, 24),
        "n": st.sampled_from([1, 1, 1, 2, 4]),
        "priority": st.integers(-1, 1),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([None, 1.0]),
        "deadline_ms": st.sampled_from([None, None, None, 5.0, 40.0]),
        "stream": st.booleans(),
    }
)
ACTIONS = st.lists(
    st.one_of(
        REQUESTS,
        st.integers(0, 30).map(lambda i: ("cancel", i)),
        st.integers(1, 6).map(lambda k: ("steps", k)),
    ),
    min_size=1,
    max_size=24,
)
ENGINES = st.fixed_dictionaries(
    {
        "kv_cache_tokens": st.sampled_from([96, 160, 400, 2048]),
        "max_num_seqs": st.sampled_from([1, 2, 5, 32]),
        "max_batch_tokens": st.sampled_from([32, 64]),
        "max_chunk_tokens": st.sampled_from([None, 1, 5, 16]),
        "enable_prefix_caching": st.booleans(),
        "speculation": st.sampled_from(["auto", "off", 2]),
    }
)
RUNNERS = st.sampled_from(
    [MockRunner, QueueingMockRunner, partial(QueueingMockRunner, at_once=True)]
)


@lru_cache(maxsize=4096)
def expected(prompt: tuple[int, int], items: tuple[tuple[str, Any], ...], index: int) -> list[int]:
    request = make_request(**dict(items))
    return expected_tokens(random_prompt(*prompt), request, index=index, windows=WINDOWS)


WINDOWS = (0, 20)


class World:
    """An engine, what was asked of it, and what came back."""

    def __init__(
        self,
        make_runner: Callable[..., MockRunner],
        options: dict[str, Any],
        failures: frozenset[int],
    ) -> None:
        self.runner = make_runner(windows=WINDOWS, fail_at_steps=failures)
        self.engine = make_engine(self.runner, clock=Clock(0.0002), **options)
        self.asked: dict[int, dict[str, Any]] = {}
        self.cancelled: set[int] = set()
        self.outputs: list[SequenceOutput] = []

    def do(self, action: Any) -> None:
        if isinstance(action, dict):
            options = {k: v for k, v in action.items() if k != "prompt"}
            try:
                key = self.engine.add_request(
                    make_request(**options), random_prompt(*action["prompt"])
                )
            except ResourceExhaustedError:
                return  # refused at the door
            self.asked[key] = action
        elif action[0] == "cancel":
            if self.engine.cancel(action[1]):
                self.cancelled.add(action[1])
        else:
            for _ in range(action[1]):
                self.outputs += self.engine.step()
                self.engine.kv.check_integrity()

    def finish(self) -> None:
        work = sum((a["prompt"][1] + a["max_tokens"]) * a["n"] for a in self.asked.values())
        steps = 0
        while self.engine.has_work:
            self.outputs += self.engine.step()
            steps += 1
            assert steps < 200 + 20 * work, "no progress"
        assert self.engine.unfinished == []

    def check_answers(self) -> None:
        finals: dict[tuple[int, int], SequenceOutput] = {}
        for output in self.outputs:
            assert (output.key, output.index) not in finals, "output after the end"
            if output.finished is not None:
                finals[output.key, output.index] = output
        for key, action in self.asked.items():
            for index in range(action["n"]):
                final = finals.get((key, index))
                if key in self.cancelled:
                    continue
                assert final is not None, f"request {key} was never answered"
                assert final.finished is not None
                self.check_answer(action, index, final)

    def check_answer(self, action: dict[str, Any], index: int, final: SequenceOutput) -> None:
        finished = final.finished
        assert finished is not None
        items = {k: v for k, v in action.items() if k not in ("prompt", "deadline_ms", "stream")}
        wanted = expected(action["prompt"], tuple(sorted(items.items())), index)
        if finished.failure is not None:
            assert finished.failure.code is ErrorCode.DEADLINE_EXCEEDED
            assert action["deadline_ms"] is not None
            wanted = wanted[: len(finished.token_ids)]
        assert finished.token_ids == wanted
        mine = [o for o in self.outputs if (o.key, o.index) == (final.key, index)]
        assert [t for o in mine for t in o.token_ids] == finished.token_ids
        assert "".join(o.text for o in mine) == finished.text


@given(
    make_runner=RUNNERS,
    options=ENGINES,
    actions=ACTIONS,
    failures=st.frozensets(st.integers(0, 40), max_size=3),
)
@settings(max_examples=240)
def test_every_request_is_answered_once_and_correctly(
    make_runner: Callable[..., MockRunner],
    options: dict[str, Any],
    actions: list[Any],
    failures: frozenset[int],
) -> None:
    world = World(make_runner, options, isolated(failures))
    for action in actions:
        world.do(action)
    world.finish()
    world.check_answers()
    assert_pool_empty(world.engine)


def isolated(failures: frozenset[int]) -> frozenset[int]:
    """Keeps failures far enough apart that the repetition of a failed step succeeds."""
    kept: list[int] = []
    for step in sorted(failures):
        if step > 0 and (not kept or step > kept[-1] + 40):
            kept.append(step)
    return frozenset(kept)
