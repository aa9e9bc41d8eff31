"""Gateways on the mock model, models that follow a script, and real servers in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from sagellm.backends.interface import ForwardBatch, SamplingRow, StepOutput
from sagellm.backends.mock import BOS_ID, EOS_ID, MockRunner
from sagellm.engine.async_engine import AsyncEngine
from sagellm.engine.config import EngineConfig
from sagellm.engine.engine import Engine
from sagellm.engine.loading import mock_tokenizer
from sagellm.errors import UnsupportedError
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway
from sagellm.serving import Server
from sagellm.serving.lifecycle import Handler
from sagellm.text import ChatTemplate

MODEL = "mock"

CHAT_TEMPLATE = """\
{%- if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>
{% endif %}{% endif %}"""
"""Hermes-like; every marker is plain text, since a byte vocabulary has no control tokens."""

Script = str | Mapping[str, str] | Callable[[str], str]


class ScriptedRunner(MockRunner):
    """A mock model whose output is given: greedy, it writes its script and then ends the text.

    Args:
        script: The answer to every prompt; or a mapping, in which the first key found in the
            prompt's text selects the answer; or a function of the prompt's text.
        **options: Of ``MockRunner``.

    A logit bias or a grammar's mask still decides what may be chosen, so a script that breaks its
    grammar does not come out as written.
    """

    def __init__(self, script: Script, **options: Any) -> None:
        super().__init__(**options)
        self._script = script
        self._prompt_lengths: tuple[int, ...] = ()
        self._row = 0

    def answer_to(self, prompt: str) -> str:
        if callable(self._script):
            return self._script(prompt)
        if isinstance(self._script, str):
            return self._script
        return next(answer for key, answer in self._script.items() if key in prompt)

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        **options: Any,
    ) -> StepOutput:
        self._prompt_lengths = tuple(row.prompt_length for row in sampling)
        self._row = 0
        return super().step(batch, sampling, **options)

    def _logits(self, tables: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        logits = super()._logits(tables, position)  # checks the pages; a fallback under a mask
        if self._row >= len(self._prompt_lengths):
            return logits  # prompt logprobs and hidden states: not a place of the script
        prompt_length = self._prompt_lengths[self._row]
        self._row += 1
        places = np.arange(position + 1)
        blocks = tables[0][places // self._block_size]
        tokens = self._pages[blocks, places % self._block_size, 0] - 1
        prompt = bytes(int(t) for t in tokens[:prompt_length] if t < BOS_ID)
        script = self.answer_to(prompt.decode(errors="replace")).encode()
        done = position + 1 - prompt_length
        logits[script[done] if 0 <= done < len(script) else EOS_ID] = 30.0
        return logits


class BlockingRunner(MockRunner):
    """A mock model whose steps wait while ``gate`` is closed; ``entered`` tells that one does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        **options: Any,
    ) -> StepOutput:
        if not self.gate.is_set():
            self.entered.set()
        assert self.gate.wait(60), "the test never opened the gate"
        return super().step(batch, sampling, **options)


@dataclass
class BytePair:
    token_ids: list[int]


@dataclass
class HashEmbedder:
    """An ``Embedder`` without weights: a byte per token, equal texts have equal unit vectors."""

    model_name: str = "mock-embedding"
    dimension: int = 16
    max_tokens: int = 128
    pooling: str = "mean"
    normalized: bool = True
    has_cross_encoder: bool = False
    batches: list[int] = field(default_factory=list)
    is_closed: bool = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_pair(self, first: str, second: str) -> BytePair:
        return BytePair([*first.encode(), BOS_ID, *second.encode()])

    async def embed(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self.batches.append(len(prompts))
        rows = [np.bincount([t % self.dimension for t in p], minlength=16) for p in prompts]
        vectors = np.array(rows, dtype=np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    async def score(self, pairs: Sequence[BytePair]) -> NDArray[np.float32]:
        if not self.has_cross_encoder:
            raise UnsupportedError(f"{self.model_name} has no cross-encoder head")
        return np.array([1 / (1 + len(pair.token_ids)) for pair in pairs], dtype=np.float32)

    async def close(self) -> None:
        self.is_closed = True


def mock_gateway(
    runner: MockRunner | None = None,
    *,
    script: Script | None = None,
    config: GatewayConfig | None = None,
    embedder: Any = None,
    with_engine: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    block_size: int = 16,
    kv_cache_tokens: int = 8192,
    **engine_options: Any,
) -> Gateway:
    """A gateway on the mock model, called ``mock``.

    Args:
        runner: Instead of a plain ``MockRunner``.
        script: Makes a ``ScriptedRunner``.
        config: Of the gateway; the default writes no access log.
        embedder: Such as ``HashEmbedder()``.
        with_engine: False for a server with embeddings only.
        chat_template: Jinja source; None for a model without one.
        block_size, kv_cache_tokens, **engine_options: Of ``EngineConfig``.
    """
    engine = None
    if with_engine:
        if script is not None:
            runner = ScriptedRunner(script)
        template = None if chat_template is None else ChatTemplate(chat_template, "", "<eos>")
        engine = AsyncEngine(
            Engine(
                runner or MockRunner(),
                mock_tokenizer(),
                EngineConfig(
                    block_size=block_size, kv_cache_tokens=kv_cache_tokens, **engine_options
                ),
                chat_template=template,
            )
        )
    return Gateway(
        config or GatewayConfig(access_log=False, warm_up=False),
        engine=engine,
        embedder=embedder,
        model_name=MODEL if with_engine else "",
    )


@contextmanager
def serve_in_thread(server: Server) -> Iterator[str]:
    """Runs a server on a free port of 127.0.0.1, as ``sagellm serve`` does.

    Yields:
        The base URL, such as ``http://127.0.0.1:41234``.
    """
    handler = Handler(server, host="127.0.0.1", port=0, drain_timeout=5)
    thread = threading.Thread(target=_serve, args=(handler,), name="test-server")
    thread.start()
    try:
        assert handler.started.wait(30), "the server did not start"
        yield handler.address
    finally:
        handler.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def _serve(handler: Handler) -> None:
    try:
        handler.serve()
    except SystemExit as end:  # a test may leave requests open on purpose
        assert end.code in (0, 1)


@contextmanager
def serving(gateway: Gateway, **client_options: Any) -> Iterator[httpx.Client]:
    """Serves a gateway and yields a client of it; closes both."""
    with (
        serve_in_thread(create_server(gateway)) as url,
        httpx.Client(base_url=url, timeout=30, **client_options) as client,
    ):
        yield client


def assert_pool_is_empty(gateway: Gateway) -> None:
    """Every block is back, and nothing waits or runs. Ask between steps, from any thread."""
    assert gateway.engine is not None
    engine = gateway.engine.engine
    engine.kv.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.kv.free_blocks == stats.kv.num_blocks
    assert engine.unfinished == []
