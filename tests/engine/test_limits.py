"""What is refused at start and at the door, and what the refusal says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.support import make_engine, make_request
from sagellm.backends.mock import MockRunner
from sagellm.engine.config import EngineConfig
from sagellm.engine.memory import available_memory, blocks_needed, resolve_kv_plan, tokens_that_fit
from sagellm.errors import InvalidArgumentError, ResourceExhaustedError
from sagellm.kv import KvGroup
from sagellm.protocol import SamplingParams

MIB = 1 << 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"block_size": 24}, "multiple of 16"),
        ({"max_num_seqs": 64, "max_batch_tokens": 32}, "raise max_batch_tokens or lower"),
        ({"kv_cache_bytes": 1, "kv_cache_tokens": 1}, "not both"),
        ({"max_model_len": 1.5}, "max_model_len is 1.5"),
        ({"max_queue": True}, "max_queue is True"),
    ],
)
def test_config_names_the_wrong_knob(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        EngineConfig(**options)


def plan(available: int, windows: tuple[int, ...] = (0,), **options: Any) -> Any:
    return resolve_kv_plan(MockRunner(windows=windows), EngineConfig(**options), available)


def test_pool_follows_the_budget() -> None:
    per_block = 16 * 32
    assert plan(1024 * MIB, kv_cache_bytes=10 * MIB).num_blocks == 10 * MIB // per_block
    assert plan(1024 * MIB, kv_cache_tokens=1000).num_blocks == 32
    assert plan(1024 * MIB, windows=(0, 64), kv_cache_tokens=1000).num_blocks == 64
    # By default: what max_num_seqs of the longest sequences use, here 64 * 4096 tokens of 16 bytes.
    assert plan(10_240 * MIB).num_bytes == 4 * MIB


def test_budget_beyond_memory_names_the_largest_value_that_fits() -> None:
    with pytest.raises(ResourceExhaustedError, match=r"the largest kv_cache_gb that fits is 0\.75"):
        plan(1024 * MIB, kv_cache_bytes=2048 * MIB)
    fits = 768 * MIB // (16 * 32) * 32
    with pytest.raises(ResourceExhaustedError, match=f"kv_cache_tokens to at most {fits}"):
        plan(1024 * MIB, kv_cache_tokens=fits + 1)
    assert plan(1024 * MIB, kv_cache_tokens=fits).num_bytes == 768 * MIB
    with pytest.raises(ResourceExhaustedError, match="memory are free"):
        plan(1 * MIB)


def test_explicit_max_model_len_must_fit_in_the_pool() -> None:
    with pytest.raises(
        ResourceExhaustedError, match="lower max_model_len to at most 512, or raise"
    ):
        plan(1024 * MIB, kv_cache_tokens=500, max_model_len=4000)
    assert plan(1024 * MIB, kv_cache_tokens=500, max_model_len=512).max_model_len == 512
    assert plan(1024 * MIB, kv_cache_tokens=500).max_model_len == 4096


def test_tokens_that_fit_is_the_inverse_of_blocks_needed() -> None:
    groups = (KvGroup(window=0, layers=(0,)), KvGroup(window=100, layers=(1,)))
    for blocks in (2, 3, 10, 50, 400):
        fits = tokens_that_fit(groups, 16, blocks, 64)
        assert blocks_needed(groups, 16, fits, 64) <= blocks
        assert blocks_needed(groups, 16, fits + 1, 64) > blocks


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_memory_is_the_least_of_machine_and_every_cgroup_above(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 999999 kB\nMemAvailable: 2048 kB\n")
    assert available_memory(tmp_path) == 2 * MIB
    write(tmp_path, "proc/self/cgroup", "0::/pod/box\n")
    write(tmp_path, "sys/fs/cgroup/pod/box/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/pod/box/memory.current", "5\n")
    assert available_memory(tmp_path) == 2 * MIB
    write(tmp_path, "sys/fs/cgroup/pod/memory.max", f"{3 * MIB}\n")
    write(tmp_path, "sys/fs/cgroup/pod/memory.current", f"{5 * MIB // 2}\n")
    assert available_memory(tmp_path) == MIB // 2
    write(tmp_path, "sys/fs/cgroup/pod/memory.stat", f"anon 7\ninactive_file {MIB // 4}\n")
    assert available_memory(tmp_path) == MIB * 3 // 4
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "1000")
    write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "2000")
    assert available_memory(tmp_path) == 0


def test_available_memory_of_this_machine_is_positive() -> None:
    assert available_memory() > MIB


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt is empty"),
        ([258], "token id 258 is outside the vocabulary of 258"),
        ([-1], "token id -1"),
        ([2**70], "whole numbers"),
        ([1.5], "whole numbers"),
        ([[1], [2]], "flat list"),
        ([[1], [2, 3]], "flat list"),
        ([True], "whole numbers"),
        (["a"], "whole numbers"),
        (np.zeros((2, 2), dtype=np.int64), "flat list"),
        ([1] * 4096, r"4096 tokens and the longest sequence is 4096.*max_model_len"),
    ],
)
def test_bad_prompts_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_engine().add_request(make_request(max_tokens=1), ids)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", 3.0),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("deadline_ms", -1.0),
        ("max_tokens", 0),
    ],
)
def test_values_that_went_around_pydantic_are_refused(field: str, value: Any) -> None:
    request = make_request(max_tokens=1).model_copy(update={field: value})
    with pytest.raises(InvalidArgumentError, match=field):
        make_engine().add_request(request, [1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("n", 100_000),
        ("logprobs", 999),
        ("stop", ["x"] * 99),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {9999: 1.0}),
        ("stop_token_ids", [9999]),
    ],
)
def test_sampling_values_that_went_around_pydantic_are_refused(field: str, value: Any) -> None:
    sampling = SamplingParams().model_copy(update={field: value})
    request = make_request(max_tokens=1).model_copy(update={"sampling": sampling})
    with pytest.raises(InvalidArgumentError, match="stop" if "stop" in field else field):
        make_engine().add_request(request, [1])


def test_kv_budget_below_the_prompt_is_named() -> None:
    engine = make_engine()
    with pytest.raises(ResourceExhaustedError, match=r"kv_budget_tokens is 5.*takes 6"):
        engine.add_request(make_request(max_tokens=1, kv_budget_tokens=5), [1] * 6)


def test_max_output_tokens_is_the_most_that_is_served() -> None:
    for options in ({"max_model_len": 100}, {"kv_cache_tokens": 64}):
        engine = make_engine(**options)
        for length in (1, 20, 63):
            most = engine.capacity.max_output_tokens(length)
            assert most > 0
            engine.cancel(engine.add_request(make_request(max_tokens=most), [1] * length))
            state = engine.prepare(make_request(max_tokens=most), [1] * length)
            assert state.sequences[0].max_length == length + most
        if "kv_cache_tokens" in options:
            with pytest.raises(ResourceExhaustedError):
                engine.prepare(make_request(max_tokens=most + 1), [1] * length)
        assert engine.capacity.max_output_tokens(1000) == 0
        assert engine.capacity.max_output_tokens(20, n=8) == engine.capacity.max_output_tokens(20)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="min_tokens is 5"):
        make_engine().add_request(make_request(max_tokens=4, min_tokens=5), [1])
