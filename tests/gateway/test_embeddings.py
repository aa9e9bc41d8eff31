"""``/v1/embeddings`` with the official client and by hand."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from gateway.support import HashEmbedder, mock_gateway, serve_in_thread
from sagellm.gateway.app import create_server
from sagellm.gateway.openai.embeddings import shorten
from sagellm.protocol import LIMITS

MODEL = "mock-embedding"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    gateway = mock_gateway(with_engine=False, embedder=HashEmbedder())
    with serve_in_thread(create_server(gateway)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """Strict, so for ``encoding_format="float"`` only: it checks before it decodes base64."""
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def refusal(url: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x", **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_texts_come_back_in_order_as_unit_vectors(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model=MODEL, input=["one", "two", "one"], encoding_format="float"
    )
    assert [item.index for item in answer.data] == [0, 1, 2]
    first, second, third = (item.embedding for item in answer.data)
    assert first == third != second
    assert len(first) == 16
    assert math.isclose(math.hypot(*first), 1.0, rel_tol=1e-6)
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 9


def test_the_client_decodes_the_base64_that_it_asks_for_by_default(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        item = client.embeddings.create(model=MODEL, input="one").data[0]
    assert math.isclose(math.hypot(*item.embedding), 1.0, rel_tol=1e-6)


def test_base64_is_little_endian_float32_of_the_same_numbers(url: str) -> None:
    answers = {
        form: httpx.post(
            f"{url}/v1/embeddings", json={"model": MODEL, "input": "abc", "encoding_format": form}
        ).json()["data"][0]["embedding"]
        for form in ("float", "base64")
    }
    decoded = np.frombuffer(base64.b64decode(answers["base64"]), dtype="<f4")
    assert decoded.tolist() == answers["float"]


@pytest.mark.parametrize(
    "given", [[97, 98, 99], [[97, 98, 99]]], ids=["one list", "a list of lists"]
)
def test_token_ids_are_taken_as_they_are(client: openai.OpenAI, given: Any) -> None:
    text = client.embeddings.create(model=MODEL, input="abc", encoding_format="float")
    ids = client.embeddings.create(model=MODEL, input=given, encoding_format="float")
    assert ids.data[0].embedding == text.data[0].embedding
    assert ids.usage.prompt_tokens == 3


def test_fewer_dimensions_are_the_first_ones_at_length_one(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model=MODEL, input="hello", encoding_format="float")
    short = client.embeddings.create(
        model=MODEL, input="hello", dimensions=10, encoding_format="float"
    )
    first = np.array(whole.data[0].embedding[:10])
    np.testing.assert_allclose(
        short.data[0].embedding, first / np.linalg.norm(first), rtol=0, atol=1e-6
    )


def test_shortening_keeps_a_zero_vector_finite() -> None:
    vectors = np.array([[0.0, 0.0, 1.0], [3.0, 4.0, 0.0]], dtype=np.float32)
    np.testing.assert_array_equal(
        shorten(vectors, 2), np.array([[0.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    )


def test_more_dimensions_than_the_model_has_are_refused(url: str) -> None:
    error = refusal(url, dimensions=17)
    assert error["param"] == "dimensions"
    assert "16" in error["message"]


@pytest.mark.parametrize(
    "given",
    ["", [], [""], [[]], ["a", 1], [-1], [True], [1.5], {"text": "a"}, None, ["a"] * 257],
    ids=repr,
)
def test_an_input_of_another_form_is_refused_in_one_sentence(url: str, given: Any) -> None:
    error = refusal(url, input=given)
    assert error["param"] == "input"
    assert "a string, a list of strings" in error["message"]
    assert str(LIMITS.prompts_per_request) in error["message"]


def test_an_input_longer_than_the_model_reads_is_refused_not_cut(url: str) -> None:
    error = refusal(url, input=["short", "x" * 129])
    assert error["param"] == "input.1"
    assert error["code"] == "context_length_exceeded"
    assert "129" in error["message"] and "128" in error["message"]


@pytest.mark.parametrize("field", [{"encoding_format": "int8"}, {"truncate": True}])
def test_an_unknown_field_or_value_is_refused_by_name(url: str, field: dict[str, Any]) -> None:
    error = refusal(url, **field)
    assert next(iter(field)) in error["message"]


def test_another_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="mock-embedding"):
        client.embeddings.create(model="another", input="x")


def test_a_server_without_embeddings_says_so() -> None:
    with (
        serve_in_thread(create_server(mock_gateway())) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="--embedding-model"),
    ):
        client.embeddings.create(model="mock", input="x")


class BrokenEmbedder(HashEmbedder):
    async def embed(self, prompts: Any) -> Any:
        vectors = await super().embed(prompts)
        vectors[0, 0] = np.nan
        return vectors


def test_numbers_that_are_not_finite_never_reach_a_client() -> None:
    gateway = mock_gateway(with_engine=False, embedder=BrokenEmbedder())
    with serve_in_thread(create_server(gateway)) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert answer.status_code == 500
    assert "NaN" not in answer.text
