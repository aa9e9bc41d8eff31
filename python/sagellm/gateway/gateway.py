"""The one object that all routes share: the models behind the server, and its state."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sagellm.errors import SagellmError, UnavailableError
from sagellm.gateway.errors import RETRY_LATER_S, ApiError
from sagellm.gateway.fair_share import FairShare, share_of
from sagellm.gateway.generation import GatewayStream
from sagellm.gateway.observer import ObserverGroup, RequestRecord
from sagellm.gateway.request_metrics import RequestMetrics
from sagellm.gateway.tracing import open_tracing
from sagellm.protocol import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.engine.async_engine import AsyncEngine
    from sagellm.engine.embedding import Embedder
    from sagellm.gateway.config import GatewayConfig
    from sagellm.gateway.context import RequestContext
    from sagellm.gateway.observer import RequestObserver
    from sagellm.text import ChatTemplate, Tokenizer

logger = logging.getLogger(__name__)

_LOGGED_PROMPT_CHARS = 1000
_PATIENCE_S = 10.0  # for the step at hand when a model is told to end


class Gateway:
    """The models of one server. Belongs to one event loop once requests come.

    Attributes:
        config: As given.
        engine: Generates text; None on a server for embeddings only.
        embedder: Makes embeddings; None on a server without.
        created: Unix seconds of the start, for ``/v1/models``.
        observers: Hear of every request: counters, and tracing if it is on.
        metrics: All of them as one.
        is_ready: The models are loaded and warm.
        is_draining: No new requests are taken.
        is_stuck: A model did not end when told to.
        at_hand: HTTP requests without a complete answer, by id; probes do not count.
        share: What each client has at hand.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        engine: AsyncEngine | None = None,
        embedder: Embedder | None = None,
        model_name: str = "",
        embedding_name: str = "",
        metrics: RequestObserver | None = None,
    ) -> None:
        """Takes loaded models, which it closes in the end.

        Args:
            config: Knobs.
            engine: For generation.
            embedder: For embeddings.
            model_name: What the model is called unless ``config.served_model_name`` says.
            embedding_name: What the embedder is called beside an engine; the embedder's own name if
                empty, and every name of the generation model if it is ``model_name``.
            metrics: Hears of every request instead of the counters and tracing.
        """
        if engine is None and embedder is None:
            raise ValueError("a gateway needs an engine or an embedder")
        self.config = config
        self.engine = engine
        self.embedder = embedder
        self.created = int(time.time())
        self.observers = _observers(config) if metrics is None else (metrics,)
        self.metrics: RequestObserver = self.observers[0]
        if len(self.observers) > 1:
            self.metrics = ObserverGroup(self.observers)
        self.is_ready = False
        self.is_draining = False
        self.at_hand: dict[str, RequestContext] = {}
        self.share = FairShare(share_of(config, engine))
        self.is_stuck = False
        self._is_closed = False
        own = model_name or ("" if engine is None else engine.engine.runner.config.name)
        if not own and embedder is not None:
            own = embedder.model_name
        served = config.served_model_name or (own or "model",)
        self.generation_names = served if engine is not None else ()
        self.embedding_names: tuple[str, ...] = ()
        if embedder is not None and engine is None:
            self.embedding_names = (*served, embedder.model_name)
        elif embedder is not None:
            name = embedding_name or embedder.model_name
            self.embedding_names = served if name == own else (name,)

    # ------------------------------------------------------------------------------- the models

    @property
    def model_name(self) -> str:
        """The name in answers."""
        return (*self.generation_names, *self.embedding_names)[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name that requests may use, without repetition."""
        return tuple(dict.fromkeys((*self.generation_names, *self.embedding_names)))

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the generation model.

        Raises:
            ApiError: This server has none.
        """
        return self.require_generation(None).engine.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Of the generation model, if it has one."""
        return None if self.engine is None else self.engine.engine.chat_template

    def require_generation(self, model: str | None) -> AsyncEngine:
        """The engine for a request that names ``model``; None takes what is served.

        Raises:
            ApiError: 404 for another model's name, 400 if this server generates no text.
        """
        self._require_known(model)
        if self.engine is None or (model is not None and model not in self.generation_names):
            raise ApiError(
                400,
                f"{model or self.model_name} makes embeddings only; send this request to a server "
                "with a generation model",
                code="unsupported",
                param="model",
            )
        return self.engine

    def require_embedder(self, model: str | None) -> Embedder:
        """The embedder for a request that names ``model``; None takes what is served.

        The generation model's name is accepted as well: a server has one embedder.

        Raises:
            ApiError: 404 for another model's name, 400 if this server makes no embeddings.
        """
        self._require_known(model)
        if self.embedder is None:
            raise ApiError(
                400,
                f"{self.model_name} is served without embeddings; start the server with "
                "--embedding-model MODEL",
                code="unsupported",
                param="model",
            )
        return self.embedder

    def _require_known(self, model: str | None) -> None:
        if model is not None and model not in self.model_names:
            shown = model if len(model) <= 128 else f"{model[:128]}..."
            raise ApiError(
                404,
                f"the model {shown!r} does not exist here; served: {', '.join(self.model_names)}",
                code="model_not_found",
                param="model",
            )

    # ----------------------------------------------------------------------------- its requests

    async def start(
        self,
        request: Request,
        prompt_token_ids: Sequence[int] | NDArray[np.int32] | None,
        context: RequestContext,
    ) -> GatewayStream:
        """Validates and submits a request; the server's own time limit goes with it.

        Args:
            request: What to run.
            prompt_token_ids: Taken instead of ``request.prompt``.
            context: Of the HTTP request.

        Raises:
            ApiError: The request cannot be served, or not now. Nothing is queued then.
        """
        engine = self.require_generation(None)
        try:
            self.require_open()
            self.share.add(context, request.sampling.n)
            request = self._limited(request)
            stream = await engine.start(request, prompt_token_ids)
        except SagellmError as error:
            answer = ApiError.from_error(error)
            self.metrics.request_rejected(context, answer.status)
            raise answer from error
        except ApiError as answer:
            self.metrics.request_rejected(context, answer.status)
            raise
        record = RequestRecord(
            key=stream.key,
            context=context,
            request=request,
            num_prompt_tokens=stream.num_prompt_tokens,
        )
        context.model = self.model_name
        context.num_prompt_tokens += stream.num_prompt_tokens
        if self.config.log_prompts and context.prompt is None:
            context.prompt = self._beginning(request, prompt_token_ids)
        self.metrics.request_started(record)
        return GatewayStream(stream, record, self.metrics)

    def require_open(self) -> None:
        """Refuses new work while draining.

        Raises:
            ApiError: 503.
        """
        if self.is_draining:
            raise ApiError(
                503,
                "the server is shutting down; send the request again",
                retry_after_s=RETRY_LATER_S,
            )

    def _limited(self, request: Request) -> Request:
        limit = self.config.request_timeout_s
        if limit is None or (request.deadline_ms is not None and request.deadline_ms < limit * 1e3):
            return request
        return request.model_copy(update={"deadline_ms": limit * 1e3})

    def _beginning(
        self, request: Request, token_ids: Sequence[int] | NDArray[np.int32] | None
    ) -> str:
        if token_ids is None:
            text = request.prompt or "\n".join(m.content or "" for m in request.messages or ())
        else:
            first = list(token_ids[:_LOGGED_PROMPT_CHARS])
            text = self.tokenizer.decode(first, skip_special=False)
        return text[:_LOGGED_PROMPT_CHARS]

    # --------------------------------------------------------------------------------- life cycle

    async def warm_up(self) -> None:
        """Runs a token through each model, so that no client pays for first times.

        Raises:
            SagellmError: A model does not work.
        """
        if self.config.warm_up and self.engine is not None:
            request = Request(
                request_id="warm-up",
                trace_id="warm-up",
                model=self.model_name,
                prompt="",
                max_tokens=2,
                stream=False,
            )
            async for output in await self.engine.start(request, [0]):
                if output.finished is not None and output.finished.failure is not None:
                    raise UnavailableError(
                        f"the model failed on a first token: {output.finished.failure.message}"
                    )
        if self.config.warm_up and self.embedder is not None:
            await self.embedder.embed([self.embedder.encode("warm up")])
        self.is_ready = True

    def begin_drain(self) -> None:
        """Takes no new requests from now on; those at hand go on."""
        self.is_draining = True
        if self.engine is not None:
            self.engine.begin_drain()

    async def close(self, drain_timeout: float = 0.0) -> int:
        """Ends the models.

        Args:
            drain_timeout: Seconds; what is unfinished then is answered ``unavailable``.

        Returns:
            How many of the engine's requests were cut short.

        A model that hangs in a step cannot end; then ``is_stuck`` is set, and only the end of the
        process frees it.
        """
        self.is_draining = True
        if self._is_closed:
            return 0
        self._is_closed = True
        await asyncio.to_thread(self.metrics.close)
        if self.embedder is not None:
            try:
                await asyncio.wait_for(self.embedder.close(), _PATIENCE_S)
            except asyncio.TimeoutError:
                logger.critical("the embedding model hangs and cannot end")
                self.is_stuck = True
        if self.engine is None:
            return 0
        try:
            return await asyncio.wait_for(
                self.engine.close(drain_timeout), drain_timeout + _PATIENCE_S
            )
        except asyncio.TimeoutError:
            logger.critical("the engine hangs in step %d and cannot end", self.engine.num_steps)
            self.is_stuck = True
            return len(self.at_hand)


def _observers(config: GatewayConfig) -> tuple[RequestObserver, ...]:
    counters = RequestMetrics()
    if config.otlp_endpoint is None:
        return (counters,)
    return (counters, open_tracing(config.otlp_endpoint))
