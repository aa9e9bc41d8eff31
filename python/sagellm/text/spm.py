"""SentencePiece vocabularies with scores (Gemma, Llama 2, Mistral): pair merging by score.

The rule is that of SentencePiece's BPE model (Kudo and Richardson 2018, arXiv 1808.06226):
characters are symbols; the adjacent pair whose concatenation is a token of the largest score is
merged, leftmost first among equals, until no pair is a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sagellm.errors import CorruptFileError
from sagellm.text.token_types import BYTE_PIECE, TokenType

SPACE = "\u2581"
_CACHED_WORDS = 16384
_CACHED_WORD_CHARS = 32


class TokenSplitter:
    """Cuts fixed token texts out of a text: leftmost first, longest first."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for token in tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        firsts = "".join(re.escape(first) for first in self._lengths)
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yields ids of the tokens found and the non-empty texts between them, in order."""
        start = position = 0
        while self._first is not None and (found := self._first.search(text, position)):
            position = found.start()
            for length in self._lengths[text[position]]:
                token_id = self._tokens.get(text[position : position + length])
                if token_id is not None:
                    if start < position:
                        yield text[start:position]
                    yield token_id
                    position += length
                    start = position
                    break
            else:
                position += 1
        if start < len(text):
            yield text[start:]


class SentencePieceModel:
    """A ``TokenModel`` that merges by score.

    A space is U+2581 inside. User-defined tokens are cut out of any text before merging. A
    character that is no token becomes its UTF-8 bytes where the vocabulary has byte tokens, else
    the unknown token.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        unk_id: int | None,
        add_space_prefix: bool,
    ) -> None:
        self._tokens = tokens
        self._scores = scores
        self._types = types
        self._ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(self._ids) != len(tokens):
            raise CorruptFileError("the vocabulary holds the same token twice")
        kinds = np.asarray(types, dtype=np.int64)
        control, unknown = _ids_of(kinds, TokenType.CONTROL), _ids_of(kinds, TokenType.UNKNOWN)
        byte_ids = _ids_of(kinds, TokenType.BYTE)
        self._mergeable = self._ids.copy()
        for token_id in (*control, *unknown, *byte_ids):
            del self._mergeable[tokens[token_id]]
        self._byte_ids = self._order_bytes(byte_ids)
        self._unk_id = unk_id
        if not self._byte_ids and unk_id is None:
            raise CorruptFileError("the vocabulary has neither byte tokens nor an unknown token")
        self._add_space_prefix = add_space_prefix
        self.special_ids = frozenset((*control, *unknown))
        self._control = self._splitter(control)
        self._user_defined = self._splitter(_ids_of(kinds, TokenType.USER_DEFINED))
        self._boundary = self._find_boundaries()
        self._cached_merge = lru_cache(_CACHED_WORDS)(self._merge)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def piece(self, token_id: int) -> str:
        """The text of a token, as stored."""
        return self._tokens[token_id]

    def find(self, piece: str) -> int | None:
        """The id of a token by its stored text."""
        return self._ids.get(piece)

    def piece_bytes(self, token_id: int) -> bytes:
        """What a token stands for."""
        token = self._tokens[token_id]
        kind = self._types[token_id]
        if kind == TokenType.BYTE:
            return bytes([_byte_value(token)])
        if kind not in (TokenType.CONTROL, TokenType.UNKNOWN):
            token = token.replace(SPACE, " ")
        return token.encode("utf-8", errors="surrogateescape")

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Segments text. The space prefix also follows control tokens."""
        text = text.replace(" ", SPACE)
        ids: list[int] = []
        for segment in self._control.split(text) if parse_special else (text,):
            if isinstance(segment, int):
                ids.append(segment)
                continue
            if self._add_space_prefix:
                segment = SPACE + segment
            for part in self._user_defined.split(segment):
                if isinstance(part, int):
                    ids.append(part)
                else:
                    for word in self._boundary.split(part):
                        short = len(word) <= _CACHED_WORD_CHARS
                        ids.extend(self._cached_merge(word) if short else self._merge(word))
        return ids

    def _merge(self, text: str) -> tuple[int, ...]:
        """Merges one word. O(n log n): a linked list of symbols and a heap of candidate pairs."""
        mergeable, scores = self._mergeable, self._scores
        symbols: list[str] = list(text)
        size = len(symbols)
        before = list(range(-1, size - 1))
        after = list(range(1, size + 1))
        unused_parts: dict[str, tuple[str, str]] = {}
        # A candidate is (-score, left, right, length); it is stale once either symbol has changed.
        heap: list[tuple[float, int, int, int]] = []
        for left, pair in enumerate(pairwise(symbols)):
            token_id = mergeable.get(pair[0] + pair[1])
            if token_id is not None:
                heap.append((-scores[token_id], left, left + 1, 2))
        heapify(heap)
        while heap:
            _, left, right, length = heappop(heap)
            first, second = symbols[left], symbols[right]
            if not first or not second or len(first) + len(second) != length:
                continue
            merged = first + second
            if self._types[mergeable[merged]] == TokenType.UNUSED:
                unused_parts[merged] = (first, second)
            symbols[left], symbols[right] = merged, ""
            following = after[left] = after[right]
            if following < size:
                before[following] = left
            for one, two in ((before[left], left), (left, following)):
                if one >= 0 and two < size:
                    joined = symbols[one] + symbols[two]
                    token_id = mergeable.get(joined)
                    if token_id is not None:
                        heappush(heap, (-scores[token_id], one, two, len(joined)))
        return tuple(self._resolve([symbol for symbol in symbols if symbol], unused_parts))

    def _resolve(
        self, symbols: list[str], unused_parts: Mapping[str, tuple[str, str]]
    ) -> Iterator[int]:
        """Maps symbols to ids, taking unused tokens apart again."""
        pending = symbols[::-1]
        after_unknown = False
        while pending:
            symbol = pending.pop()
            if symbol in unused_parts:
                pending.extend(reversed(unused_parts[symbol]))
                continue
            token_id = self._mergeable.get(symbol)
            if token_id is not None:
                yield token_id
            elif self._byte_ids:
                yield from (self._byte_ids[byte] for byte in symbol.encode())
            elif self._unk_id is not None and not after_unknown:
                yield self._unk_id
            after_unknown = token_id is None

    def _splitter(self, ids: Iterable[int]) -> TokenSplitter:
        # Converters store user-defined spaces as spaces; inside they are U+2581 as everywhere.
        texts = ((self._tokens[token_id].replace(" ", SPACE), token_id) for token_id in ids)
        return TokenSplitter({text: token_id for text, token_id in texts if text})

    def _order_bytes(self, ids: Iterable[int]) -> list[int]:
        byte_ids = [-1] * 256
        for token_id in ids:
            byte_ids[_byte_value(self._tokens[token_id])] = token_id
        if all(token_id < 0 for token_id in byte_ids):
            return []
        if any(token_id < 0 for token_id in byte_ids):
            raise CorruptFileError("the vocabulary has some byte tokens but not all 256")
        return byte_ids

    def _find_boundaries(self) -> re.Pattern[str]:
        """Finds where no merge can cross: before a space whose left neighbour no token joins to it.

        Words cut there merge exactly as in the whole text, and short ones can be remembered.
        """
        if SPACE not in self._mergeable:
            return re.compile("(?!)")  # a run of unknown characters must stay in one piece
        joined = "\n".join(self._mergeable)
        lefts = {SPACE, "\n", *re.findall(f"([^\n{SPACE}]){SPACE}", joined)}
        excluded = "".join(re.escape(left) for left in lefts)
        return re.compile(f"(?<=[^{excluded}])(?={SPACE})")


def _ids_of(kinds: NDArray[np.int64], kind: TokenType) -> list[int]:
    ids: list[int] = np.flatnonzero(kinds == kind).tolist()
    return ids


def _byte_value(piece: str) -> int:
    found = BYTE_PIECE.fullmatch(piece)
    if found is None:
        raise CorruptFileError(f"byte token {piece!r} is not of the form <0xAB>")
    return int(found[1], 16)
