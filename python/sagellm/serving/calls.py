"""Calling a handler whatever it is: function, coroutine function, generator, async generator."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import HTTPConnection

from sagellm.errors import InvalidArgumentError
from sagellm.serving.routes import Handler
from sagellm.serving.threads import ThreadIterator, ThreadPool


class HandlerKind(enum.Enum):
    """What a handler is, found by looking at it."""

    ASYNC_GENERATOR = "async generator"
    GENERATOR = "generator"
    ASYNC_FUNCTION = "async function"
    FUNCTION = "function"

    @property
    def streams(self) -> bool:
        """Whether it yields items."""
        return self in (HandlerKind.ASYNC_GENERATOR, HandlerKind.GENERATOR)


def handler_kind(handler: Handler) -> HandlerKind:
    """Tell what `handler` is; looks through partials and at the `__call__` of objects."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    code = handler if inspect.isroutine(handler) else type(handler).__call__
    if inspect.isasyncgenfunction(code):
        return HandlerKind.ASYNC_GENERATOR
    if inspect.isgeneratorfunction(code):
        return HandlerKind.GENERATOR
    if inspect.iscoroutinefunction(code):
        return HandlerKind.ASYNC_FUNCTION
    return HandlerKind.FUNCTION


@dataclass(frozen=True, slots=True)
class BoundHandler:
    """A handler, what it is, and which of `query` and `request` it takes."""

    function: Handler
    kind: HandlerKind
    takes_query: bool
    takes_request: bool
    pool: ThreadPool

    @classmethod
    def bind(cls, function: Handler, pool: ThreadPool) -> BoundHandler:
        """Look at a handler's signature.

        Raises:
            InvalidArgumentError: it needs more than `query` and `request`.
        """
        name = getattr(function, "__qualname__", repr(function))
        try:
            parameters = inspect.signature(function).parameters
        except ValueError as error:
            message = f"handler {name} has no signature: wrap it in a function of `query`"
            raise InvalidArgumentError(message) from error
        others = [p for name, p in parameters.items() if name != "request"]
        positional = [p for p in others if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [p.name for p in positional[1:] if p.default is p.empty]
        needed += [p.name for p in others if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        if needed:
            raise InvalidArgumentError(
                f"handler {name} needs {', '.join(needed)}: a handler takes `query` and, if it "
                "wants it, `request`; give the others defaults or use functools.partial"
            )
        takes_query = bool(positional) or any(p.kind is p.VAR_POSITIONAL for p in others)
        return cls(function, handler_kind(function), takes_query, "request" in parameters, pool)

    def call(self, query: Any, request: HTTPConnection) -> Any:
        """Call the handler here and now: a generator, a coroutine or a result."""
        arguments = (query,) if self.takes_query else ()
        return self.function(*arguments, **({"request": request} if self.takes_request else {}))

    async def result(self, query: Any, request: HTTPConnection) -> Any:
        """Return what the handler returns; plain functions run in a thread."""
        if self.kind is HandlerKind.FUNCTION:
            result = await self.pool.run(functools.partial(self.call, query, request))
        else:
            result = self.call(query, request)
        return await result if inspect.isawaitable(result) else result

    async def items(self, query: Any, request: HTTPConnection) -> AsyncIterator[Any] | Any:
        """Return an async iterator of the items, or the result of a handler that has none."""
        result = (
            self.call(query, request) if self.kind.streams else await self.result(query, request)
        )
        if isinstance(result, Iterator):
            return ThreadIterator(result, self.pool)
        return result
