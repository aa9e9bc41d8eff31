"""Small vocabularies trained here, as a GGUF file would hold them."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from sagellm.checkpoint.tokenizer_source import TokenizerSource
from sagellm.text.token_types import TokenType

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "A tokenizer cuts text into tokens; it's the engine's first and last step.",
    "def encode(text):\n    return [vocab[word] for word in text.split()]\n",
    "In 2024 there were 12,345 of them -- 3.14% more than in 1999!",
    "naïve café, Größe, 日本語のテキスト, текст по-русски, 中文文本。",
    "tokens tokenize tokenizers tokenizing; merges merged merging merge",
] * 4

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@lru_cache
def train_spm(
    *, byte_fallback: bool = True, add_dummy_prefix: bool = True, vocab_size: int = 700
) -> SentencePieceProcessor:
    """A SentencePiece BPE model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        character_coverage=0.98,
        control_symbols=["<turn>"],
        user_defined_symbols=["<b>", "\n\n", "▁▁▁"],
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def spm_source(processor: SentencePieceProcessor, **changes: Any) -> TokenizerSource:
    """The vocabulary of a SentencePiece model."""
    ids = range(processor.get_piece_size())

    def kind(token_id: int) -> TokenType:
        if processor.is_unknown(token_id):
            return TokenType.UNKNOWN
        if processor.is_control(token_id):
            return TokenType.CONTROL
        if processor.is_unused(token_id):
            return TokenType.UNUSED
        if processor.is_byte(token_id):
            return TokenType.BYTE
        piece = processor.id_to_piece(token_id)
        user_defined = piece in ("<b>", "\n\n", "▁▁▁")
        return TokenType.USER_DEFINED if user_defined else TokenType.NORMAL

    values: dict[str, Any] = {
        "kind": "gguf",
        "model": "llama",
        "pre": "default",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_types": [int(kind(i)) for i in ids],
        "bos_id": processor.bos_id(),
        "eos_id": processor.eos_id(),
        "unk_id": processor.unk_id(),
        **changes,
    }
    return TokenizerSource(**values)


@lru_cache
def train_bpe() -> LibraryTokenizer:
    """A byte-level BPE tokenizer that cuts words as Llama 3 does."""
    tokenizer = LibraryTokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return tokenizer


def bpe_source(**changes: Any) -> TokenizerSource:
    """The vocabulary of ``train_bpe``."""
    tokenizer = train_bpe()
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    types = dict.fromkeys(by_id, TokenType.NORMAL)
    types.update({tokenizer.token_to_id(token): TokenType.CONTROL for token in SPECIALS})
    types[tokenizer.token_to_id("<tool>")] = TokenType.USER_DEFINED
    values: dict[str, Any] = {
        "kind": "gguf",
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [by_id[i] for i in range(len(by_id))],
        "token_types": [int(types[i]) for i in range(len(by_id))],
        "merges": [" ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]],
        "bos_id": 1,
        "eos_id": 0,
        **changes,
    }
    return TokenizerSource(**values)


def write_folder(folder: Path, tokenizer: LibraryTokenizer, **settings: Any) -> TokenizerSource:
    """A Hugging Face folder with this tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return TokenizerSource.from_folder(folder)
