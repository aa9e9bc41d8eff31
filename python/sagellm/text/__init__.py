"""Tokenizers, chat templates, incremental detokenization and stop strings.

Names load on first use: a process that only detokenizes needs no template engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sagellm.lazy_names import load_name

if TYPE_CHECKING:
    from sagellm.text.chat_template import ChatTemplate
    from sagellm.text.detokenizer import IncrementalDetokenizer
    from sagellm.text.loading import load_tokenizer
    from sagellm.text.stop import StopStrings
    from sagellm.text.tokenizer import Tokenizer, TokenModel

_HOMES = {
    "ChatTemplate": "sagellm.text.chat_template",
    "IncrementalDetokenizer": "sagellm.text.detokenizer",
    "StopStrings": "sagellm.text.stop",
    "TokenModel": "sagellm.text.tokenizer",
    "Tokenizer": "sagellm.text.tokenizer",
    "load_tokenizer": "sagellm.text.loading",
}

__all__ = [
    "ChatTemplate",
    "IncrementalDetokenizer",
    "StopStrings",
    "TokenModel",
    "Tokenizer",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
