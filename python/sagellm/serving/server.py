"""A FastAPI application out of route definitions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import Body, FastAPI, Path, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import WebSocketRoute, compile_path
from starlette.types import ASGIApp

from sagellm.errors import InvalidArgumentError
from sagellm.serving.calls import BoundHandler
from sagellm.serving.docs_page import docs_page
from sagellm.serving.endpoints import Endpoint
from sagellm.serving.environment import env
from sagellm.serving.failures import ErrorRenderer, ErrorResponse, ExceptionHandler
from sagellm.serving.routes import HTTPMethod, RouterConfig, RouterDef, RouterKind
from sagellm.serving.threads import ThreadPool
from sagellm.serving.tracing import TRACE_HEADER
from sagellm.serving.websocket import WebSocketEndpoint

Hook = Callable[[], "Awaitable[None] | None"]


async def run_hook(hook: Hook | None) -> None:
    """Call a hook, sync or async."""
    if hook is not None and inspect.isawaitable(waiting := hook()):
        await waiting


class Server:
    """Routes and what surrounds them, as one ASGI application: `app`.

    A route's path is `prefix/group/path`, where group is its key in `routers`.

    Args:
        routers: route definitions by group.
        router_config: time limits, sizes and headers that the routes share; by default with
            MODEL_TIMEOUT and MODEL_THREAD_CONCURRENCY from the environment.
        prefix: put before every path, for example "/v1".
        on_startup: called before the first request is accepted; its failure ends the server.
        on_shutdown: called after the last request.
        enable_cors: True for every origin, or the origins allowed. Credentials are never allowed.
        app_name: title of the OpenAPI document.
        version: version in the OpenAPI document.
        exception_handler: sees every exception first (a missing route and a wrong method included);
            the response it returns is the answer, and None leaves the standard one.
        middleware: factories of pure ASGI applications around the routes, the outermost first.
        on_drain: called when the server is told to stop and accepts nothing more, while open
            requests go on.
        description: text of the OpenAPI document.

    Raises:
        InvalidArgumentError: a route that cannot work, or two routes in the same place.
    """

    def __init__(
        self,
        routers: Mapping[str, Sequence[RouterDef]],
        router_config: RouterConfig | None = None,
        prefix: str = "",
        on_startup: Hook | None = None,
        on_shutdown: Hook | None = None,
        enable_cors: bool | Sequence[str] = False,
        app_name: str = "ieops",
        version: str = "0.1.0",
        exception_handler: ExceptionHandler | None = None,
        middleware: Sequence[Callable[[ASGIApp], ASGIApp]] = (),
        on_drain: Hook | None = None,
        description: str = "",
    ) -> None:
        self.name = app_name
        self.on_drain = on_drain
        self.startup_failure: BaseException | None = None
        self._on_startup = on_startup
        self._on_shutdown = on_shutdown
        self.config = router_config or RouterConfig(
            timeout=env.model.timeout, thread_concurrency=env.model.concurrency
        )
        self._pool = ThreadPool(self.config.thread_concurrency)
        self._errors = ErrorRenderer(exception_handler)
        self._documents_errors = exception_handler is None
        self.app = FastAPI(
            title=app_name,
            version=version,
            description=description,
            lifespan=self._lifespan,
            docs_url=None,  # FastAPI's page is empty without a network
            redoc_url=None,
            redirect_slashes=False,
            middleware=[*_cors(enable_cors), *(Middleware(make) for make in middleware)],
            exception_handlers={
                HTTPException: self._errors.response,
                RequestValidationError: self._errors.response,
                Exception: self._errors.response,
            },
        )
        self.app.add_api_route("/docs", self._docs, include_in_schema=False)
        seen: set[tuple[str, str]] = set()
        for group, routes in routers.items():
            for route in routes:
                self._add(join_path(prefix, group, route.path), group, route, seen)

    async def _docs(self) -> HTMLResponse:
        return HTMLResponse(docs_page(self.app.openapi()))

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        try:
            await run_hook(self._on_startup)
        except BaseException as error:
            self.startup_failure = error
            raise
        try:
            yield
        finally:
            try:
                await run_hook(self._on_shutdown)
            finally:
                self._pool.close()

    def _add(self, path: str, group: str, route: RouterDef, seen: set[tuple[str, str]]) -> None:
        place = ("WS" if route.kind is RouterKind.WS else route.method.value, path)
        if place in seen:
            raise InvalidArgumentError(f"two routes for {place[0]} {path}: give one another path")
        seen.add(place)
        handler = BoundHandler.bind(route.handler, self._pool)
        if route.kind is RouterKind.WS:
            socket = WebSocketEndpoint(route, self.config, handler, self._errors)
            self.app.router.routes.append(WebSocketRoute(path, socket.serve))
            return
        if route.kind is RouterKind.API and handler.kind.streams:
            raise InvalidArgumentError(
                f"route {path}: its handler is a {handler.kind.value}; "
                "use kind=RouterKind.SSE or RouterKind.WS"
            )
        endpoint = Endpoint(route, self.config, handler, self._errors)
        self.app.router.routes.append(self._http_route(path, group, route, endpoint))

    def _http_route(self, path: str, group: str, route: RouterDef, endpoint: Endpoint) -> APIRoute:
        responses: dict[int | str, dict[str, Any]]
        responses = {status: dict(r) for status, r in (route.responses or {}).items()}
        streams = route.kind is RouterKind.SSE
        if self._documents_errors:
            error: dict[str, Any] = {"model": ErrorResponse}
            if streams:  # FastAPI would list the model as an event stream
                schema = ErrorResponse.model_json_schema()
                error = {"content": {"application/json": {"schema": schema}}}
            responses.setdefault("default", {**error, "description": "Error"})
        if streams and 200 not in responses:
            responses[200] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
        return _Route(
            path,
            _documented(path, route),
            endpoint=endpoint,
            methods=[route.method.value],
            response_model=route.response_model,
            responses=responses,
            summary=route.summary or None,
            description=route.description,
            tags=list(route.tags) or [group],
            include_in_schema=route.include_in_schema,
            response_class=_EventResponse if streams else JSONResponse,
        )


class _EventResponse(Response):
    media_type = "text/event-stream"


class _Route(APIRoute):
    """A FastAPI route for its OpenAPI document and its matching; the endpoint answers directly."""

    def __init__(
        self, path: str, documented: Callable[..., Any], *, endpoint: Endpoint, **rest: Any
    ) -> None:
        self._answer = endpoint
        super().__init__(path, documented, **rest)

    def get_route_handler(self) -> Callable[[Request], Any]:
        return self._answer.__call__


def join_path(*parts: str) -> str:
    """Join the parts of a path by single slashes."""
    return "/" + "/".join(stripped for part in parts if (stripped := part.strip("/")))


def _cors(enabled: bool | Sequence[str]) -> list[Middleware]:
    if enabled is False:
        return []
    origins = ["*"] if enabled is True else list(enabled)
    options: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
    options["expose_headers"] = [TRACE_HEADER]
    return [Middleware(CORSMiddleware, allow_origins=origins, **options)]


def _documented(path: str, route: RouterDef) -> Callable[..., None]:
    """Return a function whose signature tells FastAPI what to document; it is never called."""

    def handler() -> None: ...

    names = compile_path(path)[2]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, Path()])
        for name in names
    ]
    kind = inspect.Parameter.KEYWORD_ONLY
    model = route.request_model
    has_body = route.method not in (HTTPMethod.GET, HTTPMethod.DELETE)
    if model is not None:
        annotation = Annotated[model, Body() if has_body else Query()]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter("query", kind, annotation=annotation))
    elif has_body:
        optional = Annotated[dict[str, Any], Body()]
        parameters.append(inspect.Parameter("query", kind, annotation=optional, default={}))
    handler.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    handler.__name__ = getattr(route.handler, "__name__", "handler").strip("<>")
    return handler
