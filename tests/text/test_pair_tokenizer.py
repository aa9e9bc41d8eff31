"""Encoding of texts and pairs for encoders, with a WordPiece vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.make_tiny_encoder import SPECIALS, WORDS, write_wordpiece
from sagellm.errors import CorruptFileError, InvalidArgumentError, ModelNotFoundError
from sagellm.text.pair_tokenizer import PairTokenizer

CLS, SEP, UNK = SPECIALS.index("[CLS]"), SPECIALS.index("[SEP]"), SPECIALS.index("[UNK]")


def word(text: str) -> int:
    return len(SPECIALS) + WORDS.index(text)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PairTokenizer:
    write_wordpiece(tmp_path / "tokenizer.json")
    return PairTokenizer(tmp_path)


def test_texts_get_the_special_tokens(tokenizer: PairTokenizer) -> None:
    assert tokenizer.encode("The CAT sat") == [CLS, word("the"), word("cat"), word("sat"), SEP]
    assert tokenizer.encode("") == [CLS, SEP]
    assert tokenizer.encode("\ud800 ☃")[1:-1] == [UNK, UNK]


def test_the_files_own_truncation_and_padding_do_not_act(tokenizer: PairTokenizer) -> None:
    assert len(tokenizer.encode("cat " * 500)) == 502
    assert len(tokenizer.encode("cat")) == 3


def test_pairs_have_token_types(tokenizer: PairTokenizer) -> None:
    pair = tokenizer.encode_pair("the cat", "sat")
    assert pair.token_ids == [CLS, word("the"), word("cat"), SEP, word("sat"), SEP]
    assert pair.token_types == [0, 0, 0, 0, 1, 1]


def test_truncation_keeps_the_special_tokens(tokenizer: PairTokenizer) -> None:
    assert tokenizer.encode("the cat sat", truncate_tokens=4) == [
        CLS,
        word("the"),
        word("cat"),
        SEP,
    ]
    pair = tokenizer.encode_pair("the cat", "sat on the mat", truncate_tokens=6)
    assert pair.token_ids == [CLS, word("the"), word("cat"), SEP, word("sat"), SEP]
    assert pair.token_types == [0, 0, 0, 0, 1, 1]
    with pytest.raises(InvalidArgumentError, match="at least 3"):
        tokenizer.encode("the cat", truncate_tokens=2)
    with pytest.raises(InvalidArgumentError, match="first text has 2 tokens"):
        tokenizer.encode_pair("the cat", "sat", truncate_tokens=5)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        PairTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json"):
        PairTokenizer(tmp_path)
