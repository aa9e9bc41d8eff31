"""``/v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers import json_response
from sagellm.gateway.errors import ApiError
from sagellm.gateway.openai.embeddings_types import EmbeddingRequest, EmbeddingResponse
from sagellm.serving import RouterDef, until_disconnect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sagellm.engine.embedding import Embedder
    from sagellm.gateway.gateway import Gateway


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""

    async def embeddings(query: EmbeddingRequest, request: Request) -> Response:
        return await until_disconnect(request, create_embeddings(gateway, query))

    return {
        "v1": [
            RouterDef(
                "embeddings",
                embeddings,
                summary="Embeddings of texts",
                request_model=EmbeddingRequest,
                response_model=EmbeddingResponse,
                tags=("embeddings",),
            )
        ]
    }


async def create_embeddings(gateway: Gateway, query: EmbeddingRequest) -> Response:
    """Answers a request.

    Raises:
        ApiError: No such model, an input that is too long, or more dimensions than there are.
    """
    gateway.require_open()
    embedder = gateway.require_embedder(query.model)
    if query.dimensions is not None and query.dimensions > embedder.dimension:
        raise ApiError(
            400,
            f"dimensions is {query.dimensions}; this model has {embedder.dimension}",
            param="dimensions",
        )
    prompts = await asyncio.to_thread(encode_inputs, embedder, query.input)
    vectors = check_finite(await embedder.embed(prompts))
    if query.dimensions is not None and query.dimensions < embedder.dimension:
        vectors = shorten(vectors, query.dimensions)
    num_tokens = sum(map(len, prompts))
    body = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": value}
            for index, value in enumerate(_as_json(vectors, query.encoding_format))
        ],
        "model": gateway.embedding_names[0],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return json_response(body)


def encode_inputs(
    embedder: Embedder, inputs: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    """Token ids of each input.

    Raises:
        ApiError: An input is longer than the model reads.
    """
    listed: Sequence[Any] = [inputs] if isinstance(inputs, str) else inputs
    if isinstance(listed[0], int):
        listed = [listed]
    prompts = [embedder.encode(item) if isinstance(item, str) else list(item) for item in listed]
    for index, prompt in enumerate(prompts):
        check_length(len(prompt), embedder.max_tokens, "input", index if len(prompts) > 1 else None)
    return prompts


def check_length(num_tokens: int, limit: int, param: str, index: int | None = None) -> None:
    """Refuses what the model cannot read whole; it is never cut silently.

    Raises:
        ApiError: More tokens than ``limit``.
    """
    if num_tokens > limit:
        place = param if index is None else f"{param}.{index}"
        raise ApiError(
            400,
            f"{place} has {num_tokens} tokens; this model reads at most {limit}: send a shorter "
            "text, or split it",
            param=place,
            code="context_length_exceeded",
        )


def shorten(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """The first components of each vector, of length 1 again (a zero vector stays zero)."""
    cut = vectors[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return (cut / np.where(lengths == 0.0, 1.0, lengths)).astype(np.float32)


def check_finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Passes on what JSON can carry.

    Raises:
        ApiError: The model gave NaN or infinities.
    """
    if not np.isfinite(values).all():
        raise ApiError(500, "the model gave numbers that are not finite; its weights may be broken")
    return values


def _as_json(vectors: NDArray[np.float32], encoding_format: str) -> list[Any]:
    if encoding_format == "float":
        listed: list[Any] = vectors.tolist()
        return listed
    rows = np.ascontiguousarray(vectors, dtype="<f4")
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]
