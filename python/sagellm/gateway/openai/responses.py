"""``/v1/responses``: the Responses API without a memory of its own.

Nothing is stored: ``store`` is taken because clients send it by default, every answer says
``"store": false``, and whatever refers to something stored is a 400.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers import json_response, stream_error, stream_responses
from sagellm.gateway.context import RequestContext, context_of
from sagellm.gateway.conversation import ChatRun, run_to_end, start_chat
from sagellm.gateway.openai.responses_input import chat_options
from sagellm.gateway.openai.responses_output import ResponseWriter, new_response
from sagellm.gateway.openai.responses_types import CreateResponse, ResponseObject
from sagellm.serving import EventStream, RouterDef, until_disconnect

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""

    async def responses(query: CreateResponse, request: Request) -> Response:
        context = context_of(request)
        options = chat_options(gateway, query)
        response = new_response(query, gateway.model_name, context)
        writer = ResponseWriter(response, streams=options.stream)
        if options.stream:
            run = await start_chat(gateway, options, context)
            return EventStream(stream_response(run, writer, context), on_close=run.cancel)
        await until_disconnect(request, run_to_end(gateway, options, writer, context))
        return json_response(writer.response)

    return {
        "v1": [
            RouterDef(
                "responses",
                responses,
                summary="Response to a conversation",
                request_model=CreateResponse,
                response_model=ResponseObject,
                responses=stream_responses(
                    "`response.completed`, `response.incomplete` or `response.failed`"
                ),
                tags=("responses",),
            )
        ]
    }


async def stream_response(
    run: ChatRun, writer: ResponseWriter, context: RequestContext
) -> AsyncGenerator[bytes, None]:
    """The events of a run; a failure ends them with ``response.failed``."""
    try:
        yield writer.begin()
        async with aclosing(run.batches()) as batches:
            async for deltas in batches:
                events = writer.write(deltas)
                if events:
                    yield events
        yield writer.finish(run.usage())
    except Exception as error:
        yield writer.fail(stream_error(error, context), run.usage(), context.request_id)
