"""docs/serving.md and the README: their examples run, and what they list is what there is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gateway.support import HashEmbedder, mock_gateway, serve_in_thread
from sagellm.cli.app import app
from sagellm.gateway.app import create_server

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "serving.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
LOCAL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    gateway = mock_gateway(embedder=HashEmbedder())
    with serve_in_thread(create_server(gateway)) as url:
        yield url


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_every_example_runs(url: str) -> None:
    names: dict[str, Any] = {"url": url, "model": "mock", "embedding_model": "mock-embedding"}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 8
    try:
        for block in blocks:
            exec(compile(block, str(DOCUMENT), "exec"), names)
        assert names["answer"].choices[0].message.content
        assert names["message"].content
        (call,) = names["called"].choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    finally:
        for client in ("client", "claude"):
            if client in names:
                names[client].close()


@pytest.mark.parametrize("name", ["docs/serving.md", "README.md"])
def test_the_curl_examples_are_answered(url: str, name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("curl ")]
    assert commands
    for command in commands:
        words = shlex.split(command)
        answer = httpx.post(
            words[1].replace(LOCAL, url),
            content=words[words.index("-d") + 1],
            headers=[tuple(words[words.index("-H") + 1].split(": ", 1))],
            timeout=30,
        )
        assert answer.status_code == 200, answer.text


def test_the_routes_are_those_of_the_server(url: str) -> None:
    section = TEXT.split("\n## Routes\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if re.match(r"\| `", line)]
    listed = {
        path for cell in cells for path in re.findall(r"/[\w/{}.]+", cell.replace("/docs", ""))
    }
    paths = set(httpx.get(f"{url}/openapi.json").json()["paths"])
    assert listed - {"/openapi.json"} == {re.sub(r":path\}", "}", path) for path in paths}


def test_the_metrics_are_those_of_the_server(url: str) -> None:
    section = TEXT.split("\n## Metrics and traces\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"`((?:vllm|sagellm):\w+)`", section))
    httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    types = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE "))
    served = {
        f"{name}_total" if kind == "counter" and not name.endswith("_total") else name
        for name, kind in types.items()
        if name.startswith(("vllm:", "sagellm:")) and not name.endswith("_created")
    }
    assert listed == served


def test_the_options_exist() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for option in set(re.findall(r"--[a-z][a-z-]+", TEXT)) - {"--help"}:
        assert option in shown, option
