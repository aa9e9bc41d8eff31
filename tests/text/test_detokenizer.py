"""Text that arrives token by token equals text decoded at once."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.text import IncrementalDetokenizer, Tokenizer, load_tokenizer
from text.vocabularies import bpe_source, spm_source, train_spm


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    return load_tokenizer(bpe_source() if kind == "bpe" else spm_source(train_spm()))


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 800)), max_size=40),
    skip_special=st.booleans(),
    continuation=st.booleans(),
)
def test_pieces_concatenate_to_the_decoded_text(
    kind: str, ids: list[int], skip_special: bool, continuation: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    stream = IncrementalDetokenizer(tokenizer, skip_special=skip_special, continuation=continuation)
    pieces = [stream.push(token_id) for token_id in ids]
    text = "".join(pieces) + stream.finish()
    assert text == tokenizer.decode(ids, skip_special, continuation=continuation)


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@given(text=st.text(alphabet="é日🙂a ", max_size=20))
def test_valid_text_never_shows_a_replacement_character(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    stream = IncrementalDetokenizer(tokenizer)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_unfinished_character_is_held_and_then_replaced() -> None:
    tokenizer = tokenizer_of("spm")
    first, second = (tokenizer.id_of(f"<0x{byte:02X}>") for byte in "é".encode())
    assert first is not None
    assert second is not None
    stream = IncrementalDetokenizer(tokenizer)
    assert (stream.push(first), stream.push(second)) == ("", "é")
    assert (stream.push(first), stream.finish()) == ("", "\ufffd")


def test_only_the_very_first_space_is_stripped() -> None:
    tokenizer = tokenizer_of("spm")
    space = tokenizer.id_of("▁")
    assert space is not None
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push(i) for i in (tokenizer.bos_id or 0, space, space)] == ["", "", " "]
