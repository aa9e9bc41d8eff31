"""Settings of GGUF files and of config.json, as they become a ModelConfig."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.make_tiny import ARCHITECTURES, hf_config, make_tiny_gguf, make_tiny_hf, tiny_dims
from sagellm.checkpoint import ModelConfig, RopeConfig, inverse_frequencies, open_checkpoint
from sagellm.checkpoint.gguf_config import config_from_gguf
from sagellm.checkpoint.hf_config import config_from_hf
from sagellm.errors import CorruptFileError, UnsupportedError


class FakeGguf:
    """Metadata without a file; the tensors are names and shapes."""

    def __init__(self, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> None:
        self.metadata = metadata
        self.tensors = {name: _Info(name=name, shape=shape) for name, shape in tensors.items()}

    def raw(self, name: str) -> Any:
        raise AssertionError("settings alone are read")

    def dequantize(self, name: str) -> Any:
        raise AssertionError("settings alone are read")


@dataclasses.dataclass
class _Info:
    name: str
    shape: tuple[int, ...]
    format: str = "F32"
    nbytes: int = 0


def gguf_config(arch: str, layers: int = 12, **keys: Any) -> ModelConfig:
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": layers,
        f"{arch}.context_length": 4096,
        f"{arch}.embedding_length": 512,
        f"{arch}.feed_forward_length": 1024,
        f"{arch}.attention.head_count": 8,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
    }
    metadata |= {f"{arch}.{key.replace('__', '.')}": value for key, value in keys.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    file = FakeGguf(metadata, {"token_embd.weight": (1000, 512), "output.weight": (1000, 512)})
    return config_from_gguf(file, "test.gguf")


def json_config(arch: str, **changes: Any) -> ModelConfig:
    values = hf_config(arch, tiny_dims(arch)) | changes
    return config_from_hf(values, "test", has_lm_head=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_kinds_of_checkpoint_give_one_config(arch: str, tmp_path: Path) -> None:
    gguf = open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf", arch)).config
    hf = open_checkpoint(make_tiny_hf(tmp_path / "tiny", arch)).config
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(gguf, field.name), getattr(hf, field.name)
        if field.name == "name":
            continue
        assert ours == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), field.name


def test_gguf_defaults_follow_the_architecture() -> None:
    llama = gguf_config("llama")
    assert (llama.num_kv_heads, llama.head_dim, llama.rope.theta) == (8, 64, 10000.0)
    assert llama.layer_windows == (0,) * 12 and llama.attention_scale == 64**-0.5
    gemma2 = gguf_config("gemma2", attention__key_length=128, attention__value_length=128)
    assert (gemma2.attention_softcap, gemma2.final_softcap) == (50.0, 30.0)
    assert gemma2.layer_windows == (4096, 0) * 6
    assert gemma2.embedding_scale == math.sqrt(512) and gemma2.activation == "gelu_tanh"
    gemma3 = gguf_config("gemma3", attention__sliding_window=512)
    assert gemma3.layer_windows == (512, 512, 512, 512, 512, 0) * 2
    assert gemma3.rope.theta == 1e6 and gemma3.rope_local == RopeConfig(theta=10000.0, dim=64)


def test_gguf_window_patterns_may_be_a_period_or_flags() -> None:
    windows = gguf_config(
        "gemma3", 4, attention__sliding_window=64, attention__sliding_window_pattern=2
    ).layer_windows
    assert windows == (64, 0, 64, 0)
    flags = np.array([True, True, False, True])
    windows = gguf_config(
        "gemma3", 4, attention__sliding_window=64, attention__sliding_window_pattern=flags
    ).layer_windows
    assert windows == (64, 64, 0, 64)


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_27b_gemmas_scale_attention_by_width_over_heads(arch: str, layers: int) -> None:
    keys = {
        "attention__sliding_window": 64,
        "attention__key_length": 128,
        "attention__value_length": 128,
    }
    assert gguf_config(arch, layers, **keys).attention_scale == pytest.approx((512 / 8) ** -0.5)
    assert gguf_config(arch, layers - 1, **keys).attention_scale == pytest.approx(128**-0.5)


def test_gguf_rope_scaling() -> None:
    linear = gguf_config("llama", rope__scaling__type="linear", rope__scaling__factor=4.0).rope
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    keys = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    yarn = gguf_config("qwen2", rope__scaling__original_context_length=1024, **keys).rope
    assert (yarn.kind, yarn.original_max_position) == ("yarn", 1024)
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    with pytest.raises(UnsupportedError, match=r"longrope.*supported: none, linear, yarn"):
        gguf_config("llama", rope__scaling__type="longrope")


def test_a_per_layer_gguf_number_must_be_the_same_for_all() -> None:
    assert gguf_config("llama", attention__head_count_kv=np.array([2, 2, 2])).num_kv_heads == 2
    with pytest.raises(CorruptFileError, match="head_count_kv"):
        gguf_config("llama", attention__head_count_kv=np.array([2, 4, 2]))


BAD_GGUF: list[tuple[dict[str, Any], str]] = [
    ({"embedding_length": None}, "embedding_length is missing"),
    ({"block_count": 0}, "block_count is '0'"),
    ({"block_count": 1 << 20}, "block_count"),
    ({"attention__head_count": "8"}, "head_count"),
    ({"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon"),
    ({"rope__freq_base": -1.0}, "freq_base"),
    ({"context_length": True}, "context_length"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_GGUF)
def test_impossible_gguf_settings_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        gguf_config("llama", **keys)


def test_unknown_models_list_what_is_supported() -> None:
    with pytest.raises(UnsupportedError, match=r"'mamba'.*llama, qwen2, qwen3, gemma2, gemma3"):
        gguf_config("mamba")
    with pytest.raises(
        UnsupportedError, match=r"'mamba'.*llama, mistral, qwen2, qwen3, gemma2, gemma3_text"
    ):
        json_config("llama", model_type="mamba")
    with pytest.raises(UnsupportedError, match="mixture-of-experts"):
        gguf_config("llama", expert_count=8)


UNSUPPORTED_JSON: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'.*supported: silu"),
    ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    ("gemma3", {"hidden_activation": "relu"}, "hidden_activation"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*llama3, yarn"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
]


@pytest.mark.parametrize(("arch", "changes", "message"), UNSUPPORTED_JSON)
def test_variants_that_change_the_arithmetic_are_refused(
    arch: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        json_config(arch, **changes)


BAD_JSON: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 1e300}, "hidden_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rope_scaling": 3}, "rope_scaling is not an object"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_JSON)
def test_impossible_json_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        json_config("llama", **changes)


def test_json_windows_of_every_model_type() -> None:
    assert json_config("mistral", sliding_window=4096).layer_windows == (4096, 4096)
    assert json_config("mistral", sliding_window=None).layer_windows == (0, 0)
    assert json_config("qwen2", sliding_window=64).layer_windows == (0, 0)
    sliding = json_config("qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=1)
    assert sliding.layer_windows == (0, 64)
    assert json_config("gemma2").layer_windows == (8, 0, 8, 0)
    assert json_config("gemma3").layer_windows == (8, 8, 8, 8, 8, 0, 8)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert json_config("gemma2", layer_types=kinds).layer_windows == (0, 8, 0, 8)


def test_newer_rope_parameters_are_read_like_older_keys() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    nested = {
        "full_attention": scaling | {"rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    new = json_config("gemma3", rope_theta=None, rope_local_base_freq=None, rope_parameters=nested)
    old = json_config("gemma3", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=scaling)
    assert new == old
    assert new.rope == RopeConfig(theta=5e5, dim=32, kind="linear", factor=8.0)
    flat = json_config(
        "qwen3", rope_theta=None, rope_parameters={"rope_theta": 7e5, "rope_type": "default"}
    )
    assert flat.rope.theta == 7e5


def test_yarn_extends_the_context_when_it_names_the_original() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert json_config("qwen2", rope_scaling=yarn).max_position == 2048
    assert json_config("qwen2").max_position == 512


def test_gemma2_caps_are_on_unless_the_file_says_null() -> None:
    values = hf_config("gemma2", tiny_dims("gemma2"))
    del values["attn_logit_softcapping"]
    values["final_logit_softcapping"] = None
    config = config_from_hf(values, "test", has_lm_head=False)
    assert (config.attention_softcap, config.final_softcap) == (50.0, 0.0)


def test_heads_tie_when_no_setting_and_no_head_exist() -> None:
    values = hf_config("llama", tiny_dims("llama"))
    del values["tie_word_embeddings"]
    assert config_from_hf(values, "test", has_lm_head=False).tie_embeddings
    assert not config_from_hf(values, "test", has_lm_head=True).tie_embeddings


def test_frequencies_without_scaling_are_a_geometric_sequence() -> None:
    frequencies, factor = inverse_frequencies(RopeConfig(theta=10000.0, dim=8))
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01, 0.001], rtol=1e-15)
    assert frequencies.dtype == np.float64 and factor == 1.0


def test_llama3_keeps_fast_pairs_divides_slow_ones_and_blends_between() -> None:
    rope = RopeConfig(
        theta=500000.0, dim=128, kind="llama3", factor=8.0, original_max_position=8192
    )
    plain, _ = inverse_frequencies(RopeConfig(theta=500000.0, dim=128))
    scaled, _ = inverse_frequencies(rope)
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-12)
    between = ~fast & ~slow
    assert between.any() and (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_stored_frequency_factors_divide() -> None:
    factors = (1.0, 2.0, 4.0, 8.0)
    frequencies, _ = inverse_frequencies(RopeConfig(theta=10000.0, dim=8, freq_factors=factors))
    np.testing.assert_allclose(frequencies, [1.0, 0.05, 0.0025, 0.000125], rtol=1e-12)
