"""Vocabularies and chat template of the tiny models (see ``make_tiny``)."""

from __future__ import annotations

VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PIECES = (
    "th",
    "the",
    " t",
    " the",
    "in",
    "an",
    "and",
    " a",
    "er",
    "on",
    "he",
    "ll",
    "hello",
    " w",
    "or",
)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def bpe_merges() -> list[tuple[str, str]]:
    """Merges, best first, that build ``_PIECES`` from left to right."""
    alphabet = byte_alphabet()
    merges: dict[tuple[str, str], None] = {}
    for piece in _PIECES:
        text = "".join(alphabet[byte] for byte in piece.encode())
        for end in range(1, len(text)):
            merges[text[:end], text[end]] = None
    return list(merges)


def bpe_vocab(size: int = VOCAB_SIZE) -> tuple[list[str], list[int]]:
    """Tokens and GGUF token types of the byte-level vocabulary."""
    tokens = [*SPECIALS, *byte_alphabet()]
    tokens += [merged for pair in bpe_merges() if (merged := "".join(pair)) not in tokens]
    types = [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))
    unused = size - len(tokens)
    return tokens + [f"<unused{i}>" for i in range(unused)], types + [5] * unused


def spm_vocab(size: int = VOCAB_SIZE) -> tuple[list[str], list[int]]:
    """Tokens and GGUF token types of the SentencePiece vocabulary."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [piece.replace(" ", "\u2581") for piece in _PIECES]
    letters = [letter for letter in "\u2581ehtanoilrdsw" if letter not in pieces]
    tokens = specials + byte_tokens + pieces + letters
    types = [3, 3, 3, 2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    unused = size - len(tokens)
    return tokens + [f"<unused{i}>" for i in range(unused)], types + [5] * unused
