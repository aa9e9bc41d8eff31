"""From engine outputs to OpenAI's completions: whole ones, or events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sagellm.gateway.answers import encode
from sagellm.gateway.openai.common import (
    SYSTEM_FINGERPRINT,
    completion_id,
    finite_logprob,
    quote,
)
from sagellm.text import IncrementalDetokenizer

if TYPE_CHECKING:
    from sagellm.backends.interface import SampledRow
    from sagellm.engine.output import SequenceOutput
    from sagellm.gateway.context import RequestContext
    from sagellm.text import Tokenizer


def new_header(model: str, context: RequestContext) -> dict[str, Any]:
    """The fields that an answer and all of its chunks begin with."""
    return {
        "id": completion_id("cmpl", context),
        "object": "text_completion",
        "created": int(context.arrived_at),
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
    }


def spell(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is no valid UTF-8 by itself as ``bytes:`` and hexadecimal."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LogprobWriter:
    """Log-probabilities in the form of completions, piece by piece.

    Args:
        tokenizer: Of the model.
        skip_special: Control tokens are no part of the text.
        continuation: The tokens follow other text.
        offset: Characters of the text before the first token.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool, continuation: bool, offset: int
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special=skip_special, continuation=continuation
        )
        self._offset = offset

    def write(
        self, token_ids: Iterable[int], rows: Sequence[SampledRow | None]
    ) -> dict[str, list[Any]]:
        """The entries of the next tokens; the row of a token that follows nothing is None."""
        written: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for token_id, row in zip(token_ids, rows, strict=True):
            written["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.push(token_id))
            written["tokens"].append(spell(self._tokenizer, token_id))
            logprob = None if row is None else finite_logprob(row.logprob)
            written["token_logprobs"].append(logprob)
            written["top_logprobs"].append(None if row is None else self._likely(row))
        return written

    def _likely(self, row: SampledRow) -> dict[str, float]:
        """The likely tokens and the one that stands there, best first."""
        likely: dict[str, float] = {}
        for token_id, logprob in zip(row.top_ids, row.top_logprobs, strict=True):
            likely.setdefault(spell(self._tokenizer, token_id), finite_logprob(logprob))
        likely.setdefault(spell(self._tokenizer, row.token_id), finite_logprob(row.logprob))
        return likely


class ChoiceWriter:
    """One completion of one prompt.

    Args:
        index: Among all completions of the request.
        tokenizer: Of the model.
        prompt_ids: The prompt.
        echo: The prompt's text if the answer begins with it, else None.
        echo_special: The prompt's text shows control tokens.
        skip_special: The completion's text leaves control tokens out.
        with_logprobs: Log-probabilities are wanted.
        drop_output: Nothing is wanted but the prompt.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int],
        echo: str | None,
        echo_special: bool,
        skip_special: bool,
        with_logprobs: bool,
        drop_output: bool,
    ) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._echo = echo
        self._echo_special = echo_special
        self._with_logprobs = with_logprobs
        self._drop_output = drop_output
        self._has_begun = False
        self._writer = LogprobWriter(
            tokenizer,
            skip_special=skip_special,
            continuation=True,
            offset=0 if echo is None else len(echo),
        )

    def take(
        self, output: SequenceOutput, prompt_rows: Sequence[SampledRow | None] | None
    ) -> tuple[str, dict[str, list[Any]] | None, str | None]:
        """What is new: text, log-probabilities, and the finish reason at the end.

        Args:
            output: Of the engine.
            prompt_rows: Log-probabilities of the prompt's tokens, if they were asked for.
        """
        text, logprobs = "", None
        if not self._has_begun:
            self._has_begun = True
            if self._echo is not None:
                text = self._echo
                logprobs = self._prompt_logprobs(prompt_rows)
        reason = None if output.finished is None else output.finished.reason
        if self._drop_output:
            return text, logprobs, None if reason is None else "length"
        if self._with_logprobs:
            more = self._writer.write(output.token_ids, output.logprobs)
            logprobs = more if logprobs is None else _joined(logprobs, more)
        return text + output.text, logprobs, reason

    def _prompt_logprobs(
        self, rows: Sequence[SampledRow | None] | None
    ) -> dict[str, list[Any]] | None:
        if not self._with_logprobs or rows is None:
            return None
        writer = LogprobWriter(
            self._tokenizer, skip_special=not self._echo_special, continuation=False, offset=0
        )
        return writer.write(self._prompt_ids, rows)


def _joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values + second[name] for name, values in first.items()}


class CompletionEvents:
    """Writes the events of a stream.

    Args:
        header: From ``new_header``.
        with_usage: All chunks have a ``usage`` field.
    """

    def __init__(self, header: dict[str, Any], *, with_usage: bool) -> None:
        self._head = f'data: {encode(header)[:-1]},"choices":['
        self._tail = '],"usage":null}\n\n' if with_usage else "]}\n\n"

    def tell_usage(self, usage_json: str) -> None:
        """Puts the usage so far into the chunks that follow."""
        self._tail = f'],"usage":{usage_json}}}\n\n'

    def chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> bytes:
        """What is new in one completion."""
        rows = "null" if logprobs is None else encode(logprobs)
        ending = "null" if reason is None else f'"{reason}"'
        return (
            f'{self._head}{{"index":{index},"text":{quote(text)},"logprobs":{rows},'
            f'"finish_reason":{ending}}}{self._tail}'
        ).encode("ascii")

    def usage(self, usage_json: str) -> bytes:
        """The chunk without completions that tells the usage."""
        return f'{self._head}],"usage":{usage_json}}}\n\n'.encode("ascii")
