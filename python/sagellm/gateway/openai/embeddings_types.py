"""What ``/v1/embeddings`` and ``/v1/rerank`` take and give."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from sagellm.gateway.request_model import WHOLE, RequestModel, explained
from sagellm.protocol import LIMITS

_MANY = LIMITS.prompts_per_request

TokenId = Annotated[int, Field(ge=0, le=LIMITS.token_id)]
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1), WHOLE]
Texts = Annotated[list[Text], Field(min_length=1, max_length=_MANY)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=_MANY)]
EmbeddingInput = Annotated[
    Text | Texts | Tokens | TokenLists,
    explained(
        "a string, a list of strings, a list of token ids, or a list of lists of token ids; none "
        f"of them empty, and at most {_MANY} inputs"
    ),
]


class EmbeddingRequest(RequestModel):
    """A request for embeddings.

    Attributes:
        input: Text is encoded with the model's special tokens; token ids are taken as they are.
        model: Name of the model.
        dimensions: Keep this many leading components and normalise again.
        encoding_format: JSON numbers, or base64 of little-endian float32.
        user: A label; has no effect.
    """

    input: EmbeddingInput
    model: str | None = None
    dimensions: Annotated[int, Field(ge=1), WHOLE] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class EmbeddingUsage(BaseModel):
    """Tokens that the model read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(BaseModel):
    """One embedding; a string when base64 was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """Embeddings in the order of the input."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class RerankDocument(RequestModel):
    """A document as an object."""

    text: Text


RerankInput = Annotated[Text | RerankDocument, explained('a non-empty string or {"text": string}')]


class RerankRequest(RequestModel):
    """A request to sort documents by their relevance to a query.

    Attributes:
        model: Name of the model.
        query: What to compare with.
        documents: Texts to sort.
        top_n: Give only the best; None gives all.
        return_documents: Repeat the text of each document in the answer.
        user: A label; has no effect.
    """

    query: Text
    documents: Annotated[list[RerankInput], Field(min_length=1, max_length=_MANY)]
    model: str | None = None
    top_n: Annotated[int, Field(ge=1), WHOLE] | None = None
    return_documents: bool = False
    user: str | None = None


class RerankResult(BaseModel):
    """One document's place in the order; ``index`` counts in the request's order."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankResponse(BaseModel):
    """Documents, best first.

    Attributes:
        method: ``cross_encoder``: the model read query and document together, scores are in
            (0, 1). ``embedding_similarity``: cosine of two embeddings, in [-1, 1].
    """

    id: str
    model: str
    method: Literal["cross_encoder", "embedding_similarity"]
    results: list[RerankResult]
    usage: EmbeddingUsage
