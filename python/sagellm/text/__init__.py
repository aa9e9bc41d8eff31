"""Tokenizers, chat templates, incremental detokenization and stop strings."""

from sagellm.text.chat_template import ChatTemplate
from sagellm.text.detokenizer import IncrementalDetokenizer
from sagellm.text.loading import load_tokenizer
from sagellm.text.stop import StopStrings
from sagellm.text.tokenizer import Tokenizer, TokenModel

__all__ = [
    "ChatTemplate",
    "IncrementalDetokenizer",
    "StopStrings",
    "TokenModel",
    "Tokenizer",
    "load_tokenizer",
]
