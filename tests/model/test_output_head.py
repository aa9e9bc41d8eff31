"""What a step gives out: rows restricted to allowed tokens, scored prompts, hidden states."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from make_tiny import make_tiny_gguf

from sagellm import LLM
from sagellm.backends.cpu import CpuRunner
from sagellm.backends.interface import ForwardBatch, SamplingRow
from sagellm.backends.reference import ReferenceRunner
from sagellm.checkpoint import open_checkpoint

CASES = (("llama", "Q4_1"), ("gemma2", "Q5_0"), ("qwen2", "Q8_0"))  # gemma2 caps its logits


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, format = request.param
    return make_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", arch, format)


def batch_of(runner: Any, lengths: list[int], every_row: bool = False) -> ForwardBatch:
    """Random sequences from position 0, each in blocks of its own; the last row of each is wanted.

    The same for every runner of a model.
    """
    rng = np.random.default_rng(1)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    groups, size = len(runner.kv_groups), 32
    blocks = -(-max(lengths) // size)
    tables = 1 + np.arange(groups * len(lengths) * blocks, dtype=np.int32)
    rows = np.arange(starts[-1], dtype=np.int32) if every_row else starts[1:] - 1
    return ForwardBatch(
        token_ids=rng.integers(0, runner.config.vocab_size, int(starts[-1])).astype(np.int32),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        query_starts=starts,
        block_tables=tables.reshape(groups, len(lengths), blocks),
        block_copies=np.zeros((0, 2), dtype=np.int32),
        logit_rows=rows.astype(np.int32),
    )


def cpu(path: Path, **options: Any) -> CpuRunner:
    runner = CpuRunner(open_checkpoint(path), **{"threads": 2, **options})
    runner.allocate_kv(256, 32)
    return runner


def mask_of(ids: NDArray[np.int64], vocab: int) -> NDArray[np.uint32]:
    words = np.zeros(-(-vocab // 32), np.uint32)
    np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    return words


@pytest.mark.parametrize("lengths", [[3], [2, 5], [1] * 70])
@pytest.mark.parametrize("few", [1, 5, 60])
def test_a_restricted_head_chooses_the_same_tokens(
    model: Path, lengths: list[int], few: int
) -> None:
    runner = cpu(model)
    vocab = runner.config.vocab_size
    batch = batch_of(runner, lengths)
    rng = np.random.default_rng(few)

    def rows(num_logprobs: int) -> tuple[SamplingRow, ...]:
        return tuple(
            SamplingRow(
                temperature=1.0 if i % 2 else 0.0,
                seed=i,
                top_p=0.9,
                allowed=masks[i],
                num_logprobs=num_logprobs,
                bias_ids=np.array([i], np.int32),
                bias_values=np.array([1.0], np.float32),
            )
            for i in range(len(lengths))
        )

    shared = rng.choice(vocab, size=few, replace=False)
    masks = [mask_of(rng.choice(shared, size=max(1, few // 2)), vocab) for _ in lengths]
    runner.step(batch, return_logits=True)  # leaves other values where nothing is computed
    full = runner.step(batch, rows(num_logprobs=0))
    blocks = -(-vocab // 16)
    assert runner._decoder.last_head_blocks == blocks
    restricted = runner.step(batch, rows(num_logprobs=-1))
    needed = {
        int(i) // 16
        for mask in masks
        for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    }
    assert runner._decoder.last_head_blocks == len(needed)
    assert few == 60 or len(needed) < blocks
    assert [r.token_id for r in restricted.rows] == [r.token_id for r in full.rows]
    assert all(r.error is None for r in restricted.rows)


def test_one_row_without_a_mask_needs_the_whole_head(model: Path) -> None:
    runner = cpu(model)
    vocab = runner.config.vocab_size
    only = SamplingRow(allowed=mask_of(np.array([7]), vocab))
    for other in (SamplingRow(), SamplingRow(forced_token=3, num_logprobs=1)):
        rows = runner.step(batch_of(runner, [2, 3]), (only, other)).rows
        assert rows[0].token_id == 7
        assert rows[1].token_id >= 0
        assert runner._decoder.last_head_blocks == -(-vocab // 16)
    nothing = SamplingRow(allowed=np.zeros(-(-vocab // 32), np.uint32))
    (row,) = runner.step(batch_of(runner, [2]), (nothing,)).rows
    assert row.error == "no token is allowed"
    assert runner._decoder.last_head_blocks == 0


@pytest.mark.parametrize("lengths", [[1], [2], [5, 40, 1], [1] * 70])
def test_hidden_states_are_what_the_head_reads(model: Path, lengths: list[int]) -> None:
    checkpoint = open_checkpoint(model)
    reference = ReferenceRunner(checkpoint)
    reference.allocate_kv(256, 32)
    batch = batch_of(reference, lengths, every_row=True)
    expected = reference.step(batch, return_hidden=True, return_logits=True)
    assert expected.hidden is not None
    assert expected.logits is not None
    size = checkpoint.config.hidden_size
    assert expected.hidden.shape == (sum(lengths), size)
    head = checkpoint.load_f32("lm_head" if "lm_head" in checkpoint.sources else "embed")
    logits = expected.hidden @ head.T
    if checkpoint.config.final_softcap:
        cap = checkpoint.config.final_softcap
        logits = cap * np.tanh(logits / cap)
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-4)

    native = cpu(model, precision="a15")
    got = native.step(batch, return_hidden=True)
    assert got.hidden is not None
    assert got.logits is None
    scale = np.abs(expected.hidden).max()
    np.testing.assert_allclose(got.hidden / scale, expected.hidden / scale, atol=2e-2)


def test_hidden_states_do_not_depend_on_chunks_or_threads(model: Path) -> None:
    tokens = np.random.default_rng(2).integers(0, 200, 75).tolist()
    found = []
    for options in ({"threads": 1}, {"threads": 2, "max_chunk_tokens": 9}):
        with LLM(model, device="cpu", kv_cache_tokens=4096, **options) as llm:
            found.append(llm.engine.hidden(tokens))
            assert llm.engine.kv.stats().free_blocks == llm.engine.kv.stats().num_blocks
    assert found[0].shape[0] == 75
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_prompts_are_scored_by_their_own_logits(model: Path, device: str) -> None:
    tokens = np.random.default_rng(4).integers(0, 200, 90).tolist()
    with LLM(model, device=device, kv_cache_tokens=4096, max_chunk_tokens=80) as llm:
        logits = llm.logits(tokens).astype(np.float64)
        peak = logits.max(axis=1, keepdims=True)
        logprobs = logits - (peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True)))
        (answer,) = llm.generate([tokens], max_tokens=1, prompt_logprobs=2)
        rows = answer.prompt_logprobs
        assert rows is not None
        assert rows[0] is None
        assert [row.token_id for row in rows[1:] if row is not None] == tokens[1:]
        for position, row in enumerate(rows[1:]):
            assert row is not None
            assert row.logprob == pytest.approx(logprobs[position, tokens[position + 1]], abs=1e-4)
            assert row.top_logprobs == pytest.approx(
                np.sort(logprobs[position])[::-1][:2], abs=1e-4
            )
