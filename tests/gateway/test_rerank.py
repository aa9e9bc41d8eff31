"""``/v1/rerank``: by a cross-encoder where there is one, else by embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.support import HashEmbedder, mock_gateway, serve_in_thread
from sagellm.gateway.app import create_server

MODEL = "mock-embedding"


def serve(embedder: HashEmbedder) -> Any:
    return serve_in_thread(create_server(mock_gateway(with_engine=False, embedder=embedder)))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(HashEmbedder()) as url:
        yield url


def rerank(url: str, path: str = "/v1/rerank", **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"model": MODEL, "query": "abc", **body})


def ranking(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [result["index"] for result in answer.json()["results"]]


def test_the_best_document_comes_first_and_the_method_is_named(url: str) -> None:
    answer = rerank(url, documents=["zzz", "abd", "abc"])
    assert ranking(answer) == [2, 1, 0]
    body = answer.json()
    scores = [result["relevance_score"] for result in body["results"]]
    assert scores[0] == pytest.approx(1.0)
    assert scores == sorted(scores, reverse=True)
    assert body["method"] == "embedding_similarity"
    assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    assert "document" not in body["results"][0]


def test_equal_scores_keep_the_order_of_the_request(url: str) -> None:
    assert ranking(rerank(url, documents=["abd", "abc", "abd", "abc", "abd"])) == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_top_n_cuts_and_documents_come_back_when_asked(url: str, path: str) -> None:
    answer = rerank(url, path, documents=["zzz", {"text": "abc"}], top_n=1, return_documents=True)
    assert ranking(answer) == [1]
    assert answer.json()["results"][0]["document"] == {"text": "abc"}


def test_more_than_there_are_is_all(url: str) -> None:
    assert ranking(rerank(url, documents=["abc"], top_n=5)) == [0]


def test_a_cross_encoder_reads_query_and_document_together() -> None:
    with serve(HashEmbedder(has_cross_encoder=True)) as url:
        answer = rerank(url, documents=["a long document", "short"])
    assert ranking(answer) == [1, 0]
    body = answer.json()
    assert body["method"] == "cross_encoder"
    assert body["results"][0]["relevance_score"] == pytest.approx(1 / (1 + 3 + 1 + 5))
    assert body["usage"]["prompt_tokens"] == (3 + 1 + 15) + (3 + 1 + 5)


@pytest.mark.parametrize("has_cross_encoder", [False, True])
def test_a_document_longer_than_the_model_reads_is_refused(has_cross_encoder: bool) -> None:
    with serve(HashEmbedder(has_cross_encoder=has_cross_encoder)) as url:
        answer = rerank(url, documents=["fits", "x" * 129])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "documents.1"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"documents": []}, "documents"),
        ({"documents": [""]}, "documents.0"),
        ({"documents": [{"title": "abc"}]}, "documents.0"),
        ({"documents": [1]}, "documents.0"),
        ({"documents": ["a"] * 257}, "documents"),
        ({"documents": ["a"], "top_n": 0}, "top_n"),
        ({"documents": ["a"], "query": ""}, "query"),
        ({"documents": ["a"], "max_chunks_per_doc": 3}, "max_chunks_per_doc"),
        ({}, "documents"),
    ],
)
def test_an_illegal_request_names_the_field(url: str, body: dict[str, Any], named: str) -> None:
    answer = rerank(url, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == named
