"""Tokens guessed ahead change the time of an output and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.support import (
    answers,
    assert_pool_empty,
    expected_tokens,
    make_engine,
    make_request,
    random_prompt,
    run_all,
    serve,
)
from sagellm.backends.interface import ForwardBatch, SamplingRow, StepOutput
from sagellm.backends.mock import EOS_ID, MockRunner
from sagellm.engine.config import EngineConfig, parse_speculation
from sagellm.engine.prompt_lookup import PromptLookup
from sagellm.engine.request import Sequence
from sagellm.engine.speculation import break_even, worthwhile
from sagellm.errors import InvalidArgumentError

# ------------------------------------------------------------------------------ the lookup


def lookup_of(tokens: list[int]) -> PromptLookup:
    lookup = PromptLookup()
    lookup.extend(tokens)
    return lookup


def test_without_a_repeated_pair_nothing_is_guessed() -> None:
    for tokens in ([], [1], [1, 2], [1, 2, 3, 4], [1, 2, 1]):
        lookup = lookup_of(tokens)
        assert (lookup.match, lookup.draft(4)) == (0, [])


def test_what_followed_a_match_is_guessed() -> None:
    lookup = lookup_of([5, 6, 7, 8, 9, 1, 5, 6])
    assert lookup.match == 2
    assert lookup.draft(3) == [7, 8, 9]


def test_the_longest_match_wins_and_among_equals_the_latest() -> None:
    longer_first = [4, 1, 2, 30, 0, 9, 1, 2, 40, 4, 1, 2]
    assert lookup_of(longer_first).draft(1) == [30]
    equally_long = [8, 1, 2, 30, 0, 9, 1, 2, 40, 4, 1, 2]
    assert lookup_of(equally_long).draft(1) == [40]


def test_a_match_that_reaches_the_end_goes_on_in_circles() -> None:
    assert lookup_of([1, 2, 3, 1, 2, 3, 1, 2]).draft(7) == [3, 1, 2, 3, 1, 2, 3]
    assert lookup_of([7, 7, 7, 7]).draft(3) == [7, 7, 7]


def test_a_prediction_that_holds_lengthens_the_match() -> None:
    tokens = [1, 2, 3, 4, 5, 1, 2]
    lookup = lookup_of(tokens)
    lookup.extend([3, 4])
    assert (lookup.match, lookup.draft(2)) == (4, [5, 1])
    lookup.extend([9])
    assert (lookup.match, lookup.draft(1)) == (0, [])


def test_matches_that_keep_failing_lose_trust_and_regain_it() -> None:
    tokens: list[int] = []
    lookup = PromptLookup()
    for i in range(40):  # a pair that every time goes on differently
        tokens += [1, 2, 100 + i]
        for end in range(len(tokens) - 3, len(tokens)):
            lookup.extend(tokens[len(lookup) : end + 1])
    assert lookup.trust < 0.5
    for _ in range(40):
        tokens.append(7)
        lookup.extend(tokens[len(lookup) :])
    assert lookup.trust > 0.9


@given(tokens=st.lists(st.integers(0, 3), max_size=80), cuts=st.lists(st.integers(0, 80)))
def test_a_guess_stood_behind_the_end_of_the_text_before(
    tokens: list[int], cuts: list[int]
) -> None:
    lookup = PromptLookup()
    for end in sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)}):
        lookup.extend(tokens[len(lookup) : end])
    guess = lookup.draft(1)
    pairs = list(itertools.pairwise(tokens[:-1]))
    assert bool(guess) == (len(tokens) >= 3 and tuple(tokens[-2:]) in pairs)
    if guess:
        places = [
            i
            for i in range(lookup.match, len(tokens))
            if tokens[i - lookup.match : i] == tokens[len(tokens) - lookup.match :]
        ]
        assert guess[0] in {tokens[i] for i in places}


# ------------------------------------------------------------------------------ when it pays


def test_guesses_pay_alone_and_not_in_large_batches() -> None:
    assert worthwhile(24, break_even(1, 1)) >= 15
    assert worthwhile(2, break_even(1, 1)) >= 1
    assert worthwhile(2, break_even(8, 8)) == 0
    assert worthwhile(24, break_even(8, 8)) >= 1
    odds = [break_even(n, n) for n in (1, 2, 8, 32, 1000)]
    assert odds == sorted(odds)
    assert odds[-1] < 1.001


@pytest.mark.parametrize("value", [0, -1, True, "on", 1.5])
def test_a_configuration_that_means_nothing_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="speculation"):
        EngineConfig(speculation=value)


def test_the_command_line_takes_auto_off_and_numbers() -> None:
    assert [parse_speculation(text) for text in ("auto", "off", "7")] == ["auto", "off", 7]
    for text in ("", "on", "0", "-1", "1e3", "\u0663"):
        with pytest.raises(InvalidArgumentError, match="--speculate"):
            parse_speculation(text)


# ---------------------------------------------------------------------------- exactness, mock


class Oracle:
    """Guesses what it was told, right up to a token that changes from step to step."""

    def __init__(self, wanted: dict[tuple[int, int], list[int]], wrong_every: int) -> None:
        self.wanted = wanted
        self.wrong_every = wrong_every
        self.calls = 0

    def draft(self, sequence: Sequence, room: int, num_decodes: int, num_tokens: int) -> list[int]:
        assert room >= 1
        assert 1 <= num_decodes <= num_tokens
        self.calls += 1
        done = len(sequence.output_tokens)
        wanted = self.wanted.get((sequence.state.key, sequence.index), [])
        guesses = wanted[done : done + 1 + self.calls % 9]
        if self.wrong_every and guesses and self.calls % self.wrong_every == 0:
            guesses[self.calls % len(guesses)] ^= 1
        return guesses  # more than there is room for, at times


OPTIONS = st.fixed_dictionaries(
    {
        "prompt": st.tuples(st.integers(0, 3), st.integers(1, 70)),
        "max_tokens": st.integers(1, 40),
        "n": st.sampled_from([1, 1, 2, 3]),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([None, 0.7, 1.0]),
        "top_p": st.sampled_from([None, 0.9]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "stop_token_ids": st.sampled_from([[], list(range(0, 256, 16))]),
        "logprobs": st.sampled_from([None, 0, 2]),
        "stream": st.booleans(),
    }
)
ENGINES = st.fixed_dictionaries(
    {
        "kv_cache_tokens": st.sampled_from([160, 400, 4096]),
        "max_num_seqs": st.sampled_from([1, 3, 32]),
        "max_batch_tokens": st.sampled_from([32, 64]),
        "max_chunk_tokens": st.sampled_from([None, 2, 5, 16]),
        "enable_prefix_caching": st.booleans(),
    }
)


def complete_answers(
    requests: list[dict[str, Any]], windows: tuple[int, ...], drafter: Any, **options: Any
) -> tuple[dict[tuple[int, int], Any], Any]:
    """Everything that clients learn of their answers but for times."""
    engine = make_engine(MockRunner(windows=windows), drafter=drafter, **options)
    for request in requests:
        fields = {key: value for key, value in request.items() if key != "prompt"}
        fields["min_tokens"] = min(fields["min_tokens"], fields["max_tokens"])
        if not fields["stop_token_ids"]:
            del fields["stop_token_ids"]
        engine.add_request(make_request(**fields), random_prompt(*request["prompt"]))
    found: dict[tuple[int, int], Any] = {}
    streamed: dict[tuple[int, int], list[int]] = {}
    for output in run_all(engine):
        place = (output.key, output.index)
        streamed.setdefault(place, []).extend(output.token_ids)
        if output.finished is not None:
            end = output.finished
            assert streamed[place] == end.token_ids
            found[place] = (
                end.reason,
                end.token_ids,
                end.text,
                end.logprobs,
                end.matched_stop,
                output.num_prompt_tokens,
            )
    assert_pool_empty(engine)
    return found, engine.stats()


@given(
    requests=st.lists(OPTIONS, min_size=1, max_size=5),
    options=ENGINES,
    windows=st.sampled_from([(0,), (0, 20), (7,)]),
    wrong_every=st.sampled_from([0, 1, 2, 3]),
)
@settings(max_examples=60)
def test_no_guess_changes_an_answer(
    requests: list[dict[str, Any]],
    options: dict[str, Any],
    windows: tuple[int, ...],
    wrong_every: int,
) -> None:
    plain, _ = complete_answers(requests, windows, None, **options, speculation="off")
    wanted = {place: answer[1] for place, answer in plain.items()}
    guessed, stats = complete_answers(requests, windows, Oracle(wanted, wrong_every), **options)
    assert guessed == plain
    if wrong_every == 0:
        # All hold but those behind a stop, of which the oracle knows none.
        assert stats.num_accepted_tokens == stats.num_draft_tokens


def test_right_guesses_save_steps_and_are_reported() -> None:
    prompt, option = random_prompt(1, 20), {"max_tokens": 30, "ignore_eos": True}
    wanted = expected_tokens(prompt, make_request(**option))
    engine = make_engine(drafter=Oracle({(0, 0): wanted}, 0))
    key = engine.add_request(make_request(**option), prompt)
    outputs = run_all(engine)
    assert answers(outputs)[key, 0] == wanted
    assert engine.num_steps < 12
    assert outputs[-1].finished is not None
    assert outputs[-1].finished.metrics.spec_accept_rate == 1.0


def test_a_repetitive_output_is_looked_up_and_without_speculation_is_the_same() -> None:
    option = {"max_tokens": 100, "ignore_eos": True, "logit_bias": {65: 100.0}}
    steps = {}
    for speculation in ("off", "auto", 4):
        engine = make_engine(speculation=speculation)
        assert serve(engine, [[1, 2, 3]], [option]) == [[65] * 100]
        steps[speculation] = engine.num_steps
        stats = engine.stats()
        assert (stats.num_draft_tokens > 0) == (speculation != "off")
        assert stats.num_accepted_tokens == stats.num_draft_tokens
    assert steps["off"] == 100
    assert steps["auto"] < 20
    assert 20 <= steps[4] < 30


def test_an_output_without_guesses_has_no_rate() -> None:
    engine = make_engine(speculation="off")
    engine.add_request(make_request(max_tokens=3), [1, 1, 1, 1, 1])
    last = run_all(engine)[-1]
    assert last.finished is not None
    assert last.finished.metrics.spec_accept_rate is None
    assert engine.stats().spec_accept_rate is None


@pytest.mark.parametrize("stop", [{"stop": ["AAA"]}, {"max_tokens": 5}, {"stop_token_ids": [66]}])
def test_what_was_guessed_behind_the_end_is_dropped(stop: dict[str, Any]) -> None:
    prompt = [65, 65, 66] * 8 + [65]
    wanted = {"prompt": "", "max_tokens": 60, "ignore_eos": True, "logit_bias": {65: 100.0}, **stop}
    del wanted["prompt"]
    found = []
    for speculation in ("off", 8):
        engine = make_engine(speculation=speculation)
        engine.add_request(make_request(**wanted), prompt)
        last = run_all(engine)[-1].finished
        assert last is not None
        found.append((last.reason, last.text, last.token_ids, last.matched_stop))
        assert last.metrics.kv_used_tokens <= len(prompt) + len(last.token_ids)
    assert found[0] == found[1]


# ------------------------------------------------------------------- nobody pays for a guess


class Recorder(MockRunner):
    """Keeps how many tokens each step had."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sizes: list[int] = []

    def step(
        self, batch: ForwardBatch, sampling: tuple[SamplingRow, ...] = (), **options: Any
    ) -> StepOutput:
        self.sizes.append(len(batch.token_ids))
        return super().step(batch, sampling, **options)


class Greedy:
    """Guesses nonsense wherever it may."""

    def draft(self, sequence: Sequence, room: int, num_decodes: int, num_tokens: int) -> list[int]:
        assert sequence.output_tokens, "a first token has waited"
        return [0] * room


@pytest.mark.parametrize("pool", [160, 272, 400])
def test_guesses_cause_no_preemption_and_no_further_step(pool: int) -> None:
    prompts = [random_prompt(i, 5 + 7 * i) for i in range(8)]
    options: list[dict[str, Any]] = [{"max_tokens": 20 + 3 * i, "seed": i} for i in range(8)]
    plain = make_engine(kv_cache_tokens=pool, speculation="off")
    wanted = serve(plain, prompts, options)
    engine = make_engine(kv_cache_tokens=pool, drafter=Greedy())
    assert serve(engine, prompts, options) == wanted
    assert engine.stats().num_draft_tokens > 0
    assert engine.stats().num_preemptions <= plain.stats().num_preemptions
    assert engine.num_steps <= plain.num_steps
    evicted = engine.kv.stats().evicted_blocks
    assert evicted <= plain.kv.stats().evicted_blocks


def test_a_first_token_waits_for_no_guess() -> None:
    runner = Recorder()
    engine = make_engine(runner, drafter=Greedy())
    engine.add_request(make_request(max_tokens=9, n=2, ignore_eos=True, seed=1), [5, 6])
    run_all(engine)
    assert runner.sizes[:2] == [1, 2]  # the prompt but for its end, then the end, twice
    assert max(runner.sizes) > 2


def test_a_lookup_asked_twice_answers_the_same() -> None:
    lookup = lookup_of([5, 6, 7, 8, 9, 1, 5, 6])
    for tokens in ([5, 6, 7, 8, 9, 1, 5, 6], [5, 6, 7, 8, 9, 1, 5, 6, 3]):
        lookup.extend(tokens[len(lookup) :])
        drafted = lookup.draft(2)
        lookup.extend(tokens[len(lookup) :])
        assert lookup.draft(2) == drafted == ([7, 8] if tokens[-1] == 6 else [])


def test_a_prompt_gets_its_whole_chunk_before_any_guess() -> None:
    runner = Recorder()
    engine = make_engine(runner, max_batch_tokens=40, max_num_seqs=4, drafter=Greedy())
    engine.add_request(make_request(max_tokens=30, ignore_eos=True), random_prompt(0, 8))
    engine.step()
    engine.add_request(make_request(max_tokens=2), random_prompt(1, 100))
    for done in (39, 78):
        engine.step()
        assert runner.sizes[-1] == 40
        waiting = list(engine._states.values())[1].sequences[0]
        assert waiting.num_computed == done
    run_all(engine)


def test_a_step_fails_on_its_guess_and_the_output_is_the_same() -> None:
    prompt, option = random_prompt(3, 12), {"max_tokens": 12, "ignore_eos": True}
    wanted = expected_tokens(prompt, make_request(**option))
    assert 0 not in wanted
    assert 0 not in prompt
    engine = make_engine(MockRunner(fail_on_token=0), drafter=Greedy())
    assert serve(engine, [prompt], [option]) == [wanted]
    assert engine.stats().num_failed_steps > 0


def test_a_row_that_cannot_be_read_fails_where_it_would_without_guesses() -> None:
    prompt, option = random_prompt(4, 12), {"max_tokens": 12, "ignore_eos": True, "stream": True}
    wanted = expected_tokens(prompt, make_request(**option))
    broken = wanted[6]
    assert broken not in wanted[:6]
    assert broken not in prompt
    found = []
    for drafter in (None, Oracle({(0, 0): wanted}, 0)):
        engine = make_engine(MockRunner(nan_on_token=broken), drafter=drafter, speculation="off")
        engine.add_request(make_request(**option), prompt)
        outputs = run_all(engine)
        last = outputs[-1].finished
        assert last is not None
        assert last.failure is not None
        found.append((last.token_ids, last.failure, last.text))
        assert_pool_empty(engine)
    assert found[0] == found[1]
    assert found[0][0] == wanted[:7]


def test_a_published_block_holds_drawn_tokens_only() -> None:
    prompt, option = random_prompt(6, 20), {"max_tokens": 60, "ignore_eos": True}
    wanted = expected_tokens(prompt, make_request(**option))
    engine = make_engine(drafter=Oracle({(0, 0): wanted}, 2))
    assert serve(engine, [prompt], [option]) == [wanted]
    again = [*prompt, *wanted, 1, 2, 3]
    assert serve(engine, [again], [option]) == [expected_tokens(again, make_request(**option))]
    assert engine.kv.stats().prefix_hit_tokens == 64


def test_the_end_token_is_never_guessed() -> None:
    class Watch(Recorder):
        def step(self, batch: ForwardBatch, *args: Any, **options: Any) -> StepOutput:
            if len(batch.query_starts) == 2 and 0 < batch.positions[0] > 30:
                assert EOS_ID not in batch.token_ids
            return super().step(batch, *args, **options)

    prompt = [1, 2, EOS_ID, 3] * 8
    engine = make_engine(Watch(), speculation=6)
    key = engine.add_request(make_request(max_tokens=40, logit_bias={1: 50.0, 2: 50.0}), prompt)
    assert answers(run_all(engine))[key, 0]
    assert engine.stats().num_draft_tokens > 0


# --------------------------------------------------------------------------------- grammars

FORMS: list[dict[str, Any]] = [
    {"type": "json_schema", "json_schema": {"type": "array", "items": {"enum": ["aab", "aac"]}}},
    {"type": "regex", "regex": "(ab|abc){3,12}x"},
    {"type": "choice", "choices": ["one two two two three", "one two two four"]},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["type"])
@pytest.mark.parametrize("wrong_every", [0, 1, 2, 3])
def test_what_a_grammar_allows_is_known_behind_guesses(
    form: dict[str, Any], wrong_every: int
) -> None:
    for seed in range(6):
        option = {"max_tokens": 60, "temperature": 1.0, "seed": seed, "response_format": form}
        found = []
        wanted: list[int] = []
        for drafter in (None, Oracle({(0, 0): wanted}, wrong_every)):
            engine = make_engine(drafter=drafter, speculation="off")
            engine.add_request(make_request(min_tokens=seed, **option), random_prompt(seed, 9))
            last = run_all(engine)[-1].finished
            assert last is not None
            assert last.failure is None
            found.append((last.token_ids, last.text, last.reason))
            wanted += last.token_ids
        assert found[0] == found[1]
        stats = engine.stats()
        assert stats.num_draft_tokens > 0
        assert wrong_every == 1 or stats.num_accepted_tokens > 0


def test_a_guess_that_a_grammar_forbids_is_not_computed() -> None:
    form = {"type": "regex", "regex": "[b-z]{40}"}
    engine = make_engine(drafter=Greedy())
    engine.add_request(make_request(max_tokens=50, response_format=form), [1, 2, 3])
    last = run_all(engine)[-1].finished
    assert last is not None
    assert len(last.text) == 40
    assert engine.stats().num_draft_tokens == 0
