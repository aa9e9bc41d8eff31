"""What the conformance test adds to schemathesis, which loads this file as its hooks.

Schemathesis asks that every request which fits the schema is accepted, and that no answer is a
server error. Some rules of the API are not rules that a JSON schema states, or only at the price of
a document that nobody can read; a request that breaks one of those is a 400 whose message matches
an entry of ``RULES_BEYOND_THE_SCHEMA``. Any other 400 to a request that fits the schema is a
failure: either the schema or the validator is wrong.
"""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from schemathesis.core.failures import Failure, ServerError
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

GENERATION_MODEL = "mock"
EMBEDDING_MODEL = "mock-embedding"
LONG_DEADLINE_MS = 60_000
EXCLUSIVE_FORMATS = (
    "guided_choice",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_grammar",
)
_EMBEDDING_ROUTES = ("/v1/embeddings", "/v1/rerank", "/rerank")

RULES_BEYOND_THE_SCHEMA = {
    name: re.compile(pattern)
    for name, pattern in {
        # The size of this model, which would be another document for every model.
        "vocabulary": r"outside the vocabulary of",
        "context": r"leaves no room for output|tokens do not fit|longer than the model",
        "dimensions": r"^dimensions is \d+; this model has",
        "empty prompt": r"^the prompt is empty",
        "reasoning": r"^this model has no degrees of reasoning|^the chat template",
        # Fields that need or exclude each other.
        "top_logprobs": r"^top_logprobs needs logprobs",
        "stream_options": r"^stream_options is only for streams",
        "prompt or messages": r"^give prompt or messages, one of them",
        "best_of": r"^best_of is \d+ and n is",
        "min_tokens": r"^min_tokens is \d+",
        "one format": r" exclude each other; give one$",
        "no format": r"^structured_outputs needs one of",
        "json_schema": r"^response_format.json_schema must be set if and only if",
        "max_tokens": r"^max_tokens and max_completion_tokens",
        # Turns and tools that refer to each other.
        "turn": r"^messages\.\d+\.(content|tool_call|reasoning)\S*: (only|a tool|content|the arg)",
        "result of a call": r"(no tool_use block|no function_call) with this (call_)?id",
        "prefill": r"the last message is the assistant's",
        "no turns": r"^messages hold no content; |^input holds no turn; ",
        "tool_choice": r"^tool_choice is (named|required) and there are no tools|tool_choice names",
        "tools": r"^tools\[\d+\]: the name .* occurs twice",
        # Text in a language of its own: JSON Schema, regular expressions, Lark.
        "JSON as text": r"must be a JSON schema: an object, or its text$",
        "language": r"^(response_format|structured_outputs|guided_\w+|tools\[\d+\])\b",
    }.items()
}


@schemathesis.check
def known_rules_only(ctx: Any, response: Any, case: Any) -> None:
    """``positive_data_acceptance``, but for ``RULES_BEYOND_THE_SCHEMA``."""
    try:
        positive_data_acceptance(ctx, response, case)
    except Failure:
        if response.status_code == 400:
            message = response.json()["error"]["message"]
            if any(rule.search(message) for rule in RULES_BEYOND_THE_SCHEMA.values()):
                return
        raise


@schemathesis.check
def no_server_fault(ctx: Any, response: Any, case: Any) -> None:
    """``not_a_server_error``, but 504 is right for a request that sets itself a deadline."""
    if response.status_code < 500:
        return
    has_deadline = isinstance(case.body, dict) and "deadline_ms" in case.body
    if response.status_code != 504 or not has_deadline:
        raise ServerError(operation=case.operation.label, status_code=response.status_code)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Lets most requests that fit the schema reach the engine.

    Else nearly all of them were a 404, a 504 for a deadline of 5e-324 ms, or a 400 for two fields
    that exclude each other. What this changes still fits the schema.
    """
    del context, kwargs
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if not isinstance(case.body, dict):
        return
    _settle(case.body)
    if case.body.get("deadline_ms") is not None:
        case.body["deadline_ms"] = LONG_DEADLINE_MS
    if isinstance(case.body.get("model"), str):
        is_embedding = case.operation.path in _EMBEDDING_ROUTES
        case.body["model"] = EMBEDDING_MODEL if is_embedding else GENERATION_MODEL


def _settle(body: dict[str, Any]) -> None:
    formats = [name for name in EXCLUSIVE_FORMATS if body.get(name) is not None]
    for name in formats[1:]:
        del body[name]
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if body.get("prompt") == "":
        body["prompt"] = "a"
    for message in body.get("messages") or ():
        if message["role"] == "tool":
            message["tool_call_id"] = message.get("tool_call_id") or "call"
            message["content"] = message.get("content") or "a"
    if not body.get("stream"):
        body.pop("stream_options", None)
    body.pop("best_of", None)
