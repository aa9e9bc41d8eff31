"""From deltas to a message, and to the events that tell of it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sagellm.gateway.answers import event
from sagellm.gateway.conversation import ChoiceEnd, ReasoningDelta, TextDelta, ToolCallDelta

if TYPE_CHECKING:
    from sagellm.gateway.conversation import ChatDelta, Usage
    from sagellm.gateway.errors import ApiError

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTA_KEYS = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
_DELTA_TYPES = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens in the words of this API."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


class MessageWriter:
    """Writes deltas into a message. With ``streams``, every method returns the events of it.

    One block is open at a time. A delta of another kind closes it and opens the next.

    Args:
        request_id, model: For the message.
        shows_thinking: Whether reasoning becomes thinking blocks; else it is left out.
        streams: Whether events are wanted.
    """

    def __init__(self, *, request_id: str, model: str, shows_thinking: bool, streams: bool) -> None:
        self.message: dict[str, Any] = {
            "id": f"msg_{request_id.removeprefix('req-')}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": None,
        }
        self._shows_thinking = shows_thinking
        self._streams = streams
        self._events: list[str] = []
        self._block: dict[str, Any] | None = None
        self._pieces: list[str] = []  # text, thinking or input of the open block
        self._call_index = -1

    def begin(self, usage: Usage) -> bytes:
        """The first event; ``usage`` should know how much of the prompt was cached."""
        self.message["usage"] = {**usage_of(usage), "service_tier": "standard"}
        if self._streams:
            self.message["usage"]["output_tokens"] = 0
        self._emit("message_start", message=self.message)
        return self._take()

    def write(self, deltas: Sequence[ChatDelta]) -> bytes:
        """Takes what is new."""
        for delta in deltas:
            if isinstance(delta, TextDelta):
                if delta.text:
                    self._piece("text", delta.text)
            elif isinstance(delta, ReasoningDelta):
                if self._shows_thinking and delta.text:
                    self._piece("thinking", delta.text)
            elif isinstance(delta, ToolCallDelta):
                self._call(delta)
            else:
                self._end(delta)
        return self._take()

    def finish(self, usage: Usage) -> bytes:
        """Ends the message after its last delta."""
        self._close()
        message, counts = self.message, usage_of(usage)
        message["usage"] = {**counts, "service_tier": "standard"}
        reason = {key: message[key] for key in ("stop_reason", "stop_sequence")}
        self._emit("message_delta", delta=reason, usage=counts)
        self._emit("message_stop")
        return self._take()

    def fail(self, error: ApiError, request_id: str) -> bytes:
        """Ends the stream with an error."""
        self._events.append(event("error", error.anthropic(request_id)))
        return self._take()

    # ---------------------------------------------------------------------------------- blocks

    def _piece(self, kind: str, text: str) -> None:
        if self._block is None or self._block["type"] != kind:
            block = {"type": kind, kind: ""}
            self._open({**block, "signature": ""} if kind == "thinking" else block)
        self._push(kind, text)

    def _call(self, delta: ToolCallDelta) -> None:
        is_open = self._block is not None and self._block["type"] == "tool_use"
        if not is_open or delta.call_index != self._call_index:
            self._call_index = delta.call_index
            call_id = delta.call_id or f"call_{secrets.token_hex(12)}"
            self._open({"type": "tool_use", "id": call_id, "name": delta.name, "input": {}})
        if delta.arguments:
            self._push("tool_use", delta.arguments)

    def _push(self, kind: str, text: str) -> None:
        self._pieces.append(text)
        self._emit_block(
            "content_block_delta", delta={"type": _DELTA_TYPES[kind], _DELTA_KEYS[kind]: text}
        )

    def _open(self, block: dict[str, Any]) -> None:
        self._close()
        self._block = block
        self.message["content"].append(block)
        self._emit_block("content_block_start", content_block=block)

    def _close(self) -> None:
        block = self._block
        if block is None:
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        if block["type"] == "tool_use":
            block["input"] = _arguments(text)
        else:
            block[block["type"]] = text
        self._emit_block("content_block_stop")
        self._block = None

    def _end(self, delta: ChoiceEnd) -> None:
        message = self.message
        message["stop_reason"] = _STOP_REASONS[delta.finish_reason]
        if delta.finish_reason == "stop" and isinstance(delta.matched_stop, str):
            message["stop_reason"] = "stop_sequence"
            message["stop_sequence"] = delta.matched_stop

    # ---------------------------------------------------------------------------------- events

    def _emit_block(self, kind: str, **fields: Any) -> None:
        self._emit(kind, index=len(self.message["content"]) - 1, **fields)

    def _emit(self, kind: str, **fields: Any) -> None:
        if self._streams:
            self._events.append(event(kind, {"type": kind, **fields}))

    def _take(self) -> bytes:
        events = "".join(self._events).encode()
        self._events.clear()
        return events


def _arguments(text: str) -> dict[str, Any]:
    """The input of a call, which this API gives as an object.

    A call that ``max_tokens`` cut off has no whole object: as in a stream, where no event carries
    one, its input stays empty, and ``stop_reason`` tells why.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
