"""The text of a sequence: detokenized as its tokens arrive, and ended by stop rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm.text import IncrementalDetokenizer, StopStrings

if TYPE_CHECKING:
    from sagellm.protocol import Request
    from sagellm.text import Tokenizer


class OutputText:
    """The text of one sequence as its tokens arrive."""

    __slots__ = ("_detokenizer", "_named_ids", "_parts", "_sent_parts", "_stops", "stop_ids")

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        """Prepares for a request's stop rules.

        Args:
            request: Its ``sampling`` gives stop strings and ids, ``ignore_eos``, and whether
                control tokens show.
            tokenizer: Gives text and end-of-generation ids.
        """
        params = request.sampling
        ends = frozenset() if params.ignore_eos else tokenizer.eos_ids
        self._named_ids = frozenset(params.stop_token_ids)
        self.stop_ids = ends | self._named_ids
        # A response format describes every byte of the text, a leading space too.
        exact = params.response_format is not None and params.response_format.type != "text"
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special=params.skip_special_tokens,
            continuation=exact or request.messages is None,
        )
        self._stops = StopStrings(params.stop) if params.stop else None
        self._parts: list[str] = []
        self._sent_parts = 0

    def push(self, token_id: int) -> bool:
        """Takes one token that is not a stop token; returns whether a stop string is complete."""
        piece = self._detokenizer.push(token_id)
        if not piece:
            return False
        if self._stops is None:
            self._parts.append(piece)
            return False
        return self._pass(self._stops, piece)

    def finish(self) -> bool:
        """Ends the text, giving out what was held back; returns whether a stop string ended it."""
        rest = self._detokenizer.finish()
        if self._stops is None:
            if rest:
                self._parts.append(rest)
            return False
        stopped = self._stops.stopped or self._pass(self._stops, rest)
        held = self._stops.finish()
        if held:
            self._parts.append(held)
        return stopped

    def matched_stop(self, last_token: int | None) -> str | int | None:
        """The stop string, or the stop token that the request named, that ended the text."""
        if self._stops is not None and self._stops.matched is not None:
            return self._stops.matched
        return last_token if last_token in self._named_ids else None

    def _pass(self, stops: StopStrings, piece: str) -> bool:
        safe = stops.push(piece)
        if safe:
            self._parts.append(safe)
        return stops.stopped

    def take(self) -> str:
        """Text since the last call."""
        if self._sent_parts == len(self._parts):
            return ""
        new = "".join(self._parts[self._sent_parts :])
        self._sent_parts = len(self._parts)
        return new

    def whole(self) -> str:
        """All text so far."""
        return "".join(self._parts)
