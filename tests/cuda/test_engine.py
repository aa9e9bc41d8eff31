"""The engine on CUDA kernels: tiny models of every architecture and format, on the emulator and on
a device, against the NumPy reference; graphs, determinism, sampling, and what the runner tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core", reason="the KV cache's bookkeeping is native")
from models.make_tiny import make_tiny_gguf, make_tiny_hf
from reference.cases import chunked_logits, make_batch
from sagellm.backends import cuda as backend
from sagellm.backends.cuda import CudaRunner
from sagellm.backends.interface import ForwardBatch, SampledRow, SamplingRow
from sagellm.backends.numpy_sampler import sample_rows
from sagellm.backends.reference import ReferenceRunner
from sagellm.checkpoint import Checkpoint, open_checkpoint
from sagellm.engine.config import EngineConfig
from sagellm.engine.engine import Engine
from sagellm.engine.llm import LLM
from sagellm.engine.memory import resolve_kv_plan
from sagellm.errors import InvalidArgumentError, ResourceExhaustedError
from sagellm.text import load_tokenizer

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "IQ4_NL")
TOKENS = 24  # longer than the windows of the tiny models

MakeRunner = Callable[..., CudaRunner]


@pytest.fixture
def make_runner(cuda: ModuleType) -> MakeRunner:
    def make(checkpoint: Checkpoint, **options: Any) -> CudaRunner:
        return CudaRunner(
            checkpoint, module=cuda, **{"cublas": False, "max_batch_tokens": 96, **options}
        )

    return make


@pytest.fixture
def late(cuda: ModuleType) -> Iterator[Callable[[], None]]:
    """From its call on the emulated device works as late as it may; a real one does as it likes."""
    yield lambda: cuda.set_deferred(True) if hasattr(cuda, "set_deferred") else None
    if hasattr(cuda, "set_deferred"):
        cuda.set_deferred(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def tiny(folder: Path, arch: str = "llama", dtype: str = "F16", **dims: Any) -> Checkpoint:
    name = "-".join([arch, dtype, *(f"{key}{value}" for key, value in dims.items())])
    path = folder / f"{name}.gguf"
    return open_checkpoint(path if path.exists() else make_tiny_gguf(path, arch, dtype, **dims))


def tokens_of(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 320, count).astype(np.int32)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    x = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


def divergence(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """Mean Kullback-Leibler divergence of the rows."""
    p, q = log_softmax(expected), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def reference_logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    return chunked_logits(ReferenceRunner(checkpoint), tokens_of(TOKENS), TOKENS, block_size=16)


def step_logits(runner: CudaRunner, batch: Any) -> NDArray[np.float32]:
    logits = runner.step(batch, return_logits=True).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_agrees_with_the_reference(
    make_runner: MakeRunner, folder: Path, arch: str, dtype: str
) -> None:
    checkpoint = tiny(folder, arch, dtype)
    runner = make_runner(checkpoint)
    assert runner.kv_dtype == dtype.lower()
    got = chunked_logits(runner, tokens_of(TOKENS), 10, block_size=16)
    assert divergence(reference_logits(checkpoint), got) < 1e-3


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_every_format_agrees_with_the_reference(
    make_runner: MakeRunner, folder: Path, dtype: str
) -> None:
    checkpoint = tiny(folder, "llama", dtype)
    expected = reference_logits(checkpoint)
    got = chunked_logits(make_runner(checkpoint), tokens_of(TOKENS), TOKENS, block_size=16)
    assert divergence(expected, got) < 1e-3


def test_many_rows_of_quantized_weights_agree_with_few(
    make_runner: MakeRunner, folder: Path
) -> None:
    checkpoint = tiny(folder, "qwen2", "Q4_K")
    tokens = tokens_of(70)  # above the rows that are quantized themselves
    whole = chunked_logits(make_runner(checkpoint), tokens, 70, block_size=16)
    parts = chunked_logits(make_runner(checkpoint), tokens, 16, block_size=16)
    assert divergence(parts, whole) < 2e-3


def test_a_folder_in_bfloat16_agrees_with_the_reference(
    make_runner: MakeRunner, folder: Path
) -> None:
    checkpoint = open_checkpoint(make_tiny_hf(folder / "hf", "qwen3", dtype="BF16"))
    got = chunked_logits(make_runner(checkpoint), tokens_of(TOKENS), 7, block_size=16)
    assert divergence(reference_logits(checkpoint), got) < 1e-3


@pytest.mark.build
def test_cublas_is_told_the_right_products(
    emulated: ModuleType, fake_cublas_folder: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "cublas_folders", lambda: [fake_cublas_folder])
    checkpoint = tiny(folder, "qwen2", "BF16")
    runner = CudaRunner(checkpoint, module=emulated)
    assert runner.matmul == "cuBLASLt 130000"
    got = chunked_logits(runner, tokens_of(TOKENS), TOKENS, block_size=16)
    assert divergence(reference_logits(checkpoint), got) < 1e-3
    assert CudaRunner(checkpoint, module=emulated, deterministic=True).matmul == "own kernels"


@pytest.mark.build
def test_the_order_of_threads_changes_nothing(
    cuda: ModuleType, orders: range, make_runner: MakeRunner, folder: Path
) -> None:
    if len(orders) == 1:
        pytest.skip("a device chooses the order of its threads itself")
    checkpoint = tiny(folder, "gemma3", "Q8_0")
    results = set()
    for seed in orders:
        cuda.set_order(seed)
        results.add(
            chunked_logits(make_runner(checkpoint), tokens_of(12), 9, block_size=16).tobytes()
        )
    assert len(results) == 1


def test_a_copied_block_serves_like_its_source(make_runner: MakeRunner, folder: Path) -> None:
    runner = make_runner(tiny(folder), deterministic=True)
    runner.allocate_kv(8, 16)
    tokens = tokens_of(21)

    def step(begin: int, end: int, blocks: list[int], copies: list[list[int]]) -> bytes:
        batch = ForwardBatch(
            token_ids=tokens[begin:end],
            positions=np.arange(begin, end, dtype=np.int32),
            query_starts=np.array([0, end - begin], np.int32),
            block_tables=np.array([[blocks]], np.int32),
            block_copies=np.array(copies, np.int32).reshape(-1, 2),
            logit_rows=np.array([end - begin - 1], np.int32),
        )
        return step_logits(runner, batch).tobytes()

    step(0, 20, [3, 5], [])
    expected = step(20, 21, [3, 5], [])
    assert step(20, 21, [7, 2], [[3, 7], [5, 2]]) == expected
    assert step(20, 21, [7, 1], []) != expected


@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 2e-3), ("fp8", 2e-2)])
def test_eight_bit_keys_and_values_stay_close(
    make_runner: MakeRunner, folder: Path, kv_dtype: str, bound: float
) -> None:
    checkpoint = tiny(folder, head_dim=64)
    runner = make_runner(checkpoint, kv_dtype=kv_dtype)
    assert runner.kv_bytes_per_block(16) < make_runner(checkpoint).kv_bytes_per_block(16)
    got = chunked_logits(runner, tokens_of(TOKENS), 10, block_size=16)
    assert divergence(reference_logits(checkpoint), got) < bound


def decode_all(runner: CudaRunner, count: int, steps: int = 3) -> list[NDArray[np.float32]]:
    """Logits of `count` sequences of different lengths, prompts first, then token by token."""
    cache = runner.allocate_kv(128, 16)
    tokens = {s: tokens_of(5 + 3 * s + steps, seed=s) for s in range(count)}
    lengths = {s: 5 + 3 * s for s in range(count)}
    for s, tokens_of_s in tokens.items():
        cache.add(s)
        runner.step(make_batch(cache, {s: tokens_of_s}, {s: (0, lengths[s])}))
        cache.commit(s, tokens_of_s, lengths[s])
    logits = []
    for _ in range(steps):
        chunks = {s: (lengths[s], lengths[s] + 1) for s in tokens}
        logits.append(step_logits(runner, make_batch(cache, tokens, chunks)))
        for s in tokens:
            lengths[s] += 1
            cache.commit(s, tokens[s], lengths[s])
    return logits


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_deterministic_answers_do_not_depend_on_the_batch(
    make_runner: MakeRunner, folder: Path, arch: str
) -> None:
    checkpoint = tiny(folder, arch, "BF16")
    together = decode_all(make_runner(checkpoint, deterministic=True), 11)
    fewer = decode_all(make_runner(checkpoint, deterministic=True), 2)
    for many, few in zip(together, fewer, strict=True):
        assert many[:2].tobytes() == few.tobytes()


@pytest.mark.parametrize("dtype", ["F16", "Q4_1"])
def test_deterministic_answers_do_not_depend_on_chunks(
    make_runner: MakeRunner, folder: Path, dtype: str
) -> None:
    checkpoint = tiny(folder, "llama", dtype)
    tokens = tokens_of(70)
    expected = chunked_logits(
        make_runner(checkpoint, deterministic=True), tokens, 70, block_size=16
    )
    for chunk in (9, 33):
        got = chunked_logits(
            make_runner(checkpoint, deterministic=True), tokens, chunk, block_size=16
        )
        assert got.tobytes() == expected.tobytes()


def test_equal_runs_give_equal_bits(make_runner: MakeRunner, folder: Path) -> None:
    checkpoint = tiny(folder, "qwen3", "BF16")
    first, again = (decode_all(make_runner(checkpoint), 5) for _ in range(2))
    assert [x.tobytes() for x in first] == [x.tobytes() for x in again]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_replayed_steps_give_the_bits_of_launched_ones(
    cuda: ModuleType, make_runner: MakeRunner, folder: Path, count: int
) -> None:
    checkpoint = tiny(folder, "gemma2", "BF16")
    recorded = make_runner(checkpoint, deterministic=True)
    launched = make_runner(checkpoint, deterministic=True, max_graph_sequences=0)
    for got, expected in zip(
        decode_all(recorded, count, 4), decode_all(launched, count, 4), strict=True
    ):
        assert got.tobytes() == expected.tobytes()
    assert recorded.graph_counts[0] >= 1 and recorded.graph_counts[1] >= 2
    assert launched.graph_counts == (0, 0)


SAMPLING = (
    SamplingRow(),
    SamplingRow(temperature=0.8, seed=5, position=3),
    SamplingRow(temperature=1.2, top_k=7, top_p=0.9, seed=6, num_logprobs=3),
    SamplingRow(
        repetition_penalty=1.3,
        presence_penalty=0.4,
        history=np.array([3, 9, 9, 200, 5], np.int32),
        prompt_length=3,
        num_logprobs=0,
    ),
    SamplingRow(
        bias_ids=np.array([17], np.int32),
        bias_values=np.array([90.0], np.float32),
    ),
    SamplingRow(allowed=np.array([0, 0, 6, *[0] * 7], np.uint32), temperature=1.0, seed=1),
    SamplingRow(allowed=np.zeros(10, np.uint32)),
    SamplingRow(forced_token=44, num_logprobs=2),
)


EVERY_RULE = (
    *SAMPLING[:2],
    SamplingRow(  # changes the choice, as nearly every token is in the output
        repetition_penalty=1.8,
        presence_penalty=2.0,
        history=np.arange(300, dtype=np.int32),
        prompt_length=0,
    ),
    *SAMPLING[2:],
)


def choose_all(runner: CudaRunner, count: int, steps: int) -> list[tuple[SampledRow, ...]]:
    """What `count` sequences choose in decode steps; in every step the rules move on by one row."""
    cache = runner.allocate_kv(64, 32)
    tokens = {s: tokens_of(5 + s + steps, seed=s) for s in range(count)}
    for s, tokens_of_s in tokens.items():
        cache.add(s)
        runner.step(make_batch(cache, {s: tokens_of_s}, {s: (0, 5 + s)}))
        cache.commit(s, tokens_of_s, 5 + s)
    chosen = []
    for step in range(steps):
        batch = make_batch(cache, tokens, {s: (5 + s + step, 6 + s + step) for s in tokens})
        rules = tuple(EVERY_RULE[(s + step) % len(EVERY_RULE)] for s in tokens)
        chosen.append(runner.step(batch, rules).rows)
        for s in tokens:
            cache.commit(s, tokens[s], 6 + s + step)
    return chosen


@pytest.mark.parametrize("count", [1, 3, 9])
def test_one_recording_serves_every_sampling_rule(
    make_runner: MakeRunner, folder: Path, count: int
) -> None:
    checkpoint = tiny(folder, "llama", "BF16")
    recorded = make_runner(checkpoint, deterministic=True)
    launched = make_runner(checkpoint, deterministic=True, max_graph_sequences=0)
    assert choose_all(recorded, count, 5) == choose_all(launched, count, 5)
    assert recorded.graph_counts == (1, 4)  # the first step of the shape is not recorded


def test_steps_with_and_without_sampling_are_recorded_apart(
    make_runner: MakeRunner, folder: Path
) -> None:
    runner = make_runner(tiny(folder))
    cache = runner.allocate_kv(64, 16)
    cache.add(0)
    tokens = {0: tokens_of(9)}
    runner.step(make_batch(cache, tokens, {0: (0, 1)}, rows=[]))
    cache.commit(0, tokens[0], 1)
    for end in range(2, 9):
        batch = make_batch(cache, tokens, {0: (end - 1, end)})
        rules = (SamplingRow(),) if end % 2 == 0 else ()
        output = runner.step(batch, rules, return_logits=True)
        assert output.logits is not None and len(output.rows) == len(rules)
        if rules:
            assert output.rows[0].token_id == int(output.logits[0].argmax())
        cache.commit(0, tokens[0], end)
    assert runner.graph_counts[0] == 2


def queued_batches(runner: CudaRunner, count: int, steps: int) -> list[ForwardBatch]:
    """Prompts of `count` sequences and decode steps behind them, each in another order than the one
    before; a token that stands there already is mixed in."""
    cache = runner.allocate_kv(128, 16)
    tokens = {s: tokens_of(4 + s + steps, seed=s) for s in range(count)}
    lengths = {s: 4 + s for s in range(count)}
    for s in tokens:
        cache.add(s)
    last = (np.cumsum(list(lengths.values())) - 1).tolist()
    batches = [make_batch(cache, tokens, {s: (0, lengths[s]) for s in tokens}, rows=last)]
    before = list(tokens)
    for step in range(steps):
        order = before[::-1]
        ends = {s: (lengths[s] + step, lengths[s] + step + 1) for s in order}
        sources = [-1 if s == 2 and step == 1 else before.index(s) for s in order]
        batch = make_batch(cache, tokens, ends)
        batches.append(replace(batch, token_sources=np.array(sources, np.int32)))
        before = order
    return batches


def rules_of(batches: list[ForwardBatch]) -> list[tuple[SamplingRow, ...]]:
    return [
        tuple(
            SamplingRow(temperature=0.9 * (s % 2), seed=s, position=i, num_logprobs=1 - i % 2)
            for s in range(len(batch.logit_rows))
        )
        for i, batch in enumerate(batches)
    ]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_queued_steps_give_the_tokens_of_those_waited_for(
    make_runner: MakeRunner, folder: Path, late: Callable[[], None], count: int
) -> None:
    checkpoint = tiny(folder, "llama", "BF16")
    runner = make_runner(checkpoint)
    expected: list[tuple[SampledRow, ...]] = []
    batches = queued_batches(runner, count, 8)
    rules = rules_of(batches)
    for batch, rows in zip(batches, rules, strict=True):
        ids = batch.token_ids.copy()
        if batch.token_sources is not None:
            for place, row in enumerate(batch.token_sources):
                ids[place] = expected[-1][row].token_id if row >= 0 else ids[place]
        expected.append(runner.step(replace(batch, token_ids=ids, token_sources=None), rows).rows)

    runner = make_runner(checkpoint)
    batches = queued_batches(runner, count, 8)
    late()
    runner.launch(batches[0], rules[0])
    got = []
    for batch, rows in zip(batches[1:], rules[1:], strict=True):
        runner.launch(batch, rows)
        for array in (batch.token_ids, batch.positions, batch.block_tables):
            array[:] = -1  # it is the caller's again
        got.append(runner.finish().rows)
    got.append(runner.finish().rows)
    assert got == expected
    assert runner.graph_counts[1] > 0


def test_a_queue_takes_two_steps_and_tokens_of_the_one_before(
    make_runner: MakeRunner, folder: Path
) -> None:
    runner = make_runner(tiny(folder))
    first, second, third = queued_batches(runner, 3, 2)
    rules = (SamplingRow(),) * 3
    with pytest.raises(InvalidArgumentError, match="no step was launched"):
        runner.finish()
    with pytest.raises(InvalidArgumentError, match="none is in flight"):
        runner.launch(second, rules)
    runner.launch(first, rules)
    with pytest.raises(InvalidArgumentError, match="wait for it first"):
        runner.step(replace(second, token_sources=None), rules)
    for sources in ([0, 1], [0, 1, 3], [0, 1, -2]):
        with pytest.raises(InvalidArgumentError, match="token_sources has"):
            runner.launch(replace(second, token_sources=np.array(sources, np.int32)), rules)
    runner.launch(second, rules)
    with pytest.raises(InvalidArgumentError, match="two steps are in flight"):
        runner.launch(third, rules)
    assert len(runner.finish().rows) == 3
    runner.launch(third, rules)
    assert [len(runner.finish().rows) for _ in range(2)] == [3, 3]


def test_a_row_that_chose_nothing_gives_the_next_step_token_0(
    make_runner: MakeRunner, folder: Path, late: Callable[[], None]
) -> None:
    nothing = SamplingRow(allowed=np.zeros(10, np.uint32))
    rows = []
    for queued in (True, False):
        runner = make_runner(tiny(folder))
        first, second = queued_batches(runner, 1, 1)
        if queued:
            late()
            runner.launch(first, (nothing,))
            runner.launch(second, (SamplingRow(num_logprobs=0),))
            assert runner.finish().rows[0].error == "no token is allowed"
            rows.append(runner.finish().rows)
        else:
            runner.step(first, (nothing,))
            second.token_ids[0] = 0
            second.token_sources = None
            rows.append(runner.step(second, (SamplingRow(num_logprobs=0),)).rows)
    assert rows[0] == rows[1]


@pytest.mark.build
def test_an_engine_on_a_late_device_answers_like_the_reference(
    emulated: ModuleType, folder: Path, late: Callable[[], None]
) -> None:
    checkpoint = tiny(folder, "gemma3", "BF16")
    prompts = [tokens_of(n, seed=n).tolist() for n in (3, 20, 41, 9)]
    options: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_tokens": 12}
    answers = []
    for queued in (True, False):
        runner = CudaRunner(checkpoint, module=emulated, cublas=False, deterministic=True)
        config = EngineConfig(kv_cache_tokens=1024, max_num_seqs=3, block_size=16)
        engine = Engine(runner, load_tokenizer(checkpoint.tokenizer), config)
        if queued:
            late()
        else:
            emulated.set_deferred(False)
            engine._executor._queue = None  # waits for every step
        with LLM(engine) as llm:
            responses = llm.generate(prompts, **options)
        assert all(response.error is None for response in responses)
        answers.append([response.output_tokens for response in responses])
    assert answers[0] == answers[1]


def test_tokens_follow_the_sampling_rule(make_runner: MakeRunner, folder: Path) -> None:
    runner = make_runner(tiny(folder))
    cache = runner.allocate_kv(64, 16)
    cache.add(0)
    batch = make_batch(cache, {0: tokens_of(len(SAMPLING))}, {0: (0, len(SAMPLING))})
    output = runner.step(batch, SAMPLING, return_logits=True)
    assert output.logits is not None
    expected_rows = sample_rows(output.logits, SAMPLING)
    for row, expected in zip(output.rows, expected_rows, strict=True):
        assert (row.token_id, row.error, row.top_ids) == (
            expected.token_id,
            expected.error,
            expected.top_ids,
        )
        if expected.logprob is not None:
            assert row.logprob == pytest.approx(expected.logprob, abs=1e-5)


def test_an_invalid_row_fails_alone(make_runner: MakeRunner, folder: Path) -> None:
    runner = make_runner(tiny(folder))
    cache = runner.allocate_kv(64, 16)
    cache.add(0)
    batch = make_batch(cache, {0: tokens_of(3)}, {0: (0, 3)})
    rules = (SamplingRow(temperature=-1.0), SamplingRow(), SamplingRow(num_logprobs=21))
    bad, good, many = runner.step(batch, rules).rows
    assert bad.error is not None and "temperature" in bad.error
    assert many.error is not None and "at most 20" in many.error
    assert good.error is None and good.token_id >= 0


def test_hidden_states_are_what_the_head_reads(make_runner: MakeRunner, folder: Path) -> None:
    checkpoint = tiny(folder)
    runner, reference = make_runner(checkpoint), ReferenceRunner(checkpoint)
    hidden = []
    for one in (runner, reference):
        cache = one.allocate_kv(64, 16)
        cache.add(0)
        batch = make_batch(cache, {0: tokens_of(20)}, {0: (0, 20)}, rows=[4, 19])
        hidden.append(one.step(batch, return_hidden=True).hidden)
    assert hidden[0] is not None and hidden[1] is not None
    assert np.linalg.norm(hidden[0] - hidden[1]) < 5e-3 * np.linalg.norm(hidden[1])


def test_the_engine_gives_the_tokens_of_the_reference(
    make_runner: MakeRunner, folder: Path
) -> None:
    checkpoint = tiny(folder)
    prompts = [tokens_of(n, seed=n).tolist() for n in (3, 20, 41)]
    answers = []
    for runner in (make_runner(checkpoint), ReferenceRunner(checkpoint)):
        config = EngineConfig(
            kv_cache_tokens=1024, max_num_seqs=8, max_batch_tokens=64, block_size=16
        )
        with LLM(Engine(runner, load_tokenizer(checkpoint.tokenizer), config)) as llm:
            responses = llm.generate(prompts, max_tokens=6, ignore_eos=True)
        assert all(response.error is None for response in responses)
        answers.append([response.output_tokens for response in responses])
    assert answers[0] == answers[1]


@pytest.mark.build
def test_the_pool_is_sized_from_the_memory_of_the_device(
    emulated: ModuleType, folder: Path
) -> None:
    runner = CudaRunner(tiny(folder), module=emulated, cublas=False)
    free = runner.free_memory_bytes
    many = EngineConfig(max_num_seqs=20_000, max_batch_tokens=20_000, block_size=16)
    plan = resolve_kv_plan(runner, many)
    assert 0.5 * free < plan.num_bytes < 0.9 * free
    with pytest.raises(ResourceExhaustedError, match="kv_cache_gb"):
        resolve_kv_plan(runner, EngineConfig(kv_cache_bytes=free + 1))
    runner.allocate_kv(plan.num_blocks, 16)
    assert free - runner.free_memory_bytes >= plan.num_blocks * runner.kv_bytes_per_block(16)
    assert runner.memory["kv"] == (plan.num_blocks + 1) * runner.kv_bytes_per_block(16)


def test_what_does_not_fit_is_refused_with_a_remedy(make_runner: MakeRunner, folder: Path) -> None:
    checkpoint = tiny(folder, dtype="BF16")
    with pytest.raises(InvalidArgumentError, match="choose one of auto, bf16"):
        make_runner(checkpoint, kv_dtype="int4")
    with pytest.raises(InvalidArgumentError, match="activations are bf16; choose 'auto', 'bf16'"):
        make_runner(checkpoint, kv_dtype="f16")
    runner = make_runner(checkpoint)
    with pytest.raises(InvalidArgumentError, match="takes 16, 32 or 64"):
        runner.allocate_kv(8, 24)


@pytest.mark.build
def test_a_closed_runner_frees_all_memory(emulated: ModuleType, folder: Path) -> None:
    checkpoint = tiny(folder)
    probe = CudaRunner(checkpoint, module=emulated, cublas=False)
    free = probe.free_memory_bytes
    runner = CudaRunner(checkpoint, module=emulated, cublas=False)
    runner.allocate_kv(64, 16)
    assert probe.free_memory_bytes < free
    runner.close()
    assert probe.free_memory_bytes == free
