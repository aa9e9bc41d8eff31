"""JSON in pieces, against the reader of the standard library."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.text.json_scanner import MAX_DEPTH, JsonScanner

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)  # fmt: skip
noise = st.text(alphabet='{}[]",:\\ \n0-1.eE+trufalsn"u0aZ\x01', max_size=24)


def refuse(name: str) -> object:
    raise ValueError(name)


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def is_accepted(text: str) -> bool:
    """Whether the scanner finds exactly one value in the text; a blank ends numbers."""
    scanner = JsonScanner()
    stop = scanner.feed(text + " ")
    return scanner.done and not text[stop:].strip(" \t\n\r")


@settings(max_examples=500)
@given(noise)
def test_noise_is_valid_exactly_when_the_library_says_so(text: str) -> None:
    assert is_accepted(text) == is_json(text)


@given(values, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_every_value_is_valid_in_every_style(
    value: object, ascii_only: bool, indent: int | str | None
) -> None:
    assert is_accepted(json.dumps(value, ensure_ascii=ascii_only, indent=indent))


@settings(max_examples=300)
@given(st.one_of(noise, values.map(json.dumps)), st.lists(st.integers(0, 30), max_size=4))
def test_it_stops_at_the_same_character_however_the_text_is_cut(text: str, cuts: list[int]) -> None:
    whole = JsonScanner()
    expected = whole.feed(text)
    scanner = JsonScanner()
    position = 0
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(bounds):
        taken = scanner.feed(text[start:end])
        position = start + taken
        if scanner.done or scanner.failed:
            break
    assert position == expected
    assert (scanner.done, scanner.failed) == (whole.done, whole.failed)


def test_it_never_reads_beyond_the_value() -> None:
    scanner = JsonScanner()
    assert scanner.feed('x{"a": [1]} tail', 1) == 11
    assert scanner.done


@pytest.mark.parametrize(("depth", "valid"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_nesting_is_bounded(depth: int, valid: bool) -> None:
    assert is_accepted("[" * depth + "]" * depth) == valid
