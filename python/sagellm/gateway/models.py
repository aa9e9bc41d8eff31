"""``/v1/models`` and ``/v1/models/{model}``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from starlette.requests import Request

from sagellm.gateway.errors import ApiError
from sagellm.serving import HTTPMethod, RouterDef

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway


class ModelCard(BaseModel):
    """A model that requests may name.

    Attributes:
        root: The name of the model that this name stands for.
        max_model_len: Longest prompt and output together, in tokens; for an embedding model its
            longest input.
        capabilities: What the model is for.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sagellm"
    root: str
    max_model_len: int
    capabilities: list[Literal["completion", "chat", "embedding", "rerank"]]


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""

    async def list_models() -> ModelList:
        return ModelList(data=[model_card(gateway, name) for name in gateway.model_names])

    async def show_model(request: Request) -> ModelCard:
        name = request.path_params["model"]
        if name not in gateway.model_names:
            raise ApiError(
                404,
                f"the model {name[:128]!r} does not exist here; served: "
                f"{', '.join(gateway.model_names)}",
                code="model_not_found",
                param="model",
            )
        return model_card(gateway, name)

    def route(path: str, handler: Any, summary: str, model: type[BaseModel]) -> RouterDef:
        return RouterDef(
            path,
            handler,
            method=HTTPMethod.GET,
            summary=summary,
            response_model=model,
            tags=("models",),
        )

    return {
        "v1": [
            route("models", list_models, "The models served here", ModelList),
            route("models/{model:path}", show_model, "One model", ModelCard),
        ]
    }


def model_card(gateway: Gateway, name: str) -> ModelCard:
    """Describes one of ``gateway.model_names``."""
    capabilities: list[Literal["completion", "chat", "embedding", "rerank"]] = []
    max_model_len = 0
    root = gateway.model_name
    if gateway.engine is not None and name in gateway.generation_names:
        capabilities.append("completion")
        if gateway.chat_template is not None:
            capabilities.append("chat")
        max_model_len = gateway.engine.engine.capacity.max_model_len
    if gateway.embedder is not None and name in gateway.embedding_names:
        capabilities += ["embedding", "rerank"]
        if not max_model_len:
            max_model_len = gateway.embedder.max_tokens
            root = gateway.embedding_names[0]
    return ModelCard(
        id=name,
        created=gateway.created,
        root=root,
        max_model_len=max_model_len,
        capabilities=capabilities,
    )
