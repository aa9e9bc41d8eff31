"""``/v1/completions``: raw prompts, also for scoring (``echo`` with ``logprobs``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from starlette.responses import Response

from sagellm.engine.async_engine import SHORT_TEXT_CHARS
from sagellm.gateway.context import RequestContext
from sagellm.gateway.conversation import Usage, build_request
from sagellm.gateway.errors import ApiError
from sagellm.gateway.openai.common import (
    DONE,
    json_answer,
    sampling_params,
    usage_info,
)
from sagellm.gateway.openai.completion_answer import (
    ChoiceWriter,
    CompletionEvents,
    new_header,
)
from sagellm.gateway.openai.completion_types import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionRequest,
)
from sagellm.gateway.openai.generation_route import Events, generation_routers
from sagellm.protocol import LIMITS, SamplingParams
from sagellm.protocol import Request as EngineRequest
from sagellm.serving import RouterDef

if TYPE_CHECKING:
    from sagellm.backends.interface import SampledRow
    from sagellm.engine.output import SequenceOutput
    from sagellm.gateway.gateway import Gateway
    from sagellm.gateway.generation import GatewayStream
    from sagellm.text import Tokenizer


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""
    return generation_routers(
        gateway,
        "completions",
        summary="Continue prompts",
        tag="completions",
        request_model=CompletionRequest,
        response_model=Completion,
        create=create_completion,
        stream=_stream,
    )


async def create_completion(
    gateway: Gateway, query: CompletionRequest, context: RequestContext
) -> Response:
    """Answers a request that is no stream.

    Raises:
        ApiError: The request cannot be served, or failed while it ran.
    """
    run = await start_run(gateway, query, context)
    choices: dict[int, dict[str, Any]] = {}
    async for batch in run.outputs():
        for choice, output in batch:
            text, logprobs, reason = run.take(choice, output)
            assert reason is not None  # a request that is no stream has one output per completion
            choices[choice.index] = {
                "index": choice.index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": reason,
            }
    return json_answer(
        Completion.model_validate(
            {
                **new_header(gateway.model_name, context),
                "choices": [choices[index] for index in sorted(choices)],
                "usage": usage_info(run.usage()),
            }
        )
    )


async def _stream(gateway: Gateway, query: CompletionRequest, context: RequestContext) -> Events:
    run = await start_run(gateway, query, context)
    return run.events(new_header(gateway.model_name, context)), run.cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """A prompt as it was given, and its tokens."""

    text: str | None
    ids: Sequence[int]

    def echo(self, tokenizer: Tokenizer) -> str:
        """Its text; token ids as what they stand for, control tokens included."""
        if self.text is not None:
            return self.text
        return tokenizer.decode(self.ids, skip_special=False)


class CompletionRun:
    """Completions that are being made: use ``outputs`` or ``events`` once, and ``cancel``."""

    def __init__(
        self,
        query: CompletionRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[_Prompt],
        streams: Sequence[GatewayStream],
        sampling: SamplingParams,
    ) -> None:
        self._query = query
        self._streams = streams
        self._n = sampling.n
        self._drops_output = query.max_tokens == 0
        self._prompt_rows: list[Sequence[SampledRow | None] | None] = [None] * len(streams)
        self._cached = [0] * len(streams)
        self._completion_tokens = 0
        self._choices = [
            ChoiceWriter(
                number * self._n + index,
                tokenizer,
                prompt_ids=prompt.ids,
                echo=prompt.echo(tokenizer) if query.echo else None,
                echo_special=prompt.text is None,
                skip_special=sampling.skip_special_tokens,
                with_logprobs=query.logprobs is not None,
                drop_output=self._drops_output,
            )
            for number, prompt in enumerate(prompts)
            for index in range(self._n)
        ]

    def cancel(self) -> None:
        """Stops the work; may be called at any time and more than once."""
        for stream in self._streams:
            stream.cancel()

    def usage(self) -> Usage:
        """Tokens so far, of all prompts together."""
        return Usage(
            prompt_tokens=sum(stream.num_prompt_tokens for stream in self._streams),
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(self._cached),
        )

    async def outputs(self) -> AsyncGenerator[list[tuple[ChoiceWriter, SequenceOutput]], None]:
        """The engine's outputs as they come, each with the completion that it belongs to.

        Raises:
            ApiError: A prompt failed while it ran; the others are cancelled.
        """
        try:
            async for batch in merge(self._streams):
                yield [self._owned(number, output) for number, output in batch]
        finally:
            self.cancel()  # without effect once answered

    def _owned(self, number: int, output: SequenceOutput) -> tuple[ChoiceWriter, SequenceOutput]:
        if output.finished is not None and output.finished.failure is not None:
            raise ApiError.from_failure(output.finished.failure)
        if output.prompt_logprobs is not None:
            self._prompt_rows[number] = output.prompt_logprobs
        self._cached[number] = max(self._cached[number], output.num_cached_tokens)
        if not self._drops_output:
            self._completion_tokens += len(output.token_ids)
        return self._choices[number * self._n + output.index], output

    def take(
        self, choice: ChoiceWriter, output: SequenceOutput
    ) -> tuple[str, dict[str, list[Any]] | None, str | None]:
        """What an output brings: text, log-probabilities, finish reason."""
        return choice.take(output, self._prompt_rows[choice.index // self._n])

    async def events(self, header: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The answer as a stream of events."""
        writer = CompletionEvents(header, with_usage=self._query.wants_usage)
        async for batch in self.outputs():
            chunks = b""
            if self._query.wants_continuous_usage:
                writer.tell_usage(usage_info(self.usage()).model_dump_json())
            for choice, output in batch:
                text, logprobs, reason = self.take(choice, output)
                if text or logprobs is not None or reason is not None:
                    chunks += writer.chunk(choice.index, text, logprobs, reason)
            if chunks:
                yield chunks
        if self._query.wants_usage:
            yield writer.usage(usage_info(self.usage()).model_dump_json()) + DONE
        else:
            yield DONE


async def start_run(
    gateway: Gateway, query: CompletionRequest, context: RequestContext
) -> CompletionRun:
    """Encodes, checks and submits all prompts of a request, or none.

    Raises:
        ApiError: The request cannot be served.
    """
    gateway.require_generation(query.model)
    query.check_stream_options()
    n = query.n or 1
    if query.best_of is not None and query.best_of != n:
        raise ApiError(
            400,
            f"best_of is {query.best_of} and n is {n}; completions are not ranked here, so leave "
            "best_of out",
            code="unsupported",
            param="best_of",
        )
    given = _listed(query.prompt)
    if len(given) * n > LIMITS.prompts_per_request:
        raise ApiError(
            400,
            f"{len(given)} prompts with n = {n} are {len(given) * n} completions; at most "
            f"{LIMITS.prompts_per_request} in one request",
            param="n",
        )
    wants_prompt_rows = query.echo and query.logprobs is not None
    sampling = sampling_params(
        query,
        logprobs=query.logprobs,
        prompt_logprobs=query.logprobs if wants_prompt_rows else None,
    )
    if sum(len(prompt) for prompt in given if isinstance(prompt, str)) <= SHORT_TEXT_CHARS:
        prompts = _encode(gateway.tokenizer, given)
    else:
        prompts = await asyncio.to_thread(_encode, gateway.tokenizer, given)
    streams: list[GatewayStream] = []
    try:
        for prompt in prompts:
            request = _request(gateway, query, sampling, context)
            streams.append(await gateway.start(request, prompt.ids, context))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return CompletionRun(query, gateway.tokenizer, prompts, streams, sampling)


def _request(
    gateway: Gateway, query: CompletionRequest, sampling: SamplingParams, context: RequestContext
) -> EngineRequest:
    max_tokens = DEFAULT_MAX_TOKENS if query.max_tokens is None else query.max_tokens
    return build_request(
        context,
        temperature=1.0 if query.temperature is None else query.temperature,
        top_p=1.0 if query.top_p is None else query.top_p,
        sampling=sampling,
        model=gateway.model_name,
        max_tokens=max(1, max_tokens),  # with 0 the one token is dropped: the prompt's rows remain
        stream=bool(query.stream),
        priority=query.priority or 0,
        deadline_ms=query.deadline_ms,
        cache_salt=query.cache_salt,
    )


def _listed(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """The prompts, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(cast("list[str | list[int]]", prompt))


def _encode(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[_Prompt]:
    return [
        _Prompt(text=None, ids=prompt)
        if isinstance(prompt, list)
        else _Prompt(text=prompt, ids=tokenizer.encode(prompt) if prompt else [])
        for prompt in prompts
    ]


async def merge(
    streams: Sequence[GatewayStream],
) -> AsyncGenerator[list[tuple[int, SequenceOutput]], None]:
    """The outputs of several streams with their streams' numbers, together what is there at once.

    Raises:
        Exception: Whatever the first stream to fail raises.
    """
    if len(streams) == 1:
        (only,) = streams
        async for output in only:
            batch = [(0, output)]
            while only.num_ready:
                batch.append((0, await anext(only)))
            yield batch
        return
    waiting: asyncio.Queue[tuple[int, SequenceOutput | Exception | None]] = asyncio.Queue()

    async def pump(number: int, stream: GatewayStream) -> None:
        try:
            async for output in stream:
                waiting.put_nowait((number, output))
        except Exception as error:
            waiting.put_nowait((number, error))
        else:
            waiting.put_nowait((number, None))

    pumps = [asyncio.create_task(pump(*item)) for item in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            items = [await waiting.get()]
            while not waiting.empty():
                items.append(waiting.get_nowait())
            batch = []
            for number, item in items:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    batch.append((number, item))
            if batch:
                yield batch
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
