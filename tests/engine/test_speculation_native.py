"""Speculation on the native core: every byte of an answer is what it is without."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sagellm._core")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from make_tiny import make_tiny_gguf

from sagellm import LLM
from sagellm.engine.llm import new_request
from sagellm.protocol import Request

CASES = (("llama", "Q4_1"), ("qwen2", "Q8_0"), ("gemma3", "BF16"), ("llama", "Q4_K"))
DRAFTED = 6


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, format = request.param
    return make_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", arch, format)


def requests() -> list[Request]:
    """Every rule of sampling, with an output that repeats itself now and then."""
    steady = {5: 14.0, 6: 13.0, 7: 12.0}  # so that even a random model repeats itself
    rules: list[dict[str, Any]] = [
        {},
        {"logit_bias": steady},
        {"temperature": 0.7, "seed": 1, "logit_bias": steady},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 5, "seed": 2, "logit_bias": steady},
        {"temperature": 0.5, "min_p": 0.1, "seed": 3, "logit_bias": steady, "n": 2},
        {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.2, "logit_bias": steady},
        {"presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": steady},
        {"logprobs": 3, "logit_bias": steady, "temperature": 0.6, "seed": 5},
        {"logprobs": 0, "prompt_logprobs": 1},
        {"stop_token_ids": [7], "logit_bias": steady, "temperature": 1.0, "seed": 6},
        {"min_tokens": 20, "stop_token_ids": [6], "logit_bias": steady},
        {
            "response_format": {"type": "regex", "regex": "(ab|abc){2,8}"},
            "temperature": 1.0,
            "seed": 7,
        },
        {"cache_salt": "a", "temperature": 1.2, "seed": 8, "logit_bias": steady},
    ]
    made = []
    for rule in rules:
        ignoring = {} if "response_format" in rule else {"ignore_eos": True}
        made.append(new_request(prompt="abc abc abd " * 4, max_tokens=48, **ignoring, **rule))
    return made


def answer(llm: LLM) -> list[tuple[Any, ...]]:
    """What clients see of all answers, but for times."""
    responses = llm.generate(requests())
    assert all(r.error is None for r in responses), [r.error for r in responses if r.error]
    return [
        (
            (r.output_tokens, r.output_text, r.finish_reason, r.matched_stop, r.index),
            (r.logprobs, r.prompt_logprobs, r.prompt_tokens),
        )
        for r in responses
    ]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[Any, ...]]:
    with LLM(model, device="cpu", threads=1, kv_cache_tokens=8192, speculation="off") as llm:
        answers = answer(llm)
        assert llm.stats().num_draft_tokens == 0
    return answers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "max_batch_tokens": 16},
        {"max_chunk_tokens": 3},
        {"enable_prefix_caching": False},
        {"block_size": 64},
        {"kv_cache_tokens": 384},
        {"speculation": 1},
        {"speculation": "auto", "max_num_seqs": 2},
    ],
    ids=str,
)
def test_nothing_that_a_client_sees_changes(
    model: Path, expected: list[tuple[Any, ...]], options: dict[str, Any]
) -> None:
    options = {"kv_cache_tokens": 8192, "speculation": DRAFTED, **options}
    with LLM(model, device="cpu", threads=2, **options) as llm:
        assert answer(llm) == expected
        stats = llm.stats()
        assert stats.num_accepted_tokens > 60
        assert stats.num_accepted_tokens < stats.num_draft_tokens
        if options["kv_cache_tokens"] < 1000:
            assert stats.num_preemptions > 0
        assert answer(llm) == expected  # from a warm prefix cache


def test_a_repeating_answer_takes_far_fewer_steps(model: Path) -> None:
    ids = np.random.default_rng(0).integers(10, 200, 30)
    steps = {}
    for speculation in ("off", "auto"):
        with LLM(model, device="cpu", threads=1, speculation=speculation) as llm:
            response = llm.generate([ids], max_tokens=100, ignore_eos=True, logit_bias={9: 100.0})
            assert response[0].output_tokens == [9] * 100
            steps[speculation] = llm.engine.num_steps
            rate = response[0].metrics.spec_accept_rate
            assert rate == (None if speculation == "off" else 1.0)
    assert steps["auto"] < steps["off"] / 4
