"""Reasoning that a model writes before its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sagellm.text.tokenizer import Tokenizer
from sagellm.text.tool_formats import control_token

Kind = Literal["reasoning", "text"]

_BLANKS = " \t\n\r"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTags:
    """The texts around a model's reasoning.

    Attributes:
        start, end: The tags.
        control: They are control tokens of the vocabulary, seen only with
            ``SamplingParams.skip_special_tokens=False``.
    """

    start: str = "<think>"
    end: str = "</think>"
    control: bool = False

    def open_at_end(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside of the reasoning that the model is to write."""
        return prompt.rstrip(_BLANKS).endswith(self.start)


def detect_reasoning(
    chat_template: str | None, tokenizer: Tokenizer | None = None
) -> ReasoningTags | None:
    """The tags of a model that reasons, told by its chat template.

    Args:
        chat_template: Jinja source; None when the model has none.
        tokenizer: Tells whether the tags are control tokens.
    """
    tags = ReasoningTags()
    if chat_template is None or tags.end not in chat_template:
        return None
    if tokenizer is None:
        return tags
    return ReasoningTags(control=control_token(tokenizer, tags.end) is not None)


class ReasoningParser:
    """Separates one block of reasoning at the beginning of an answer from the rest.

    A start tag anywhere but at the beginning is text. Whitespace beside the tags belongs to them
    and is dropped; otherwise characters are neither lost nor invented. Constant time per character.

    Args:
        start_tag, end_tag: The texts around the reasoning.
        starts_inside: The prompt ended with the start tag; a model that repeats it is forgiven.
    """

    def __init__(self, start_tag: str, end_tag: str, starts_inside: bool) -> None:
        self._start = start_tag
        self._end = end_tag
        self._inside = starts_inside
        self._phase: Literal["beginning", "opened", "reasoning", "after", "text"] = "beginning"
        self._blank: list[str] = []  # whitespace that may belong to a tag
        self._held = ""  # the beginning of what may become a tag
        self._pieces: list[tuple[Kind, str]] = []

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Takes the next piece of the answer and returns what has become certain."""
        text, self._held = self._held + text, ""
        position = 0
        while position < len(text):
            if self._phase == "beginning":
                position = self._beginning(text, position)
            elif self._phase == "reasoning":
                position = self._reasoning(text, position)
            elif self._phase == "text":
                self._emit("text", text[position:])
                break
            else:
                position = _skip_blank(text, position)
                if position < len(text):
                    self._phase = "reasoning" if self._phase == "opened" else "text"
        return self._take()

    def finish(self) -> list[tuple[Kind, str]]:
        """Ends the answer and returns what was held back."""
        reasoning = self._inside or self._phase == "reasoning"
        self._emit("reasoning" if reasoning else "text", "".join(self._blank) + self._held)
        self._blank, self._held, self._phase = [], "", "text"
        return self._take()

    def _take(self) -> list[tuple[Kind, str]]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _emit(self, kind: Kind, text: str) -> None:
        if text:
            self._pieces.append((kind, text))

    def _beginning(self, text: str, position: int) -> int:
        stop = _skip_blank(text, position)
        if stop > position:
            self._blank.append(text[position:stop])
            return stop
        if text.startswith(self._start, position):
            self._blank, self._phase = [], "opened"
            return position + len(self._start)
        rest = text[position : position + len(self._start)]
        if self._start.startswith(rest):
            self._held = rest
            return len(text)
        if self._inside:
            self._phase = "opened"
        else:
            self._phase = "text"
            self._emit("text", "".join(self._blank))
        self._blank = []
        return position

    def _reasoning(self, text: str, position: int) -> int:
        found = text.find(self._end, position)
        if found < 0:
            longest = min(len(self._end) - 1, len(text) - position)
            sizes = range(longest, 0, -1)
            held = next((size for size in sizes if text.endswith(self._end[:size])), 0)
            end = len(text) - held
            self._held = text[end:]
        else:
            end = found
        body = text[position:end]
        solid = body.rstrip(_BLANKS)
        if solid:
            self._emit("reasoning", "".join(self._blank) + solid)
            self._blank = []
        if found < 0:
            self._blank.append(body[len(solid) :])
            return len(text)
        self._blank, self._inside, self._phase = [], False, "after"
        return found + len(self._end)


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position
