"""Builds a ``Tokenizer`` from a GGUF vocabulary or from the files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from sagellm.checkpoint.tokenizer_source import TokenizerSource
from sagellm.errors import CorruptFileError, InvalidArgumentError, UnsupportedError
from sagellm.text.bpe import LibraryModel, build_bpe, rule_of
from sagellm.text.spm import SentencePieceModel
from sagellm.text.token_types import END_OF_TURN, TokenType
from sagellm.text.tokenizer import Tokenizer, TokenModel

_MAX_CONFIG_BYTES = 16 * 1024 * 1024
_MAX_TOKENIZER_BYTES = 512 * 1024 * 1024


def load_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Builds the tokenizer that a checkpoint describes.

    Raises:
        CorruptFileError: The description is incomplete or contradicts itself.
        UnsupportedError: A kind of vocabulary that is not read; the message lists those that are.
    """
    if source.kind == "hf":
        if source.folder is None:
            raise InvalidArgumentError("a tokenizer source of kind 'hf' needs a folder")
        return _load_folder(source.folder)
    return _load_gguf(source)


def _load_gguf(source: TokenizerSource) -> Tokenizer:
    count = len(source.tokens)
    types = source.token_types if len(source.token_types) else [int(TokenType.NORMAL)] * count
    model: TokenModel
    if source.model == "gpt2":
        model = build_bpe(source)
        add_bos = rule_of(source).add_bos if source.add_bos is None else source.add_bos
        strips = False
    elif source.model == "llama":
        strips = source.add_space_prefix is not False
        model = SentencePieceModel(
            list(source.tokens),
            source.scores,
            types,
            unk_id=source.unk_id,
            add_space_prefix=strips,
        )
        add_bos = source.add_bos is not False
    else:
        raise UnsupportedError(f"vocabulary kind {source.model!r}; supported: gpt2, llama")
    if add_bos and source.bos_id is None:
        if source.add_bos:
            raise CorruptFileError("the tokenizer asks for a begin token but names none")
        add_bos = False
    if source.add_eos and source.eos_id is None:
        raise CorruptFileError("the tokenizer asks for an end token but names none")
    named = (model.find(name) for name in END_OF_TURN)
    ends = {i for i in named if i is not None and types[i] == TokenType.CONTROL}
    ends.update(i for i in (source.eot_id, source.eom_id) if i is not None)
    return Tokenizer(
        model,
        bos_id=source.bos_id,
        eos_id=source.eos_id,
        eos_ids=ends,
        prefix_ids=[source.bos_id] if add_bos and source.bos_id is not None else [],
        suffix_ids=[source.eos_id] if source.add_eos and source.eos_id is not None else [],
        strips_leading_space=strips,
        chat_template=source.chat_template,
    )


def _load_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    _check_size(path, _MAX_TOKENIZER_BYTES)
    try:
        library = LibraryTokenizer.from_file(str(path))
    except Exception as error:  # the library has no exception type of its own
        raise CorruptFileError(f"tokenizer.json cannot be read: {error}") from error
    library.no_truncation()
    library.no_padding()
    prefix_ids, suffix_ids = _surroundings(library)
    model, strips = _describe_decoder(library)
    settings = _read_json(folder / "tokenizer_config.json")
    eos_id = model.find(_token_text(settings.get("eos_token")))
    bos_id = model.find(_token_text(settings.get("bos_token")))
    ends = _end_ids(_read_json(folder / "generation_config.json"), model.size)
    ends |= _end_ids(_read_json(folder / "config.json"), model.size)
    return Tokenizer(
        model,
        bos_id=bos_id if bos_id is not None or not prefix_ids else prefix_ids[0],
        eos_id=eos_id,
        eos_ids=ends,
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        strips_leading_space=strips,
        chat_template=_find_template(folder, settings),
    )


def _surroundings(library: LibraryTokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text."""
    inner = library.encode("a", add_special_tokens=False).ids
    outer = library.encode("a", add_special_tokens=True).ids
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise UnsupportedError("tokenizer.json: the post-processor changes more than the text's ends")


def _describe_decoder(library: LibraryTokenizer) -> tuple[LibraryModel, bool]:
    """Reads from the decoder how token texts stand for bytes, and whether it strips a space."""
    if library.decoder is None:
        raise UnsupportedError(
            "tokenizer.json has no decoder; supported: byte-level, byte-fallback"
        )
    root = json.loads(library.decoder.__getstate__())
    steps = root["decoders"] if root["type"] == "Sequence" else [root]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return LibraryModel(library, "byte_level"), False
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if not set(kinds) <= known or not {"Replace", "Metaspace"} & set(kinds):
        raise UnsupportedError(
            f"tokenizer.json decodes by {', '.join(kinds)}; supported: ByteLevel, Metaspace,"
            " Replace with ByteFallback"
        )
    space, strips = "\u2581", False
    for step in steps:
        if step["type"] == "Replace":
            space = step["pattern"].get("String", space)
            if step["content"] != " ":
                raise UnsupportedError("tokenizer.json: the decoder replaces more than spaces")
        elif step["type"] == "Strip":
            strips = strips or (step["content"] == " " and step["start"] > 0)
        elif step["type"] == "Metaspace":
            space = step["replacement"]
            strips = strips or step.get("prepend_scheme", "always") != "never"
    return LibraryModel(library, "byte_fallback", space), strips


def _find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        _check_size(path, _MAX_CONFIG_BYTES)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"{path.name} is not UTF-8: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _end_ids(settings: Mapping[str, Any], size: int) -> set[int]:
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return {i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size}


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    _check_size(path, _MAX_CONFIG_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path.name} does not hold a JSON object")
    return value


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise CorruptFileError(f"{path.name} has {size} bytes; at most {limit} are read")
