"""Tool calls in text that a model writes piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sagellm.text.json_scanner import WHITESPACE, JsonScanner, skip_blank
from sagellm.text.tool_formats import (
    ARGS_MARKER,
    CALL_ID_MARKER,
    TOOL_CALL_FORMATS,
    ToolCallFormat,
    detect_tool_format,
    needs_special_tokens,
    tool_format,
    validate_tools,
)
from sagellm.text.tool_prompt import call_text, result_text, tool_system_prompt

__all__ = [
    "TOOL_CALL_FORMATS",
    "CallPiece",
    "TextPiece",
    "ToolCallFormat",
    "ToolCallParser",
    "call_text",
    "detect_tool_format",
    "needs_special_tokens",
    "result_text",
    "tool_format",
    "tool_system_prompt",
    "validate_tools",
]

ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
"""Keys of the arguments; every format reads both."""

IGNORED_KEYS = frozenset({"id", "type"})
"""Further keys that a call may have."""

CALL_KEYS = ARGUMENT_KEYS | IGNORED_KEYS | {"name"}
"""Any other key before the call is certain rules out that it is one."""

_CALL_ID_CHARS = 64
_FENCE_WORD = re.compile(r"[a-z_]*")
_FENCE_WORD_CHARS = 16

# Inside a call, between values: what is awaited, by what was awaited and the character that came.
_EXPECT: dict[tuple[str, str], str] = {
    ("body", "{"): "first key",
    ("body", "["): "item",
    ("item", "{"): "first key",
    ("first key", '"'): "key text",
    ("key", '"'): "key text",
    ("colon", ":"): "value",
    ("next", ","): "key",
    ("next", "}"): "object end",
    ("after item", ","): "item",
    ("after item", "]"): "array end",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """A part of a call.

    Attributes:
        call_index: Which call, from 0 in order of appearance.
        name: The tool, in the first piece of a call; None in those that follow.
        arguments_delta: More of the arguments' JSON text, as the model wrote it.
    """

    call_index: int
    name: str | None
    arguments_delta: str


class ToolCallParser:
    """Separates calls from text, whatever the pieces they arrive in, in linear time.

    A call is announced once it is certain: its name is one of ``tool_names`` and its arguments have
    begun as a JSON object. Until then its text is held back; if it turns out to be no call, because
    it is malformed, names an unknown tool or ends early, it comes back as text, and the search goes
    on at the character that did not fit. Once announced, arguments stream while they are valid
    JSON. If they break off, the call stays as it is and the rest comes back as text.

    Characters are neither lost nor invented, except that what holds calls together is dropped:
    markers, the object around name and arguments, and whitespace with nothing but calls and the
    ends of the answer on both sides.

    Args:
        format_name: Name of a format in ``TOOL_CALL_FORMATS``.
        tool_names: Tools that may be called.

    Attributes:
        num_calls: Calls announced so far.
    """

    def __init__(self, format_name: str, tool_names: Iterable[str]) -> None:
        self._format = tool_format(format_name)
        self._names = frozenset(tool_names)
        self._word_limit = _CALL_ID_CHARS + max(map(len, self._names), default=0)
        self._word_limit += len(CALL_ID_MARKER) + len(ARGS_MARKER)
        self.num_calls = 0
        self._pieces: list[TextPiece | CallPiece] = []
        self._loose: list[str] = []  # parts of the text piece to come
        self._state: Callable[[str, int], int] = self._between
        self._held = ""  # the beginning of what may become a marker
        self._space: list[str] = []  # blanks since the beginning or the last call
        self._closing = ""  # marker that may still close the last call
        # Text since the possible beginning of a call that is not announced; None if there is none.
        # It continues in the text at hand, from _mark on.
        self._candidate: list[str] | None = None
        self._mark = 0
        self._ending = ""
        self._word = ""
        self._expect = "body"
        self._in_array = False
        self._scanner = JsonScanner()
        self._role = ""  # what the value being scanned is: "key", "name", "arguments", "other"
        self._raw: list[str] = []  # the text of a key or name
        self._key = ""
        self._name: str | None = None
        self._early: list[str] = []  # arguments that came before the name
        self._announced = False

    def push(self, text: str) -> list[TextPiece | CallPiece]:
        """Takes the next piece of the answer and returns what has become certain."""
        if not text:
            return []
        text, self._held = self._held + text, ""
        self._mark = position = 0
        while position < len(text):
            position = self._state(text, position)
        if self._candidate is not None:
            self._candidate.append(text[self._mark :])
        return self._take()

    def finish(self) -> list[TextPiece | CallPiece]:
        """Ends the answer: what was held back comes out as text.

        A call that was cut short keeps the arguments it has.
        """
        if self._candidate is not None:
            rest = "".join(self._candidate)
        else:
            closing = bool(self._held) and self._closing.startswith(self._held)
            rest = "".join(self._space) + ("" if closing else self._held)
        if self.num_calls == 0 or rest.strip():
            self._emit_text(rest)
        self._candidate, self._space, self._held = None, [], ""
        self._state = self._text
        return self._take()

    def _take(self) -> list[TextPiece | CallPiece]:
        self._flush_text()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _emit_text(self, text: str) -> None:
        if text:
            self._loose.append(text)

    def _emit_call(self, piece: CallPiece) -> None:
        self._flush_text()
        self._pieces.append(piece)

    def _flush_text(self) -> None:
        if self._loose:
            self._pieces.append(TextPiece(text="".join(self._loose)))
            self._loose = []

    # Outside of calls. Each state reads on from a position and returns how far it came.

    def _between(self, text: str, position: int) -> int:
        """Where only blanks separate this from the beginning or the last call."""
        separators = self._format.separator if self.num_calls else ""
        stop = position
        while stop < len(text) and (text[stop] in WHITESPACE or text[stop] in separators):
            stop += 1
        if stop > position:
            self._space.append(text[position:stop])
            return stop
        if self._closing and text.startswith(self._closing, position):
            position += len(self._closing)
            self._closing, self._space = "", []
            return position
        marker = self._format.marker
        if text.startswith(marker, position) or (self._format.bare and text[position] in "{["):
            space, self._space = self._space, []
            return self._begin(text, position, space)
        tail = text[position : position + max(len(marker), len(self._closing))]
        if marker.startswith(tail) or self._closing.startswith(tail):
            self._held = tail
            return len(text)
        self._emit_text("".join(self._space))
        self._space, self._closing, self._state = [], "", self._text
        return position

    def _text(self, text: str, position: int) -> int:
        marker = self._format.marker
        found = text.find(marker, position)
        if found >= 0:
            self._emit_text(text[position:found])
            return self._begin(text, found, [])
        longest = min(len(marker) - 1, len(text) - position)
        sizes = range(longest, 0, -1)
        held = next((size for size in sizes if text.endswith(marker[:size])), 0)
        end = len(text) - held
        self._emit_text(text[position:end])
        self._held = text[end:]
        return len(text)

    def _begin(self, text: str, position: int, before: list[str]) -> int:
        """Where a call may begin, with its marker or without."""
        self._candidate, self._mark = before, position
        self._closing, self._word, self._in_array = "", "", False
        self._begin_call("body")
        if not text.startswith(self._format.marker, position):
            self._ending, self._state = "", self._body
            return position
        self._ending = self._format.end
        self._state = self._fence if self._format.fence_words else self._open
        return position + len(self._format.marker)

    def _fail(self, text: str, position: int) -> int:
        """This is no call, or no longer: what was held back is text."""
        if self._candidate is not None:
            self._emit_text("".join(self._candidate) + text[self._mark : position])
            self._candidate = None
        self._state = self._text
        return position

    # After a marker.

    def _fence(self, text: str, position: int) -> int:
        match = _FENCE_WORD.match(text, position)
        stop = position if match is None else match.end()
        self._word += text[position : min(stop, position + _FENCE_WORD_CHARS)]
        if len(self._word) >= _FENCE_WORD_CHARS:
            return self._fail(text, stop)
        if stop < len(text):
            if self._word not in self._format.fence_words:
                return self._fail(text, stop)
            self._state = self._open
        return stop

    def _open(self, text: str, position: int) -> int:
        stop = skip_blank(text, position)
        if stop < len(text):
            structured = text[stop] in "{[" or not self._format.named
            self._state, self._word = (self._body if structured else self._named), ""
        return stop

    def _named(self, text: str, position: int) -> int:
        """A tool's name in front of its arguments: all that comes before the first brace."""
        stop = text.find("{", position)
        end = len(text) if stop < 0 else stop
        self._word += text[position : min(end, position + self._word_limit + 1)]
        if len(self._word) > self._word_limit:
            return self._fail(text, end)
        if stop < 0:
            return end
        name = self._word.strip().removesuffix(ARGS_MARKER).partition(CALL_ID_MARKER)[0].strip()
        if name not in self._names:
            return self._fail(text, end)
        self._name = name
        self._scan("arguments")
        return end

    # Inside the object around name and arguments, or an array of such objects.

    def _begin_call(self, expect: str) -> None:
        self._expect, self._name, self._early, self._announced = expect, None, [], False

    def _body(self, text: str, position: int) -> int:
        stop = skip_blank(text, position)
        if stop > position:
            return stop
        char = text[position]
        if self._expect == "value":
            return position if self._begin_value(char) else self._fail(text, position)
        expect = _EXPECT.get((self._expect, char))
        if expect is None or (expect == "object end" and not self._announced):
            return self._fail(text, position)
        if expect == "key text":
            self._scan("key")
            return position
        if expect == "item":
            self._in_array = True
        position += 1
        if expect == "object end" and self._in_array:
            self._candidate, self._mark = [], position
            self._begin_call("after item")
        elif expect in ("object end", "array end"):
            self._end_calls()
        else:
            self._expect = expect
        return position

    def _begin_value(self, char: str) -> bool:
        """Begins the value of a key; False if it rules out that this is a call."""
        key = self._key
        if self._announced or key in IGNORED_KEYS:
            self._scan("other")
        elif key == "name" and self._name is None and char == '"':
            self._scan("name")
        elif key in ARGUMENT_KEYS and not self._early and char == "{":
            self._scan("arguments")
        else:
            return False
        return True

    def _scan(self, role: str) -> None:
        self._role, self._raw, self._scanner = role, [], JsonScanner()
        self._state = self._value

    def _value(self, text: str, position: int) -> int:
        stop = self._scanner.feed(text, position)
        if self._role == "arguments":
            self._arguments(text[position:stop])
        elif self._role in ("key", "name"):
            self._raw.append(text[position:stop])
        if self._scanner.failed or (self._scanner.done and not self._end_value()):
            return self._fail(text, stop)
        return stop

    def _arguments(self, text: str) -> None:
        if not text:
            return
        if self._name is None:
            self._early.append(text)
        elif self._announced:
            index = self.num_calls - 1
            self._emit_call(CallPiece(call_index=index, name=None, arguments_delta=text))
        else:
            self._announce(text)

    def _announce(self, arguments: str) -> None:
        index = self.num_calls
        self._emit_call(CallPiece(call_index=index, name=self._name, arguments_delta=arguments))
        self.num_calls += 1
        self._announced, self._candidate = True, None

    def _end_value(self) -> bool:
        """Uses a complete value; False if it rules out that this is a call."""
        role, self._state = self._role, self._body
        if role == "key":
            self._key, self._expect = json.loads("".join(self._raw)), "colon"
            return self._announced or self._key in CALL_KEYS
        self._expect = "next"
        if role == "name":
            self._name = json.loads("".join(self._raw))
            if self._name not in self._names:
                return False
            if self._early:
                self._announce("".join(self._early))
        elif role == "arguments" and self._word:  # the name stood outside: no object to close
            self._end_calls()
        return True

    def _end_calls(self) -> None:
        self._candidate, self._space = None, []
        self._closing, self._state = self._ending, self._between
