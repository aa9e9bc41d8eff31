"""The text side of a model: its tokenizer and its chat template.

``sagellm.engine.loading`` imports this module on the thread that calls it: the engine, the template
engine and the tokenizer library load while the weights are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sagellm.engine.engine  # noqa: F401  # needed next, by whoever needs the text side
from sagellm.text import ChatTemplate, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from sagellm.checkpoint import TokenizerSource


def load_text(source: TokenizerSource) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a checkpoint, and the chat template where it has one."""
    tokenizer = load_tokenizer(source)
    if not tokenizer.chat_template:
        return tokenizer, None
    return tokenizer, ChatTemplate(
        tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token
    )
