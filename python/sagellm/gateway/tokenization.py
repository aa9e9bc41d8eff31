"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field

from sagellm.gateway.conversation import encode_chat
from sagellm.gateway.errors import ApiError
from sagellm.gateway.openai.chat import chat_options
from sagellm.gateway.openai.chat_types import ChatCompletionRequest, ChatMessage, Tool
from sagellm.gateway.request_model import WHOLE, RequestModel, unsupported
from sagellm.protocol import LIMITS
from sagellm.serving import HTTPMethod, RouterDef

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway

_TokenId = Annotated[int, Field(ge=0, le=LIMITS.token_id)]


class TokenizeRequest(RequestModel):
    """A text, or a conversation for the model's chat template.

    Attributes:
        prompt: The text; control tokens in it stay text.
        messages: The conversation; the answer is the prompt that /v1/chat/completions makes of it.
        add_special_tokens: Put the vocabulary's own begin and end tokens around a text.
        add_generation_prompt: A conversation ends with the opening of the assistant's turn.
        tools: As for chat completions.
        chat_template_kwargs: Further variables of the template.
        return_token_strs: Also give each token's text.
    """

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=LIMITS.messages)] | None
    ) = None
    add_special_tokens: bool = True
    add_generation_prompt: Annotated[
        Literal[True], unsupported("prompts of conversations end with the assistant's opening")
    ] = True
    tools: Annotated[list[Tool], Field(max_length=LIMITS.tool_schemas)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class TokenizeResponse(BaseModel):
    """Token ids, their number, and how many fit."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Token ids of the served model."""

    model: str | None = None
    tokens: Annotated[list[_TokenId], Field(max_length=LIMITS.body_bytes), WHOLE]
    skip_special_tokens: bool = False


class DetokenizeResponse(BaseModel):
    """Their text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to write prompts of its own; null: the model has none."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""

    async def tokenize(query: TokenizeRequest) -> TokenizeResponse:
        engine = gateway.require_generation(query.model).engine
        if (query.prompt is None) == (query.messages is None):
            raise ApiError(400, "give prompt or messages, one of them", param="prompt")
        if query.prompt is not None:
            tokens = await asyncio.to_thread(
                engine.tokenizer.encode, query.prompt, query.add_special_tokens
            )
        else:
            tokens = await encode_chat(gateway, chat_options(gateway, _conversation(query)))
        strings = None
        if query.return_token_strs:
            strings = [engine.tokenizer.decode([token], skip_special=False) for token in tokens]
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=engine.capacity.max_model_len,
            tokens=tokens,
            token_strs=strings,
        )

    async def detokenize(query: DetokenizeRequest) -> DetokenizeResponse:
        return await asyncio.to_thread(_detokenize, gateway, query)

    async def tokenizer_info() -> TokenizerInfo:
        tokenizer = gateway.require_generation(None).engine.tokenizer
        template = gateway.chat_template
        return TokenizerInfo(
            bos_token=tokenizer.bos_token or None,
            eos_token=tokenizer.eos_token or None,
            chat_template=None if template is None else template.source,
        )

    return {
        "tokenizer_info": [
            RouterDef(
                "",
                tokenizer_info,
                method=HTTPMethod.GET,
                summary="Control tokens and chat template",
                response_model=TokenizerInfo,
                tags=("tokens",),
            )
        ],
        "tokenize": [
            RouterDef(
                "",
                tokenize,
                summary="Token ids of a text or a conversation",
                request_model=TokenizeRequest,
                response_model=TokenizeResponse,
                tags=("tokens",),
            )
        ],
        "detokenize": [
            RouterDef(
                "",
                detokenize,
                summary="The text of token ids",
                request_model=DetokenizeRequest,
                response_model=DetokenizeResponse,
                tags=("tokens",),
            )
        ],
    }


def _conversation(query: TokenizeRequest) -> ChatCompletionRequest:
    return ChatCompletionRequest(
        messages=query.messages or [],
        tools=query.tools,
        chat_template_kwargs=query.chat_template_kwargs,
    )


def _detokenize(gateway: Gateway, query: DetokenizeRequest) -> DetokenizeResponse:
    engine = gateway.require_generation(query.model).engine
    for token in query.tokens:
        if token >= engine.capacity.vocab_size:
            raise ApiError(
                400,
                f"token id {token} is outside the vocabulary of {engine.capacity.vocab_size}",
                param="tokens",
            )
    text = engine.tokenizer.decode(query.tokens, query.skip_special_tokens, continuation=True)
    return DetokenizeResponse(prompt=text)
