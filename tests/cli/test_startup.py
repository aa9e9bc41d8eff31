"""What a command loads, no more than it needs, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.cli.app import COMMANDS
from sagellm.cli.lazy import LazyCommands

SERVER = {"fastapi", "starlette", "uvicorn", "prometheus_client", "sagellm.gateway"}
SELDOM = {"rich", "httpx", "aiohttp", "matplotlib", "sagellm.bench"}
# What only pulls models, reads them without the native core, or speaks of KV memory from outside.
OTHERS = {
    "sagellm.checkpoint.store",
    "sagellm.checkpoint.catalogue",
    "sagellm.checkpoint.download",
    "sagellm.checkpoint.gguf_file",
    "sagellm.checkpoint.safetensors_file",
    "sagellm.protocol.kv_hooks",
    "sagellm.kv.reference",
}
HEAVY = {"numpy", "jinja2", "llguidance", "sagellm.engine", "sagellm.protocol"}


def loaded_by(*args: str) -> set[str]:
    """Modules in a fresh interpreter after a command."""
    code = (
        "import sys; from sagellm.terminal import run_app; "
        "status = run_app('sagellm.cli.app', prog_name='sagellm', args=sys.argv[1:]); "
        "assert status == 0, status; sys.stderr.write('\\n'.join(['loaded:', *sys.modules]))"
    )
    command = [sys.executable, "-c", code, *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return set(result.stderr.partition("loaded:\n")[2].splitlines())


@pytest.mark.parametrize("args", (("version",), ("--help",)))
def test_version_and_help_load_no_engine(args: tuple[str, ...]) -> None:
    assert loaded_by(*args) & (SERVER | SELDOM | HEAVY) == set()


def test_run_loads_no_server() -> None:
    loaded = loaded_by("run", "mock", "--device", "mock", "--raw", "--max-tokens", "1")
    assert "sagellm.engine.llm" in loaded
    assert loaded & (SERVER | SELDOM) == set()


@pytest.mark.native
def test_run_with_a_file_loads_no_store_and_no_reader_in_python(tiny: Path) -> None:
    loaded = loaded_by("run", str(tiny), "-p", "a", "--max-tokens", "1")
    assert "sagellm.checkpoint.checkpoint" in loaded
    assert loaded & (SERVER | SELDOM | OTHERS) == set()


def test_what_is_needed_after_the_weights_loads_beside_them() -> None:
    late = {"jinja2", "tokenizers", "sagellm.protocol", "sagellm.engine.engine", "sagellm.text.bpe"}
    code = "import sys, sagellm.cli.run; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(result.stdout.split())
    assert "sagellm.engine.loading" in loaded
    assert loaded & late == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    command = LazyCommands(COMMANDS)[name]
    assert command.name == name
    assert command.get_short_help_str(limit=200) == COMMANDS[name].summary
