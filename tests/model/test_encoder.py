"""Encoders: NumPy against stored transformers outputs, native kernels against NumPy in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.make_tiny_encoder import make_tiny_encoder
from reference.transformers_encoder import CASES, GOLDENS, case_input
from sagellm.backends.encoder import (
    EncoderBatch,
    EncoderRunner,
    NativeEncoder,
    ReferenceEncoder,
    create_encoder,
)
from sagellm.checkpoint.encoder import EncoderCheckpoint, open_encoder
from sagellm.errors import (
    CorruptFileError,
    DeviceUnavailableError,
    InvalidArgumentError,
    UnsupportedError,
)

LENGTHS = (1, 15, 16, 17, 49, 100, 3, 150)  # around row blocks and query tiles
SHAPES: dict[str, dict[str, Any]] = {
    "f32": {},
    "odd-heads": {"hidden_size": 48, "num_heads": 4, "intermediate_size": 80, "num_layers": 3},
    "one-head": {"hidden_size": 32, "num_heads": 1, "intermediate_size": 16},
    "f16": {"dtype": "F16"},
    "bf16": {"dtype": "BF16"},
    "cross-encoder": {"has_head": True, "prefix": "bert."},
    "roberta": {"architecture": "roberta", "has_head": True, "prefix": "roberta."},
}


def isas() -> list[str]:
    core = pytest.importorskip("sagellm._core")
    return list(core.kernels.available_isas())


def make_batch(checkpoint: EncoderCheckpoint, lengths: tuple[int, ...] = LENGTHS) -> EncoderBatch:
    rng = np.random.default_rng(7)
    config = checkpoint.config
    ids = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
    types = [rng.integers(0, config.num_token_types, length).tolist() for length in lengths]
    return EncoderBatch.of(ids, types)


def part(batch: EncoderBatch, sequence: int) -> EncoderBatch:
    begin, end = batch.query_starts[sequence : sequence + 2]
    return EncoderBatch.of([batch.token_ids[begin:end]], [batch.token_types[begin:end]])


def oracle(checkpoint: EncoderCheckpoint) -> ReferenceEncoder:
    return ReferenceEncoder(checkpoint, dtype=np.float64)


@pytest.mark.parametrize("name", CASES)
def test_the_numpy_encoder_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    golden = np.load(GOLDENS / f"{name}.npz")
    runner = oracle(open_encoder(make_tiny_encoder(tmp_path / name, **CASES[name])))
    ids, types = case_input(name)
    batch = EncoderBatch.of([ids], [types])
    np.testing.assert_allclose(runner.hidden(batch), golden["hidden"], atol=2e-6)
    if "score" in golden:
        np.testing.assert_allclose(runner.score(batch), golden["score"], atol=2e-6)


@pytest.mark.native
@pytest.mark.parametrize("shape", SHAPES)
def test_native_states_agree_with_float64_on_every_path(shape: str, tmp_path: Path) -> None:
    checkpoint = open_encoder(make_tiny_encoder(tmp_path / "m", **SHAPES[shape]))
    batch = make_batch(checkpoint)
    expected = oracle(checkpoint).hidden(batch)
    for isa in isas():
        native = NativeEncoder(checkpoint, isa=isa, threads=2)
        # bf16 kernels round the activations of bf16 weights as well
        rounded = shape == "bf16" and isa == "avx512_bf16"
        atol = 0.15 if rounded else 3e-5
        np.testing.assert_allclose(native.hidden(batch), expected, atol=atol, err_msg=isa)


@pytest.mark.native
def test_native_pooling_and_scores_agree_with_float64(tmp_path: Path) -> None:
    for pooling, modules in (
        ("mean_tokens", ("Transformer", "Pooling", "Normalize")),
        ("cls_token", ("Transformer", "Pooling")),
    ):
        folder = make_tiny_encoder(tmp_path / pooling, pooling=pooling, modules=modules)
        checkpoint = open_encoder(folder)
        batch = make_batch(checkpoint)
        got, expected = NativeEncoder(checkpoint).embed(batch), oracle(checkpoint).embed(batch)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        lengths = np.linalg.norm(got, axis=1)
        assert (np.abs(lengths - 1) < 1e-6).all() == (len(modules) == 3)
    checkpoint = open_encoder(make_tiny_encoder(tmp_path / "head", **SHAPES["cross-encoder"]))
    batch = make_batch(checkpoint)
    got, expected = NativeEncoder(checkpoint).score(batch), oracle(checkpoint).score(batch)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.shape == (len(LENGTHS),) and np.ptp(got) > 0.01


@pytest.mark.native
@pytest.mark.parametrize("shape", ["f32", "bf16", "cross-encoder"])
def test_a_result_does_not_depend_on_its_batch_or_on_threads(shape: str, tmp_path: Path) -> None:
    checkpoint = open_encoder(make_tiny_encoder(tmp_path / "m", **SHAPES[shape]))
    batch = make_batch(checkpoint)
    for isa in isas():
        whole = NativeEncoder(checkpoint, isa=isa, threads=3)
        single = NativeEncoder(checkpoint, isa=isa, threads=1)
        calls = ["embed", "score"] if checkpoint.config.has_head else ["embed"]
        for call in calls:
            together = getattr(whole, call)(batch)
            for sequence in range(batch.num_sequences):
                alone = getattr(single, call)(part(batch, sequence))
                assert alone[0].tobytes() == together[sequence].tobytes(), (isa, call, sequence)


def runners(checkpoint: EncoderCheckpoint) -> list[EncoderRunner]:
    made: list[EncoderRunner] = [ReferenceEncoder(checkpoint)]
    if "sagellm._core" in sys.modules or isas():
        made.append(NativeEncoder(checkpoint, threads=1))
    return made


def int32(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


@pytest.mark.native
def test_malformed_batches_are_refused_and_the_runner_lives(tmp_path: Path) -> None:
    checkpoint = open_encoder(make_tiny_encoder(tmp_path / "m"))
    good = EncoderBatch.of([[2, 7, 3]])
    long = [5] * (checkpoint.config.num_positions + 1)
    zeros = int32(0, 0, 0)
    for runner in runners(checkpoint):
        before = runner.embed(good)
        for ids, types, starts, message in (
            (int32(1, 2, 128), zeros, int32(0, 3), "outside the"),
            (int32(1, 2, -1), zeros, int32(0, 3), "outside the"),
            (int32(1, 2, 3), int32(0, 0, 2), int32(0, 3), "outside the 2"),
            (int32(1, 2, 3), zeros, int32(0, 2), "query_starts"),
            (int32(1, 2, 3), zeros, int32(1, 3), "query_starts"),
            (int32(1, 2, 3), zeros, int32(0, 3, 3), "sequence"),
            (int32(1, 2, 3), zeros, int32(0, 4, 3), "sequence"),
            (int32(1, 2, 3), int32(0), int32(0, 3), "types"),
            (int32(), int32(), int32(0, 0), "batch of 0"),
            (int32(*long), np.zeros(len(long), np.int32), int32(0, len(long)), "model takes 160"),
            (np.ones(5000, np.int32), np.zeros(5000, np.int32), int32(0, 5000), "batch of 5000"),
        ):
            batch = EncoderBatch(token_ids=ids, token_types=types, query_starts=starts)
            with pytest.raises(InvalidArgumentError, match=message):
                runner.embed(batch)
        with pytest.raises(UnsupportedError, match="cross-encoder"):
            runner.score(good)
        assert runner.embed(good).tobytes() == before.tobytes()


@pytest.mark.native
def test_sizes_that_the_native_kernels_lack_name_the_remedy(tmp_path: Path) -> None:
    checkpoint = open_encoder(make_tiny_encoder(tmp_path / "m", intermediate_size=100))
    with pytest.raises(UnsupportedError, match="reference"):
        NativeEncoder(checkpoint)
    assert ReferenceEncoder(checkpoint).embed(EncoderBatch.of([[2, 3]])).shape == (1, 64)


@pytest.mark.native
def test_options_are_checked(tmp_path: Path) -> None:
    checkpoint = open_encoder(make_tiny_encoder(tmp_path / "m"))
    with pytest.raises(UnsupportedError, match="avx9000"):
        NativeEncoder(checkpoint, isa="avx9000")
    with pytest.raises(InvalidArgumentError, match="threads"):
        NativeEncoder(checkpoint, threads=0)
    with pytest.raises(InvalidArgumentError, match="'cuda'"):
        create_encoder(checkpoint, "cuda")
    with pytest.raises(InvalidArgumentError, match="threads"):
        create_encoder(checkpoint, "reference", threads=2)


def test_auto_takes_numpy_without_the_native_core_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_core() -> None:
        raise DeviceUnavailableError("the native core is not installed")

    monkeypatch.setattr("sagellm.backends.devices.load_core", no_core)
    monkeypatch.setattr("sagellm.backends.encoder.load_core", no_core)
    checkpoint = open_encoder(make_tiny_encoder(tmp_path / "m"))
    with caplog.at_level("INFO", logger="sagellm.backends.encoder"):
        assert create_encoder(checkpoint).device == "reference"
    (record,) = caplog.records
    assert "not cpu: " in record.message and "not installed" in record.message
    with pytest.raises(DeviceUnavailableError, match="not installed"):
        create_encoder(checkpoint, "cpu")


def test_checkpoints_that_lie_are_refused(tmp_path: Path) -> None:
    made = make_tiny_encoder(tmp_path / "m")
    config = (made / "config.json").read_text()
    for old, new, error, message in (
        ('"hidden_act": "gelu"', '"hidden_act": "relu"', UnsupportedError, "hidden_act"),
        ('"num_attention_heads": 4', '"num_attention_heads": 5', CorruptFileError, "5 heads"),
        ('"vocab_size": 128', '"vocab_size": 129', CorruptFileError, "word_embeddings"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 3', CorruptFileError, "layer.2"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1', UnsupportedError, "layer.1"),
        ('"hidden_size": 64', '"hidden_size": "x"', CorruptFileError, "hidden_size"),
        ('"bert"', '"distilbert"', UnsupportedError, "distilbert"),
        ('"BertModel"', '"BertForSequenceClassification"', CorruptFileError, "classifier"),
        (
            '"layer_norm_eps"',
            '"is_decoder": true, "layer_norm_eps"',
            UnsupportedError,
            "is_decoder",
        ),
    ):
        assert old in config
        (made / "config.json").write_text(config.replace(old, new))
        with pytest.raises(error, match=message):
            open_encoder(made)
    labels = {"id2label": {"0": "A", "1": "B"}, "architectures": ["BertForSequenceClassification"]}
    with pytest.raises(UnsupportedError, match="2 labels"):
        open_encoder(make_tiny_encoder(tmp_path / "labels", settings=labels))
