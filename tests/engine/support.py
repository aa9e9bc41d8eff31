"""Requests, engines on the mock model, and what that model answers without any engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from sagellm.backends.interface import ForwardBatch
from sagellm.backends.mock import EOS_ID, VOCAB_SIZE, MockRunner
from sagellm.engine.config import EngineConfig
from sagellm.engine.engine import Engine
from sagellm.engine.llm import new_request
from sagellm.engine.loading import mock_tokenizer
from sagellm.engine.output import SequenceOutput
from sagellm.engine.sampling import Sampling, derive_seed
from sagellm.engine.speculation import Drafter
from sagellm.protocol import Request

_LABELS = itertools.count()


class Clock:
    """Unix seconds that pass when told to, and a little with every look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 1000.0
        self.tick = tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def make_request(prompt: str = "", **options: Any) -> Request:
    return new_request(prompt=prompt, request_id=f"r{next(_LABELS)}", **options)


def make_engine(
    runner: MockRunner | None = None,
    *,
    clock: Clock | None = None,
    drafter: Drafter | None = None,
    **options: Any,
) -> Engine:
    options.setdefault("block_size", 16)
    options.setdefault("kv_cache_tokens", 4096)
    return Engine(
        runner or MockRunner(),
        mock_tokenizer(),
        EngineConfig(**options),
        clock=clock or Clock(0.001),
        drafter=drafter,
    )


def random_prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def run_all(engine: Engine, max_steps: int = 20_000) -> list[SequenceOutput]:
    """Steps until nothing is left; more than ``max_steps`` is a livelock."""
    outputs: list[SequenceOutput] = []
    for _ in range(max_steps):
        if not engine.has_work:
            break
        outputs += engine.step()
    assert not engine.has_work, "the engine does not come to an end"
    assert engine.unfinished == []
    return outputs


def answers(outputs: Iterable[SequenceOutput]) -> dict[tuple[int, int], list[int]]:
    """Output tokens by (request, completion); every one is answered once and without an error."""
    found: dict[tuple[int, int], list[int]] = {}
    for output in outputs:
        if output.finished is not None:
            assert output.finished.failure is None, output.finished.failure
            assert (output.key, output.index) not in found
            found[output.key, output.index] = output.finished.token_ids
    return found


def serve(
    engine: Engine, prompts: list[list[int]], options: list[dict[str, Any]]
) -> list[list[int]]:
    """Runs requests together and returns their tokens in order."""
    keys = [
        engine.add_request(make_request(**option), prompt)
        for prompt, option in zip(prompts, options, strict=True)
    ]
    found = answers(run_all(engine))
    assert_pool_empty(engine)
    return [found[key, 0] for key in keys]


def assert_pool_empty(engine: Engine) -> None:
    engine.kv.check_integrity()
    stats = engine.kv.stats()
    assert stats.free_blocks == stats.num_blocks
    assert len(engine.kv.take_copies()) == 0


def expected_tokens(
    prompt: list[int], request: Request, *, index: int = 0, windows: tuple[int, ...] = (0,)
) -> list[int]:
    """The answer by recomputing everything for every token, without engine or cache."""
    size = 1024
    runner = MockRunner(windows=windows)
    runner.allocate_kv(len(windows), size)
    tables = np.arange(1, len(windows) + 1, dtype=np.int32).reshape(-1, 1, 1)
    seed = derive_seed(request.sampling.seed or 0, index)
    sampling = Sampling(request, seed, len(prompt))
    tokens = list(prompt)

    while len(tokens) < len(prompt) + request.max_tokens:
        n = len(tokens)
        so_far = np.array(tokens, dtype=np.int32)
        batch = ForwardBatch(
            token_ids=so_far,
            positions=np.arange(n, dtype=np.int32),
            query_starts=np.array([0, n], dtype=np.int32),
            block_tables=tables,
            block_copies=np.zeros((0, 2), dtype=np.int32),
            logit_rows=np.array([n - 1], dtype=np.int32),
        )
        row = runner.step(batch, tuple(sampling.rows(n, so_far))).rows[0]
        tokens.append(row.token_id)
        if row.token_id == EOS_ID and not request.sampling.ignore_eos:
            break
    assert max(tokens) < VOCAB_SIZE
    return tokens[len(prompt) :]
