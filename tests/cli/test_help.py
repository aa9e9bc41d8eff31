"""Help that teaches with examples, and wrong command lines; in this process, for speed."""

from __future__ import annotations

import pytest

from sagellm.terminal import run_app


def status(*args: str) -> int:
    return run_app("sagellm.cli.app", prog_name="sagellm", args=list(args))


@pytest.mark.parametrize(
    "name",
    (
        "run",
        "chat",
        "pull",
        "list",
        "show",
        "rm",
        "info",
        "serve",
        "top",
        "bench",
        "bench offline",
        "bench kernels",
        "bench kv",
    ),
)
def test_examples_stand_on_lines_of_their_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*name.split(), "--help") == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    assert "\\b" not in out
    lines = [line.strip() for line in out.splitlines()]
    first = lines[next(i for i, line in enumerate(lines) if line in ("Example:", "Examples:")) + 1]
    assert first.startswith(("sagellm ", "python -m sagellm.bench "))
    assert name.split()[-1] in first.split()


@pytest.mark.parametrize(
    ("args", "named"),
    (
        ("nosuch", "nosuch"),
        ("run --nosuch", "--nosuch"),
        ("run model surplus", "surplus"),
        ("run --max-tokens 0", "--max-tokens"),
        ("run --max-tokens many", "--max-tokens"),
        ("pull", "NAME"),
        ("rm", "NAME"),
        ("bench nosuch", "nosuch"),
        ("bench offline --streams 0", "--streams"),
        ("bench kernels --rows 0", "--rows"),
        ("bench kv --blocks 1", "--blocks"),
    ),
)
def test_a_wrong_command_line_is_status_2_with_its_cause(
    args: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*args.split()) == 2
    out, errors = capsys.readouterr()
    assert out == "" or args in ("pull", "rm")
    assert named in out + errors
