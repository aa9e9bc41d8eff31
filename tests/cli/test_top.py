"""``sagellm top`` against real servers on the mock model, and its arithmetic."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gateway.support import mock_gateway, serve_in_thread
from sagellm.cli.top import Scrape, compare, quantile, read, scrape, view
from sagellm.errors import InvalidArgumentError, UnavailableError
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.terminal import run_app

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hello " * 20}], "max_tokens": 64}


def status(*args: str) -> int:
    return run_app("sagellm.cli.app", prog_name="sagellm", args=["top", *args])


@contextmanager
def server(config: GatewayConfig | None = None) -> Iterator[str]:
    with serve_in_thread(create_server(mock_gateway(script="an answer", config=config))) as url:
        yield url


def test_it_tells_what_happened_between_two_readings() -> None:
    with server() as url, httpx.Client() as client:
        before = scrape(client, url)
        answers = [client.post(f"{url}/v1/chat/completions", json=CHAT).json() for _ in range(4)]
        client.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
        after = scrape(client, url)
    reading = compare(before, after)
    usage = answers[0]["usage"]
    assert reading.model == "mock"
    assert (reading.running, reading.waiting, reading.errors) == (0, 0, 0)
    assert reading.seconds == after.at - before.at
    assert reading.prompt_tokens_per_s == pytest.approx(
        5 * usage["prompt_tokens"] / reading.seconds
    )
    assert reading.output_tokens_per_s == pytest.approx(
        5 * usage["completion_tokens"] / reading.seconds
    )
    assert reading.completions_per_s == pytest.approx(5 / reading.seconds)
    assert reading.prefix_hit_rate is not None
    assert 0 < reading.prefix_hit_rate < 1
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        percentiles = list(reading.latencies[name].values())
        assert None not in percentiles
        assert percentiles == sorted(percentiles)  # type: ignore[type-var]
    assert not reading.stalled
    idle = compare(after, after)
    assert idle.latencies["ttft_ms"] == {"p50": None, "p90": None, "p99": None}
    assert idle.prefix_hit_rate is None


def test_once_prints_one_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with server() as url:
        assert status(url, "--once", "--interval", "0.1") == 0
        text, errors = capsys.readouterr()
        assert errors == ""
        assert f"mock at {url}" in text
        assert "KV cache" in text
        assert "TTFT" in text
        assert status(url, "--once", "--json", "--interval", "0.1") == 0
    reading = json.loads(capsys.readouterr().out)
    assert reading["running"] == 0
    assert reading["kv_usage"] == 0.0
    assert set(reading["latencies"]) == {"ttft_ms", "itl_ms", "e2e_ms"}


def test_a_server_that_wants_a_key_gets_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = GatewayConfig(access_log=False, warm_up=False, api_keys=("key",))
    with server(config) as url:
        assert status(url, "--once") == 1
        assert "--api-key" in capsys.readouterr().err
        assert status(url, "--once", "--interval", "0.1", "--api-key", "key") == 0


def test_nobody_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert status(url, "--once") == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith(f"error: no answer from {url}/metrics")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://[::1", "x"])
def test_what_is_no_url_is_an_error(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(url, "--once") == 1
    assert "is no URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "body", "error"),
    [
        (404, b"", UnavailableError),
        (200, b"<html>", InvalidArgumentError),
        (200, b'x_bucket{le="many"} 1', InvalidArgumentError),
    ],
)
def test_other_servers_are_told_apart(code: int, body: bytes, error: type[Exception]) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as other, httpx.Client() as client:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        with pytest.raises(error):
            scrape(client, f"http://127.0.0.1:{other.server_port}")
        thread.join()


def test_a_server_that_was_restarted_starts_from_zero() -> None:
    before = read("vllm:generation_tokens_total 100", at=0.0)
    after = read("vllm:generation_tokens_total 30", at=2.0)
    assert compare(before, after).output_tokens_per_s == 15


def test_a_server_with_fewer_metrics_shows_what_it_has() -> None:
    empty = Scrape(at=0.0, values={}, buckets={}, errors=0.0, model="")
    reading = compare(empty, read("vllm:num_requests_running 3", at=1.0))
    shown = io.StringIO()
    Console(width=100, file=shown).print(view(reading, "http://x"))
    assert re.search(r"running +3\b", shown.getvalue())


def test_a_stalled_engine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    reading = compare(read("sagellm:stalled 0", at=0.0), read("sagellm:stalled 1", at=1.0))
    Console().print(view(reading, "http://x"))
    assert "stalled" in capsys.readouterr().out


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
)
def test_quantiles_lie_in_the_bucket_that_holds_their_rank(counts: list[int], q: float) -> None:
    bounds = [2.0**i for i in range(len(counts) - 1)] + [float("inf")]
    cumulative = [sum(counts[: i + 1]) for i in range(len(counts))]
    found = quantile(list(zip(bounds, map(float, cumulative), strict=True)), q)
    if cumulative[-1] == 0:
        assert found is None
        return
    assert found is not None
    index = next(i for i, count in enumerate(cumulative) if count >= q * cumulative[-1] > 0)
    low = bounds[index - 1] if index else 0.0
    assert low <= found <= (low if bounds[index] == float("inf") else bounds[index])
