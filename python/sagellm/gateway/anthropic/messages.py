"""``/v1/messages`` and ``/v1/messages/count_tokens``, in the form of Anthropic's API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers import json_response, stream_error, stream_responses
from sagellm.gateway.anthropic.conversion import chat_options, counting_options, shows_thinking
from sagellm.gateway.anthropic.output import MessageWriter
from sagellm.gateway.anthropic.types import (
    AnswerMessage,
    CountTokensRequest,
    MessagesRequest,
    TokenCount,
)
from sagellm.gateway.context import RequestContext, context_of
from sagellm.gateway.conversation import ChatRun, encode_chat, run_to_end, start_chat
from sagellm.serving import EventStream, RouterDef, until_disconnect

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""

    async def messages(query: MessagesRequest, request: Request) -> Response:
        context = context_of(request)
        options = chat_options(query)
        writer = MessageWriter(
            request_id=context.request_id,
            model=gateway.model_name,
            shows_thinking=shows_thinking(query),
            streams=options.stream,
        )
        if options.stream:
            run = await start_chat(gateway, options, context)
            return EventStream(stream_message(run, writer, context), on_close=run.cancel)
        await until_disconnect(request, run_to_end(gateway, options, writer, context))
        return json_response(writer.message)

    async def count_tokens(query: CountTokensRequest, request: Request) -> Response:
        prompt = await until_disconnect(request, encode_chat(gateway, counting_options(query)))
        return json_response({"input_tokens": len(prompt)})

    return {
        "v1": [
            RouterDef(
                "messages",
                messages,
                summary="Next message of a conversation",
                request_model=MessagesRequest,
                response_model=AnswerMessage,
                responses=stream_responses("`message_stop` or `error`"),
                tags=("messages",),
            ),
            RouterDef(
                "messages/count_tokens",
                count_tokens,
                summary="Tokens of a conversation",
                request_model=CountTokensRequest,
                response_model=TokenCount,
                tags=("messages",),
            ),
        ]
    }


async def stream_message(
    run: ChatRun, writer: MessageWriter, context: RequestContext
) -> AsyncGenerator[bytes, None]:
    """The events of a run; a failure ends them with an ``error`` event.

    ``message_start`` comes with the first output: only then is it known how much of the prompt the
    cache held.
    """
    begun = False
    try:
        async with aclosing(run.batches()) as batches:
            async for deltas in batches:
                events = b"" if begun else writer.begin(run.usage())
                begun = True
                events += writer.write(deltas)
                if events:
                    yield events
        yield writer.finish(run.usage())
    except Exception as error:
        yield writer.fail(stream_error(error, context), context.request_id)
