"""The one table of limits that every front door applies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds on what one request may ask for; lower bounds stand with the fields.

    Attributes:
        temperature: Largest sampling temperature.
        repetition_penalty: Largest repetition penalty; 1 is off.
        additive_penalty: Largest absolute presence or frequency penalty, in logits.
        logit_bias: Largest absolute bias, in logits.
        logit_bias_entries: Most biased tokens.
        logprobs: Most alternatives reported per token, of the output or of the prompt.
        n: Most completions of one prompt.
        seed: Largest seed (64 bits).
        token_id: Largest token id that any vocabulary can hold (signed 32 bits).
        stop_strings: Most stop strings.
        stop_string_chars: Longest stop string, in characters.
        stop_token_ids: Most stop tokens.
        priority: Largest absolute priority.
        cache_salt_chars: Longest cache salt, in characters.
        messages: Most turns in one conversation.
        schema_bytes: Longest JSON schema of a response format, as compact JSON in UTF-8.
        grammar_bytes: Longest regular expression or Lark grammar of a response format, and most
            text of all its choices together, in UTF-8.
        choices: Most strings that a response format may choose from.
        text_chars: Longest text that is turned into tokens, in characters.
        template_chars: Longest chat template, in characters.
        prompts_per_request: Most prompts in one HTTP request.
        tool_schemas: Most tools described in one request.
        body_bytes: Largest HTTP body, checked while reading.
        header_bytes: Largest HTTP header block.
    """

    temperature: float = 2.0
    repetition_penalty: float = 10.0
    additive_penalty: float = 2.0
    logit_bias: float = 100.0
    logit_bias_entries: int = 1024
    logprobs: int = 20
    n: int = 64
    seed: int = 2**64 - 1
    token_id: int = 2**31 - 1
    stop_strings: int = 16
    stop_string_chars: int = 1024
    stop_token_ids: int = 64
    priority: int = 1000
    cache_salt_chars: int = 256
    messages: int = 4096
    schema_bytes: int = 256 * 1024
    grammar_bytes: int = 256 * 1024
    choices: int = 1024
    text_chars: int = 4 * 1024 * 1024
    template_chars: int = 64 * 1024
    prompts_per_request: int = 256
    tool_schemas: int = 128
    body_bytes: int = 32 * 1024 * 1024
    header_bytes: int = 64 * 1024


LIMITS = Limits()
"""The limits in force."""
