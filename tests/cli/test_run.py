"""``sagellm run``: the answer on stdout, everything else on stderr, the JSON contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.support import run, succeed
from models.make_tiny import make_tiny_hf
from sagellm import LLM

GREEDY = ("--greedy", "--raw", "--max-tokens", "6")


def answer(model: Path, *options: str) -> dict[str, Any]:
    """The parsed answer to "hello" of ``run --json``."""
    printed = succeed("run", model, "-p", "hello", "--json", *options)
    assert printed.count("\n") == 1
    return dict(json.loads(printed))


def test_json_is_one_object_with_what_the_library_answers(tiny: Path) -> None:
    content = answer(tiny, *GREEDY)
    assert list(content) == [
        "output_text",
        "output_tokens",
        "prompt_tokens",
        "finish_reason",
        "metrics",
    ]
    with LLM(tiny) as llm:
        expected = llm.generate("hello", max_tokens=6)[0]
        assert content["prompt_tokens"] == len(llm.tokenizer.encode("hello"))
    assert content["output_tokens"] == expected.output_tokens
    assert content["output_text"] == expected.output_text
    assert content["finish_reason"] == expected.finish_reason == "length"
    assert content["metrics"]["ttft_ms"] > 0
    assert content["metrics"]["peak_mem_mb"] > 0


def test_text_is_streamed_to_stdout_and_figures_to_stderr(tiny: Path) -> None:
    expected = answer(tiny, *GREEDY)["output_text"]
    result = run("run", tiny, "-p", "-", *GREEDY, stdin="hello")
    assert (result.returncode, result.stdout) == (0, f"{expected}\n")
    assert result.stderr.startswith("6 tokens, ")
    assert "tok/s" in result.stderr
    assert result.stderr.count("\n") == 1


def test_raw_leaves_out_the_chat_template(tiny: Path) -> None:
    kinds = (("--raw",), (), ("--system", "be brief"))
    counts = [answer(tiny, "--max-tokens", "1", *kind)["prompt_tokens"] for kind in kinds]
    assert counts == sorted(set(counts)), counts  # each adds to the one before


def test_a_seed_repeats_a_random_answer(tiny: Path) -> None:
    first, again, other = (
        answer(tiny, "--raw", "--temperature", "1.5", "--max-tokens", "12", "--seed", seed)
        for seed in ("7", "7", "8")
    )
    assert first["output_tokens"] == again["output_tokens"] != other["output_tokens"]


def test_temperature_zero_is_greedy(tiny: Path) -> None:
    options = ("--raw", "--max-tokens", "6", "--temperature", "0")
    assert answer(tiny, *options)["output_tokens"] == answer(tiny, *GREEDY)["output_tokens"]


@pytest.mark.native
def test_the_cpu_is_deterministic_with_and_without_the_option(tiny: Path) -> None:
    options = (*GREEDY, "--device", "cpu")
    expected = answer(tiny, *options)["output_tokens"]
    assert answer(tiny, *options, "--deterministic")["output_tokens"] == expected


def test_a_hugging_face_folder_on_the_reference_backend(tmp_path: Path) -> None:
    folder = make_tiny_hf(tmp_path / "tiny", "qwen2")
    with LLM(folder, device="reference") as llm:
        expected = llm.generate("hello", max_tokens=6)[0].output_tokens
    assert answer(folder, *GREEDY, "--device", "reference")["output_tokens"] == expected


def test_the_mock_device_needs_no_model() -> None:
    printed = succeed("run", "mock", "-p", "hi", *GREEDY, "--device", "mock", "--json")
    assert len(json.loads(printed)["output_tokens"]) == 6
