"""Whatever goes wrong is one line on standard error that names the remedy, and exit status 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.support import fail, run
from models.make_tiny import make_tiny_gguf

PROMPT = ("-p", "hello", "--raw", "--greedy", "--max-tokens", "3")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--device", "gpu"), r"unknown device 'gpu'; choose one of auto, "),
        (("--device", "cuda"), r"device 'cuda' cannot run here: "),
        (("--temperature", "nan"), "temperature: Input should be a finite number"),
        (("--temperature", "3"), "temperature: Input should be less than or equal to 2"),
        (("--precision", "a7"), "precision is 'a7'; choose 'a8' or 'a15'"),
        (("--kv-dtype", "fp8"), "kv_dtype is 'fp8'; choose 'auto', 'bf16' or 'int8'"),
        (("--device", "reference", "--kv-dtype", "int8"), "has no option kv_dtype; leave it out"),
        (("--device", "reference", "--deterministic"), "has no option deterministic; leave it out"),
        (("--threads", "9999"), "threads is 9999; choose between 1 and 1024"),
        (("--kv-cache-gb", "1e5"), "the largest kv_cache_gb that fits is "),
        (("--kv-cache-gb", "nan"), "kv_cache_gb is nan; give GiB above 0"),
        (("-p", ""), "the prompt is empty; give -p TEXT"),
        (("--system", "be brief"), "leave out --system"),
    ),
)
@pytest.mark.native
def test_bad_options_of_run(tiny: Path, options: tuple[str, ...], message: str) -> None:
    sampled = [option for option in PROMPT if option != "--greedy"]
    assert message in fail("run", tiny, *sampled, *options)


def test_a_prompt_that_does_not_fit(tiny: Path) -> None:
    error = fail("run", tiny, "--raw", "-p", "-", stdin="hello " * 1000)
    assert "the longest sequence is 512" in error
    assert "shorten the prompt" in error


def test_models_that_are_not_there(tmp_path: Path) -> None:
    error = fail("run", "nosuch", *PROMPT)
    assert "no model 'nosuch'" in error
    assert "smollm2" in error
    assert "sagellm pull smollm2" in fail("show", "smollm2")
    assert "no model 'nosuch'" in fail("pull", "nosuch")
    assert "no config.json" in fail("run", tmp_path, *PROMPT)


def test_files_that_are_no_models(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:-1000])
    assert "download it again" in fail("run", broken, *PROMPT)
    broken.write_bytes(b"not a model")
    assert "broken.gguf" in fail("show", broken)
    note = tmp_path / "note.txt"
    note.write_text("hello")
    assert ".gguf" in fail("run", note, *PROMPT)


def test_a_chat_needs_a_template(tmp_path: Path, tiny: Path) -> None:
    bare = make_tiny_gguf(tmp_path / "bare.gguf")
    key = b"tokenizer.chat_template"
    bare.write_bytes(bare.read_bytes().replace(key, b"tokenizer.chat_templatf"))
    assert "sagellm run --raw" in fail("chat", bare)
    answer = run("run", bare, "-p", "hello", "--max-tokens", "2", "--greedy", "--json")
    assert json.loads(answer.stdout)["prompt_tokens"] > 0


def test_a_wrong_command_line_names_the_help() -> None:
    for args in (("run", "--max-tokens", "0"), ("run", "--threads", "0"), ("nosuch",)):
        result = run(*args)
        assert result.returncode == 2
        assert result.stdout == ""
        assert "--help" in result.stderr
