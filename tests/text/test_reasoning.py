"""Reasoning blocks in streamed text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.text import load_tokenizer
from sagellm.text.reasoning import ReasoningParser, ReasoningTags, detect_reasoning
from text.vocabularies import spm_source, train_spm


def read(pieces: Iterable[str], starts_inside: bool = False) -> tuple[str, str]:
    """All reasoning and all text; the reasoning has to come first."""
    parser = ReasoningParser("<think>", "</think>", starts_inside)
    out = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    kinds = [kind for kind, _ in out]
    assert kinds == sorted(kinds)
    assert all(text for _, text in out)
    return (
        "".join(text for kind, text in out if kind == "reasoning"),
        "".join(text for kind, text in out if kind == "text"),
    )


CASES: list[tuple[str, bool, tuple[str, str]]] = [
    ("<think>\nOne. Two\n</think>\n\nAnswer.\n", False, ("One. Two", "Answer.\n")),
    ("\n<think>why</think>because", False, ("why", "because")),
    ("<think>\n\n</think>\n\nAnswer", False, ("", "Answer")),
    ("<think>a < b </thin </think>c", False, ("a < b </thin", "c")),
    ("<think>cut short \n", False, ("cut short \n", "")),
    ("<think>cut </th", False, ("cut </th", "")),
    ("<think>a</think>b<think>c</think>d", False, ("a", "b<think>c</think>d")),
    (" no tags ", False, ("", " no tags ")),
    ("say <think>x</think>", False, ("", "say <think>x</think>")),
    ("end </think> only", False, ("", "end </think> only")),
    (" <thi", False, ("", " <thi")),
    ("<thinking>", False, ("", "<thinking>")),
    ("", False, ("", "")),
    ("\nwhy\n</think>\nbecause", True, ("why", "because")),
    ("<think>\nwhy</think>because", True, ("why", "because")),
    ("</think>because", True, ("", "because")),
    ("cut short", True, ("cut short", "")),
    (" <th", True, (" <th", "")),
]


@pytest.mark.parametrize(("text", "starts_inside", "expected"), CASES)
def test_reasoning_is_split_off(text: str, starts_inside: bool, expected: tuple[str, str]) -> None:
    assert read([text], starts_inside) == expected
    assert read(text, starts_inside) == expected


answers = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", "think>", " ", "\n", "a", "é"]), max_size=12
).map("".join)


@settings(max_examples=500)
@given(answers, st.booleans(), st.lists(st.integers(0, 60), max_size=6))
def test_any_split_of_the_answer_gives_the_same_result(
    text: str, starts_inside: bool, cuts: list[int]
) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    whole = read([text], starts_inside)
    assert read(pieces, starts_inside) == whole
    assert read(text, starts_inside) == whole
    reasoning, visible = whole
    assert reasoning in text
    assert text.endswith(visible)
    if not starts_inside and not text.lstrip(" \n").startswith("<think>"):
        assert whole == ("", text)


def test_reasoning_streams_and_only_a_possible_tag_waits() -> None:
    parser = ReasoningParser("<think>", "</think>", starts_inside=True)
    assert parser.push("\nFirst") == [("reasoning", "First")]
    assert parser.push(" \n") == []
    assert parser.push("second </th") == [("reasoning", " \nsecond")]
    assert parser.push("ink>\n") == []
    assert parser.push("\nyes") == [("text", "yes")]
    assert parser.push(" \n") == [("text", " \n")]


@pytest.mark.parametrize("unit", ["<think>", "</think", "<think> ", " \n", "</think>"])
@pytest.mark.parametrize("size", [5, 1_000_000])
def test_a_megabyte_of_hostile_text_is_linear_work(unit: str, size: int) -> None:
    """With quadratic work this takes hours."""
    text = unit * (1_000_000 // len(unit))
    for starts_inside in (False, True):
        read((text[i : i + size] for i in range(0, len(text), size)), starts_inside)


def test_the_template_tells_whether_a_model_reasons() -> None:
    tokenizer = load_tokenizer(spm_source(train_spm()))
    assert detect_reasoning(None) is None
    assert detect_reasoning("{{ messages[0].content }}", tokenizer) is None
    assert detect_reasoning("{{ content.split('</think>')[-1] }}", tokenizer) == ReasoningTags()


def test_the_prompt_tells_whether_reasoning_has_begun() -> None:
    tags = ReasoningTags()
    assert tags.open_at_end("<|assistant|><think>\n")
    assert not tags.open_at_end("<|assistant|><think>\n\n</think>\n\n")
    assert not tags.open_at_end("<|assistant|>")
