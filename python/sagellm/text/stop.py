"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sagellm.errors import InvalidArgumentError


class StopStrings:
    """Passes text on until a stop string is complete, whatever the pieces it arrives in.

    Text that may be the beginning of a stop string is held back. The first stop string to be
    complete wins, the longest of those that end at the same character; it and all that follows are
    dropped.

    An Aho-Corasick automaton: constant time per character, however many strings there are.

    Attributes:
        matched: The stop string that ended the text; None until then.
    """

    __slots__ = ("_depth", "_fail", "_held", "_match", "_next", "_state", "matched")

    def __init__(self, strings: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        self._fail = [0]
        for string in strings:
            if not string:
                raise InvalidArgumentError("a stop string is empty; leave it out")
            self._insert(string)
        self._link()
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text that is safe to pass on; none once stopped."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            self._state = self._step(self._state, char)
            self.matched = self._match[self._state]
            if self.matched is not None:
                self._held = ""
                return pending[: position - len(self.matched)]
        safe = len(pending) - self._depth[self._state]
        self._held = pending[safe:]
        return pending[:safe]

    def finish(self) -> str:
        """Ends the text and returns what was held back; none if stopped."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            following = self._next[state].get(char)
            if following is None:
                following = len(self._next)
                self._next[state][char] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
                self._fail.append(0)
            state = following
        self._match[state] = string

    def _link(self) -> None:
        """Links each state to that of its longest proper suffix, breadth first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self._next[state].items():
                self._fail[following] = self._step(self._fail[state], char)
                if self._match[following] is None:
                    self._match[following] = self._match[self._fail[following]]
                queue.append(following)
