"""From deltas to OpenAI's chat completions: a whole one, or events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sagellm.gateway.answers import encode
from sagellm.gateway.conversation import (
    ChatDelta,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from sagellm.gateway.openai.chat_types import ChatCompletion
from sagellm.gateway.openai.common import (
    DONE,
    SYSTEM_FINGERPRINT,
    completion_id,
    finite_logprob,
    quote,
    usage_info,
)

if TYPE_CHECKING:
    from sagellm.backends.interface import SampledRow
    from sagellm.gateway.context import RequestContext
    from sagellm.text import Tokenizer


def new_header(kind: str, model: str, context: RequestContext) -> dict[str, Any]:
    """The fields that an answer and all of its chunks begin with."""
    return {
        "id": completion_id("chatcmpl", context),
        "object": kind,
        "created": int(context.arrived_at),
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
    }


def logprobs_of(rows: Iterable[SampledRow], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log-probabilities in the form of chat completions."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {
            "token": data.decode(errors="replace"),
            "logprob": finite_logprob(logprob),
            "bytes": list(data),
        }

    content = [
        {
            **entry(row.token_id, row.logprob),
            "top_logprobs": [
                entry(token_id, logprob)
                for token_id, logprob in zip(row.top_ids, row.top_logprobs, strict=True)
            ],
        }
        for row in rows
    ]
    return {"content": content, "refusal": None}


# ----------------------------------------------------------------------------------- whole answers


class _Answer:
    """Collects the deltas of one completion."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._rows: list[SampledRow] | None = None
        self._finish_reason = ""

    def add(self, delta: ChatDelta) -> None:
        if isinstance(delta, TextDelta):
            self._text.append(delta.text)
            if delta.logprobs is not None:
                self._rows = [*(self._rows or ()), *delta.logprobs]
        elif isinstance(delta, ReasoningDelta):
            self._reasoning.append(delta.text)
        elif isinstance(delta, ToolCallDelta):
            call = self._calls.setdefault(
                delta.call_index,
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] = delta.call_id or call["id"]
            call["function"]["name"] += delta.name or ""
            call["function"]["arguments"] += delta.arguments
        else:
            self._finish_reason = delta.finish_reason

    def choice(self, index: int, tokenizer: Tokenizer) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not text else text,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = [self._calls[key] for key in sorted(self._calls)]
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        return {
            "index": index,
            "message": message,
            "logprobs": None if self._rows is None else logprobs_of(self._rows, tokenizer),
            "finish_reason": self._finish_reason,
        }


def completion(
    header: dict[str, Any], deltas: Iterable[ChatDelta], usage: Usage, tokenizer: Tokenizer, n: int
) -> ChatCompletion:
    """A whole answer.

    Args:
        header: From ``new_header``.
        deltas: Of all completions, to their ends.
        usage: Of the request.
        tokenizer: Spells tokens for ``logprobs``.
        n: How many completions there are.
    """
    answers = [_Answer() for _ in range(n)]
    for delta in deltas:
        answers[delta.index].add(delta)
    return ChatCompletion.model_validate(
        {
            **header,
            "choices": [answer.choice(i, tokenizer) for i, answer in enumerate(answers)],
            "usage": usage_info(usage),
        }
    )


# ------------------------------------------------------------------------------------------ events


class ChunkWriter:
    """Writes the events of a stream; text, which comes with every token, without any model.

    Args:
        header: From ``new_header``.
        tokenizer: Spells tokens for ``logprobs``.
        with_usage: All chunks have a ``usage`` field, and one that has it filled ends the stream.
    """

    def __init__(self, header: dict[str, Any], tokenizer: Tokenizer, *, with_usage: bool) -> None:
        self._tokenizer = tokenizer
        self._with_usage = with_usage
        self._head = f'data: {encode(header)[:-1]},"choices":['
        self._set_tail('],"usage":null}\n\n' if with_usage else "]}\n\n")
        # By completion, once it has begun: what stands before its text and before its reasoning.
        self._starts: dict[int, tuple[str, str]] = {}

    def tell_usage(self, usage: Usage) -> None:
        """Puts the usage so far into the chunks that follow."""
        self._set_tail(f'],"usage":{usage_info(usage).model_dump_json()}}}\n\n')

    def chunks(self, deltas: Sequence[ChatDelta]) -> bytes:
        """The events of some deltas; those of a completion begin with its role."""
        return "".join([self._event(delta) for delta in deltas]).encode("ascii")

    def end(self, usage: Usage) -> bytes:
        """The last events of the stream."""
        if not self._with_usage:
            return DONE
        total = usage_info(usage).model_dump_json()
        return f'{self._head}],"usage":{total}}}\n\n'.encode("ascii") + DONE

    def _set_tail(self, tail: str) -> None:
        self._tail = tail
        self._text_end = '},"logprobs":null,"finish_reason":null}' + tail

    def _event(self, delta: ChatDelta) -> str:
        starts = self._starts.get(delta.index)
        begin = ""
        if starts is None:
            begin = self._chunk(delta.index, '{"role":"assistant","content":"","refusal":null}')
            start = f'{self._head}{{"index":{delta.index},"delta":'
            starts = (f'{start}{{"content":', f'{start}{{"reasoning_content":')
            self._starts[delta.index] = starts
        if isinstance(delta, TextDelta):
            if delta.logprobs is None:
                return f"{begin}{starts[0]}{quote(delta.text)}{self._text_end}"
            logprobs = encode(logprobs_of(delta.logprobs, self._tokenizer))
            body = f'{{"content":{quote(delta.text)}}}'
            return begin + self._chunk(delta.index, body, logprobs=logprobs)
        if isinstance(delta, ReasoningDelta):
            return f"{begin}{starts[1]}{quote(delta.text)}{self._text_end}"
        if isinstance(delta, ToolCallDelta):
            return begin + self._call(delta)
        return begin + self._chunk(delta.index, "{}", reason=f'"{delta.finish_reason}"')

    def _call(self, delta: ToolCallDelta) -> str:
        events = []
        if delta.name is not None:
            call = {
                "index": delta.call_index,
                "id": delta.call_id,
                "type": "function",
                "function": {"name": delta.name, "arguments": ""},
            }
            events.append(self._chunk(delta.index, encode({"tool_calls": [call]})))
        if delta.arguments:
            more = {"index": delta.call_index, "function": {"arguments": delta.arguments}}
            events.append(self._chunk(delta.index, encode({"tool_calls": [more]})))
        return "".join(events)

    def _chunk(
        self, index: int, delta: str, *, logprobs: str = "null", reason: str = "null"
    ) -> str:
        return (
            f'{self._head}{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}{self._tail}'
        )
