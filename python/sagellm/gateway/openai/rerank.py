"""``/v1/rerank`` and ``/rerank``, in the shape that Jina and Cohere share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers import json_response
from sagellm.gateway.context import context_of
from sagellm.gateway.openai.embeddings import check_finite, check_length
from sagellm.gateway.openai.embeddings_types import RerankRequest, RerankResponse
from sagellm.serving import RouterDef, until_disconnect

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.engine.embedding import Embedder
    from sagellm.gateway.gateway import Gateway


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""

    async def rerank(query: RerankRequest, request: Request) -> Response:
        request_id = context_of(request).request_id
        return await until_disconnect(request, create_ranking(gateway, query, request_id))

    def route(path: str) -> RouterDef:
        return RouterDef(
            path,
            rerank,
            summary="Documents sorted by relevance",
            request_model=RerankRequest,
            response_model=RerankResponse,
            tags=("embeddings",),
        )

    return {"v1": [route("rerank")], "rerank": [route("")]}


async def create_ranking(gateway: Gateway, query: RerankRequest, request_id: str) -> Response:
    """Answers a request. Equal scores keep the order of the request.

    Raises:
        ApiError: No such model, or a text that is too long.
    """
    gateway.require_open()
    embedder = gateway.require_embedder(query.model)
    texts = [item if isinstance(item, str) else item.text for item in query.documents]
    if embedder.has_cross_encoder:
        method, (scores, num_tokens) = "cross_encoder", await _cross(embedder, query.query, texts)
    else:
        method = "embedding_similarity"
        scores, num_tokens = await _similarity(embedder, query.query, texts)
    order = np.argsort(-check_finite(scores), kind="stable")[: query.top_n].tolist()
    results: list[dict[str, Any]] = []
    for index in order:
        result = {"index": index, "relevance_score": float(scores[index])}
        results.append(
            {**result, "document": {"text": texts[index]}} if query.return_documents else result
        )
    body = {
        "id": request_id,
        "model": gateway.embedding_names[0],
        "method": method,
        "results": results,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return json_response(body)


async def _cross(
    embedder: Embedder, query: str, texts: list[str]
) -> tuple[NDArray[np.float32], int]:
    def encode() -> list[Any]:
        return [embedder.encode_pair(query, text) for text in texts]

    pairs = await asyncio.to_thread(encode)
    for index, pair in enumerate(pairs):
        check_length(len(pair.token_ids), embedder.max_tokens, "documents", index)
    return await embedder.score(pairs), sum(len(pair.token_ids) for pair in pairs)


async def _similarity(
    embedder: Embedder, query: str, texts: list[str]
) -> tuple[NDArray[np.float32], int]:
    def encode() -> list[list[int]]:
        return [embedder.encode(text) for text in (query, *texts)]

    prompts = await asyncio.to_thread(encode)
    check_length(len(prompts[0]), embedder.max_tokens, "query")
    for index, prompt in enumerate(prompts[1:]):
        check_length(len(prompt), embedder.max_tokens, "documents", index)
    vectors = (await embedder.embed(prompts)).astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    products = np.where(lengths == 0.0, 1.0, lengths) * (lengths[0] or 1.0)
    cosines = np.clip(vectors @ vectors[0] / products, -1.0, 1.0)
    return cosines[1:].astype(np.float32), sum(map(len, prompts))
