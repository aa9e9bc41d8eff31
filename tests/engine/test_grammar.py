"""Structured output: every answer has the form that was asked for, alone and in company."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.support import answers, assert_pool_empty, make_engine, make_request, run_all
from sagellm.backends.mock import EOS_ID, VOCAB_SIZE, MockTokenModel
from sagellm.engine import grammar as grammar_module
from sagellm.engine.grammar import GrammarCompiler
from sagellm.engine.loading import mock_tokenizer
from sagellm.engine.output import SequenceOutput, response_of
from sagellm.engine.output_text import OutputText
from sagellm.errors import InvalidArgumentError, UnsupportedError
from sagellm.protocol import ErrorCode, Response, ResponseFormat
from sagellm.text import Tokenizer

jsonschema = pytest.importorskip("jsonschema")

JSON_OBJECT = {"type": "json_object"}
# Ends of strings, arrays and objects are likely, so that random text comes to an end.
ENDING = {ord(c): 6.0 for c in '"]}'}
FORMS: list[dict[str, Any]] = [
    {"type": "regex", "regex": r"[a-f]{3,9}-(north|south)"},
    {"type": "choice", "choices": ["yes", "no", "nope", 'qu"ote', "é"]},
    {"type": "lark", "grammar": 'start: "(" start ")" | WORD\nWORD: /[a-c]{2,5}/'},
    {
        "type": "json_schema",
        "json_schema": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
    JSON_OBJECT,
]


def schema_form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema}


def ask(form: dict[str, Any], seed: int = 0, **options: Any) -> Response:
    options = {"max_tokens": 300, "temperature": 1.0, "logit_bias": ENDING} | options
    engine = make_engine()
    key = engine.add_request(make_request(response_format=form, seed=seed, **options), [1, 2, 3])
    return the_response(run_all(engine), key)


def the_response(outputs: list[SequenceOutput], key: int, index: int = 0) -> Response:
    found = [o for o in outputs if (o.key, o.index) == (key, index) and o.finished is not None]
    assert len(found) == 1
    return response_of(found[0])


# -------------------------------------------------------------------------------- every form


@pytest.mark.parametrize("seed", range(8))
def test_each_form_is_kept(seed: int) -> None:
    texts = []
    for form in FORMS:
        answer = ask(form, seed)
        assert answer.error is None
        if answer.finish_reason == "stop":
            assert answer.matched_stop is None
            texts.append(answer.output_text)
        else:
            assert form is JSON_OBJECT or form is FORMS[2]  # these have no longest output
            texts.append("")
    assert re.fullmatch(r"[a-f]{3,9}-(north|south)", texts[0])
    assert texts[1] in FORMS[1]["choices"]
    assert not texts[2] or re.fullmatch(r"\(*[a-c]{2,5}\)*", texts[2])
    assert not texts[2] or texts[2].count("(") == texts[2].count(")")
    jsonschema.validate(json.loads(texts[3]), FORMS[3]["json_schema"])
    assert not texts[4] or isinstance(json.loads(texts[4]), dict)


scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-500, 500),
        st.integers(0, 1000),
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(
        lambda v: {"enum": v},
        st.lists(st.one_of(st.integers(), st.text(max_size=4), st.none()), min_size=1, max_size=4),
    ),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(
            lambda item, n: {"type": "array", "items": item, "maxItems": n},
            inner,
            st.integers(0, 3),
        ),
        st.builds(
            lambda fields, required: {
                "type": "object",
                "properties": fields,
                "required": sorted(set(required) & set(fields)),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
            st.lists(st.sampled_from("abcd"), max_size=3),
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(schema=schemas, seed=st.integers(0, 1000))
def test_random_schemas_are_satisfied(schema: Any, seed: int) -> None:
    # White space is unlikely, so that the answer ends within its tokens.
    bias = ENDING | {ord(c): -100.0 for c in " \t\n\r"}
    answer = ask(schema_form(schema), seed, max_tokens=2000, logit_bias=bias)
    assert answer.error is None
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.output_text), schema)


@settings(max_examples=40)
@given(
    choices=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_a_choice_is_answered_exactly(choices: list[str], seed: int) -> None:
    answer = ask({"type": "choice", "choices": choices}, seed)
    assert (answer.finish_reason, answer.error) == ("stop", None)
    assert answer.output_text in choices


def test_white_space_between_tokens_is_bounded() -> None:
    spaces = {ord(" "): 100.0}
    answer = ask(schema_form({"const": [1, 2]}), max_tokens=500, logit_bias=spaces)
    assert json.loads(answer.output_text) == [1, 2]
    assert len(answer.output_text) > 30


def test_an_answer_cut_by_its_length_is_a_prefix_of_the_form() -> None:
    answer = ask(schema_form({"const": "abcdefgh"}), max_tokens=4)
    assert (answer.output_text, answer.finish_reason) == ('"abc', "length")


# ----------------------------------------------------------------------------------- company


def test_results_do_not_depend_on_company_or_preemption() -> None:
    requests = [
        make_request(
            response_format=form,
            max_tokens=120,
            temperature=1.0,
            seed=seed,
            logit_bias=ENDING,
            min_tokens=seed,
        )
        for seed in range(4)
        for form in [*FORMS, None]
    ]
    prompts = [[1 + i, 2, 3] for i in range(len(requests))]
    alone = []
    for request, prompt in zip(requests, prompts, strict=True):
        engine = make_engine()
        alone.append(answers_of(engine, [(request, prompt)])[0])
    together = make_engine(kv_cache_tokens=320)
    assert answers_of(together, list(zip(requests, prompts, strict=True))) == alone
    assert together.stats().num_preemptions > 0
    assert_pool_empty(together)


def answers_of(engine: Any, asked: list[tuple[Any, list[int]]]) -> list[list[int]]:
    keys = [engine.add_request(request, prompt) for request, prompt in asked]
    found = answers(run_all(engine))
    return [found[key, 0] for key in keys]


def test_completions_follow_their_own_copies() -> None:
    engine = make_engine()
    form = {"type": "regex", "regex": "[ab]{6}"}
    key = engine.add_request(
        make_request(response_format=form, n=6, temperature=1.0, seed=1, max_tokens=20), [5]
    )
    outputs = run_all(engine)
    texts = {the_response(outputs, key, index).output_text for index in range(6)}
    assert len(texts) > 1
    assert all(re.fullmatch("[ab]{6}", text) for text in texts)


def test_a_failing_grammar_fails_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    # Ambiguity that the matcher gives up on after a few tokens, within its limits before.
    form = {"type": "lark", "grammar": 'start: ("a"{700}){700}'}
    engine = make_engine()
    other = engine.add_request(make_request(max_tokens=30, ignore_eos=True), [1])
    bad = engine.add_request(make_request(max_tokens=30, response_format=form), [2])
    outputs = run_all(engine)
    error = the_response(outputs, bad).error
    assert error is not None
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "Too many items" in error.message
    (record,) = caplog.records  # a line: what a client asked for is no fault of the engine
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert the_response(outputs, other).error is None
    assert engine.stats().num_failed_steps == 0
    assert_pool_empty(engine)


# ------------------------------------------------------------------- other rules of sampling


def test_the_mask_stands_above_every_other_rule() -> None:
    form = {"type": "choice", "choices": ["ok"]}
    answer = ask(
        form,
        logit_bias={ord("o"): -100.0, ord("x"): 100.0},
        top_k=1,
        presence_penalty=2.0,
        repetition_penalty=2.0,
    )
    assert answer.output_text == "ok"


def test_ignore_eos_contradicts_a_response_format() -> None:
    with pytest.raises(InvalidArgumentError, match="ignore_eos"):
        ask(JSON_OBJECT, ignore_eos=True)
    assert ask({"type": "text"}, ignore_eos=True, max_tokens=5).error is None


def test_min_tokens_holds_the_end_back_only_while_something_else_may_come() -> None:
    end = {EOS_ID: 100.0}
    form = {"type": "regex", "regex": "a{1,9}"}
    assert ask(form, logit_bias=end).output_text == "a"
    assert ask(form, logit_bias=end, min_tokens=5).output_text == "aaaaa"
    assert ask(form, logit_bias=end, min_tokens=20).output_text == "a" * 9


def test_stop_rules_may_cut_an_answer_short() -> None:
    form = schema_form({"const": "abcdef"})
    answer = ask(form, stop=["cd"])
    assert (answer.output_text, answer.matched_stop) == ('"ab', "cd")
    answer = ask(form, stop_token_ids=[ord("d")])
    assert (answer.output_text, answer.matched_stop) == ('"abc', ord("d"))


def test_a_leading_space_belongs_to_the_form() -> None:
    """Vocabularies that put a space before a text take it off an answer, but not off a form."""
    tokenizer = Tokenizer(MockTokenModel(), eos_id=EOS_ID, strips_leading_space=True)
    turns = [{"role": "user", "content": "hi"}]
    for form, text in (({"type": "regex", "regex": " a"}, " a"), ({"type": "text"}, "a")):
        output = OutputText(make_request(messages=turns, response_format=form), tokenizer)
        for token in b" a":
            output.push(token)
        assert output.whole() == text


def test_log_probabilities_are_of_the_unmasked_distribution() -> None:
    answer = ask({"type": "choice", "choices": ["abc"]}, logprobs=2)
    assert answer.logprobs is not None
    assert [row.token_id for row in answer.logprobs] == list(b"abc")
    assert all(row.logprob < 0 for row in answer.logprobs)


# ---------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"type": "regex", "regex": "(a"}, "unclosed group"),
        ({"type": "regex", "regex": r"[^\s\S]"}, "no output matches"),
        ({"type": "lark", "grammar": "start: x"}, "unknown name"),
        (schema_form({"type": "nosuch"}), "Invalid type: nosuch"),
        (schema_form({"not": {"type": "string"}}), "Unimplemented"),
        (schema_form({"type": "string", "minLength": 3, "maxLength": 2}), "Unsatisfiable"),
        (schema_form({"$ref": "http://127.0.0.1/x"}), "not present"),
        ({"type": "regex", "regex": "(" * 5000 + ")" * 5000}, "invalid regex"),
        ({"type": "lark", "grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "nested"),
    ],
)
def test_a_bad_grammar_is_refused_before_it_is_queued(form: dict[str, Any], reason: str) -> None:
    engine = make_engine()
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        engine.add_request(make_request(response_format=form), [1])
    assert len(str(caught.value)) < 1000
    assert not engine.has_work


@pytest.mark.parametrize("count", [3000, 20_000])
def test_deep_chains_do_not_exhaust_the_stack(count: int) -> None:
    rules = "".join(f"r{i}:r{i + 1}\n" for i in range(count))
    answer = ask({"type": "lark", "grammar": f'start: r0\n{rules}r{count}: "ab"'})
    assert (answer.output_text, answer.error) == ("ab", None)


def test_long_reference_chains_do_not_exhaust_the_stack() -> None:
    chain: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(6000)}
    answer = ask(schema_form({"$defs": {**chain, "d6000": {"const": 1}}, "$ref": "#/$defs/d0"}))
    assert answer.output_text.strip() == "1"


def test_compiled_grammars_are_kept_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    sources = dict(grammar_module._SOURCES)

    def counted(text: str) -> str:
        compiled.append(text)
        return sources["regex"](text)

    monkeypatch.setitem(grammar_module._SOURCES, "regex", counted)
    budget = 4 * (32 << 10)
    compiler = GrammarCompiler(mock_tokenizer(), VOCAB_SIZE, cache_bytes=budget)
    for regex in ("aa", "bb", "aa", "cc", "aa", "dd", "aa", "bb"):
        compiler.compile(ResponseFormat(type="regex", regex=regex))
    # "aa" stays because it is used; three of that size fit, so "bb" had to go.
    assert compiled == ["aa", "bb", "cc", "dd", "bb"]
    compiler.compile(ResponseFormat(type="regex", regex="x" * 1000))
    compiler.compile(ResponseFormat(type="regex", regex="x" * 1000))
    assert compiled.count("x" * 1000) == 2  # larger than the budget


def test_a_used_grammar_leaves_the_kept_one_alone() -> None:
    compiler = GrammarCompiler(mock_tokenizer(), VOCAB_SIZE)
    form = ResponseFormat(type="regex", regex="ab")
    for _ in range(2):
        grammar = compiler.compile(form)
        assert grammar is not None
        mask = grammar.allowed()
        assert int(mask[ord("a") // 32]) == 1 << ord("a") % 32
        assert not grammar.accept(ord("a"))
        assert grammar.accept(ord("b"))
    assert compiler.compile(ResponseFormat(type="text")) is None


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    compiler = GrammarCompiler(mock_tokenizer(), VOCAB_SIZE)
    grammar = compiler.compile(ResponseFormat(type="regex", regex="ab"))
    assert grammar is not None
    with pytest.raises(InvalidArgumentError, match="cannot be followed"):
        grammar.accept(ord("z"))
    assert grammar.error
    assert not grammar.allowed().any()


def test_many_threads_compile_at_once() -> None:
    compiler = GrammarCompiler(mock_tokenizer(), VOCAB_SIZE)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                grammar = compiler.compile(
                    ResponseFormat(type="regex", regex=f"x{(i + number) % 4}")
                )
                assert grammar is not None
                assert not grammar.accept(ord("x"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_vocabulary_without_an_end_is_refused() -> None:
    tokenizer = Tokenizer(mock_tokenizer()._model)
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    with pytest.raises(UnsupportedError, match="end-of-sequence"):
        compiler.compile(ResponseFormat(type="json_object"))


def test_tokens_agree_with_the_matcher_itself() -> None:
    """Every output token was allowed, by a matcher that this engine never touched."""
    answer = ask(FORMS[3], seed=3)
    vocabulary: Any = grammar_module._Vocabulary(mock_tokenizer(), VOCAB_SIZE, [EOS_ID])
    tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=VOCAB_SIZE, eos_token=EOS_ID)
    schema = json.dumps(FORMS[3]["json_schema"])
    matcher = llguidance.LLMatcher(tokenizer, grammar_module._json_source(schema))
    assert matcher.consume_tokens(list(answer.output_tokens))
    assert matcher.is_accepting()


def test_a_model_with_more_rows_than_tokens_never_gets_one() -> None:
    compiler = GrammarCompiler(mock_tokenizer(), VOCAB_SIZE + 100)
    grammar = compiler.compile(ResponseFormat(type="regex", regex="(?s:.*)"))
    assert grammar is not None
    mask = grammar.allowed()
    allowed = {i for i in range(VOCAB_SIZE + 100) if mask[i // 32] >> (i % 32) & 1}
    assert allowed
    assert max(allowed) < VOCAB_SIZE
