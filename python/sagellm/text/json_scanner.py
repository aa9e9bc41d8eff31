"""Strict JSON that arrives in pieces, checked character by character."""

from __future__ import annotations

import re

MAX_DEPTH = 128
"""Deepest nesting that counts as valid; readers of JSON give up somewhere beyond it."""

WHITESPACE = " \t\n\r"

# What a string holds without further thought. One character class: no backtracking.
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_BLANK = re.compile(r"[ \t\n\r]*")

_LITERALS = {"t": "true", "f": "false", "n": "null"}
_CLOSERS = {"{": "}", "[": "]"}
_CLOSABLE = {"}": ("next", "first key"), "]": ("next", "first item")}

# Numbers: state to the next state by kind of character ("9" is any digit, "e" also "E").
_NUMBER: dict[str, dict[str, str]] = {
    "sign": {"0": "zero", "9": "whole"},
    "zero": {".": "point", "e": "exponent"},
    "whole": {"0": "whole", "9": "whole", ".": "point", "e": "exponent"},
    "point": {"0": "fraction", "9": "fraction"},
    "fraction": {"0": "fraction", "9": "fraction", "e": "exponent"},
    "exponent": {"0": "power", "9": "power", "+": "power sign", "-": "power sign"},
    "power sign": {"0": "power", "9": "power"},
    "power": {"0": "power", "9": "power"},
}
_COMPLETE_NUMBERS = frozenset({"zero", "whole", "fraction", "power"})


def _kind(char: str) -> str:
    if char in "123456789":
        return "9"
    return "e" if char == "E" else char


def skip_blank(text: str, position: int) -> int:
    """The position of the first character from ``position`` on that is not JSON whitespace."""
    match = _BLANK.match(text, position)
    return position if match is None else match.end()


class JsonScanner:
    """Checks one JSON value whose text arrives in pieces, in constant time per character.

    Nothing is stored but the open brackets. Strict: RFC 8259, with at most ``MAX_DEPTH`` levels.

    Attributes:
        done: The value is complete. A number is complete only when another character follows it.
        failed: The next character cannot continue the value.
    """

    __slots__ = ("_open", "_state", "_word", "done", "failed")

    def __init__(self) -> None:
        self._open: list[str] = []
        self._state = "value"
        self._word = ""  # the rest of a literal or an escape, or the state inside a number
        self.done = False
        self.failed = False

    def feed(self, text: str, position: int = 0) -> int:
        """Reads on from ``position``.

        Returns:
            The position of the first character that does not belong to the value: the length of
            ``text`` unless the scanner is ``done`` or has ``failed``.
        """
        end = len(text)
        while position < end and not self.done and not self.failed:
            if self._state == "string":
                position = self._string(text, position)
            elif self._state in ("escape", "hex", "literal"):
                position += self._inside(text[position])
            elif self._state == "number":
                position += self._number(text[position])
            else:
                position = skip_blank(text, position)
                if position < end:
                    position += self._structure(text[position])
        return position

    def _string(self, text: str, position: int) -> int:
        match = _PLAIN.match(text, position)
        position = position if match is None else match.end()
        if position == len(text):
            return position
        if text[position] == '"':
            self._end_value()
        elif text[position] == "\\":
            self._state = "escape"
        else:
            self.failed = True
            return position
        return position + 1

    def _inside(self, char: str) -> int:
        """One character of an escape or a literal; returns how many were taken."""
        if self._state == "literal":
            if char != self._word[0]:
                self.failed = True
                return 0
            self._word = self._word[1:]
            if not self._word:
                self._end_value()
        elif self._state == "hex":
            if char not in "0123456789abcdefABCDEF":
                self.failed = True
                return 0
            self._word = self._word[1:]
            if not self._word:
                self._state = "string"
        elif char == "u":
            self._state, self._word = "hex", "0000"
        elif char in '"\\/bfnrt':
            self._state = "string"
        else:
            self.failed = True
            return 0
        return 1

    def _number(self, char: str) -> int:
        following = _NUMBER[self._word].get(_kind(char))
        if following is not None:
            self._word = following
            return 1
        if self._word in _COMPLETE_NUMBERS:
            self._end_value()
        else:
            self.failed = True
        return 0

    def _structure(self, char: str) -> int:
        """One character between values; returns how many were taken."""
        state = self._state
        if state in ("value", "first item") and self._begin_value(char):
            return 1
        if char == '"' and state in ("first key", "key"):
            self._open.append('"')  # marks that the string to come is a key
            self._state = "string"
        elif char == ":" and state == "colon":
            self._state = "value"
        elif char == "," and state == "next":
            self._state = "key" if self._open[-1] == "{" else "value"
        elif self._open and char == _CLOSERS[self._open[-1]] and state in _CLOSABLE[char]:
            self._open.pop()
            self._end_value()
        else:
            self.failed = True
            return 0
        return 1

    def _begin_value(self, char: str) -> bool:
        if char == '"':
            self._state = "string"
        elif char in "{[":
            if len(self._open) == MAX_DEPTH:
                return False
            self._open.append(char)
            self._state = "first key" if char == "{" else "first item"
        elif char in "-0123456789":
            self._state = "number"
            self._word = {"-": "sign", "0": "zero"}.get(char, "whole")
        elif char in _LITERALS:
            self._state, self._word = "literal", _LITERALS[char][1:]
        else:
            return False
        return True

    def _end_value(self) -> None:
        if self._open and self._open[-1] == '"':
            self._open.pop()
            self._state = "colon"
        elif self._open:
            self._state = "next"
        else:
            self.done = True
