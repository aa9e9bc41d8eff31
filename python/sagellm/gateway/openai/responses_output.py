"""From deltas to a response object, and to the events that tell of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sagellm.gateway.answers import event
from sagellm.gateway.conversation import (
    ChoiceEnd,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from sagellm.gateway.openai.responses_types import CreateResponse, NamedTool

if TYPE_CHECKING:
    from sagellm.gateway.context import RequestContext
    from sagellm.gateway.conversation import ChatDelta
    from sagellm.gateway.errors import ApiError

_ID_PREFIX = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_FAILURE_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def new_response(query: CreateResponse, model: str, context: RequestContext) -> dict[str, Any]:
    """The object of a response that has just begun."""
    choice = query.tool_choice
    text = query.text.model_dump(by_alias=True, exclude_none=True) if query.text else {}
    return {
        "id": f"resp_{context.request_id.removeprefix('req-')}",
        "object": "response",
        "created_at": int(context.arrived_at),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": query.instructions,
        "max_output_tokens": query.max_output_tokens,
        "max_tool_calls": None,
        "metadata": query.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": query.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": query.prompt_cache_key,
        "reasoning": {
            "effort": query.reasoning.effort if query.reasoning else None,
            "summary": None,
        },
        "safety_identifier": query.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if query.temperature is None else query.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **text},
        "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto",
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in query.tools or ()
        ],
        "top_logprobs": 0,
        "top_p": 1.0 if query.top_p is None else query.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": query.user,
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens in the words of this API.

    Prefixes are cached without being asked and without a price, so no token counts as a write.
    """
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ResponseWriter:
    """Writes deltas into a response. With ``streams``, every method returns the events of it.

    One output item is open at a time: a message, a reasoning block or a function call. A delta of
    another kind closes it and opens the next.

    Args:
        response: From ``new_response``; it is always up to date.
        streams: Whether events are wanted.
    """

    def __init__(self, response: dict[str, Any], *, streams: bool) -> None:
        self.response = response
        self._streams = streams
        self._events: list[str] = []
        self._sequence_number = 0
        self._item: dict[str, Any] | None = None
        self._pieces: list[str] = []  # text, reasoning or arguments of the open item
        self._call_index = -1
        self._finish_reason = "stop"

    def begin(self) -> bytes:
        """The first events."""
        self._emit("response.created", response=self.response)
        self._emit("response.in_progress", response=self.response)
        return self._take()

    def write(self, deltas: Sequence[ChatDelta]) -> bytes:
        """Takes what is new."""
        for delta in deltas:
            if isinstance(delta, TextDelta):
                if delta.text:
                    self._text(delta.text)
            elif isinstance(delta, ReasoningDelta):
                self._reasoning(delta.text)
            elif isinstance(delta, ToolCallDelta):
                self._call(delta)
            else:
                self._end(delta)
        return self._take()

    def finish(self, usage: Usage) -> bytes:
        """Ends the response after its last delta."""
        response, is_cut = self.response, self._finish_reason == "length"
        if not self._item and not response["output"]:
            self._open({"type": "message", "role": "assistant", "content": []})
        self._close("incomplete" if is_cut else "completed")
        response["usage"] = usage_of(usage)
        if is_cut:
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["status"] = "completed"
            response["completed_at"] = int(time.time())
        self._emit(f"response.{response['status']}", response=response)
        return self._take()

    def fail(self, error: ApiError, usage: Usage, request_id: str) -> bytes:
        """Ends the response with an error; what is written stays in it."""
        response = self.response
        if self._item is not None:
            self._settle(self._item, "incomplete")
            self._item = None
        response["status"] = "failed"
        response["error"] = {
            "code": _FAILURE_CODES.get(error.status, "server_error"),
            "message": error.openai(request_id)["error"]["message"],
        }
        response["usage"] = usage_of(usage)
        self._emit("response.failed", response=response)
        return self._take()

    # -------------------------------------------------------------------------------- deltas

    def _text(self, text: str) -> None:
        if self._kind != "message":
            self._open({"type": "message", "role": "assistant", "content": []})
        self._pieces.append(text)
        self._emit_part("response.output_text.delta", delta=text, logprobs=[])

    def _reasoning(self, text: str) -> None:
        if self._kind != "reasoning":
            self._open({"type": "reasoning", "summary": [], "content": []})
        self._pieces.append(text)
        self._emit_part("response.reasoning_text.delta", delta=text)

    def _call(self, delta: ToolCallDelta) -> None:
        if self._kind != "function_call" or delta.call_index != self._call_index:
            self._call_index = delta.call_index
            call = {"type": "function_call", "call_id": delta.call_id, "name": delta.name}
            self._open({**call, "arguments": ""})
        if delta.arguments:
            self._pieces.append(delta.arguments)
            self._emit_item("response.function_call_arguments.delta", delta=delta.arguments)

    def _end(self, delta: ChoiceEnd) -> None:
        self._finish_reason = delta.finish_reason

    # --------------------------------------------------------------------------------- items

    @property
    def _kind(self) -> str | None:
        return None if self._item is None else self._item["type"]

    def _open(self, item: dict[str, Any]) -> None:
        self._close("completed")
        item_id = f"{_ID_PREFIX[item['type']]}{secrets.token_hex(16)}"
        self._item = {"id": item_id, "status": "in_progress", **item}
        self.response["output"].append(self._item)
        self._emit("response.output_item.added", output_index=self._index, item=self._item)
        if item["type"] != "function_call":
            self._emit_part("response.content_part.added", part=_part(item["type"], ""))

    def _close(self, status: str) -> None:
        item = self._item
        if item is None:
            return
        text = self._settle(item, status)
        if item["type"] == "function_call":
            self._emit_item(
                "response.function_call_arguments.done", name=item["name"], arguments=text
            )
        else:
            if item["type"] == "message":
                self._emit_part("response.output_text.done", text=text, logprobs=[])
            else:
                self._emit_part("response.reasoning_text.done", text=text)
            self._emit_part("response.content_part.done", part=item["content"][0])
        self._emit("response.output_item.done", output_index=self._index, item=item)
        self._item = None

    def _settle(self, item: dict[str, Any], status: str) -> str:
        """Puts the gathered pieces into the item."""
        text = "".join(self._pieces)
        self._pieces.clear()
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
        else:
            item["content"] = [_part(item["type"], text)]
        return text

    # -------------------------------------------------------------------------------- events

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _emit_part(self, kind: str, **fields: Any) -> None:
        self._emit_item(kind, content_index=0, **fields)

    def _emit_item(self, kind: str, **fields: Any) -> None:
        assert self._item is not None
        self._emit(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _emit(self, kind: str, **fields: Any) -> None:
        if self._streams:
            number = self._sequence_number
            self._events.append(event(kind, {"type": kind, "sequence_number": number, **fields}))
            self._sequence_number = number + 1

    def _take(self) -> bytes:
        events = "".join(self._events).encode()
        self._events.clear()
        return events


def _part(item_type: str, text: str) -> dict[str, Any]:
    if item_type == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
