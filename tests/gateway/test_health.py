"""Liveness is the engine's progress, not the web server's answer."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from gateway.support import BlockingRunner, HashEmbedder, mock_gateway, serve_in_thread, serving
from sagellm.backends.interface import StepOutput
from sagellm.backends.mock import MockRunner
from sagellm.errors import UnavailableError
from sagellm.gateway import gateway as gateway_module
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.liveness import check_liveness


def test_a_stuck_engine_turns_health_503_and_recovers() -> None:
    runner = BlockingRunner()
    config = GatewayConfig(access_log=False, warm_up=False, stall_timeout_s=0.2)
    gateway = mock_gateway(runner, config=config)
    with serve_in_thread(create_server(gateway)) as url:
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        runner.gate.clear()
        body = {"prompt": "Hi", "max_tokens": 2}
        post = threading.Thread(
            target=lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        )
        post.start()
        assert runner.entered.wait(30)
        limit = time.monotonic() + 30
        while (answer := httpx.get(f"{url}/health")).status_code == 200:
            assert time.monotonic() < limit
        assert answer.status_code == 503
        assert answer.json()["status"] == "stalled"
        assert "no step" in answer.json()["reason"]
        assert httpx.get(f"{url}/ready").status_code == 503
        runner.gate.set()
        post.join(30)
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 200


class DyingRunner(MockRunner):
    """Ends the engine's thread, as only something outside of ``Exception`` can."""

    def step(self, *arguments: object, **options: object) -> StepOutput:
        raise SystemExit("the device is gone")


def test_a_dead_engine_turns_health_503_and_answers_503() -> None:
    with serving(mock_gateway(DyingRunner())) as client:
        body = {"prompt": "Hi", "max_tokens": 2}
        first = client.post("/v1/completions", json=body)
        assert first.status_code == 503
        health = client.get("/health")
        assert health.status_code == 503
        assert "ended" in health.json()["reason"]
        later = client.post("/v1/completions", json=body)
        assert later.status_code == 503
        assert "retry-after" in later.headers


def test_an_idle_engine_is_alive_however_long_it_idles() -> None:
    gateway = mock_gateway()
    assert check_liveness(gateway.engine, None, 1e-9).is_alive


class StuckEmbedder(HashEmbedder):
    is_alive = True
    seconds_since_progress = 100.0


def test_an_embedder_with_a_thread_of_its_own_is_watched_too() -> None:
    stuck, dead = StuckEmbedder(), StuckEmbedder()
    dead.is_alive = False
    assert not check_liveness(None, stuck, 60).is_alive
    assert check_liveness(None, stuck, 200).is_alive
    assert not check_liveness(None, dead, 200).is_alive
    assert check_liveness(None, HashEmbedder(), 1).is_alive


class EndlessEmbedder(HashEmbedder):
    async def close(self) -> None:
        await asyncio.Event().wait()


def test_an_embedder_that_never_ends_does_not_keep_the_engine_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway_module, "_PATIENCE_S", 1.0)
    gateway = mock_gateway(embedder=EndlessEmbedder())
    assert gateway.engine is not None
    assert asyncio.run(asyncio.wait_for(gateway.close(), 60)) == 0
    assert gateway.is_stuck
    assert not gateway.engine.is_alive


def test_draining_turns_ready_and_new_requests_503_while_health_stays() -> None:
    gateway = mock_gateway()
    with serving(gateway) as client:
        gateway.begin_drain()
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert client.get("/health").status_code == 200
        refused = client.post("/v1/completions", json={"prompt": "Hi"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        anthropic = client.post("/v1/messages", json={})
        assert anthropic.status_code == 503
        assert anthropic.json()["error"]["type"] == "overloaded_error"


def test_a_model_that_fails_its_first_token_never_serves() -> None:
    runner = MockRunner(fail_at_steps=frozenset(range(10)))
    gateway = mock_gateway(runner, config=GatewayConfig(access_log=False))
    server = create_server(gateway)

    async def start() -> None:
        async with server.app.router.lifespan_context(server.app):
            pytest.fail("it started")

    with pytest.raises(UnavailableError, match="first token"):
        asyncio.run(start())
    assert not gateway.is_ready
