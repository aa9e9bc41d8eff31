"""``sagellm serve`` with a real embedding model: alone, beside a generation model, and without."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from sagellm.engine.embedding import load_embedder

pytestmark = [pytest.mark.native, pytest.mark.model, pytest.mark.slow]

LIMIT_S = 60.0
TEXTS = ["A cat sleeps on the sofa.", "Kittens nap.", "Taxes are due in April.", "größer als 世界"]


@contextmanager
def served(*arguments: str) -> Iterator[httpx.Client]:
    """Runs ``sagellm serve`` as a process on a free port."""
    command = [sys.executable, "-m", "sagellm.cli", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(
        [*command, "--threads", "2", "--no-access-log", "--kv-cache-gb", "0.25"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        timer = threading.Timer(LIMIT_S, process.kill)  # a server that never starts
        drain = threading.Thread(target=process.stderr.read)  # so that its pipe never fills
        timer.start()
        try:
            lines = iter(process.stderr.readline, "")
            found = (re.search(r"^serving .* on (http://\S+)", line) for line in lines)
            match = next((item for item in found if item), None)
            assert match is not None, "the server ended"
            timer.cancel()
            drain.start()
            with httpx.Client(base_url=match[1], timeout=LIMIT_S) as client:
                yield client
        finally:
            timer.cancel()
            process.terminate()
            process.wait(LIMIT_S)
            if drain.ident is not None:
                drain.join(LIMIT_S)


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors(client: httpx.Client, model: str, **options: Any) -> NDArray[np.float32]:
    data = post(client, "/v1/embeddings", model=model, input=TEXTS, **options)["data"]
    assert [item["index"] for item in data] == list(range(len(TEXTS)))
    if options.get("encoding_format") == "base64":
        return np.stack([np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in data])
    return np.array([item["embedding"] for item in data], dtype=np.float32)


@pytest.fixture(scope="module")
def expected(minilm: str) -> NDArray[np.float32]:
    """By the NumPy implementation."""

    async def run() -> NDArray[np.float32]:
        embedder = load_embedder(minilm, device="reference")
        try:
            return await embedder.embed([embedder.encode(text) for text in TEXTS])
        finally:
            await embedder.close()

    return asyncio.run(run())


def check_embeddings(client: httpx.Client, model: str, expected: NDArray[np.float32]) -> None:
    """Every form of the answer, against another implementation of the model."""
    floats = vectors(client, model)
    assert floats.shape == expected.shape
    np.testing.assert_allclose(floats, expected, atol=1e-5)
    assert vectors(client, model, encoding_format="base64").tobytes() == floats.tobytes()
    short = vectors(client, model, dimensions=64)
    assert short.shape == (len(TEXTS), 64)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    cosines = np.sum(short * expected[:, :64], axis=1) / np.linalg.norm(expected[:, :64], axis=1)
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


def check_ranking(client: httpx.Client, model: str, expected: NDArray[np.float32]) -> None:
    ranking = post(client, "/v1/rerank", model=model, query=TEXTS[0], documents=TEXTS[1:3])
    assert ranking["method"] == "embedding_similarity"
    assert [result["index"] for result in ranking["results"]] == [0, 1]
    scores = [result["relevance_score"] for result in ranking["results"]]
    np.testing.assert_allclose(scores, expected[1:3] @ expected[0], atol=1e-5)


def test_an_embedding_model_alone(minilm: str, expected: NDArray[np.float32]) -> None:
    with served(minilm) as client:
        check_embeddings(client, minilm, expected)
        check_ranking(client, minilm, expected)
        (card,) = client.get("/v1/models").json()["data"]
        assert card["id"] == minilm
        assert card["capabilities"] == ["embedding", "rerank"]
        refused = client.post("/v1/completions", json={"model": minilm, "prompt": "Hi"})
        assert refused.status_code == 400
        assert "embeddings only" in refused.json()["error"]["message"]


def test_an_embedding_model_beside_a_generation_model(
    smollm2: str, minilm: str, expected: NDArray[np.float32]
) -> None:
    with served(smollm2, "--embedding-model", minilm) as client:
        check_embeddings(client, minilm, expected)
        check_ranking(client, minilm, expected)
        text = post(
            client,
            "/v1/completions",
            model=smollm2,
            prompt="The capital of France is",
            max_tokens=6,
            temperature=0,
        )["choices"][0]["text"]
        assert "Paris" in text


def test_a_generation_model_makes_embeddings_of_its_own(smollm2: str) -> None:
    with served(smollm2) as client:
        floats = vectors(client, smollm2)
        assert floats.shape == (len(TEXTS), 576)
        np.testing.assert_allclose(np.linalg.norm(floats, axis=1), 1, atol=1e-5)
        assert vectors(client, smollm2).tobytes() == floats.tobytes()
        assert vectors(client, smollm2, encoding_format="base64").tobytes() == floats.tobytes()
        cosines = floats @ floats[0]
        assert cosines[1] > cosines[2]
        ranking = post(client, "/v1/rerank", query=TEXTS[0], documents=TEXTS[1:3])
        assert ranking["method"] == "embedding_similarity"
