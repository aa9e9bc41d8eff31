"""The reference backend on a stand-in for an Ascend device, against the same on NumPy.

No Ascend hardware took part: the operator is ``fake_torch_npu``'s, on the CPU.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.make_tiny import make_tiny_hf
from reference.cases import CASES, case_tokens, make_batch
from reference.fake_torch_npu import FakeTorchNpu, ascend
from sagellm.backends.npu_attention import pages_refusal
from sagellm.backends.reference import ReferenceRunner
from sagellm.checkpoint import Checkpoint, open_checkpoint
from sagellm.errors import DeviceUnavailableError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, at import

FLOAT32 = 3e-5
FLOAT16 = 0.006  # keys, values and queries are rounded
PROMPT = 18  # past a block of 16, so that decodes read two blocks


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorchNpu]:
    module = FakeTorchNpu()
    with ascend(monkeypatch, module):
        yield module


def open_case(tmp_path: Path, name: str) -> Checkpoint:
    case = CASES[name]
    return open_checkpoint(make_tiny_hf(tmp_path / name, case.arch, seed=case.seed, **case.dims))


def on_npu(checkpoint: Checkpoint) -> ReferenceRunner:
    return ReferenceRunner(checkpoint, array_namespace="torch", device="npu:0")


def prefill_then_decode(
    runner: ReferenceRunner, tokens: NDArray[np.int32], block_size: int = 16
) -> NDArray[np.float32]:
    """Logits of every position: ``PROMPT`` tokens at once, the rest one by one."""
    cache = runner.allocate_kv(8 * len(runner.kv_groups), block_size)
    cache.add(0)
    pieces = []
    ends = [PROMPT, *range(PROMPT + 1, len(tokens) + 1)]
    for begin, end in zip([0, *ends], ends, strict=False):
        output = runner.step(make_batch(cache, {0: tokens}, {0: (begin, end)}), return_logits=True)
        assert output.logits is not None
        pieces.append(output.logits)
        cache.commit(0, tokens, end)
    return np.concatenate(pieces)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_decodes_take_the_fused_attention_and_give_the_logits_of_numpy(
    name: str, fake: FakeTorchNpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, tokens = open_case(tmp_path, name), case_tokens(CASES[name])
    with caplog.at_level(logging.INFO, "sagellm"):
        runner = on_npu(checkpoint)
    (line,) = caplog.messages
    assert "fused paged attention" in line
    windows = checkpoint.config.layer_windows
    assert ("sliding-window" in line) == any(windows)
    fake.calls.clear()  # the trial
    logits = prefill_then_decode(runner, tokens)
    expected = prefill_then_decode(ReferenceRunner(checkpoint), tokens)
    np.testing.assert_allclose(logits, expected, atol=FLOAT16)
    full_layers = windows.count(0)
    assert full_layers > 0
    steps = range(PROMPT + 1, len(tokens) + 1)
    assert fake.calls == [[length] for length in steps for _ in range(full_layers)]


@pytest.mark.parametrize("fault", ["scale", "length"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_comparison_notices_a_wrong_operator(
    name: str, fault: str, fake: FakeTorchNpu, tmp_path: Path
) -> None:
    checkpoint, tokens = open_case(tmp_path, name), case_tokens(CASES[name])
    runner = on_npu(checkpoint)
    fake.fault = fault  # after the trial
    logits = prefill_then_decode(runner, tokens)
    expected = prefill_then_decode(ReferenceRunner(checkpoint), tokens)
    difference = np.abs(logits - expected)
    assert difference[:PROMPT].max() < FLOAT16
    assert difference[PROMPT:].max() > 3 * FLOAT16


def test_decodes_and_prefills_share_a_step(fake: FakeTorchNpu, tmp_path: Path) -> None:
    checkpoint = open_case(tmp_path, "qwen3")
    tokens = {s: np.roll(case_tokens(CASES["qwen3"]), s) for s in range(4)}
    results = []
    for runner in (ReferenceRunner(checkpoint), on_npu(checkpoint)):
        fake.calls.clear()
        cache = runner.allocate_kv(16, 16)
        for sequence, length in {0: 20, 1: 5, 2: 16, 3: 0}.items():
            cache.add(sequence)
            if length:
                runner.step(make_batch(cache, tokens, {sequence: (0, length)}))
                cache.commit(sequence, tokens[sequence], length)
        chunks = {2: (16, 17), 3: (0, 24), 0: (20, 21), 1: (5, 9)}
        output = runner.step(make_batch(cache, tokens, chunks), return_logits=True)
        results.append(output.logits)
    assert fake.calls == [[17, 21]] * checkpoint.config.num_layers
    np.testing.assert_allclose(results[1], results[0], atol=FLOAT16)


def test_sequences_that_share_blocks_are_cut_into_calls_the_operator_takes(
    fake: FakeTorchNpu, tmp_path: Path
) -> None:
    checkpoint = open_case(tmp_path, "llama")
    first = case_tokens(CASES["llama"])
    tokens = {s: np.concatenate([first[:16], np.roll(first, s)[:8]]) for s in range(3)}
    results = []
    for runner in (ReferenceRunner(checkpoint), on_npu(checkpoint)):
        fake.calls.clear()
        cache = runner.allocate_kv(4, 16)  # 5 pages; the sequences name 6 blocks
        cache.add(0)
        runner.step(make_batch(cache, tokens, {0: (0, 16)}))
        cache.commit(0, tokens[0], 16)
        cache.fork(0, 1)
        cache.fork(0, 2)
        batch = make_batch(cache, tokens, {s: (16, 17) for s in tokens})
        results.append(runner.step(batch, return_logits=True).logits)
    assert fake.calls == [[17, 17], [17]] * checkpoint.config.num_layers
    np.testing.assert_allclose(results[1], results[0], atol=FLOAT16)


def test_fused_pages_are_float16_and_the_ledger_says_so(fake: FakeTorchNpu, tmp_path: Path) -> None:
    checkpoint = open_case(tmp_path, "llama")
    runner = on_npu(checkpoint)
    assert runner.device == "torch:npu:0"
    plain = ReferenceRunner(checkpoint).kv_bytes_per_block(16)
    assert runner.kv_bytes_per_block(16) == plain // 2
    runner.allocate_kv(4, 16)
    assert runner.memory["kv"] == 5 * plain // 2


def _raises(error: Exception) -> Any:
    def operator(*args: Any, **kwargs: Any) -> Any:
        raise error

    return operator


def _wrong_signature(query: Any, key: Any, value: Any, *, scale_value: float = 1.0) -> Any: ...


def _check_plain(
    runner: ReferenceRunner, checkpoint: Checkpoint, name: str, tolerance: float, block_size: int
) -> None:
    tokens = case_tokens(CASES[name])
    logits = prefill_then_decode(runner, tokens, block_size)
    expected = prefill_then_decode(ReferenceRunner(checkpoint), tokens, block_size)
    np.testing.assert_allclose(logits, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (None, "has no npu_fused_infer_attention_score"),
        (_raises(RuntimeError("error 561002\nlong report")), "failed its trial: error 561002"),
        (_wrong_signature, "failed its trial: .*unexpected keyword"),
    ],
)
def test_an_operator_that_does_not_work_leaves_plain_attention(
    operator: Any,
    reason: str,
    fake: FakeTorchNpu,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake, "npu_fused_infer_attention_score", operator)
    checkpoint = open_case(tmp_path, "llama")
    with caplog.at_level(logging.INFO, "sagellm"):
        runner = on_npu(checkpoint)
    (line,) = caplog.messages
    assert line.startswith("npu:0: decode uses plain attention: ") and "\n" not in line
    assert re.search(reason, line), line
    _check_plain(runner, checkpoint, "llama", FLOAT32, 16)


@pytest.mark.parametrize("fault", ["scale", "length"])
def test_the_trial_refuses_an_operator_that_computes_something_else(
    fault: str, fake: FakeTorchNpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fault = fault
    checkpoint = open_case(tmp_path, "qwen3")
    with caplog.at_level(logging.INFO, "sagellm"):
        runner = on_npu(checkpoint)
    assert "trial differs from plain attention" in caplog.text
    _check_plain(runner, checkpoint, "qwen3", FLOAT32, 16)


@pytest.mark.parametrize(
    ("name", "reason"), [("gemma2", "no soft cap"), ("mistral", "every layer has a sliding window")]
)
def test_attention_that_the_operator_cannot_express_stays_plain(
    name: str,
    reason: str,
    fake: FakeTorchNpu,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = open_case(tmp_path, name)
    with caplog.at_level(logging.INFO, "sagellm"):
        runner = on_npu(checkpoint)
    (line,) = caplog.messages
    assert reason in line
    _check_plain(runner, checkpoint, name, FLOAT32, 16)
    assert fake.calls == []


@pytest.mark.parametrize("block_size", [4, 24, 528])
def test_a_block_size_that_the_operator_cannot_read_stays_plain(
    block_size: int, fake: FakeTorchNpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_case(tmp_path, "llama")
    runner = on_npu(checkpoint)
    fake.calls.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, "sagellm"):
        _check_plain(runner, checkpoint, "llama", FLOAT16, block_size)
    (line,) = caplog.messages
    assert f"KV block size is {block_size}" in line
    assert fake.calls == []


def test_page_tensors_stay_within_the_operators_index_range() -> None:
    assert pages_refusal(1 << 12, 128, 8, 128) is None
    refusal = pages_refusal(1 << 15, 128, 8, 128)
    assert refusal is not None and "elements" in refusal


def test_an_npu_without_torch_npu_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(DeviceUnavailableError, match="torch_npu is not installed"):
        on_npu(open_case(tmp_path, "llama"))
