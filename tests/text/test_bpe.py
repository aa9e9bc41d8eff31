"""Byte-level BPE from a GGUF vocabulary and from a folder, against the ``tokenizers`` library."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from sagellm.checkpoint import open_file
from sagellm.checkpoint.tokenizer_source import TokenizerSource
from sagellm.errors import CorruptFileError, InvalidArgumentError, UnsupportedError
from sagellm.text import Tokenizer, load_tokenizer
from sagellm.text.bpe import BYTE_ALPHABET, PRE_TOKENIZERS
from text.vocabularies import (
    CORPUS,
    SPECIALS,
    bpe_source,
    spm_source,
    train_bpe,
    train_spm,
    write_folder,
)

KINDS = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
TEXTS = [*CORPUS[:6], "", " ", "a  b\n\n\tc", "<|im_end|><tool>", "🙂 \u0301", "it'S 12345"]


@pytest.fixture(params=["gguf", "folder"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "gguf":
        return load_tokenizer(bpe_source())
    source = write_folder(
        tmp_path, train_bpe(), bos_token="<|im_start|>", eos_token={"content": "<|endoftext|>"}
    )
    return load_tokenizer(source)


@pytest.mark.parametrize("text", TEXTS)
def test_both_sources_encode_as_the_library(tokenizer: Tokenizer, text: str) -> None:
    oracle = LibraryTokenizer.from_str(train_bpe().to_str())
    assert tokenizer.encode(text, parse_special=True) == oracle.encode(text).ids
    oracle.encode_special_tokens = True
    assert tokenizer.encode(text, add_special=False) == (
        oracle.encode(text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_inverts_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>" + text


def test_facts_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == train_bpe().get_vocab_size(with_added_tokens=True)
    assert (tokenizer.bos_id, tokenizer.bos_token) == (1, "<|im_start|>")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert 0 in tokenizer.eos_ids
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.id_of("<|im_end|>") == 2
    assert tokenizer.id_of("no such token") is None


def test_end_of_turn_token_ends_a_generation_though_the_file_is_silent() -> None:
    assert load_tokenizer(bpe_source()).eos_ids == {0, 2}


def test_token_bytes_of_any_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("日本", False))
    assert joined == "日本".encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    with pytest.raises(InvalidArgumentError, match="negative"):
        tokenizer.token_bytes(-1)


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match="character 1"):
        tokenizer.encode("a\ud800")


def test_byte_alphabet_is_that_of_the_library() -> None:
    assert set(BYTE_ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))


def words_of(pre: str, text: str) -> list[str]:
    """How a rule cuts text."""
    rule = PRE_TOKENIZERS[pre]
    cutter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in rule.patterns]
    )
    return [word for word, _ in cutter.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "It|'s| 1234| d|'|Été|  | OKay|/|\n\n"),
        ("smollm", "It|'s| |1|2|3|4| d|'|Été|  | OKay|/|\n\n"),
        ("llama-bpe", "It|'s| |123|4| d|'Été|  | OKay|/\n\n"),
        ("qwen2", "It|'s| |1|2|3|4| d|'Été|  | OKay|/\n\n"),
        ("tekken", "It|'s| |1|2|3|4| d|'Été|  | OKay|/\n\n"),
    ],
)
def test_rules_cut_words_where_their_models_do(pre: str, expected: str) -> None:
    assert words_of(pre, "It's 1234 d'Été   OKay/\n\n") == expected.split("|")


def test_gpt2_rule_equals_the_librarys_own() -> None:
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for text in TEXTS:
        spans = [span for _, span in own.pre_tokenize_str(text)]
        assert words_of("gpt-2", text) == [text[start:end] for start, end in spans]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@settings(max_examples=30, deadline=None)
@given(text=st.text())
def test_every_rule_keeps_every_byte(pre: str, text: str) -> None:
    tokenizer = load_tokenizer(bpe_source(pre=pre, token_types=()))
    expected = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == expected


@pytest.mark.parametrize("pre", ["", "unheard-of"])
def test_unknown_rule_lists_the_known_ones(pre: str) -> None:
    with pytest.raises(UnsupportedError, match=r"known: .*llama-bpe.*qwen2.*smollm"):
        load_tokenizer(bpe_source(pre=pre))


@pytest.mark.parametrize("merges", [["ab"], ["a "], [""], ["a nosuchtoken"]])
def test_malformed_merge_is_corrupt(merges: list[str]) -> None:
    with pytest.raises(CorruptFileError, match="merge"):
        load_tokenizer(bpe_source(merges=merges))


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_begin_token_follows_the_file_then_the_rule(add_bos: bool | None) -> None:
    expected = (1,) if add_bos is not False else ()
    assert load_tokenizer(bpe_source(add_bos=add_bos)).prefix_ids == expected
    expected = (1,) if add_bos else ()
    assert load_tokenizer(bpe_source(add_bos=add_bos, pre="smollm")).prefix_ids == expected


def metadata(**changes: Any) -> dict[str, Any]:
    source = bpe_source()
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": source.tokens,
        "tokenizer.ggml.token_type": source.token_types,
        "tokenizer.ggml.merges": source.merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    values.update({f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    return {name: value for name, value in values.items() if value is not None}


def test_source_reads_gguf_metadata() -> None:
    source = TokenizerSource.from_gguf(metadata())
    assert load_tokenizer(source).encode("again") == load_tokenizer(bpe_source()).encode("again")
    assert load_tokenizer(source).chat_template == "{{ messages }}"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_a_vocabulary_in_a_file_encodes_as_the_same_in_lists(pre: str, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata(pre=pre).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, KINDS[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = load_tokenizer(TokenizerSource.from_gguf(open_file(path).metadata))
    listed = load_tokenizer(bpe_source(pre=pre))
    for text in TEXTS:
        ids = listed.encode(text, parse_special=True)
        assert read.encode(text, parse_special=True) == ids
        assert read.decode(ids, skip_special=False) == listed.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": None}, CorruptFileError),
        ({"model": "bert"}, UnsupportedError),
        ({"tokens": []}, CorruptFileError),
        ({"tokens": "abc"}, CorruptFileError),
        ({"merges": None}, CorruptFileError),
        ({"merges": [1, 2]}, CorruptFileError),
        ({"token_type": ["1"] * 700}, CorruptFileError),
        ({"token_type": [1, 1]}, CorruptFileError),
        ({"bos_token_id": 10**6}, CorruptFileError),
        ({"eos_token_id": "0"}, CorruptFileError),
        ({"model": "llama"}, CorruptFileError),
    ],
)
def test_bad_gguf_metadata_is_named(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"tokenizer"):
        TokenizerSource.from_gguf(metadata(**changes))


def test_folder_of_sentencepiece_kind_decodes_as_the_library(tmp_path: Path) -> None:
    spm = train_spm()
    source = spm_source(spm)
    vocabulary = {token: i for i, token in enumerate(source.tokens)}
    library = LibraryTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer = load_tokenizer(write_folder(tmp_path, library, eos_token="</s>"))
    ids = [spm.bos_id(), *spm.encode(CORPUS[4]), spm.eos_id()]
    assert tokenizer.strips_leading_space
    assert tokenizer.decode(ids) == library.decode(ids) == CORPUS[4]


def test_folder_without_supported_decoder_is_refused(tmp_path: Path) -> None:
    library = LibraryTokenizer.from_str(train_bpe().to_str())
    library.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="WordPiece"):
        load_tokenizer(write_folder(tmp_path, library))


def test_folder_end_tokens_come_from_every_file(tmp_path: Path) -> None:
    source = write_folder(tmp_path, train_bpe(), eos_token="<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 10**9]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert load_tokenizer(source).eos_ids == {0, 2, 3}


def test_folder_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    library = LibraryTokenizer.from_str(train_bpe().to_str())
    library.enable_truncation(4)
    library.enable_padding(length=64)
    tokenizer = load_tokenizer(write_folder(tmp_path, library))
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


@pytest.mark.parametrize("as_list", [True, False])
def test_folder_chat_template(tmp_path: Path, as_list: bool) -> None:
    template: Any = "from settings"
    if as_list:
        template = [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": template},
        ]
    source = write_folder(tmp_path, train_bpe(), chat_template=template)
    assert load_tokenizer(source).chat_template == "from settings"
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert load_tokenizer(source).chat_template == "from its own file"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "[" * 100_000),
    ],
)
def test_malformed_file_in_folder_is_corrupt(tmp_path: Path, name: str, content: str) -> None:
    source = write_folder(tmp_path, train_bpe())
    (tmp_path / name).write_text(content)
    with pytest.raises(CorruptFileError, match=name.replace(".", r"\.")):
        load_tokenizer(source)


def test_folder_without_tokenizer_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json"):
        TokenizerSource.from_folder(tmp_path)


def test_special_tokens_of_the_vocabulary_are_all_control() -> None:
    tokenizer = load_tokenizer(bpe_source())
    for token in SPECIALS:
        token_id = tokenizer.id_of(token)
        assert token_id is not None
        assert tokenizer.encode(token, False, parse_special=True) == [token_id]
        assert token_id not in tokenizer.encode(token, False)


def library_oracle(source: TokenizerSource) -> LibraryTokenizer:
    """The vocabulary on the tables of the ``tokenizers`` library."""
    rule = PRE_TOKENIZERS[source.pre]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in source.merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(source.tokens)}
    oracle = LibraryTokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words)
    )
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    oracle.add_special_tokens(SPECIALS)
    return oracle


@pytest.mark.parametrize(
    "pre", sorted(name for name, rule in PRE_TOKENIZERS.items() if not rule.nfc)
)
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.text(max_size=8), st.sampled_from([*SPECIALS, *CORPUS, "tokens", "\u0338"])),
        max_size=12,
    )
)
def test_every_rule_encodes_as_the_library(pre: str, parts: list[str]) -> None:
    source, text = bpe_source(pre=pre), "".join(parts)
    tokenizer, oracle = load_tokenizer(source), library_oracle(source)
    assert tokenizer.encode(text, False, parse_special=True) == oracle.encode(text).ids
    oracle.encode_special_tokens = True
    assert tokenizer.encode(text, False) == oracle.encode(text).ids


def test_a_byte_that_is_no_token_is_left_out_as_by_the_library() -> None:
    whole = bpe_source(pre="smollm")
    source = bpe_source(
        pre="smollm",
        tokens=[token for token in whole.tokens if "q" not in token],
        merges=[merge for merge in whole.merges if "q" not in merge],
        token_types=(),
    )
    text = "a quick quote"
    expected = library_oracle(source).encode(text).ids
    assert load_tokenizer(source).encode(text, add_special=False) == expected


def test_a_token_twice_is_corrupt() -> None:
    source = bpe_source(pre="smollm")
    tokens = [*source.tokens[:-1], source.tokens[-2]]
    with pytest.raises(CorruptFileError, match="twice"):
        load_tokenizer(bpe_source(pre="smollm", tokens=tokens, merges=["a n"]))
