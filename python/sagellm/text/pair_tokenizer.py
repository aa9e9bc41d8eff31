"""Tokenizers of encoder models: text, or a pair of texts, to token ids. Nothing is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as LibraryTokenizer

from sagellm.errors import CorruptFileError, InvalidArgumentError, ModelNotFoundError

_MAX_TOKENIZER_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PairEncoding:
    """Two texts as one input of a cross-encoder.

    Attributes:
        token_ids: With the model's special tokens.
        token_types: Which text a token belongs to, as the model numbers them; as many.
    """

    token_ids: list[int]
    token_types: list[int]


class PairTokenizer:
    """A ``tokenizer.json`` of any kind, for encoding only. Safe to use from several threads."""

    def __init__(self, folder: Path, *, lower_case: bool = False) -> None:
        """Reads the folder's ``tokenizer.json``.

        Args:
            folder: The model's.
            lower_case: Lower-case texts first, whatever the file's own normalizer does.

        Raises:
            ModelNotFoundError: There is none.
            CorruptFileError: It is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelNotFoundError(
                f"{folder.name}: no tokenizer.json; download the model's tokenizer files as well"
            )
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise CorruptFileError(f"tokenizer.json is larger than {_MAX_TOKENIZER_BYTES} bytes")
        try:
            self._library = LibraryTokenizer.from_file(str(path))
        except Exception as error:  # the library has no exception type of its own
            raise CorruptFileError(f"tokenizer.json cannot be read: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._lower_case = lower_case

    @property
    def size(self) -> int:
        """Tokens of the vocabulary, added ones included."""
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, truncate_tokens: int | None = None) -> list[int]:
        """Token ids of a text, with the model's special tokens.

        Args:
            text: Any string; lone surrogates become question marks.
            truncate_tokens: Cut the text so that it has at most so many tokens, special ones
                included.

        Raises:
            InvalidArgumentError: ``truncate_tokens`` leaves no room for the text.
        """
        encoding = self._raw(text)
        if truncate_tokens is not None:
            encoding.truncate(self._room(truncate_tokens, is_pair=False))
        return list(self._library.post_process(encoding).ids)

    def encode_pair(
        self, first: str, second: str, *, truncate_tokens: int | None = None
    ) -> PairEncoding:
        """Token ids and types of two texts.

        Args:
            first: Such as a query.
            second: Such as a document.
            truncate_tokens: Cut the second text so that both have at most so many tokens.

        Raises:
            InvalidArgumentError: The first text leaves no room for the second.
        """
        one, two = self._raw(first), self._raw(second)
        if truncate_tokens is not None:
            room = self._room(truncate_tokens, is_pair=True) - len(one.ids)
            if room < 1 and len(two.ids):
                raise InvalidArgumentError(
                    f"the first text has {len(one.ids)} tokens, which leaves no room for the "
                    f"second in {truncate_tokens}; shorten it"
                )
            two.truncate(max(room, 0))
        encoding = self._library.post_process(one, two)
        return PairEncoding(token_ids=list(encoding.ids), token_types=list(encoding.type_ids))

    def _raw(self, text: str):  # type: ignore[no-untyped-def]  # the library's Encoding
        clean = text.encode("utf-8", "replace").decode("utf-8")
        if self._lower_case:
            clean = clean.lower()
        return self._library.encode(clean, add_special_tokens=False)

    def _room(self, truncate_tokens: int, *, is_pair: bool) -> int:
        room = truncate_tokens - int(self._library.num_special_tokens_to_add(is_pair))
        if room < 1:
            raise InvalidArgumentError(
                f"truncate_tokens is {truncate_tokens}, which leaves no room beside the special "
                f"tokens; choose at least {truncate_tokens - room + 1}"
            )
        return room
