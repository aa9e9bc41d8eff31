"""What a server accepts and how it counts: found out by asking it, before anything is measured.

Prompts get their exact length from the server's own tokenizer. ``learn_vocabulary`` looks for
pieces of text that each cost one token wherever they stand, so that any sequence of them has a
known length. No prompt that is measured later was ever seen by the server's prefix cache.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sagellm.bench.serve_client import Client
from sagellm.errors import UnavailableError, UnsupportedError

Endpoint = Literal["chat", "completions"]
Message = dict[str, str]
Content = str | list[Message]

_PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
}
# Common words, which nearly every tokenizer of text has as one token after a space.
_WORDS = """
the of and to in is for that on with as was at by from are this have not be or an his but they
which one you had her all there would when who will more no if out so said what up its about into
than them can only other new some could time these two may then do first any my now such like our
over man me even most made after also did many before must through back years where much your way
well down should because each just those people too how little state good very make world still
own see men work long get here between both life being under never day same another know while last
might us great old year off come since against go came right used take three states himself few
house use during without again place around however home small found
"""
_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
_MIN_UNITS = 12
_PROBE_UNITS = 48
_SAMPLE = 8
# Fields that make an answer as long as asked, and usage in the stream; the most telling set first.
_EXTRAS: tuple[dict[str, Any], ...] = tuple(
    {**usage, **enforce}
    for usage in ({"stream_options": {"include_usage": True}}, {})
    for enforce in ({"ignore_eos": True, "min_tokens": None}, {"ignore_eos": True}, {})
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How requests to one server are written.

    Attributes:
        limit_field: The field that bounds the answer.
        extras: Fields beyond OpenAI's that the server took without an error; ``min_tokens`` is
            filled with the number asked.
    """

    endpoint: Endpoint
    model: str
    limit_field: str
    extras: dict[str, Any]
    temperature: float

    @property
    def path(self) -> str:
        """The route of the endpoint."""
        return _PATHS[self.endpoint]

    @property
    def enforced_by(self) -> list[str]:
        """The accepted fields that make answers as long as asked."""
        return [name for name in self.extras if name != "stream_options"]

    def body(self, content: Content, output_tokens: int, *, stream: bool = True) -> bytes:
        """A request as JSON."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages" if self.endpoint == "chat" else "prompt": content,
            self.limit_field: output_tokens,
            "temperature": self.temperature,
            "stream": stream,
        }
        for name, value in self.extras.items():
            if stream or name != "stream_options":
                fields[name] = output_tokens if name == "min_tokens" else value
        return json.dumps(fields).encode()


async def model_name(client: Client) -> str:
    """The first model that the server lists.

    Raises:
        UnavailableError: The server cannot be reached, or lists none.
    """
    listed = (await client.fetch_json("/v1/models")).get("data")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0].get("id"), str):
        raise UnavailableError("/v1/models lists no model; give --model")
    return str(listed[0]["id"])


async def learn_dialect(
    client: Client, *, endpoint: Endpoint, model: str, temperature: float
) -> Dialect:
    """Finds the fields that the server accepts, by streaming an answer of two tokens.

    Raises:
        UnavailableError: The server answers none of the forms; the message holds what it said.
    """
    content: Content = "hello" if endpoint == "completions" else [_user("hello")]
    first = ""
    for limit_field in ("max_tokens", "max_completion_tokens"):
        for extras in _EXTRAS:
            dialect = Dialect(
                endpoint=endpoint,
                model=model,
                limit_field=limit_field,
                extras=extras,
                temperature=temperature,
            )
            exchange = await client.stream(dialect.path, dialect.body(content, 2))
            failure = exchange.answer().failure
            if failure is None:
                return dialect
            first = first or f"{failure.kind}: {failure.message}"
            if failure.kind not in ("http 400", "http 422"):
                raise UnavailableError(_no_answer(dialect, first))
    raise UnavailableError(_no_answer(dialect, first))


def _no_answer(dialect: Dialect, reason: str) -> str:
    hint = "; give --api-key" if reason.startswith("http 401") else ""
    return (
        f"the server does not stream on {dialect.path} for model {dialect.model!r} ({reason}){hint}"
    )


class TokenCounter:
    """Counts the prompt tokens of a request as the server does.

    ``usage`` of an answer of one token is what the server says about itself. Where ``/tokenize``
    says the same, it is asked instead, because it costs the server no forward pass.
    """

    def __init__(self, client: Client, dialect: Dialect) -> None:
        self._client = client
        self._dialect = dialect
        self._tokenize: bool | None = None

    async def count(self, content: Content) -> int:
        """Prompt tokens of ``content``.

        Raises:
            UnsupportedError: The server reports no counts.
            UnavailableError: It answers with an error.
        """
        if self._tokenize:
            count = await self._by_tokenize(content)
            if count is not None:
                return count
        counted = await self._by_usage(content)
        if self._tokenize is None:
            self._tokenize = await self._by_tokenize(content) == counted
        return counted

    async def _by_tokenize(self, content: Content) -> int | None:
        key = "prompt" if isinstance(content, str) else "messages"
        status, answer = await self._client.fetch(
            "/tokenize", {"model": self._dialect.model, key: content}
        )
        if status != 200:
            return None
        found = json.loads(answer)
        count = found.get("count") if isinstance(found, dict) else None
        return count if isinstance(count, int) else None

    async def _by_usage(self, content: Content) -> int:
        body = json.loads(self._dialect.body(content, 1, stream=False))
        answer = await self._client.fetch_json(self._dialect.path, body)
        count = (answer.get("usage") or {}).get("prompt_tokens")
        if not isinstance(count, int):
            raise UnsupportedError(
                "the server reports no usage.prompt_tokens, so prompts of an exact length cannot "
                "be made for it"
            )
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Pieces of text of one token each.

    Attributes:
        separator: What stands between two pieces.
        overhead: Tokens of a request besides its pieces: the chat template, BOS.
        system_overhead: The same with a system message.
    """

    units: tuple[str, ...]
    separator: str
    overhead: int
    system_overhead: int

    def text(self, rng: random.Random, count: int) -> str:
        """Random text of ``count`` tokens; its first piece is always the same."""
        return self.separator.join([self.units[0], *rng.choices(self.units, k=count - 1)])


def write(endpoint: Endpoint, text: str, *, system: str | None, separator: str) -> Content:
    """The content of a request; on completions the system prompt is the start of the text."""
    if endpoint == "completions":
        return text if system is None else system + separator + text
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, _user(text)]


async def learn_vocabulary(
    count: Callable[[Content], Awaitable[int]], endpoint: Endpoint, *, with_system: bool
) -> Vocabulary:
    """Finds pieces of one token each, and proves them on a random text.

    Raises:
        UnsupportedError: The tokenizer has none among common words and letters, or its counts do
            not add up.
    """

    async def cost(text: str, system: str | None = None, separator: str = " ") -> int:
        return await count(write(endpoint, text, system=system, separator=separator))

    for separator, candidates in ((" ", tuple(_WORDS.split())), ("", tuple(_LETTERS))):
        first = candidates[0]
        base = await cost(first)

        async def extra(pieces: Sequence[str], first: str = first, base: int = base) -> int:
            return await cost(separator.join([first, *pieces]), separator=separator) - base  # noqa: B023

        units = await _units(extra, candidates)
        if len(units) < _MIN_UNITS or first not in units:
            continue
        system_overhead = base - 1
        if with_system:
            system_overhead = await cost(first, system=first, separator=separator) - 2
        vocabulary = Vocabulary(
            units=(first, *(unit for unit in units if unit != first)),
            separator=separator,
            overhead=base - 1,
            system_overhead=system_overhead,
        )
        proof = vocabulary.text(random.Random(0), _PROBE_UNITS)
        if await cost(proof) == vocabulary.overhead + _PROBE_UNITS:
            return vocabulary
    raise UnsupportedError(
        "no text of an exact length can be made for this server: its tokenizer counts neither "
        "common words nor letters as one token each"
    )


async def _units(
    extra: Callable[[Sequence[str]], Awaitable[int]], candidates: Sequence[str]
) -> list[str]:
    """The candidates that add exactly one token, by bisection."""
    if await extra(candidates[:_SAMPLE]) > 2 * _SAMPLE:
        return []  # a tokenizer of smaller pieces
    waiting = [list(candidates)]
    units: list[str] = []
    while waiting:
        pieces = waiting.pop()
        if await extra(pieces) == len(pieces):  # each adds at least one, so each adds one
            units += pieces
        elif len(pieces) > 1:
            middle = len(pieces) // 2
            waiting += [pieces[middle:], pieces[:middle]]
    return units


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
