"""The SentencePiece encoder against the ``sentencepiece`` library."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.checkpoint.tokenizer_source import TokenizerSource
from sagellm.errors import CorruptFileError
from sagellm.text import load_tokenizer
from sagellm.text.spm import SPACE, TokenSplitter
from sagellm.text.token_types import TokenType
from text.vocabularies import CORPUS, spm_source, train_spm

words = st.sampled_from([" ", "  ", "\n\n", "<b>", "tokenize", "merging", "é", "日本", "🙂", "\t"])
texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="tokenizrsmg ", max_size=60),
    st.lists(words, max_size=20).map("".join),
)


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("byte_fallback", [True, False])
@settings(max_examples=150, deadline=None)
@given(text=texts.filter(lambda text: "\0" not in text))
def test_ids_equal_those_of_sentencepiece(
    byte_fallback: bool, add_dummy_prefix: bool, text: str
) -> None:
    oracle = train_spm(byte_fallback=byte_fallback, add_dummy_prefix=add_dummy_prefix)
    tokenizer = load_tokenizer(spm_source(oracle, add_space_prefix=add_dummy_prefix))
    assert tokenizer.encode(text, add_special=False) == oracle.encode(text)


@pytest.mark.parametrize("text", CORPUS[:6])
def test_corpus_survives_a_round_trip_as_in_sentencepiece(text: str) -> None:
    oracle = train_spm()
    tokenizer = load_tokenizer(spm_source(oracle))
    ids = tokenizer.encode(text)
    assert ids == [oracle.bos_id(), *oracle.encode(text)]
    assert tokenizer.decode(ids) == oracle.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_byte_fallback_loses_nothing(text: str) -> None:
    tokenizer = load_tokenizer(spm_source(train_spm()))
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")


def test_long_word_without_spaces_equals_sentencepiece() -> None:
    oracle = train_spm()
    tokenizer = load_tokenizer(spm_source(oracle))
    text = "tokenizersmerging" * 500 + " " + "日本語テキスト" * 300
    assert tokenizer.encode(text, add_special=False) == oracle.encode(text)


def test_unused_token_is_taken_apart_into_what_it_was_merged_from() -> None:
    source = spm_source(train_spm())
    whole = max(
        load_tokenizer(source).encode(" merging", add_special=False),
        key=lambda token_id: len(source.tokens[token_id]),
    )
    assert len(source.tokens[whole]) > 2
    types = list(source.token_types)
    types[whole] = TokenType.UNUSED
    tokenizer = load_tokenizer(spm_source(train_spm(), token_types=types))
    ids = tokenizer.encode(" merging", add_special=False)
    assert whole not in ids
    assert tokenizer.decode(ids) == " merging"
    assert tokenizer.encode(" merging " * 3)


def test_unknown_spaces_join_a_run_of_unknown_characters() -> None:
    tokenizer = load_tokenizer(
        TokenizerSource(
            kind="gguf",
            model="llama",
            tokens=["<unk>", "a"],
            scores=[0.0, -1.0],
            token_types=[TokenType.UNKNOWN, TokenType.NORMAL],
            unk_id=0,
            add_space_prefix=False,
        )
    )
    assert tokenizer.encode("aé éa é") == [1, 0, 1, 0]


def test_control_token_in_text_is_text_unless_asked_for() -> None:
    oracle = train_spm()
    tokenizer = load_tokenizer(spm_source(oracle))
    turn = oracle.piece_to_id("<turn>")
    assert turn not in tokenizer.encode("a<turn>b")
    assert tokenizer.encode("a<turn>b", add_special=False, parse_special=True) == [
        *oracle.encode("a"),
        turn,
        *oracle.encode("b"),
    ]


def test_unknown_control_and_byte_texts_never_arise_from_merging() -> None:
    tokenizer = load_tokenizer(spm_source(train_spm()))
    ids = tokenizer.encode("<unk> <s> </s> <0x41>", add_special=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == "<unk> <s> </s> <0x41>"


def test_continuation_keeps_the_leading_space() -> None:
    tokenizer = load_tokenizer(spm_source(train_spm()))
    ids = tokenizer.encode("again", add_special=False)
    assert tokenizer.decode(ids) == "again"
    assert tokenizer.decode(ids, continuation=True) == " again"


def test_specials_are_shown_on_demand() -> None:
    tokenizer = load_tokenizer(spm_source(train_spm(), add_eos=True))
    ids = tokenizer.encode("again")
    assert tokenizer.decode(ids, skip_special=False) == "<s> again</s>"
    assert tokenizer.token_bytes(ids[0]) == b"<s>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ["a"] * 700}, "twice"),
        ({"unk_id": None}, "neither byte tokens nor an unknown"),
        ({"add_bos": True, "bos_id": None}, "begin token"),
        ({"add_eos": True, "eos_id": None}, "end token"),
    ],
)
def test_contradictory_vocabulary_is_corrupt(change: dict[str, object], message: str) -> None:
    oracle = train_spm(byte_fallback=False)
    count = oracle.get_piece_size()
    if "tokens" in change:
        change = {"tokens": ["a"] * count}
    with pytest.raises(CorruptFileError, match=message):
        load_tokenizer(spm_source(oracle, **change))


def test_missing_byte_token_is_corrupt() -> None:
    source = spm_source(train_spm())
    types = [
        TokenType.NORMAL if token == "<0x41>" else kind
        for token, kind in zip(source.tokens, source.token_types, strict=True)
    ]
    with pytest.raises(CorruptFileError, match="not all 256"):
        load_tokenizer(spm_source(train_spm(), token_types=types))


@given(
    tokens=st.sets(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=6),
    text=st.text(alphabet="ab<c", max_size=30),
)
def test_splitter_takes_leftmost_longest(tokens: set[str], text: str) -> None:
    ids = {token: i for i, token in enumerate(sorted(tokens))}
    expected: list[str | int] = []
    position = 0
    while position < len(text):
        found = [token for token in tokens if text.startswith(token, position)]
        if found:
            longest = max(found, key=len)
            expected.append(ids[longest])
            position += len(longest)
            continue
        if expected and isinstance(expected[-1], str):
            expected[-1] += text[position]
        else:
            expected.append(text[position])
        position += 1
    assert list(TokenSplitter(ids).split(text)) == expected
