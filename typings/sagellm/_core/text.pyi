"""
Vocabularies.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['BytePairTable']
class BytePairTable:
    """
    A byte-level vocabulary and its merges. Safe to share.
    """
    def __init__(self, tokens: collections.abc.Sequence, merges: collections.abc.Sequence, whole_words: bool = False) -> None:
        """
        `tokens`: texts by id in the alphabet of byte-level vocabularies. `merges`: "left right",
        best first. Sequences of str; a StringArray is read where it lies. Raises
        CorruptFileError when they contradict each other.
        """
    def encode(self, words: list) -> list:
        """
        Token ids of words of text (not of the alphabet), one word after the other.
        """
    def find(self, token: str) -> typing.Any:
        """
        The id of a token by its stored text, or None.
        """
    def token(self, token_id: typing.SupportsInt | typing.SupportsIndex) -> str:
        """
        The stored text of a token.
        """
    @property
    def size(self) -> int:
        ...
