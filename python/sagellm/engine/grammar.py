"""Structured output: a response format becomes a grammar, a grammar a mask over the vocabulary.

``GrammarCompiler`` turns a ``ResponseFormat`` into a ``SequenceGrammar`` per completion, off the
engine's thread; ``SequenceGrammar`` follows the output of one sequence token by token. What it
allows depends on that output alone, so that neither batching nor preemption changes a result.

Grammars come from users. Compiling and matching run under fixed limits on work and memory. The
compiler recurses over rules and ``$ref`` chains, so it runs on a stack that no text within the
protocol's limits can exhaust.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from sagellm.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import llguidance
    from numpy.typing import NDArray

    from sagellm.protocol import ResponseFormat
    from sagellm.text import Tokenizer

CACHE_BYTES = 256 << 20  # of compiled grammars
# Compiled grammars were measured at up to 450 bytes of memory per byte of text.
_BYTES_PER_TEXT_BYTE = 512
_BYTES_PER_GRAMMAR = 32 << 10
# One level of nesting took up to 4 KiB of stack, and 256 KiB of text hold at most 43 000 levels.
# The pages are taken only as far as the stack grows, and given back after the compilation.
_STACK_BYTES = 512 << 20
_MESSAGE_CHARS = 600
# White space between JSON tokens: enough to indent, too little to fill an answer with.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


def _library() -> ModuleType:
    """The compiler and matcher of grammars, loaded with the first grammar."""
    import llguidance  # most processes that generate text see none

    return llguidance


def _limits() -> llguidance.LLParserLimits:
    """Work and memory of one grammar; in steps of the matcher, about 20 to 50 per microsecond."""
    limits: llguidance.LLParserLimits = _library().LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,  # at 1 to 2 KiB
        max_grammar_size=500_000,
        verbose_errors=False,
    )
    return limits


class _Vocabulary:
    """A tokenizer in the form that ``LLTokenizer`` reads: its attributes and a call."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False)


class SequenceGrammar:
    """Follows the output of one sequence. Used by one thread at a time.

    Attributes:
        error: Why the grammar cannot go on; None while it can. Final.
    """

    __slots__ = ("_mask", "_matcher", "error")

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        """Takes over a matcher that has seen no token."""
        self._matcher = matcher
        self._mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        self.error: str | None = None

    def copy(self) -> SequenceGrammar:
        """One that stands at the same place and goes its own way."""
        return SequenceGrammar(self._matcher.deep_copy(), 32 * len(self._mask))

    def allowed(self, barred: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
        """Tokens that may come next, in the form of ``SamplingRow.allowed``.

        Nothing is allowed when the grammar fails; ``error`` then says why. The same array every
        time: valid until the next call.

        Args:
            barred: Tokens that are ruled out as well, unless nothing else is left.
        """
        mask = self._mask
        if self.error is None:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if self._matcher.is_error():
                self.error = _brief(self._matcher.get_error())
            elif not mask.any():
                self.error = "no token of this model continues the output as the grammar demands"
        if self.error is not None:
            mask[:] = 0
        elif barred is not None:
            rest = mask & ~barred
            if rest.any():
                mask[:] = rest
        return mask

    def num_permitted(self, token_ids: list[int]) -> int:
        """How many tokens may come one after the other without completing the output."""
        ahead = self._matcher.deep_copy()
        for count, token_id in enumerate(token_ids):
            if ahead.try_consume_tokens([token_id]) == 0 or ahead.is_stopped():
                return count
        return len(token_ids)

    def accept(self, token_id: int) -> bool:
        """Takes the next token of the output; returns whether the output is complete.

        Raises:
            InvalidArgumentError: The grammar does not allow the token, or hit one of its limits.
        """
        if not self._matcher.consume_token(token_id):
            self.error = _brief(self._matcher.get_error())
            raise InvalidArgumentError(f"the response_format cannot be followed: {self.error}")
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Compiles response formats for one model and keeps the last ones. Safe on any thread."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Costs nothing until the first grammar, which has the vocabulary indexed.

        Args:
            tokenizer: Of the model.
            vocab_size: Rows of the model's output head; those without a token are never allowed.
            cache_bytes: Estimated memory of the grammars that are kept.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._cache_bytes = cache_bytes
        self._used_bytes = 0
        self._cache: OrderedDict[tuple[str, str], tuple[SequenceGrammar, int]] = OrderedDict()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._cache_lock = threading.Lock()
        self._compile_lock = threading.Lock()  # one compilation at a time: it may take a CPU long

    def compile(self, form: ResponseFormat) -> SequenceGrammar | None:
        """The grammar of a response format, before any output; None for free text.

        Raises:
            InvalidArgumentError: The grammar is malformed, contradictory or too complex.
            UnsupportedError: The model's vocabulary has no end-of-sequence token.
        """
        if form.type == "text":
            return None
        key = (form.type, _text_of(form))
        found = self._lookup(key)
        if found is None:
            with self._compile_lock:
                found = self._lookup(key)  # another thread may have been first
                if found is None:
                    found = self._compile(*key)
                    self._keep(key, found)
        return found

    def _lookup(self, key: tuple[str, str]) -> SequenceGrammar | None:
        """A copy of a kept grammar."""
        with self._cache_lock:
            entry = self._cache.get(key)
            if entry is None:
                return None
            self._cache.move_to_end(key)
            return entry[0].copy()  # the one that is kept is only touched under the lock

    def _keep(self, key: tuple[str, str], grammar: SequenceGrammar) -> None:
        size = _BYTES_PER_GRAMMAR + _BYTES_PER_TEXT_BYTE * len(key[1].encode())
        if size > self._cache_bytes:
            return
        with self._cache_lock:
            self._cache[key] = (grammar.copy(), size)
            self._used_bytes += size
            while self._used_bytes > self._cache_bytes:
                _, (_, freed) = self._cache.popitem(last=False)
                self._used_bytes -= freed

    def _compile(self, kind: str, text: str) -> SequenceGrammar:
        if self._vocabulary is None:
            self._vocabulary = self._index_vocabulary()
        vocabulary = self._vocabulary

        def build() -> SequenceGrammar:
            source = _SOURCES[kind](text)
            matcher = _library().LLMatcher(vocabulary, source, log_level=0, limits=_limits())
            grammar = SequenceGrammar(matcher, self._vocab_size)
            if matcher.is_error():
                grammar.error = _brief(matcher.get_error())
            else:  # what cannot even begin is an error of the request, not of a step
                trial = grammar.copy()
                trial.allowed()
                grammar.error = trial.error
            return grammar

        grammar = _on_deep_stack(build)
        if grammar.error is not None:
            raise InvalidArgumentError(f"response_format ({kind}): {grammar.error}")
        return grammar

    def _index_vocabulary(self) -> llguidance.LLTokenizer:
        ends = sorted(i for i in self._tokenizer.eos_ids if i < self._vocab_size)
        if not ends:
            raise UnsupportedError(
                "response_format needs a model whose vocabulary has an end-of-sequence token; "
                "leave response_format out"
            )
        wrapped: Any = _Vocabulary(self._tokenizer, self._vocab_size, ends)
        vocabulary: llguidance.LLTokenizer = _library().LLTokenizer(
            wrapped, n_vocab=self._vocab_size, eos_token=ends
        )
        return vocabulary


def _text_of(form: ResponseFormat) -> str:
    """What tells apart two response formats of one type. Key order matters in a schema."""
    if form.type == "json_schema":
        return json.dumps(form.json_schema, separators=(",", ":"), ensure_ascii=False)
    if form.type == "choice":
        return json.dumps(form.choices)
    return form.regex or form.grammar or ""


def _json_source(text: str) -> str:
    return str(
        _library().LLMatcher.grammar_from_json_schema(
            text, defaults={"whitespace_pattern": _WHITESPACE}
        )
    )


def _choice_source(text: str) -> str:
    strings = " | ".join(json.dumps(choice) for choice in json.loads(text))
    return str(_library().LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {strings}\n"))


_SOURCES: dict[str, Callable[[str], str]] = {
    "json_object": lambda _: _json_source('{"type":"object"}'),
    "json_schema": _json_source,
    "regex": lambda text: str(_library().LLMatcher.grammar_from_regex(text)),
    "choice": _choice_source,
    "lark": lambda text: str(_library().LLMatcher.grammar_from_lark(text)),
}


def _on_deep_stack(build: Callable[[], SequenceGrammar]) -> SequenceGrammar:
    """Runs ``build`` on a new thread with a stack of ``_STACK_BYTES``."""
    results: list[SequenceGrammar] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(build())
        except Exception as error:
            errors.append(error)

    before = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="sagellm-grammar-build", daemon=True)
        thread.start()
    except RuntimeError as error:
        raise ResourceExhaustedError(
            "no thread could be started to compile the response_format; try again later"
        ) from error
    finally:
        threading.stack_size(before)
    thread.join()
    if errors:
        if isinstance(errors[0], ValueError):  # such as a schema that is no object
            raise InvalidArgumentError(f"response_format: {_brief(str(errors[0]))}") from errors[0]
        raise errors[0]
    return results[0]


def _brief(message: str) -> str:
    """An error message without its marker of left-out detail; a long one without its middle."""
    message = message.replace("<non-verbose/>", "").strip() or "unknown error"
    if message == "NoExtensionBias":  # the matcher's name for it
        message = "no output matches it"
    if len(message) <= _MESSAGE_CHARS:
        return message
    half = _MESSAGE_CHARS // 2
    return f"{message[:half]} ... {message[-half:]}"
