"""The engine for scripts: prompts in, answers out, on a thread of its own.

Example::

    from sagellm import LLM

    with LLM("smollm2") as llm:
        # Plain strings are continued; the answers come in the order of the prompts.
        for response in llm.generate(["The capital of France is", "Water boils at"], max_tokens=16):
            print(response.output_text, response.finish_reason, response.metrics.ttft_ms)

        # A conversation goes through the model's chat template.
        answer = llm.chat([{"role": "user", "content": "Name three rivers."}], max_tokens=64)
        print(answer.output_text)

        # Events as they come.
        for event in llm.stream("Once upon a time", max_tokens=32, temperature=0.8, seed=7):
            if event.event == "delta":
                print(event.chunk, end="", flush=True)

        # Logits of every position, [tokens, vocab].
        print(llm.logits(llm.tokenizer.encode("Hello")).shape)
"""

from __future__ import annotations

import itertools
import queue
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from pydantic import ValidationError

from sagellm.engine.config import engine_config
from sagellm.engine.loading import load_engine, name_of
from sagellm.engine.output import delta_of, end_of, response_of
from sagellm.engine.thread import EngineThread
from sagellm.errors import InvalidArgumentError, UnavailableError
from sagellm.protocol import (
    Message,
    Request,
    Response,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.engine.engine import Engine, EngineStats
    from sagellm.engine.output import SequenceOutput
    from sagellm.engine.request import RequestState
    from sagellm.text import Tokenizer

Prompt: TypeAlias = "str | Request | Sequence[int] | NDArray[np.integer[Any]]"
"""A text to continue, a request, or token ids."""

DEFAULT_MAX_TOKENS = 256

_Event: TypeAlias = "StreamEventStart | StreamEventDelta | StreamEventEnd"


class _Box:
    """A mailbox that one thread empties."""

    def __init__(self) -> None:
        self.outputs: queue.SimpleQueue[list[SequenceOutput]] = queue.SimpleQueue()

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        self.outputs.put(outputs)


def new_request(
    *,
    prompt: str = "",
    messages: Iterable[Mapping[str, Any] | Message] | None = None,
    model: str = "default",
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float | None = None,
    stream: bool = False,
    **options: Any,
) -> Request:
    """Builds a ``Request`` from plain values.

    Args:
        prompt: A text to continue, or
        messages: a conversation.
        model: Its name.
        max_tokens: Longest output.
        temperature: None and 0 are greedy.
        stream: Whether events are wanted.
        **options: Any other field of ``Request`` or ``SamplingParams``; missing ids are made up.

    Raises:
        InvalidArgumentError: An unknown option or an illegal value.
    """
    fields: dict[str, Any] = {"request_id": f"req-{uuid.uuid4().hex}"}
    sampling: dict[str, Any] = {}
    for name, value in options.items():
        if name in SamplingParams.model_fields:
            sampling[name] = value
        elif name in Request.model_fields:
            fields[name] = value
        else:
            known = sorted({*SamplingParams.model_fields, *Request.model_fields})
            raise InvalidArgumentError(f"unknown option {name!r}; known: {', '.join(known)}")
    fields.setdefault("trace_id", fields["request_id"])
    try:
        if sampling:
            fields["sampling"] = SamplingParams(**sampling)
        if messages is not None:
            fields["messages"] = [m if isinstance(m, Message) else Message(**m) for m in messages]
        return Request(
            prompt=prompt,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature or None,
            stream=stream,
            **fields,
        )
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc'])) or 'request'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise InvalidArgumentError("; ".join(problems)) from None


class LLM:
    """A model ready to answer. Safe to use from several threads; close it, or use ``with``."""

    def __init__(
        self,
        model: str | Path | Engine,
        *,
        device: str = "auto",
        threads: int | None = None,
        precision: str | None = None,
        isa: str | None = None,
        deterministic: bool | None = None,
        kv_dtype: str | None = None,
        kv_cache_gb: float | None = None,
        max_model_len: int | None = None,
        name: str = "",
        **engine_options: Any,
    ) -> None:
        """Loads a model and starts its engine.

        Args:
            model: A catalogue name, a Hugging Face repository, a .gguf file, a folder; or an engine
                that is ready, which then takes none of the other arguments but ``name``.
            device: ``auto``, ``cpu``, ``reference``, ``torch``, ``torch:DEVICE`` or ``mock``.
            threads: CPU threads; None takes all of this process.
            precision: ``a8`` or ``a15`` on the CPU.
            isa: Forces an instruction-set path.
            deterministic: On ``cuda``: answers do not depend on what runs beside them.
            kv_dtype: How keys and values are stored: ``bf16``, or ``int8`` in about half of the
                memory; ``cuda`` also has ``f16`` and ``fp8``.
            kv_cache_gb: Memory of the KV pool in GiB; None chooses by free memory.
            max_model_len: Longest sequence in tokens; None is the model's own limit.
            name: Of a model whose files do not tell one; by default that of the file or folder.
            **engine_options: Other fields of ``EngineConfig``.

        Raises:
            SagellmError: The model is not found, corrupt or unsupported, an option is wrong, or
                memory does not suffice; the message names the remedy.
        """
        if isinstance(model, (str, Path)):
            name = name or name_of(model)
            config = engine_config(kv_cache_gb, max_model_len, engine_options)
            self._engine = load_engine(
                model,
                config,
                device=device,
                threads=threads,
                precision=precision,
                isa=isa,
                deterministic=deterministic,
                kv_dtype=kv_dtype,
            )
        else:
            self._engine = model
        self.model_name = self._engine.runner.config.name or name or "model"
        self._thread = EngineThread(self._engine)
        self._is_closed = False

    # ------------------------------------------------------------------------------ answers

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Response]:
        """Answers prompts, all at once.

        Args:
            prompts: One or a list of: a text to continue, token ids, a ``Request``.
            **options: See ``new_request``; for prompts that are not requests.

        Returns:
            In the order of the prompts; with ``n > 1`` the completions of a prompt follow one
            another. A request that failed while it ran has finish_reason ``error``.

        Raises:
            SagellmError: One of the prompts is invalid or can never fit; nothing has run then.
            KeyboardInterrupt: Everything at hand was cancelled; the engine stays usable.
        """
        self._require_open()
        states = [self._prepare(prompt, options) for prompt in _listed(prompts)]
        box, waiting = _Box(), iter(states)
        responses: dict[tuple[int, int], Response] = {}
        at_hand: set[int] = set()
        try:
            for state in itertools.islice(waiting, self._engine.config.max_queue):
                self._submit(state, box, at_hand)
            while at_hand:
                for output in box.outputs.get():
                    if output.finished is not None:
                        responses[output.key, output.index] = response_of(output)
                    if output.request_finished:
                        at_hand.discard(output.key)
                        following = next(waiting, None)
                        if following is not None:
                            self._submit(following, box, at_hand)
        finally:
            for key in at_hand:
                self._thread.cancel(key)
        return [responses[s.key, i] for s in states for i in range(len(s.sequences))]

    def chat(self, messages: Iterable[Mapping[str, Any] | Message], **options: Any) -> Response:
        """Answers a conversation through the model's chat template.

        Args:
            messages: Turns with ``role`` and ``content``.
            **options: See ``new_request``.

        Raises:
            SagellmError: As ``generate``.
        """
        request = new_request(messages=messages, model=self.model_name, **options)
        if request.sampling.n != 1:
            raise InvalidArgumentError("chat gives one answer; use generate for n > 1")
        return self.generate(request)[0]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[_Event]:
        """Answers one prompt event by event: a start, deltas, and an end per completion.

        The request is checked and queued at once. Leaving the loop early cancels it.

        Args:
            prompt: A text to continue, token ids, or a ``Request``.
            **options: See ``new_request``; for a prompt that is not a request.

        Raises:
            SagellmError: As ``generate``.
        """
        self._require_open()
        state = self._prepare(prompt, options)
        if not state.request.stream:
            state.request = state.request.model_copy(update={"stream": True})
        box = _Box()
        self._submit(state, box, set())
        return self._events(state, box)

    def _events(self, state: RequestState, box: _Box) -> Iterator[_Event]:
        request = state.request
        try:
            yield StreamEventStart(
                request_id=request.request_id,
                trace_id=request.trace_id,
                prompt_tokens=state.sequences[0].num_prompt_tokens,
            )
            while True:
                for output in box.outputs.get():
                    delta = delta_of(output)
                    if delta is not None:
                        yield delta
                    if output.finished is not None:
                        yield end_of(output)
                    if output.request_finished:
                        return
        finally:
            self._thread.cancel(state.key)  # without effect once answered

    def logits(self, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """Logits of every position, ``[tokens, vocab]`` float32, through ordinary paged steps.

        Raises:
            InvalidArgumentError: Empty, outside the vocabulary, or too long.
            ResourceExhaustedError: The KV pool has no room for them now.
        """
        self._require_open()
        return self._thread.call(lambda: self._engine.logits(token_ids)).result()

    # ------------------------------------------------------------------------- about the model

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        return self._engine.tokenizer

    @property
    def engine(self) -> Engine:
        """For reading what is fixed at start: config, capacity, runner."""
        return self._engine

    @property
    def has_chat_template(self) -> bool:
        """Whether ``messages`` are understood."""
        return self._engine.chat_template is not None

    def count_prompt_tokens(self, request: Request) -> int:
        """Tokens of a request's prompt or conversation."""
        return len(self._engine.encode_prompt(request))

    def stats(self) -> EngineStats:
        """Gauges and counters, taken between two steps."""
        self._require_open()
        return self._thread.call(self._engine.stats).result()

    def close(self) -> None:
        """Cancels what runs (its callers get ``unavailable``) and frees the model."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.close()
            self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------ internals

    def _prepare(self, prompt: Prompt, options: Mapping[str, Any]) -> RequestState:
        if isinstance(prompt, Request):
            if options:
                raise InvalidArgumentError(
                    f"options ({', '.join(options)}) do not apply to a Request; set its fields"
                )
            return self._engine.prepare(prompt)
        if isinstance(prompt, str):
            request = new_request(prompt=prompt, model=self.model_name, **options)
            return self._engine.prepare(request)
        return self._engine.prepare(new_request(model=self.model_name, **options), prompt)

    def _submit(self, state: RequestState, box: _Box, at_hand: set[int]) -> None:
        at_hand.add(state.key)
        self._thread.submit(state, box)

    def _require_open(self) -> None:
        if self._is_closed:
            raise UnavailableError("this LLM is closed; create another one")


def logits(model: str | Path, token_ids: Iterable[int], **options: Any) -> NDArray[np.float32]:
    """Loads a model for one pass and returns the logits of every position, ``[tokens, vocab]``.

    Args:
        model: See ``LLM``.
        token_ids: One sequence.
        **options: Of ``LLM``.
    """
    with LLM(model, **options) as llm:
        return llm.logits(token_ids)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several; a flat list of numbers is one."""
    if isinstance(prompts, (str, Request)):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and isinstance(listed[0], (int, np.integer)):
        return [listed]
    return listed
