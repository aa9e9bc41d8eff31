"""All routes, middlewares and answers of the gateway as one ``serving.Server``."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sagellm import __version__
from sagellm.errors import SagellmError
from sagellm.gateway import health, metrics, models, tokenization
from sagellm.gateway.access_log import AccessLog
from sagellm.gateway.anthropic import messages
from sagellm.gateway.context import context_of
from sagellm.gateway.errors import ApiError, describe_validation
from sagellm.gateway.lifecycle import Drain
from sagellm.gateway.middleware import AdmissionMiddleware, BodyMiddleware, ContextMiddleware
from sagellm.gateway.openai import chat, completions, embeddings, rerank, responses
from sagellm.gateway.openapi import describe_api, error_responses
from sagellm.protocol import LIMITS
from sagellm.serving import RouterConfig, RouterDef, Server

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection
    from starlette.responses import Response

    from sagellm.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

ROUTE_MODULES: Sequence[Any] = (
    chat,
    completions,
    responses,
    embeddings,
    rerank,
    messages,
    tokenization,
    models,
    health,
    metrics,
)
_GRACE_S = 10.0  # the engine's deadline answers first; this limit is for the rest


def create_server(gateway: Gateway, *, log_stream: TextIO | None = None) -> Server:
    """Builds the server of a gateway; its start warms the models up, its end closes them.

    Args:
        gateway: With loaded models.
        log_stream: Where access log lines go; None is standard output.
    """
    config = gateway.config
    access_log = AccessLog(log_stream) if config.access_log else None

    async def on_startup() -> None:
        await gateway.warm_up()
        Drain(gateway).install()

    async def on_shutdown() -> None:
        await gateway.close()
        if access_log is not None:
            access_log.close()

    limit = config.request_timeout_s
    server = Server(
        routers=collect_routes(gateway),
        router_config=RouterConfig(
            timeout=None if limit is None else limit + _GRACE_S,
            max_body_bytes=LIMITS.body_bytes,
        ),
        on_startup=on_startup,
        on_shutdown=on_shutdown,
        enable_cors=list(config.cors_origins) if config.cors_origins else False,
        app_name="sagellm",
        version=__version__,
        exception_handler=answer_exception,
        middleware=(
            partial(ContextMiddleware, gateway=gateway, access_log=access_log),
            partial(AdmissionMiddleware, gateway=gateway),
            partial(BodyMiddleware, gateway=gateway),
        ),
    )
    describe_api(server.app, has_keys=bool(config.api_keys), public=config.metrics_public)
    return server


def collect_routes(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of every module by group, each with its error answers."""
    merged: dict[str, list[RouterDef]] = {}
    for module in ROUTE_MODULES:
        for group, routes in module.routers(gateway).items():
            merged.setdefault(group, []).extend(
                dataclasses.replace(
                    route,
                    responses={**error_responses(group, route), **(route.responses or {})},
                )
                for route in routes
            )
    return merged


def answer_exception(request: HTTPConnection, error: Exception) -> Response:
    """The answer to whatever a route, or the search for one, raised."""
    context = context_of(request)
    answer = as_api_error(request, error)
    if answer.status >= 500 and not isinstance(error, (ApiError, SagellmError)):
        logger.error("request %s failed", context.request_id, exc_info=error)
    context.error = answer.code
    headers = answer.headers()
    if isinstance(error, HTTPException) and error.headers:
        headers |= dict(error.headers)  # such as Allow beside 405
    path = request.url.path
    return JSONResponse(answer.body(path, context.request_id), answer.status, headers)


def as_api_error(request: HTTPConnection, error: Exception) -> ApiError:
    """What a client is told about an exception; nothing about unexpected ones."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SagellmError):
        return ApiError.from_error(error)
    if isinstance(error, (RequestValidationError, ValidationError)):
        body = getattr(error, "body", None)
        message, param = describe_validation(list(error.errors()), body)
        return ApiError(400, message, code="invalid_value", param=param)
    if isinstance(error, HTTPException):
        return _from_http(request, error)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return ApiError(504, "the request took longer than this server allows; ask for less")
    return ApiError.internal()


def _from_http(request: HTTPConnection, error: HTTPException) -> ApiError:
    path = request.url.path[:128]
    if error.status_code == 404:
        return ApiError(404, f"there is no route {path}; /docs lists all", code="unknown_route")
    if error.status_code == 405:
        method = request.scope.get("method", "this method")
        return ApiError(405, f"{path} does not take {method}; /docs lists all routes")
    if error.status_code >= 500 and error.status_code != 504:
        return ApiError.internal()
    return ApiError(error.status_code, str(error.detail))
