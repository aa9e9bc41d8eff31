"""The examples of docs/serving-sdk.md, run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from sagellm.serving import Server
from serving.support import TIMEOUT_S, Running, running, socket_in

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving-sdk.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def run_blocks() -> tuple[dict[str, Any], list[Server]]:
    """Run all blocks in one namespace; return it and every server that they assign."""
    names: dict[str, Any] = {"__name__": "document"}
    servers: list[Server] = []
    for block in BLOCKS:
        before = names.get("server")
        exec(compile(block, str(DOCUMENT), "exec"), names)
        if names.get("server") is not before:
            servers.append(names["server"])
    return names, servers


def check_routes(at: Running, client: httpx.Client) -> None:
    answer = client.post("/v1/ask", json={"text": "ab", "repeat": 2})
    assert answer.json() == {"text": "abab"}
    assert client.get("/v1/models").json()["path"] == "/v1/models"


def check_progress(at: Running, client: httpx.Client) -> None:
    assert client.post("/images/generate/stream").text.count("data: ") == 13


def check_numbers(at: Running, client: httpx.Client) -> None:
    streamed = client.post("/numbers", json={"stream": True, "stop": 2})
    assert streamed.text == "data: 0\n\ndata: 1\n\n"
    assert client.post("/numbers").json() == 3


def check_websocket(at: Running, client: httpx.Client) -> None:
    with connect(at.url.replace("http", "ws") + "/chat/ws", proxy=None) as connection:
        connection.send(json.dumps({"text": "a b"}))
        frames = [json.loads(connection.recv(TIMEOUT_S)) for _ in range(3)]
    assert frames == [{"word": "a"}, {"word": "b"}, {"stopped": True}]


def check_errors(at: Running, client: httpx.Client) -> None:
    answer = client.post("/chat")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "Messages required"


def check_traces(at: Running, client: httpx.Client) -> None:
    answer = client.post("/infer", headers={"X-Trace-Id": "mine"})
    assert answer.json() == {"trace_id": "mine"}


CHECKS = [
    check_routes,
    check_progress,
    check_numbers,
    check_websocket,
    check_errors,
    check_traces,
]


def test_every_example_runs_and_its_server_answers() -> None:
    names, servers = run_blocks()
    assert len(servers) == len(CHECKS)
    for server, check in zip(servers, CHECKS, strict=True):
        with running(server) as at, at.client() as client:
            check(at, client)
    assert names["greeting"] == "hello\n"
    assert names["address"].startswith("http://127.0.0.1:")
    assert (names["number"], names["items"], names["depth"]) == (10, ["a", "b"], 3)


@pytest.mark.parametrize("original_names", [False, True])
def test_the_first_service_runs_as_a_program(original_names: bool, tmp_path: Path) -> None:
    text = BLOCKS[0]
    if original_names:
        text = text.replace(
            "from sagellm.serving import Handler, RouterDef, RouterKind, Server, env",
            "from gmi_ieops.config import env\n"
            "from gmi_ieops.handler import Handler, RouterDef, RouterKind, Server",
        )
        assert "sagellm" not in text
    program, path = tmp_path / "service.py", socket_in(tmp_path)
    program.write_text(text)
    environment = {"MODEL_SERVER_SOCKET": path, "PATH": ""}
    command = [sys.executable, "-W", "error", str(program)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            assert any("accepting requests" in line for line in iter(child.stderr.readline, ""))
            transport = httpx.HTTPTransport(uds=path)
            with httpx.Client(transport=transport, base_url="http://localhost") as client:
                assert client.post("/chat/complete").json()["message"].startswith("Hello")
                streamed = client.post("/chat/stream", json={"messages": [{"content": "hi"}]}).text
            assert streamed.count('"stopped":false') == len("You said: hi")
            assert streamed.endswith('"stop_reasons":["end"]}\n\ndata: [DONE]\n\n')
            child.send_signal(signal.SIGTERM)
            assert child.wait(TIMEOUT_S) == 0
        finally:
            child.kill()
