"""Chat templates: the dialect works, and no template runs long, grows large or gets out."""

from __future__ import annotations

import json
import re
import threading

import pytest

from sagellm.errors import InvalidArgumentError
from sagellm.protocol import LIMITS
from sagellm.text import ChatTemplate

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
USER = [{"role": "user", "content": "hi"}]


def render(source: str, **kwargs: object) -> str:
    return ChatTemplate(source).render(USER, **kwargs)  # type: ignore[arg-type]


def test_chatml_conversation() -> None:
    template = ChatTemplate(CHATML)
    assert template.render(USER) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(USER, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_gemma_conversation() -> None:
    template = ChatTemplate(GEMMA, bos_token="<bos>")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert template.render(turns) == (
        "<bos><start_of_turn>user\nbe brief\n\nhi<end_of_turn>\n<start_of_turn>model\nhello"
        "<end_of_turn>\n<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(InvalidArgumentError, match="roles must alternate"):
        template.render([USER[0], USER[0]])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{% generation %}{{ 1 }}{% endgeneration %}", "1"),
        ("{{ tools | tojson }}", '[{"name": "é<"}]'),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | map(attribute='content') | join(', ') }}", "hi"),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}"
            "{% endfor %}{{ ns.n }}",
            "6",
        ),
        (
            "{% macro m(a, ns) %}[{{ a }}{{ ns.x }}]{% endmacro %}{{ m('b', namespace(x=1)) }}",
            "[b1]",
        ),
        ("{{ 'a-b'.split('-')[-1].upper().replace('B', 'ccc') }}", "CCC".lower()),
        ("{{ messages[::-1][0].role ~ 1 ~ none }}", "user1None"),
        (
            "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
            "role=user;content=hi;",
        ),
        ("{{ missing is defined }}{{ missing }}", "False"),
        ("{{ 'x' if 'i' in messages[0].content else 'y' }}", "x"),
        ("{% for m in messages recursive %}{{ loop.length }}{{ loop.last }}{% endfor %}", "1True"),
        ("{{ '%s and %d' % ('a', 2) }}{{ [1] + [2] }}{{ 'ab' * 2 }}", "a and 2[1, 2]abab"),
        ("{{ enable_thinking }}", "False"),
    ],
)
def test_dialect(source: str, expected: str) -> None:
    assert render(source, tools=[{"name": "é<"}], enable_thinking=False) == expected


def test_current_date() -> None:
    assert re.fullmatch(r"\d\d [A-Z][a-z]{2} \d{4}", render("{{ strftime_now('%d %b %Y') }}"))


def test_long_conversation_is_well_inside_the_bounds() -> None:
    turns = [
        {"role": role, "content": "word " * 200}
        for _ in range(500)
        for role in ("user", "assistant")
    ]
    text = ChatTemplate(GEMMA).render(turns)
    assert text.count("<start_of_turn>") == 1001


LOOP = "{% for i in range(99) %}"
RUNS_LONG = {
    "nested loops": "{% for i in range(100000) %}"
    "{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that filter everything out": "{% for i in range(100000) %}"
    "{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "exponential recursion": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "searches of large values": "{% set a = 'a' * 4000000 %}{% set b = a[:-1] ~ 'b' %}"
    "{% for i in range(100000) %}{% set z = b in a %}{% endfor %}",
    "copies of large values": "{% set a = 'a' * 8000000 %}"
    "{% for i in range(100000) %}{% set z = a[::-1] %}{% endfor %}",
}
GROWS_LARGE = {
    "repetition": "{{ 'a' * 10**10 }}",
    "repeated list": "{% for i in [0] * 10**10 %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='ab') %}"
    + LOOP
    + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='ab') %}"
    + LOOP
    + "{% set n.x = n.x + n.x %}{% endfor %}",
    "squaring": "{% set n = namespace(x=9) %}" + LOOP + "{% set n.x = n.x * n.x %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format width as argument": "{{ '%*d' % (1000000000, 1) }}",
    "replace method": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 1000000 %}{{ a | replace('', a) }}",
    "join method": "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
    "join filter": "{% set a = 'a' * 1000000 %}{{ a | join(a) }}",
    "join of a lazy sequence": "{{ range(100000) | map('string') | join('a' * 100000) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "date width": "{{ strftime_now('%1000000000d') }}",
    "shared lists": "{% set n = namespace(x=[1]) %}"
    + LOOP
    + "{% set n.x = [n.x, n.x] %}{% endfor %}",
    "cycle": "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "output": "{% for i in range(100000) %}{{ 'y' * 10000 }}{% endfor %}",
    "buffered output": "{% set x %}{% for i in range(100000) %}"
    + "y" * 10000
    + "{% endfor %}{% endset %}",
}
GETS_OUT = {
    "class": "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler(1).__init__.__globals__ }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "mutation": "{{ messages.append(1) }}",
    "item assignment": "{{ messages[0].update({'role': 'system'}) }}",
    "int method": "{{ (1).to_bytes(10**9, 'big') }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'os' as os %}",
}
INVALID = {
    "syntax": "{% for %}",
    "unknown filter": "{{ 'a' | center(10) }}",
    "attribute filter": "{{ '' | attr('__class__') }}",
    "depth": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "length": "a" * (LIMITS.template_chars + 1),
}


@pytest.mark.parametrize("source", RUNS_LONG.values(), ids=RUNS_LONG.keys())
def test_template_that_runs_long_is_cut(source: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"too long|recursion"):
        render(source)


@pytest.mark.parametrize("source", GROWS_LARGE.values(), ids=GROWS_LARGE.keys())
def test_template_that_grows_large_is_cut(source: str) -> None:
    with pytest.raises(
        InvalidArgumentError,
        match=r"too (large|much|long)|exceeds|at most 16|without widths|namespace|Range too big",
    ):
        render(source)


@pytest.mark.parametrize("source", GETS_OUT.values(), ids=GETS_OUT.keys())
def test_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"unsafe|no loader"):
        render(source)


@pytest.mark.parametrize("source", INVALID.values(), ids=INVALID.keys())
def test_invalid_template_is_refused_when_compiled(source: str) -> None:
    with pytest.raises(InvalidArgumentError, match="chat template"):
        ChatTemplate(source)


def test_messages_are_not_changed_and_special_variables_cannot_be_replaced() -> None:
    messages = [{"role": "user", "content": "hi"}]
    before = json.dumps(messages)
    text = ChatTemplate("{{ bos_token }}{{ messages | length }}", bos_token="<s>").render(
        messages, bos_token="other"
    )
    assert text == "<s>1"
    assert json.dumps(messages) == before


def test_one_template_renders_in_many_threads() -> None:
    template = ChatTemplate(CHATML)
    results: list[str] = []

    def work(name: str) -> None:
        for _ in range(50):
            results.append(template.render([{"role": "user", "content": name}]))

    threads = [threading.Thread(target=work, args=(f"n{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    assert {results.count(text) for text in results} == {50}
