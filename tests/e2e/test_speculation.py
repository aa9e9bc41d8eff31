"""A real model with tokens guessed ahead: the same text, in fewer steps where it repeats itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sagellm import LLM
from sagellm.engine.llm import new_request
from sagellm.protocol import Request, Response, StreamEventDelta

pytestmark = [pytest.mark.native, pytest.mark.model, pytest.mark.slow]

REEF = (
    "The Great Barrier Reef is the world's largest coral reef system, composed of over 2,900 "
    "individual reefs and 900 islands stretching for over 2,300 kilometres."
)
QUESTIONS = (
    f"Repeat the following text exactly, word for word:\n\n{REEF}",
    f"Summarise in one sentence:\n\n{REEF}",
    "Rename the variable `a` to `total` and print the whole code again:\n\n"
    "```python\na = 0\nfor line in lines:\n    a = a + len(line)\nprint(a)\n```",
    "List ten animals, one per line.",
    "Tell me about the history of the bicycle.",
)
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "top_p": 0.95, "seed": 3},
    {"temperature": 0.5, "seed": 4, "frequency_penalty": 0.3, "logprobs": 1},
)


def load(model: str, **options: Any) -> LLM:
    return LLM(model, device="cpu", threads=2, kv_cache_tokens=4096, **options)


def asked(rule: dict[str, Any]) -> list[Request]:
    return [
        new_request(messages=[{"role": "user", "content": question}], max_tokens=64, **rule)
        for question in QUESTIONS
    ]


def visible(response: Response) -> tuple[Any, ...]:
    assert response.error is None
    return (
        (response.output_text, response.output_tokens, response.finish_reason),
        (response.logprobs, response.prompt_tokens),
    )


@pytest.fixture(scope="module")
def plain(smollm2: str) -> list[list[tuple[Any, ...]]]:
    """Answers without speculation, by rule and question."""
    with load(smollm2, speculation="off") as llm:
        answers = [[visible(r) for r in llm.generate(asked(rule))] for rule in RULES]
        assert llm.stats().num_draft_tokens == 0
    return answers


@pytest.fixture(scope="module", params=["auto", 5])
def guessing(smollm2: str, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with load(smollm2, speculation=request.param) as llm:
        yield llm


@pytest.mark.parametrize("rule", range(len(RULES)), ids=["greedy", "sampled", "penalised"])
def test_every_answer_is_the_same(
    plain: list[list[tuple[Any, ...]]], guessing: LLM, rule: int
) -> None:
    accepted = guessing.stats().num_accepted_tokens
    alone = [visible(guessing.generate(request)[0]) for request in asked(RULES[rule])]
    assert alone == plain[rule]
    assert guessing.stats().num_accepted_tokens > accepted
    together = [visible(response) for response in guessing.generate(asked(RULES[rule]))]
    assert together == plain[rule]


def test_a_quotation_takes_less_than_half_the_steps(smollm2: str) -> None:
    steps = {}
    for speculation in ("off", "auto"):
        with load(smollm2, speculation=speculation) as llm:
            response = llm.generate(asked({})[0])[0]
            assert "Great Barrier Reef" in response.output_text
            steps[speculation] = llm.engine.num_steps
            if speculation == "auto":
                rate = response.metrics.spec_accept_rate
                assert rate is not None
                assert rate > 0.6
    assert steps["auto"] < steps["off"] / 2


def test_a_streamed_answer_is_the_same(plain: list[list[tuple[Any, ...]]], guessing: LLM) -> None:
    (request, *_), ((text, tokens, _), _) = asked(RULES[0]), plain[0][0]
    chunks = [e for e in guessing.stream(request) if isinstance(e, StreamEventDelta)]
    assert "".join(chunk.chunk for chunk in chunks) == text
    assert [token for chunk in chunks for token in chunk.chunk_tokens] == tokens
    assert len(chunks) < len(tokens)  # some steps bring several
