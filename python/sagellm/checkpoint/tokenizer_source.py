"""Where a tokenizer comes from: the vocabulary of a GGUF file, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from sagellm.errors import CorruptFileError, UnsupportedError

TOKENIZER_MODELS = ("gpt2", "llama")
"""GGUF vocabulary kinds that are read: byte-level BPE and SentencePiece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """Everything ``sagellm.text.load_tokenizer`` needs, in the file's own terms.

    Attributes:
        kind: ``gguf`` fills every field but ``folder``; ``hf`` fills ``folder`` only.
        model: ``gpt2`` (byte-level BPE with ``merges``) or ``llama`` (SentencePiece, ``scores``).
        pre: Name of the rule that cuts text into words before BPE.
        tokens: Token texts by id, as stored (byte-level alphabet, or U+2581 for a space).
        scores: Per token, larger merges first (SentencePiece only).
        token_types: Per token: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
            Empty when the file has none (all normal).
        merges: BPE merges, ``"left right"``, best first.
        bos_id, eos_id, eot_id, eom_id, unk_id, pad_id: None when the file names none.
        add_bos, add_eos, add_space_prefix: None when the file does not say; the model kind
            then decides.
        chat_template: Jinja source, None when the file has none.
        folder: Holds ``tokenizer.json`` and, optionally, ``tokenizer_config.json``,
            ``generation_config.json``, ``config.json`` and ``chat_template.jinja``.
    """

    kind: Literal["gguf", "hf"]
    model: str = ""
    pre: str = ""
    tokens: Sequence[str] = field(default=(), repr=False)
    scores: Sequence[float] = field(default=(), repr=False)
    token_types: Sequence[int] = field(default=(), repr=False)
    merges: Sequence[str] = field(default=(), repr=False)
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    eom_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = field(default=None, repr=False)
    folder: Path | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> TokenizerSource:
        """The tokenizer of a Hugging Face folder.

        Raises:
            CorruptFileError: The folder has no ``tokenizer.json``.
        """
        if not (folder / "tokenizer.json").is_file():
            raise CorruptFileError(
                f"{folder.name}: no tokenizer.json; download the model's tokenizer files as well"
            )
        return cls(kind="hf", folder=folder)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> TokenizerSource:
        """The tokenizer in the metadata of a GGUF file.

        Args:
            metadata: Key to value; arrays may be lists, numpy arrays or the native ``StringArray``.

        Raises:
            CorruptFileError: Keys are missing or contradict each other.
            UnsupportedError: A vocabulary kind that is not read.
        """
        model = metadata.get("tokenizer.ggml.model")
        if model is None:
            raise CorruptFileError("tokenizer.ggml.model is missing; convert the model again")
        if model not in TOKENIZER_MODELS:
            raise UnsupportedError(
                f"tokenizer.ggml.model is {model!r}; supported: {', '.join(TOKENIZER_MODELS)}"
            )
        source = cls(
            kind="gguf",
            model=model,
            pre=str(metadata.get("tokenizer.ggml.pre", "")),
            tokens=_listed(metadata, "tokens", str),
            scores=_listed(metadata, "scores", float),
            token_types=_listed(metadata, "token_type", int),
            merges=_listed(metadata, "merges", str),
            bos_id=_integer(metadata, "bos_token_id"),
            eos_id=_integer(metadata, "eos_token_id"),
            eot_id=_integer(metadata, "eot_token_id"),
            eom_id=_integer(metadata, "eom_token_id"),
            unk_id=_integer(metadata, "unknown_token_id"),
            pad_id=_integer(metadata, "padding_token_id"),
            add_bos=_flag(metadata, "add_bos_token"),
            add_eos=_flag(metadata, "add_eos_token"),
            add_space_prefix=_flag(metadata, "add_space_prefix"),
            chat_template=_text(metadata, "tokenizer.chat_template"),
        )
        source._check()
        return source

    def _check(self) -> None:
        count = len(self.tokens)
        if count == 0:
            raise CorruptFileError("tokenizer.ggml.tokens is missing or empty")
        if self.model == "gpt2" and not len(self.merges):
            raise CorruptFileError("tokenizer.ggml.merges is missing or empty for a BPE vocabulary")
        if self.model == "llama" and not len(self.scores):
            raise CorruptFileError("tokenizer.ggml.scores is missing: SentencePiece needs it")
        for name, values in (("scores", self.scores), ("token_type", self.token_types)):
            if len(values) not in (0, count):
                raise CorruptFileError(
                    f"tokenizer.ggml.{name} has {len(values)} entries for {count} tokens"
                )
        for name in ("bos_id", "eos_id", "eot_id", "eom_id", "unk_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < count:
                raise CorruptFileError(f"tokenizer {name} {value} is outside the {count} tokens")


def _listed(metadata: Mapping[str, Any], name: str, kind: type) -> Sequence[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif kind is str and hasattr(value, "tolist"):  # the native reader's: str objects on demand
        return cast("Sequence[str]", value)
    if not isinstance(value, (list, tuple)):
        raise CorruptFileError(f"tokenizer.ggml.{name} is not an array")
    if not set(map(type, value)) <= {kind}:
        raise CorruptFileError(f"tokenizer.ggml.{name} is not an array of {kind.__name__}")
    return list(value)


def _integer(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if isinstance(value, (bool, str, float)):
        raise CorruptFileError(f"tokenizer.ggml.{name} is not an integer")
    return int(value)


def _flag(metadata: Mapping[str, Any], name: str) -> bool | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    return None if value is None else bool(value)


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise CorruptFileError(f"{key} is not a string")
    return value
