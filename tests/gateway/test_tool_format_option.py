"""``--tool-call-format``, ``--chat-template``, ``--reasoning-tags``: what an operator knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.support import mock_gateway, serving
from sagellm.cli.serve import read_template
from sagellm.errors import InvalidArgumentError
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.loading import ModelOptions, open_gateway
from sagellm.protocol import LIMITS
from sagellm.text.tool_prompt import call_text, result_text, tool_system_prompt

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OWN = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + PLAIN
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
USER = {"role": "user", "content": "hello"}
HERMES: dict[str, Any] = {"tool_call_format": "hermes"}


def config(**options: Any) -> GatewayConfig:
    return GatewayConfig(access_log=False, warm_up=False, **options)


def answer(client: httpx.Client, **options: Any) -> Any:
    body = {"messages": [USER], "temperature": 0, "max_tokens": 200, **options}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def prompt_of(client: httpx.Client, *messages: dict[str, Any], **options: Any) -> str:
    response = client.post("/tokenize", json={"messages": messages, **options})
    assert response.status_code == 200, response.text
    return bytes(token for token in response.json()["tokens"] if token < 256).decode()


def test_a_template_without_tools_gets_them_as_text() -> None:
    gateway = mock_gateway(script=CALL, config=config(**HERMES), chat_template=PLAIN)
    with serving(gateway) as client:
        prompt = prompt_of(client, USER, tools=[ADD])
        described = tool_system_prompt("hermes", [ADD])
        assert prompt == f"<|system|>{described}\n<|user|>hello\n<|assistant|>"
        choice = answer(client, tools=[ADD])
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"a": 1}
        back = {"role": "tool", "tool_call_id": call["id"], "content": "two"}
        turns = prompt_of(client, USER, {**choice["message"], "content": None}, back)
        assert turns == (
            f"<|user|>hello\n<|assistant|>{call_text('hermes', [('add', {'a': 1})])}\n"
            f"<|user|>{result_text('add', 'two')}\n<|assistant|>"
        )


@pytest.mark.parametrize("choice", ("required", {"type": "function", "function": {"name": "add"}}))
def test_forced_calls_keep_the_grammar_of_the_named_format(choice: Any) -> None:
    # The script would say something else; the grammar decides.
    gateway = mock_gateway(script="No.", config=config(**HERMES), chat_template=PLAIN)
    with serving(gateway) as client:
        message = answer(client, tools=[ADD], tool_choice=choice)["message"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]).keys() == {"a"}


def test_a_template_with_tools_describes_them_itself() -> None:
    gateway = mock_gateway(script=CALL, config=config(**HERMES), chat_template=OWN)
    with serving(gateway) as client:
        assert prompt_of(client, USER, tools=[ADD]) == "[add]<|user|>hello\n<|assistant|>"
        assert answer(client, tools=[ADD])["finish_reason"] == "tool_calls"


def test_without_the_option_the_refusal_names_it() -> None:
    with serving(mock_gateway(chat_template=PLAIN)) as client:
        response = client.post("/v1/chat/completions", json={"messages": [USER], "tools": [ADD]})
    assert response.status_code == 400
    assert "--tool-call-format" in response.json()["error"]["message"]


def test_reasoning_tags_may_be_named() -> None:
    gateway = mock_gateway(
        script="[[hm]] Yes.", config=config(reasoning_tags=("[[", "]]")), chat_template=PLAIN
    )
    with serving(gateway) as client:
        message = answer(client)["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")


def test_an_unknown_format_and_an_empty_tag_are_refused_at_start() -> None:
    with pytest.raises(InvalidArgumentError, match="hermes, llama3"):
        GatewayConfig(tool_call_format="nosuch")
    with pytest.raises(InvalidArgumentError, match="tag is empty"):
        GatewayConfig(reasoning_tags=("<think>", ""))


def test_a_template_of_the_operators_replaces_the_models() -> None:
    options = ModelOptions(path="mock", name="mock", device="mock", chat_template=OWN)
    with serving(open_gateway(config(), options)) as client:
        assert prompt_of(client, USER) == "<|user|>hello\n<|assistant|>"


@pytest.mark.parametrize(
    ("content", "problem"),
    (
        (b"", "empty"),
        (b"\xff\xfe", "UTF-8"),
        (b"x" * (LIMITS.template_chars + 1), f"more than {LIMITS.template_chars} bytes"),
    ),
)
def test_a_bad_template_file_is_an_error_that_names_it(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=f"own.jinja .*{problem}"):
        read_template(path)


def test_a_template_that_does_not_parse_is_an_error() -> None:
    options = ModelOptions(path="mock", name="mock", device="mock", chat_template="{% if %}")
    with pytest.raises(InvalidArgumentError, match="chat template is not valid"):
        open_gateway(config(), options)
