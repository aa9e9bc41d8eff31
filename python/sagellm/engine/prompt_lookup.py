"""Where the last tokens of a sequence stood before in it: an index that grows with the sequence."""

from __future__ import annotations

from array import array

MIN_MATCH = 2
"""Tokens of the shortest match."""

_MAX_MATCH = 32  # tokens compared backwards
_MAX_CANDIDATES = 8  # earlier places compared
_MEMORY = 0.9  # weight of the past in a sequence's trust, per lookup


class PromptLookup:
    """The places in one sequence where its last tokens stood before.

    Pairs of tokens lead to their last occurrence, each occurrence to the one before: a
    microsecond or two and up to 150 bytes per token.

    Attributes:
        match: Tokens before the end that equal those before the expected one; 0 without any.
        trust: At most 1; falls as predictions fail more often than matches of their length promise.
    """

    __slots__ = ("_before", "_last", "_next", "_num_hits", "_num_promised", "_tokens", "match")

    def __init__(self) -> None:
        self._tokens = array("i")
        self._last: dict[int, int] = {}  # pair -> index behind it
        self._before = array("i")  # index behind a pair -> the same of its occurrence before, or -1
        self._next = -1  # index of the expected token
        self._num_hits = self._num_promised = 1.0
        self.match = 0

    @property
    def trust(self) -> float:
        """See the class."""
        return min(1.0, (self._num_hits + 1.0) / (self._num_promised + 1.0))

    def __len__(self) -> int:
        """Tokens seen so far."""
        return len(self._tokens)

    def extend(self, token_ids: list[int]) -> None:
        """Takes the tokens that follow those seen so far."""
        known = self._tokens
        first = len(known)
        known.extend(token_ids)
        size = len(known)
        if size == first:
            return
        for index in range(first, size):
            if self._next < 0:
                break
            self._judge(known[self._next] == known[index])
        self._remember(first + 1, size - 1)
        if self._next < 0:
            self._find()  # before the last pair is noted: it would find itself
        self._remember(size, size)

    def draft(self, count: int) -> list[int]:
        """The expected tokens; a match that reaches the end goes on in circles."""
        if self._next < 0:
            return []
        guesses = self._tokens[self._next : self._next + count].tolist()
        period = len(self._tokens) - self._next
        while len(guesses) < count:
            guesses.append(guesses[-period])
        return guesses

    def _judge(self, hit: bool) -> None:
        promised = self.match / (self.match + 2)
        self._num_hits = _MEMORY * self._num_hits + hit
        self._num_promised = _MEMORY * self._num_promised + promised
        if hit:
            self._next += 1
            self.match += 1
        else:
            self._next, self.match = -1, 0

    def _remember(self, first: int, last: int) -> None:
        """Notes the pairs before the indices ``first`` to ``last``."""
        known, places, before = self._tokens, self._last, self._before
        for end in range(first, last + 1):
            pair = _pair_before(known, end)
            before.append(places.get(pair, -1))
            places[pair] = end

    def _find(self) -> None:
        """Looks for the longest match of the end, the latest first."""
        known, size = self._tokens, len(self._tokens)
        if size < MIN_MATCH:
            return
        place = self._last.get(_pair_before(known, size), -1)
        for _ in range(_MAX_CANDIDATES):
            if place < 0:
                break
            length = MIN_MATCH
            longest = min(_MAX_MATCH, place)
            while length < longest and known[place - 1 - length] == known[size - 1 - length]:
                length += 1
            if length > self.match:
                self._next, self.match = place, length
            place = self._before[place - 1]


def _pair_before(tokens: array[int], end: int) -> int:
    """The two tokens before ``end`` in one number; -1 where there is one only."""
    return tokens[end - 2] << 32 | tokens[end - 1] if end >= 2 else -1
