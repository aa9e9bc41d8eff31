"""A completion's text on its way to clients: split into answer, reasoning and tool calls."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from sagellm.text import IncrementalDetokenizer
from sagellm.text.reasoning import ReasoningParser, ReasoningTags
from sagellm.text.tool_calls import CallPiece, TextPiece, ToolCallParser

if TYPE_CHECKING:
    from sagellm.backends.interface import SampledRow
    from sagellm.engine.output import SequenceOutput
    from sagellm.protocol import SamplingParams
    from sagellm.text import Tokenizer

ChatFinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True, kw_only=True)  # these are not frozen: one is made for every token
class TextDelta:
    """Visible text; ``logprobs`` has the rows of the tokens since the last delta, if asked for."""

    index: int
    text: str
    logprobs: list[SampledRow] | None = None


@dataclass(slots=True, kw_only=True)
class ReasoningDelta:
    """Text of a reasoning block."""

    index: int
    text: str


@dataclass(slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of a tool call: id and name come once, in its first piece."""

    index: int
    call_index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True, kw_only=True)
class ChoiceEnd:
    """A completion is over; ``matched_stop`` is the stop string or token that ended it, if any."""

    index: int
    finish_reason: ChatFinishReason
    matched_stop: str | int | None = None


ChatDelta: TypeAlias = "TextDelta | ReasoningDelta | ToolCallDelta | ChoiceEnd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request; ``cached_tokens`` are part of the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingPlan:
    """How the output of a request is to be read.

    Attributes:
        sampling: Of the request.
        tokenizer: Of the model.
        tool_format: Family whose tool calls are parsed; None parses none.
        tool_names: Tools that may be called.
        parallel_tool_calls: Whether calls after the first one are passed on.
        reasoning: Tags around a reasoning block to split off; None splits nothing.
        starts_inside: The prompt has opened the reasoning block already.
        dropped_ends: Tokens that end a completion and are no part of it.
    """

    sampling: SamplingParams
    tokenizer: Tokenizer
    tool_format: str | None
    tool_names: frozenset[str]
    parallel_tool_calls: bool
    reasoning: ReasoningTags | None
    starts_inside: bool
    dropped_ends: frozenset[int]


class ChoiceReader:
    """One completion: text in, deltas out."""

    def __init__(self, index: int, plan: ReadingPlan) -> None:
        self._index = index
        self._plan = plan
        self._wants_logprobs = plan.sampling.logprobs is not None
        self._reasoning: ReasoningParser | None = None
        if plan.reasoning is not None:
            tags = plan.reasoning
            self._reasoning = ReasoningParser(tags.start, tags.end, plan.starts_inside)
        self._tools: ToolCallParser | None = None
        if plan.tool_format is not None:
            self._tools = ToolCallParser(plan.tool_format, plan.tool_names)
        self._is_plain = self._reasoning is None and self._tools is None
        self._has_reasoned = False
        self._num_calls = 0
        self.reasoning_tokens = 0

    def take(self, output: SequenceOutput) -> list[ChatDelta]:
        """The deltas of one output."""
        if self._is_plain:
            text = output.text
            deltas: list[ChatDelta] = [TextDelta(index=self._index, text=text)] if text else []
        else:
            deltas = self._split(output.text)
        finished = output.finished
        if finished is not None and not self._is_plain:
            self._finish_text(deltas)
        if self._wants_logprobs and output.logprobs:
            self._attach(output, deltas)
        if finished is not None:
            if self._has_reasoned:
                self.reasoning_tokens = self._count_reasoning(finished.token_ids)
            called = self._num_calls > 0 and finished.reason == "stop"
            reason = "tool_calls" if called else finished.reason
            assert reason != "error"  # failures do not come here
            deltas.append(
                ChoiceEnd(
                    index=self._index, finish_reason=reason, matched_stop=finished.matched_stop
                )
            )
        return deltas

    def _split(self, text: str) -> list[ChatDelta]:
        deltas: list[ChatDelta] = []
        if self._reasoning is None:
            self._visible(text, deltas)
            return deltas
        for kind, piece in self._reasoning.push(text):
            self._reasoned(kind, piece, deltas)
        return deltas

    def _reasoned(self, kind: str, piece: str, deltas: list[ChatDelta]) -> None:
        if kind == "reasoning":
            self._has_reasoned = True
            deltas.append(ReasoningDelta(index=self._index, text=piece))
        else:
            self._visible(piece, deltas)

    def _visible(self, text: str, deltas: list[ChatDelta]) -> None:
        if self._tools is None:
            if text:
                deltas.append(TextDelta(index=self._index, text=text))
            return
        for piece in self._tools.push(text):
            self._piece(piece, deltas)

    def _piece(self, piece: TextPiece | CallPiece, deltas: list[ChatDelta]) -> None:
        if isinstance(piece, TextPiece):
            deltas.append(TextDelta(index=self._index, text=piece.text))
            return
        if piece.call_index > 0 and not self._plan.parallel_tool_calls:
            return  # the client takes one call and the model was free to write more
        call_id = None
        if piece.name is not None:
            self._num_calls += 1
            call_id = new_call_id(self._plan.tool_format)
        deltas.append(
            ToolCallDelta(
                index=self._index,
                call_index=piece.call_index,
                call_id=call_id,
                name=piece.name,
                arguments=piece.arguments_delta,
            )
        )

    def _finish_text(self, deltas: list[ChatDelta]) -> None:
        if self._reasoning is not None:
            for kind, text in self._reasoning.finish():
                self._reasoned(kind, text, deltas)
        if self._tools is not None:
            for piece in self._tools.finish():
                self._piece(piece, deltas)

    def _attach(self, output: SequenceOutput, deltas: list[ChatDelta]) -> None:
        """Puts the rows of all tokens but a closing one on the first text of this output."""
        rows = output.logprobs
        finished = output.finished
        if (
            finished is not None
            and finished.reason == "stop"
            and rows[-1].token_id in self._plan.dropped_ends
        ):
            rows = rows[:-1]
        if not rows:
            return
        for delta in deltas:
            if isinstance(delta, TextDelta):
                delta.logprobs = rows
                return
        deltas.insert(0, TextDelta(index=self._index, text="", logprobs=rows))

    def _count_reasoning(self, token_ids: Sequence[int]) -> int:
        """How many tokens it took to reach the end of the reasoning block."""
        assert self._plan.reasoning is not None
        end_tag = self._plan.reasoning.end
        detokenizer = IncrementalDetokenizer(
            self._plan.tokenizer, skip_special=self._plan.sampling.skip_special_tokens
        )
        tail = ""
        for count, token_id in enumerate(token_ids, 1):
            tail += detokenizer.push(token_id)
            if end_tag in tail:
                return count
            tail = tail[-len(end_tag) :]
        return len(token_ids)


def new_call_id(tool_format: str | None) -> str:
    """An id for a tool call; Mistral's templates refuse any but nine letters or digits."""
    if tool_format is not None and tool_format.startswith("mistral"):
        return secrets.token_hex(5)[:9]
    return f"call_{secrets.token_hex(12)}"
