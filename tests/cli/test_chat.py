"""``sagellm chat`` through pipes; test_terminal.py has the keys."""

from __future__ import annotations

from pathlib import Path

from cli.support import run


def chat(model: Path, lines: list[str], *options: str) -> list[str]:
    """The lines of the answers; the text of the help and of errors is on stderr."""
    result = run(
        *("chat", model, "--temperature", "0", "--max-tokens", "5", *options),
        stdin="".join(f"{line}\n" for line in lines),
    )
    assert result.returncode == 0, result.stderr
    assert "/exit" in result.stderr
    return result.stdout.splitlines()


def test_a_conversation_is_remembered_until_it_is_cleared(tiny: Path) -> None:
    assert chat(tiny, []) == []
    once = chat(tiny, ["hello", "/exit", "hello"])
    twice = chat(tiny, ["hello", "hello"])
    assert twice[: len(once)] == once
    assert twice != once + once
    assert chat(tiny, ["hello", "/clear", "hello"]) == once + once


def test_a_system_message_outlives_clear(tiny: Path) -> None:
    system = ("--system", "the the the")
    once = chat(tiny, ["hello"], *system)
    assert once != chat(tiny, ["hello"])
    assert chat(tiny, ["hello", "/clear", "hello"], *system) == once + once


def test_a_message_that_is_too_long_leaves_the_conversation_open(tiny: Path) -> None:
    result = run(
        *("chat", tiny, "--temperature", "0", "--max-tokens", "5"),
        stdin="hello " * 500 + "\nhello\n",
    )
    assert result.returncode == 0
    assert "error: " in result.stderr
    assert "shorten the prompt" in result.stderr
    assert result.stdout.splitlines()[1:] == chat(tiny, ["hello"])
