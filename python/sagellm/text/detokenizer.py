"""Token ids to text while they arrive."""

from __future__ import annotations

import codecs

from sagellm.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns tokens into text one by one, in constant time each.

    The pieces joined, ``finish()`` included, equal ``Tokenizer.decode`` of all tokens. A piece
    never ends inside a character: bytes of an unfinished one wait for the next token, and become
    U+FFFD when none comes.

    Args:
        tokenizer: Whose tokens these are.
        skip_special: Leave control tokens out.
        continuation: The text follows other text, so that a leading space is its own.
    """

    __slots__ = ("_held", "_skip_special", "_strip", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, continuation: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer.strips_leading_space and not continuation
        self._held = b""  # the bytes of an unfinished character

    def push(self, token_id: int) -> str:
        """Takes one token and returns the text that is complete now, possibly none."""
        data = self._tokenizer.visible_bytes(token_id, self._skip_special)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        if self._held:
            data = self._held + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """Ends the text: an unfinished character becomes U+FFFD."""
        held, self._held = self._held, b""
        return codecs.utf_8_decode(held, "replace", True)[0]
