"""Byte-level BPE vocabularies, through the ``tokenizers`` library."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from sagellm.checkpoint.tokenizer_source import TokenizerSource
from sagellm.errors import CorruptFileError, UnsupportedError
from sagellm.text.token_types import BYTE_PIECE, TokenType

if TYPE_CHECKING:
    from sagellm.text.tokenizer import TokenModel

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """How text is cut into words before merging.

    Attributes:
        patterns: Applied one after another; matches and what lies between them become words.
        nfc: Text is first brought to Unicode normal form C.
        whole_words: A word that is a token is not built from merges.
        add_bos: Texts begin with the begin token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_GPT2_RULE = PreTokenizer(patterns=(_GPT2,))
_DIGITS_RULE = PreTokenizer(patterns=(_DIGIT, _GPT2))
_LLAMA3_RULE = PreTokenizer(patterns=(_LLAMA3,), whole_words=True, add_bos=True)
_QWEN2_RULE = PreTokenizer(patterns=(_QWEN2,), nfc=True)

PRE_TOKENIZERS = {
    "default": _GPT2_RULE,
    "gpt-2": _GPT2_RULE,
    "olmo": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "refact": _DIGITS_RULE,
    "command-r": _DIGITS_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "tekken": PreTokenizer(patterns=(_TEKKEN,), whole_words=True, add_bos=True),
}
"""Rules by the name that GGUF files give them (``tokenizer.ggml.pre``)."""


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


def bytes_of(piece: str) -> bytes:
    """What the text of a token in a byte-level vocabulary stands for."""
    if any(char not in BYTE_ALPHABET for char in piece):
        return piece.encode()
    return bytes(BYTE_ALPHABET[char] for char in piece)


class LibraryModel:
    """A ``TokenModel`` over a tokenizer of the ``tokenizers`` library.

    Args:
        tokenizer: Owned by this object from here on.
        style: How stored token texts stand for bytes: ``byte_level`` is the alphabet of GPT-2,
            ``byte_fallback`` SentencePiece's texts with ``<0xAB>`` for single bytes.
        space: Character that stands for a space in ``byte_fallback`` texts.
    """

    def __init__(
        self,
        tokenizer: LibraryTokenizer,
        style: Literal["byte_level", "byte_fallback"],
        space: str = "\u2581",
    ) -> None:
        self._tokenizer = tokenizer
        self._style = style
        self._space = space
        self._added = tokenizer.get_added_tokens_decoder()
        # Whether control tokens are read is a switch on the library's object. One object for either
        # position needs no lock: a short text never waits for the end of a long one.
        self._literal = _literal_twin(tokenizer, self._added)
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.size = max(
            tokenizer.get_vocab_size(with_added_tokens=True), max(self._added, default=-1) + 1
        )

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Segments text."""
        tokenizer = self._tokenizer if parse_special else self._literal
        # A batch of one: unlike ``encode`` it lets other Python threads run meanwhile.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def piece(self, token_id: int) -> str:
        """The text of a token, as stored; empty for an id that is not taken."""
        text: str | None = self._tokenizer.id_to_token(token_id)
        return "" if text is None else text

    def find(self, piece: str) -> int | None:
        """The id of a token by its stored text."""
        token_id: int | None = self._tokenizer.token_to_id(piece)
        return token_id

    def piece_bytes(self, token_id: int) -> bytes:
        """What a token stands for."""
        text = self.piece(token_id)
        if self._style == "byte_level":
            return text.encode() if token_id in self._added else bytes_of(text)
        found = BYTE_PIECE.fullmatch(text)
        if found is not None:
            return bytes([int(found[1], 16)])
        if token_id not in self.special_ids:
            text = text.replace(self._space, " ")
        return text.encode()


class NativeModel:
    """A ``TokenModel`` over ``_core.text.BytePairTable``.

    The library finds added tokens and cuts the rest into words; to it every word is one unknown
    token. Its own tables for merging are not built: with the GIL held, they took longer than all
    else about a vocabulary.
    """

    def __init__(
        self,
        table: Any,
        cutter: pre_tokenizers.PreTokenizer,
        special: list[AddedToken],
        plain: list[AddedToken],
    ) -> None:
        self._table = table
        tokenizer = LibraryTokenizer(models.WordLevel({"": 0}, unk_token=""))
        tokenizer.pre_tokenizer = cutter
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(plain)
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer, self._literal = tokenizer, _literal_twin(tokenizer, added)
        # Ids by the library's own numbers, of which 0 is a word.
        self._added: dict[int, int] = {i: table.find(token.content) for i, token in added.items()}
        self._added_ids = frozenset(self._added.values())
        self.special_ids = frozenset(self._added[i] for i, token in added.items() if token.special)
        self.size: int = table.size

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Segments text."""
        tokenizer = self._tokenizer if parse_special else self._literal
        # A batch of one: unlike ``encode`` it lets other Python threads run meanwhile.
        (cut,) = tokenizer.encode_batch([text], add_special_tokens=False)
        kinds, words = cut.ids, [text[start:end] for start, end in cut.offsets]
        ids: list[int] = []
        begin = 0
        for place in [i for i, kind in enumerate(kinds) if kind]:
            ids += self._table.encode(words[begin:place])
            ids.append(self._added[kinds[place]])
            begin = place + 1
        ids += self._table.encode(words[begin:])
        return ids

    def piece(self, token_id: int) -> str:
        """The text of a token, as stored."""
        text: str = self._table.token(token_id)
        return text

    def find(self, piece: str) -> int | None:
        """The id of a token by its stored text."""
        token_id: int | None = self._table.find(piece)
        return token_id

    def piece_bytes(self, token_id: int) -> bytes:
        """What a token stands for."""
        text = self.piece(token_id)
        return text.encode() if token_id in self._added_ids else bytes_of(text)


def _literal_twin(tokenizer: LibraryTokenizer, added: Mapping[int, AddedToken]) -> LibraryTokenizer:
    """A tokenizer like this one that reads the text of control tokens as text.

    The two share the tables of the model, which is nearly all of their memory.
    """
    twin = LibraryTokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        twin.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        twin.pre_tokenizer = tokenizer.pre_tokenizer
    for _, token in sorted(added.items()):
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    if twin.get_added_tokens_decoder() != added:  # such as ids with gaps: copy everything then
        twin = LibraryTokenizer.from_str(tokenizer.to_str())
    twin.encode_special_tokens = True
    return twin


def rule_of(source: TokenizerSource) -> PreTokenizer:
    """The pre-tokenizer that a GGUF vocabulary names.

    Raises:
        UnsupportedError: It names none, or one that is not known.
    """
    rule = PRE_TOKENIZERS.get(source.pre)
    if rule is None:
        named = f"is {source.pre!r}" if source.pre else "is missing"
        raise UnsupportedError(
            f"tokenizer.ggml.pre {named}; known: {', '.join(sorted(PRE_TOKENIZERS))}."
            " Convert the model again with a current converter, or use its tokenizer.json"
        )
    return rule


def build_bpe(source: TokenizerSource) -> TokenModel:
    """Builds the BPE model of a GGUF vocabulary, on the native table where there is one.

    Raises:
        UnsupportedError: The pre-tokenizer is not known.
        CorruptFileError: Tokens and merges contradict each other.
    """
    rule = rule_of(source)
    core = None if rule.nfc else _native_tables()  # its words are cut from the text as it stands
    if core is None:
        return library_model(source, rule)
    table = core.BytePairTable(source.tokens, source.merges, rule.whole_words)
    return NativeModel(table, _cutter(rule), *_added_tokens(source))


def _native_tables() -> Any:
    """The ``sagellm._core.text`` module, or None in a pure-Python install."""
    try:
        return importlib.import_module("sagellm._core").text
    except ModuleNotFoundError:
        return None


def library_model(source: TokenizerSource, rule: PreTokenizer) -> LibraryModel:
    """Builds the BPE model of a GGUF vocabulary on the library's tables, which takes longer."""
    vocabulary = dict(zip(source.tokens, range(len(source.tokens)), strict=True))
    if len(vocabulary) != len(source.tokens):
        raise CorruptFileError("the vocabulary holds the same token twice")
    merges = [_merge_pair(merge) for merge in source.merges]
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words)
    except Exception as error:  # the library has no exception type of its own
        raise CorruptFileError(f"the merges do not fit the vocabulary: {error}") from error
    tokenizer = LibraryTokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_cutter(rule), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special, plain = _added_tokens(source)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    return LibraryModel(tokenizer, "byte_level")


def _cutter(rule: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Cuts text into words."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    )


def _added_tokens(source: TokenizerSource) -> tuple[list[AddedToken], list[AddedToken]]:
    """Tokens that are found in text before it is cut into words: control tokens, and others."""
    special, plain = [], []
    normal = int(TokenType.NORMAL)  # most of them; comparing members of the enumeration is slow
    for token_id in [i for i, kind in enumerate(source.token_types) if kind != normal]:
        token, kind = source.tokens[token_id], source.token_types[token_id]
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == TokenType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    return special, plain


def _merge_pair(merge: str) -> tuple[str, str]:
    left, separator, right = merge[1:].partition(" ")  # a token has at least one character
    if not separator or not right:
        raise CorruptFileError(f"merge {merge!r} is not two tokens")
    return merge[0] + left, right
