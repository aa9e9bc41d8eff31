"""Embedders: batching, order, cancellation, limits, failures, and pooling of decoder states."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.make_tiny_encoder import make_tiny_encoder
from sagellm.backends.encoder import EncoderBatch, EncoderRunner, ReferenceEncoder
from sagellm.checkpoint.encoder import open_encoder
from sagellm.engine.embedding import (
    DecoderEmbedder,
    EncoderEmbedder,
    is_encoder,
    load_embedder,
)
from sagellm.errors import (
    CorruptFileError,
    InvalidArgumentError,
    ModelNotFoundError,
    QueueFullError,
    ResourceExhaustedError,
    UnavailableError,
    UnsupportedError,
)
from sagellm.text.pair_tokenizer import PairEncoding, PairTokenizer

ALL = ("Transformer", "Pooling", "Normalize")
LIMIT_S = 30.0


class Gate:
    """A runner that waits before each batch until it is let through, and notes the batches."""

    def __init__(self, runner: EncoderRunner, max_batch_tokens: int = 1024) -> None:
        self.runner = runner
        self.config = runner.config
        self.device = runner.device
        self.max_batch_tokens = max_batch_tokens
        self.memory: dict[str, int] = {}
        self.batches: list[list[int]] = []  # lengths of their sequences
        self.poison: set[int] = set()  # token ids that make a batch fail
        self.fatal = False
        self.entered = threading.Semaphore(0)
        self.passes = threading.Semaphore(0)
        self.open = False

    def _pass(self, batch: EncoderBatch) -> None:
        self.batches.append(np.diff(batch.query_starts).tolist())
        self.entered.release()
        if not self.open:
            assert self.passes.acquire(timeout=LIMIT_S)
        if self.fatal:
            raise SystemExit
        if self.poison & set(batch.token_ids.tolist()):
            raise RuntimeError("poison")

    def embed(self, batch: EncoderBatch) -> NDArray[np.float32]:
        self._pass(batch)
        return self.runner.embed(batch)

    def score(self, batch: EncoderBatch) -> NDArray[np.float32]:
        self._pass(batch)
        return self.runner.score(batch)

    def hidden(self, batch: EncoderBatch) -> NDArray[np.float32]:
        return self.runner.hidden(batch)

    def close(self) -> None:
        self.runner.close()

    async def started(self) -> None:
        """Waits until a batch is at the gate."""
        assert await asyncio.to_thread(self.entered.acquire, True, LIMIT_S)

    def let_all(self) -> None:
        self.open = True
        self.passes.release()


def make(folder: Path, **options: Any) -> tuple[Gate, EncoderEmbedder]:
    limits = {name: options.pop(name) for name in ("max_queue",) if name in options}
    tokens = options.pop("max_batch_tokens", 1024)
    made = make_tiny_encoder(folder / "model", modules=ALL, max_seq_length=40, **options)
    gate = Gate(ReferenceEncoder(open_encoder(made)), tokens)
    return gate, EncoderEmbedder(gate, PairTokenizer(made), **limits)


def expect(gate: Gate, prompt: list[int]) -> NDArray[np.float32]:
    return gate.runner.embed(EncoderBatch.of([prompt]))[0]


def test_a_folder_becomes_an_embedder(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", modules=ALL, max_seq_length=40)
    assert is_encoder(folder)

    async def run() -> None:
        embedder = load_embedder(folder, device="reference")
        assert (embedder.model_name, embedder.dimension, embedder.max_tokens) == ("m", 64, 40)
        assert (embedder.pooling, embedder.normalized) == ("mean", True)
        assert not embedder.has_cross_encoder and embedder.is_alive
        vectors = await embedder.embed([embedder.encode(t) for t in ("the cat", "a dog", "")])
        assert vectors.shape == (3, 64) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        while embedder.seconds_since_progress:  # the thread may be just behind its answer
            await asyncio.sleep(0)
        await embedder.close()
        assert not embedder.is_alive
        with pytest.raises(UnavailableError):
            await embedder.embed([[2, 3]])

    asyncio.run(run())
    with pytest.raises(ModelNotFoundError):
        load_embedder(tmp_path / "absent")


@pytest.mark.native
def test_the_native_embedder_gives_the_same_vectors(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", modules=ALL)

    async def vectors(device: str) -> NDArray[np.float32]:
        embedder = load_embedder(folder, device=device)
        prompts = [embedder.encode(text) for text in ("the cat sat", "on a mat", "x" * 90)]
        result = await embedder.embed(prompts)
        await embedder.close()
        return result

    native, reference = asyncio.run(vectors("cpu")), asyncio.run(vectors("reference"))
    np.testing.assert_allclose(native, reference, atol=1e-5)


def test_what_waits_is_batched_in_turn_up_to_the_token_budget(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path, max_batch_tokens=12)
    big = [[2, 10 + i, 11, 3] for i in range(6)]
    small = [[2, 30, 3], [2, 31, 3]]

    async def run() -> None:
        first = asyncio.create_task(embedder.embed([[2, 9, 3]]))
        await gate.started()
        later = [asyncio.create_task(embedder.embed(prompts)) for prompts in (big, small)]
        while embedder._thread.num_waiting < 8:
            await asyncio.sleep(0)
        assert embedder.seconds_since_progress > 0
        gate.let_all()
        results = [await first, *(await asyncio.gather(*later))]
        for prompts, rows in zip(([[2, 9, 3]], big, small), results, strict=True):
            for prompt, row in zip(prompts, rows, strict=True):
                np.testing.assert_allclose(row, expect(gate, prompt), atol=1e-6)
        await embedder.close()

    asyncio.run(run())
    assert gate.batches[0] == [3]
    assert gate.batches[1] == [4, 3, 4]  # not all of the large request before the small one
    assert sorted(itertools.chain(*gate.batches[1:])) == [3, 3, 4, 4, 4, 4, 4, 4]
    assert all(sum(batch) <= 12 for batch in gate.batches)


def test_scores_and_vectors_do_not_share_a_batch(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path, has_head=True, prefix="bert.")

    async def run() -> None:
        pair = embedder.encode_pair("the cat", "sat")
        vectors, scores, more = (
            asyncio.create_task(coroutine)
            for coroutine in (
                embedder.embed([[2, 9, 3], [2, 8, 3]]),
                embedder.score([pair, pair]),
                embedder.embed([[2, 7, 3]]),
            )
        )
        await gate.started()
        gate.let_all()
        got = await scores
        assert (await vectors).shape == (2, 64) and (await more).shape == (1, 64)
        logit = gate.runner.score(EncoderBatch.of([pair.token_ids], [pair.token_types]))[0]
        np.testing.assert_allclose(got, 1 / (1 + np.exp(-logit)), atol=1e-6)
        assert got[0] == got[1] and 0 < got[0] < 1
        await embedder.close()

    asyncio.run(run())


def test_a_cancelled_request_leaves_the_queue_at_once(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path, max_queue=4)

    async def run() -> None:
        first = asyncio.create_task(embedder.embed([[2, 9, 3]]))
        await gate.started()
        doomed = asyncio.create_task(embedder.embed([[2, 99, 99, 99, 3]] * 4))
        while embedder._thread.num_waiting < 4:
            await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="max_queue"):
            await embedder.embed([[2, 8, 3]])
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert embedder._thread.num_waiting == 0
        last = asyncio.create_task(embedder.embed([[2, 8, 3]]))
        while embedder._thread.num_waiting < 1:
            await asyncio.sleep(0)
        first.cancel()  # it is in the batch at hand
        gate.let_all()
        np.testing.assert_allclose((await last)[0], expect(gate, [2, 8, 3]), atol=1e-6)
        await embedder.close()

    asyncio.run(run())
    assert gate.batches == [[3], [3]]


def test_an_input_that_fails_takes_no_other_request_with_it(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path)
    gate.poison = {66}

    async def run() -> None:
        blocker = asyncio.create_task(embedder.embed([[2, 9, 3]]))
        await gate.started()
        tasks = [
            asyncio.create_task(embedder.embed(prompts))
            for prompts in ([[2, 8, 3], [2, 7, 3]], [[2, 5, 3], [2, 66, 3]])
        ]
        while embedder._thread.num_waiting < 4:
            await asyncio.sleep(0)
        gate.let_all()
        await blocker
        good, bad = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(good, np.ndarray) and isinstance(bad, RuntimeError)
        np.testing.assert_allclose(good[1], expect(gate, [2, 7, 3]), atol=1e-6)
        assert (await embedder.embed([[2, 6, 3]])).shape == (1, 64)
        await embedder.close()

    asyncio.run(run())


def test_close_answers_those_who_wait(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path)

    async def run() -> None:
        first = asyncio.create_task(embedder.embed([[2, 9, 3]]))
        await gate.started()
        waiting = asyncio.create_task(embedder.embed([[2, 8, 3]]))
        while embedder._thread.num_waiting < 1:
            await asyncio.sleep(0)
        closing = asyncio.create_task(embedder.close())
        while embedder.is_alive:
            await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="shutting down"):
            await embedder.embed([[2, 7, 3]])
        gate.let_all()
        assert (await first).shape == (1, 64)
        with pytest.raises(UnavailableError, match="shut down"):
            await waiting
        await closing

    asyncio.run(run())


def test_the_end_of_a_loop_does_not_wait_for_a_batch_that_hangs(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path)

    async def run() -> None:
        batch = asyncio.create_task(embedder.embed([[2, 9, 3]]))
        await gate.started()
        closing = asyncio.create_task(embedder.close())
        while embedder.is_alive:
            await asyncio.sleep(0)
        batch.cancel()
        closing.cancel()

    asyncio.run(run())
    assert embedder._thread.num_batches == 0
    gate.let_all()
    embedder._thread.close()
    gate.close()


def test_a_thread_that_dies_answers_everyone(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path)
    gate.fatal = True

    async def run() -> None:
        tasks = [asyncio.create_task(embedder.embed([[2, 9, 3]])) for _ in range(3)]
        await gate.started()
        gate.let_all()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, UnavailableError) and "has failed" in str(error)
        with pytest.raises(UnavailableError, match="has failed"):
            await embedder.embed([[2, 9, 3]])
        await embedder.close()

    asyncio.run(run())


def test_a_model_that_gives_no_number_is_an_error(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path)
    gate.open = True
    gate.runner._weights["embed.norm"][:] = np.nan  # type: ignore[attr-defined]

    async def run() -> None:
        with pytest.raises(UnavailableError, match="not finite"):
            await embedder.embed([[2, 9, 3]])
        await embedder.close()

    asyncio.run(run())


def test_inputs_are_checked_before_they_wait(tmp_path: Path) -> None:
    gate, embedder = make(tmp_path, max_queue=10)
    wrong: list[tuple[list[Any], str]] = [
        ([], "no input"),
        ([[2, 3], []], "empty"),
        ([[2] * 41], r"input 0 has 41 tokens, the model takes at most 40"),
        ([[2, 3], [2, 128]], "outside the vocabulary of 128"),
        ([[2, -1]], "outside the vocabulary"),
        ([[2, 1.5]], "whole numbers"),
        ([["a"]], "whole numbers"),
        ([[2, 3]] * 11, "at most 10"),
    ]

    async def run() -> None:
        for prompts, message in wrong:
            with pytest.raises(InvalidArgumentError, match=message):
                await embedder.embed(prompts)
        with pytest.raises(UnsupportedError, match="cross-encoder"):
            await embedder.score([PairEncoding(token_ids=[2, 3], token_types=[0, 0])])
        assert embedder._thread.num_waiting == 0
        await embedder.close()

    asyncio.run(run())
    assert gate.batches == []
    assert issubclass(QueueFullError, ResourceExhaustedError)


def test_pairs_are_checked(tmp_path: Path) -> None:
    _, embedder = make(tmp_path, has_head=True, prefix="bert.")

    async def run() -> None:
        for ids, types in (([2, 3], [0]), ([2, 3], [0, 2]), ([2] * 41, [0] * 41), ([], [])):
            with pytest.raises(InvalidArgumentError):
                await embedder.score([PairEncoding(token_ids=ids, token_types=types)])
        await embedder.close()

    asyncio.run(run())


def test_truncation_is_done_only_when_asked(tmp_path: Path) -> None:
    _, embedder = make(tmp_path)
    text = "cat " * 100
    assert len(embedder.encode(text)) == 102
    assert len(embedder.encode(text, truncate_tokens=embedder.max_tokens)) == 40
    assert len(embedder.encode_pair("cat", text, truncate_tokens=40).token_ids) == 40
    asyncio.run(embedder.close())


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", vocab_size=100)
    make_tiny_encoder(tmp_path / "other", vocab_size=128)
    (tmp_path / "other" / "tokenizer.json").rename(folder / "tokenizer.json")
    with pytest.raises(CorruptFileError, match="do not belong together"):
        load_embedder(folder, device="reference")


# ------------------------------------------------------------------------------------- decoders


class States:
    """An AsyncEngine whose model's states are its token ids."""

    def __init__(self) -> None:
        self.engine = SimpleNamespace(
            runner=SimpleNamespace(config=SimpleNamespace(name="decoder", hidden_size=3)),
            capacity=SimpleNamespace(vocab_size=50, max_model_len=8),
            tokenizer=SimpleNamespace(encode=lambda text: [1, *map(ord, text)]),
            hidden=lambda ids: np.outer(ids, [1, 2, 2]).astype(np.float32),
        )
        self.num_calls = 0
        self.go = asyncio.Event()

    async def call(self, function: Any) -> Any:
        self.num_calls += 1
        await self.go.wait()
        return function()


def test_states_of_a_decoder_are_pooled() -> None:
    async def run() -> None:
        engine = States()
        engine.go.set()
        last = DecoderEmbedder(engine, normalize=False)  # type: ignore[arg-type]
        assert (last.dimension, last.max_tokens, last.pooling) == (3, 8, "last")
        assert last.encode("!") == [1, 33]
        np.testing.assert_array_equal(await last.embed([[1, 3], [2]]), [[3, 6, 6], [2, 4, 4]])
        mean = DecoderEmbedder(engine, "mean", normalize=False)  # type: ignore[arg-type]
        np.testing.assert_array_equal(await mean.embed([[1, 3]]), [[2, 4, 4]])
        unit = DecoderEmbedder(engine)  # type: ignore[arg-type]
        np.testing.assert_allclose(await unit.embed([[4, 7]]), [[1 / 3, 2 / 3, 2 / 3]], rtol=1e-6)
        for prompts, message in (
            ([[1] * 9], "at most 8"),
            ([[50]], "vocabulary of 50"),
            ([], "no input"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                await unit.embed(prompts)
        with pytest.raises(UnsupportedError):
            await unit.score([])
        with pytest.raises(UnsupportedError):
            unit.encode_pair("a", "b")

    asyncio.run(run())


def test_the_queue_of_a_decoder_is_bounded_and_cancelling_frees_it() -> None:
    async def run() -> None:
        engine = States()
        embedder = DecoderEmbedder(engine, max_queue=3)  # type: ignore[arg-type]
        task = asyncio.create_task(embedder.embed([[1], [2], [3]]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await embedder.embed([[4]])
        with pytest.raises(InvalidArgumentError, match="at most 3"):
            await embedder.embed([[4]] * 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.go.set()
        assert (await embedder.embed([[4], [5], [6]])).shape == (3, 3)
        assert engine.num_calls == 4

    asyncio.run(run())
