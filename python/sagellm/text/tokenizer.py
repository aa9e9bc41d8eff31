"""Text to token ids and back, the same for every kind of vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from sagellm.errors import InvalidArgumentError
from sagellm.protocol import LIMITS


class TokenModel(Protocol):
    """A vocabulary and its segmentation rule. ``Tokenizer`` adds what all kinds share."""

    @property
    def size(self) -> int:
        """Number of tokens; ids run from 0."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that carry control, not text."""

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Segments valid Unicode text; adds nothing."""

    def piece(self, token_id: int) -> str:
        """The text of a token in the range of ids, as stored."""

    def find(self, piece: str) -> int | None:
        """The id of a token by its stored text."""

    def piece_bytes(self, token_id: int) -> bytes:
        """What a token in the range of ids stands for; the literal text for special ones."""


class Tokenizer:
    """Encodes and decodes with one vocabulary. Safe to share between threads.

    Decoding is defined by bytes: the bytes of all tokens joined, read as UTF-8 with U+FFFD for what
    is malformed. ``IncrementalDetokenizer`` yields the same text piece by piece.

    Attributes:
        vocab_size: Number of tokens. A model may have more rows than that, as padding.
        bos_id: Token that begins a text, if any.
        eos_ids: Tokens that end a generation.
        special_ids: Tokens that carry control, not text.
        prefix_ids, suffix_ids: What ``encode`` puts around a text with ``add_special``.
        strips_leading_space: Encoding puts a space before a text and decoding takes it off again.
        bos_token, eos_token: Texts of the begin and end tokens for chat templates; empty if none.
        chat_template: Jinja source that came with the vocabulary, if any.
    """

    __slots__ = (
        "_bytes",
        "_model",
        "bos_id",
        "bos_token",
        "chat_template",
        "eos_ids",
        "eos_token",
        "prefix_ids",
        "special_ids",
        "strips_leading_space",
        "suffix_ids",
        "vocab_size",
    )

    def __init__(
        self,
        model: TokenModel,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        prefix_ids: Iterable[int] = (),
        suffix_ids: Iterable[int] = (),
        strips_leading_space: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self._model = model
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = model.size
        self.special_ids = model.special_ids
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids) | (frozenset() if eos_id is None else {eos_id})
        self.bos_token = "" if bos_id is None else model.piece(bos_id)
        self.eos_token = "" if eos_id is None else model.piece(eos_id)
        self.prefix_ids = tuple(prefix_ids)
        self.suffix_ids = tuple(suffix_ids)
        self.strips_leading_space = strips_leading_space
        self.chat_template = chat_template

    def encode(
        self, text: str, add_special: bool = True, *, parse_special: bool = False
    ) -> list[int]:
        """Segments text into token ids.

        Args:
            text: Any Unicode text.
            add_special: Put the vocabulary's begin and end tokens around it, as for a raw prompt.
            parse_special: Read the text of a control token as that token. Only for text that the
                application wrote, such as a rendered chat template (which usually brings its own
                begin token: use ``add_special=False``); never for text from a user.

        Raises:
            InvalidArgumentError: The text holds lone surrogates, or is too long.
        """
        if len(text) > LIMITS.text_chars:
            raise InvalidArgumentError(
                f"the text has {len(text)} characters; at most {LIMITS.text_chars}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                f"the text is not valid Unicode at character {error.start}: lone surrogate"
            ) from None
        ids = self._model.encode(text, parse_special=parse_special) if text else []
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special else ids

    def decode(
        self, ids: Iterable[int], skip_special: bool = True, *, continuation: bool = False
    ) -> str:
        """Joins tokens into text.

        Args:
            ids: Token ids.
            skip_special: Leave control tokens out.
            continuation: The text follows other text, so that a leading space is its own.
        """
        data = b"".join(self.visible_bytes(token_id, skip_special) for token_id in ids)
        if self.strips_leading_space and not continuation and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def visible_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """``token_bytes``, or nothing for a control token that is skipped."""
        if skip_special and token_id in self.special_ids:
            return b""
        known = self._bytes.get(token_id)
        return self.token_bytes(token_id) if known is None else known

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; the literal text of a special one.

        Ids from ``vocab_size`` on are padding rows of a model and stand for nothing.

        Raises:
            InvalidArgumentError: The id is negative.
        """
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        if token_id < 0:
            raise InvalidArgumentError(f"token id {token_id} is negative")
        if token_id >= self.vocab_size:
            return b""
        return self._bytes.setdefault(token_id, self._model.piece_bytes(token_id))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its stored text, such as ``<|im_end|>``; None if there is none."""
        return self._model.find(token)
