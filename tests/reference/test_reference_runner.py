"""The reference backend against transformers, and against itself in every way to cut the work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.make_tiny import make_tiny_gguf, make_tiny_hf
from reference.cases import CASES, GOLDEN_COLUMNS, Case, case_tokens, chunked_logits, make_batch
from reference.transformers_logits import GOLDENS, transformers_logits
from sagellm.backends.interface import ForwardBatch, SamplingRow
from sagellm.backends.reference import ReferenceRunner
from sagellm.checkpoint import Checkpoint, RopeConfig, inverse_frequencies, open_checkpoint
from sagellm.errors import DeviceUnavailableError, InvalidArgumentError, ResourceExhaustedError

TOLERANCE = 3e-5  # float32, two orders of summation; measured 6e-6


def open_case(tmp_path: Path, case: Case) -> Checkpoint:
    return open_checkpoint(
        make_tiny_hf(tmp_path / case.arch, case.arch, seed=case.seed, **case.dims)
    )


def golden(name: str) -> Any:
    return np.load(GOLDENS / f"{name}.npz")["logits"]


@pytest.mark.parametrize("name", CASES)
def test_logits_match_stored_transformers_logits(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    logits = chunked_logits(ReferenceRunner(open_case(tmp_path, case)), case_tokens(case), 24)
    np.testing.assert_allclose(logits[:, :GOLDEN_COLUMNS], golden(name), atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers_run_now(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    case = CASES[name]
    checkpoint = open_case(tmp_path, case)
    expected = transformers_logits(checkpoint.path, case_tokens(case))
    logits = chunked_logits(ReferenceRunner(checkpoint), case_tokens(case), 24)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_gguf_file_gives_the_logits_of_the_same_model_in_a_folder(
    arch: str, tmp_path: Path
) -> None:
    case = CASES[arch]
    path = make_tiny_gguf(tmp_path / "tiny.gguf", arch, seed=case.seed, **case.dims)
    logits = chunked_logits(ReferenceRunner(open_checkpoint(path)), case_tokens(case), 24)
    np.testing.assert_allclose(logits[:, :GOLDEN_COLUMNS], golden(arch), atol=TOLERANCE)


def test_gguf_rope_freqs_give_llama3_scaling(tmp_path: Path) -> None:
    case = CASES["llama_rope_llama3"]
    scaled, _ = inverse_frequencies(open_case(tmp_path, case).config.rope)
    plain, _ = inverse_frequencies(RopeConfig(theta=10000.0, dim=16))
    path = make_tiny_gguf(
        tmp_path / "tiny.gguf",
        seed=case.seed,
        tie_embeddings=True,
        rope_freqs=tuple((plain / scaled).tolist()),
    )
    logits = chunked_logits(ReferenceRunner(open_checkpoint(path)), case_tokens(case), 24)
    np.testing.assert_allclose(
        logits[:, :GOLDEN_COLUMNS], golden("llama_rope_llama3"), atol=TOLERANCE
    )


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("llama_rope_linear", {"rope": RopeConfig(theta=10000.0, dim=16)}),
    ("llama_rope_llama3", {"rope": RopeConfig(theta=10000.0, dim=16)}),
    ("qwen2_rope_yarn", {"rope": RopeConfig(theta=500.0, dim=16)}),
    ("mistral", {"layer_windows": (0, 0)}),
    ("mistral", {"layer_windows": (9, 8)}),
    ("gemma2", {"attention_softcap": 0.0}),
    ("gemma2", {"final_softcap": 0.0}),
    ("gemma2", {"layer_windows": (0, 8, 0, 8)}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"activation": "silu"}),
    ("gemma2_query_scalar", {"attention_scale": 32**-0.5}),
    ("gemma3", {"rope_local": None}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_the_goldens_notice_every_detail(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = open_case(tmp_path, CASES[name])
    wrong = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **change))
    logits = chunked_logits(ReferenceRunner(wrong), case_tokens(CASES[name]), 24)
    assert np.abs(logits[:, :GOLDEN_COLUMNS] - golden(name)).max() > 3 * TOLERANCE


@pytest.mark.parametrize("chunk", [1, 5, 8])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_logits_do_not_depend_on_chunks(name: str, chunk: int, tmp_path: Path) -> None:
    case = CASES[name]
    logits = chunked_logits(ReferenceRunner(open_case(tmp_path, case)), case_tokens(case), chunk)
    np.testing.assert_allclose(logits[:, :GOLDEN_COLUMNS], golden(name), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_sequences_in_one_batch_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    runner = ReferenceRunner(open_case(tmp_path, case))
    tokens = {s: np.roll(case_tokens(case), s) for s in range(3)}
    cache = runner.allocate_kv(128, 4)
    for sequence in tokens:
        cache.add(sequence)
    runner.step(make_batch(cache, tokens, {1: (0, 10)}))  # sequence 1 is ahead: it decodes below
    cache.commit(1, tokens[1], 10)
    chunks = {2: (0, 24), 1: (10, 11), 0: (0, 24)}
    output = runner.step(make_batch(cache, tokens, chunks), return_logits=True)
    assert output.logits is not None
    alone = ReferenceRunner(open_case(tmp_path, case))
    expected = chunked_logits(alone, tokens[1], 24)
    np.testing.assert_allclose(output.logits[24], expected[10], atol=TOLERANCE)
    np.testing.assert_allclose(output.logits[25:, :GOLDEN_COLUMNS], golden(name), atol=TOLERANCE)


def test_a_fork_copies_the_shared_block_before_it_is_written(tmp_path: Path) -> None:
    case = CASES["llama"]
    runner = ReferenceRunner(open_case(tmp_path, case))
    first = case_tokens(case)
    second = np.concatenate([first[:6], first[::-1][:18]]).astype(np.int32)
    tokens = {0: first, 1: second}
    cache = runner.allocate_kv(64, 4)
    cache.add(0)
    runner.step(make_batch(cache, tokens, {0: (0, 6)}))
    cache.commit(0, first, 6)
    cache.fork(0, 1)
    output = runner.step(make_batch(cache, tokens, {1: (6, 24), 0: (6, 24)}), return_logits=True)
    assert output.logits is not None
    assert cache.stats().copied_blocks == 1
    np.testing.assert_allclose(
        output.logits[18:, :GOLDEN_COLUMNS], golden("llama")[6:], atol=TOLERANCE
    )
    alone = chunked_logits(ReferenceRunner(open_case(tmp_path, case)), second, 24)
    np.testing.assert_allclose(output.logits[:18], alone[6:], atol=TOLERANCE)


def test_a_cached_prefix_gives_the_same_logits(tmp_path: Path) -> None:
    case = CASES["gemma3"]
    runner = ReferenceRunner(open_case(tmp_path, case))
    tokens = {0: case_tokens(case), 1: case_tokens(case)}
    cache = runner.allocate_kv(128, 4)
    cache.add(0)
    runner.step(make_batch(cache, tokens, {0: (0, 24)}))
    cache.commit(0, tokens[0], 24)
    cache.add(1)
    hit = cache.match_prefix(1, tokens[1])
    assert hit == 20
    output = runner.step(make_batch(cache, tokens, {1: (hit, 24)}), return_logits=True)
    assert output.logits is not None
    np.testing.assert_allclose(
        output.logits[:, :GOLDEN_COLUMNS], golden("gemma3")[hit:], atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.filterwarnings("ignore")
def test_torch_gives_the_logits_of_numpy(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    case = CASES[name]
    runner = ReferenceRunner(open_case(tmp_path, case), array_namespace="torch", device="cpu")
    assert runner.device == "torch:cpu"
    logits = chunked_logits(runner, case_tokens(case), 8)
    np.testing.assert_allclose(logits[:, :GOLDEN_COLUMNS], golden(name), atol=TOLERANCE)


def test_greedy_sampling_takes_the_largest_logit(tmp_path: Path) -> None:
    case = CASES["qwen3"]
    runner = ReferenceRunner(open_case(tmp_path, case))
    cache = runner.allocate_kv(32, 16)
    cache.add(0)
    batch = make_batch(cache, {0: case_tokens(case)}, {0: (0, 24)}, rows=[11, 23])
    output = runner.step(batch, (SamplingRow(), SamplingRow(num_logprobs=0)), return_logits=True)
    assert output.logits is not None and output.logits.shape == (2, 320)
    assert [row.token_id for row in output.rows] == output.logits.argmax(axis=1).tolist()
    assert output.rows[0].logprob is None and output.rows[1].logprob is not None
    assert runner.step(batch).logits is None


def test_the_memory_ledger_counts_weights_and_kv(tmp_path: Path) -> None:
    runner = ReferenceRunner(open_case(tmp_path, CASES["gemma3"]))
    assert runner.kv_bytes_per_block(16) == 2 * 4 * 16 * 1 * 2 * 32  # one layer slot per block
    runner.allocate_kv(10, 16)
    assert runner.memory["kv"] == 11 * runner.kv_bytes_per_block(16)
    assert runner.memory["weights"] > 4 * 320 * 64
    runner.close()
    assert runner.memory == {"weights": 0, "kv": 0, "workspace": 0}


BAD_BATCHES: list[tuple[str, dict[str, Any], str]] = [
    ("token too large", {"token_ids": [0, 320]}, "token id"),
    ("negative token", {"token_ids": [0, -1]}, "token id"),
    ("gap in positions", {"positions": [0, 2]}, "consecutive"),
    ("negative position", {"positions": [-1, 0]}, "position"),
    ("position past the table", {"positions": [4, 5]}, "position"),
    ("empty sequence", {"query_starts": [0, 2, 2]}, "query_starts"),
    ("block past the pool", {"block_tables": [[[99]]]}, "block id"),
    ("padding block", {"block_tables": [[[0]]]}, "no block"),
    ("copy past the pool", {"block_copies": [[1, 99]]}, "block id"),
    ("row past the tokens", {"logit_rows": [2]}, "logit row"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [(c, m) for _, c, m in BAD_BATCHES],
    ids=[name for name, _, _ in BAD_BATCHES],
)
def test_a_batch_that_would_leave_its_blocks_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    runner = ReferenceRunner(open_case(tmp_path, CASES["llama"]))
    runner.allocate_kv(4, 4)
    arrays: dict[str, Any] = {
        "token_ids": [1, 2],
        "positions": [0, 1],
        "query_starts": [0, 2],
        "block_tables": [[[1]]],
        "block_copies": np.empty((0, 2)),
        "logit_rows": [1],
    }
    good = {name: np.asarray(value, np.int32) for name, value in arrays.items()}
    runner.step(ForwardBatch(**good))
    bad = good | {name: np.asarray(value, np.int32) for name, value in change.items()}
    with pytest.raises(InvalidArgumentError, match=message):
        runner.step(ForwardBatch(**bad))


def test_wrong_devices_and_sizes_are_named(tmp_path: Path) -> None:
    checkpoint = open_case(tmp_path, CASES["llama"])
    with pytest.raises(InvalidArgumentError, match="NumPy runs on 'cpu' only"):
        ReferenceRunner(checkpoint, device="cuda:0")
    with pytest.raises(InvalidArgumentError, match="array namespace"):
        ReferenceRunner(checkpoint, array_namespace="jax")  # type: ignore[arg-type]
    runner = ReferenceRunner(checkpoint)
    with pytest.raises(ResourceExhaustedError, match="lower the KV memory budget"):
        runner.allocate_kv(1 << 20, 4096)
    runner.allocate_kv(4, 16)
    with pytest.raises(InvalidArgumentError, match="already"):
        runner.allocate_kv(4, 16)


@pytest.mark.filterwarnings("ignore")
def test_an_absent_torch_device_is_an_error_not_a_fallback(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    checkpoint = open_case(tmp_path, CASES["llama"])
    with pytest.raises(DeviceUnavailableError, match="cuda:7"):
        ReferenceRunner(checkpoint, array_namespace="torch", device="cuda:7")
    with pytest.raises(DeviceUnavailableError, match="torch_npu"):
        ReferenceRunner(checkpoint, array_namespace="torch", device="npu:0")
