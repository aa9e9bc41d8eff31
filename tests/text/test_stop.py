"""Stop strings in streamed text, against a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.errors import InvalidArgumentError
from sagellm.text import StopStrings

letters = st.text(alphabet="ab", max_size=30)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What comes before the stop string that is complete first, longest among equals."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end - len(stop)], stop


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(letters, max_size=8),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
)
def test_any_split_of_the_text_gives_the_same_answer(pieces: list[str], stops: list[str]) -> None:
    watcher = StopStrings(stops)
    emitted = [watcher.push(piece) for piece in pieces]
    text = "".join(emitted) + watcher.finish()
    assert (text, watcher.matched) == first_stop("".join(pieces), stops)
    assert watcher.stopped == (watcher.matched is not None)


@given(text=letters, stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4))
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    watcher = StopStrings(stops)
    emitted = ""
    for end, char in enumerate(text, start=1):
        emitted += watcher.push(char)
        if watcher.stopped:
            break
        held = text[len(emitted) : end]
        assert emitted + held == text[:end]
        longest = max(
            (n for s in stops for n in range(1, len(s)) if text[:end].endswith(s[:n])), default=0
        )
        assert len(held) == longest


def test_nothing_is_passed_on_after_a_stop() -> None:
    watcher = StopStrings(["\n\n"])
    assert watcher.push("one\n") == "one"
    assert watcher.push("\ntwo") == ""
    assert watcher.stopped
    assert watcher.push("three") == ""
    assert watcher.finish() == ""


def test_without_stop_strings_text_passes_at_once() -> None:
    watcher = StopStrings([])
    assert watcher.push("abc") == "abc"
    assert not watcher.stopped


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="empty"):
        StopStrings([""])
