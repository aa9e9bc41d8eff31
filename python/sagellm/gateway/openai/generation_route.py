"""What the routes of chat completions and completions have in common."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers import event, stream_error, stream_responses
from sagellm.gateway.context import RequestContext, context_of
from sagellm.gateway.openai.common import GenerationFields
from sagellm.serving import EventStream, RouterDef, until_disconnect

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway

Query = TypeVar("Query", bound=GenerationFields)
Events = tuple[AsyncIterator[bytes], Callable[[], None]]
"""What a stream sends, and how to stop the work behind it."""


def generation_routers(
    gateway: Gateway,
    path: str,
    *,
    summary: str,
    tag: str,
    request_model: type[Query],
    response_model: type[BaseModel],
    create: Callable[[Gateway, Query, RequestContext], Awaitable[Response]],
    stream: Callable[[Gateway, Query, RequestContext], Awaitable[Events]],
) -> dict[str, list[RouterDef]]:
    """A module's one route.

    Args:
        gateway: Serves it.
        path: Below ``/v1``.
        summary: For the OpenAPI document, as are
        tag: and the models.
        request_model: The body.
        response_model: The answer that is no stream.
        create: Answers a request that is no stream; cancelled when the client leaves.
        stream: Starts a stream; what it raises is still answered with a status of its own.
    """

    async def answer(query: Query, request: Request) -> Response:
        context = context_of(request)
        if query.stream:
            events, cancel = await stream(gateway, query, context)
            return EventStream(ends_with_error(events, context), on_close=cancel)
        return await until_disconnect(request, create(gateway, query, context))

    answer.__name__ = path.replace("/", "_")  # names the operation in the OpenAPI document
    return {
        "v1": [
            RouterDef(
                path,
                answer,
                summary=summary,
                request_model=request_model,
                response_model=response_model,
                responses=stream_responses("`[DONE]` or an `error` event"),
                tags=(tag,),
            )
        ]
    }


async def ends_with_error(
    events: AsyncIterator[bytes], context: RequestContext
) -> AsyncGenerator[bytes, None]:
    """Passes events on; a failure becomes the last event, in the API's error shape.

    Args:
        events: Of a stream whose status is sent already.
        context: Of the request.
    """
    try:
        async for data in events:
            yield data
    except Exception as error:
        answer = stream_error(error, context)
        yield event("error", answer.openai(context.request_id)).encode()
