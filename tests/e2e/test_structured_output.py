"""Structured output of a real model: always in form, the same in company, and worth asking for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from sagellm import LLM
from sagellm.engine.llm import new_request
from sagellm.protocol import Response

pytestmark = [pytest.mark.native, pytest.mark.model, pytest.mark.slow]
jsonschema = pytest.importorskip("jsonschema")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"type": "json_schema", "json_schema": PERSON},
    {"type": "regex", "regex": r"\d{4}-\d{2}-\d{2}"},
    {"type": "choice", "choices": ["Paris", "Rome", "Madrid"]},
    {"type": "lark", "grammar": 'start: "<" WORD ">" | start start\nWORD: /[a-z]{1,8}/'},
]
PROMPT = "Write about a person called Anna, who is 31 years old.\n"


@pytest.fixture(scope="module")
def llm(smollm2: str) -> Iterator[LLM]:
    with LLM(smollm2, device="cpu", threads=2, kv_cache_tokens=4096) as llm:
        yield llm


def ask(llm: LLM, form: dict[str, Any], prompt: str = PROMPT, **options: Any) -> Response:
    options = {"max_tokens": 120, "temperature": 1.0, "seed": 3} | options
    (answer,) = llm.generate(prompt, response_format=form, **options)
    assert answer.error is None
    return answer


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_in_form(llm: LLM, seed: int) -> None:
    person, date, town, _ = (ask(llm, form, seed=seed) for form in FORMS)
    assert person.finish_reason == date.finish_reason == town.finish_reason == "stop"
    jsonschema.validate(json.loads(person.output_text), PERSON)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date.output_text)
    assert town.output_text in FORMS[2]["choices"]


def test_the_model_still_chooses_what_is_likely(llm: LLM) -> None:
    answer = ask(llm, FORMS[2], "The capital of France is", temperature=None)
    assert answer.output_text == "Paris"


def test_a_json_object_ends_by_itself(llm: LLM) -> None:
    answer = ask(llm, {"type": "json_object"}, temperature=None, max_tokens=400)
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.output_text), dict)
    else:
        assert answer.output_text.startswith("{")


def test_company_changes_nothing(llm: LLM) -> None:
    requests = [
        new_request(prompt=PROMPT, response_format=form, max_tokens=40, temperature=1.0, seed=seed)
        for seed in range(3)
        for form in [*FORMS, None]
    ]
    alone = [llm.generate(request)[0].output_tokens for request in requests]
    together = [answer.output_tokens for answer in llm.generate(requests)]
    assert together == alone


def test_control_tokens_of_a_grammar_are_single_tokens(llm: LLM) -> None:
    form = {"type": "lark", "grammar": 'start: "a" <|im_start|> "b"'}
    answer = ask(llm, form, skip_special_tokens=False)
    start = llm.tokenizer.id_of("<|im_start|>")
    assert answer.output_text == "a<|im_start|>b"
    assert answer.output_tokens.count(start) == 1
    assert ask(llm, form).output_text == "ab"
