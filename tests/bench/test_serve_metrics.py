"""The definitions of what `bench serve` measures, against timelines worked out by hand."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.bench.serve_client import Exchange, SseSplitter
from sagellm.bench.serve_metrics import (
    Distribution,
    Failure,
    Objectives,
    RequestTiming,
    summarize,
)
from sagellm.errors import InvalidArgumentError


def timing(
    start: float, *tokens: float, end: float | None = None, n: int | None = None
) -> RequestTiming:
    return RequestTiming(
        start=start,
        token_times=tokens,
        end=tokens[-1] if end is None else end,
        output_tokens=len(tokens) if n is None else n,
        prompt_tokens=10,
    )


def test_a_timeline_worked_out_by_hand() -> None:
    # Sent at 1.0; tokens at 1.5, 1.6, 1.8; the finish event at 1.9: TPOT = (0.9 - 0.5) / 2.
    first = timing(1.0, 1.5, 1.6, 1.8, end=1.9)
    assert first.ttft == pytest.approx(0.5)
    assert first.e2el == pytest.approx(0.9)
    assert first.tpot == pytest.approx(0.2)
    assert first.itl == pytest.approx([0.1, 0.2])
    # Sent at 2.0; four tokens in two events at 2.25 and 2.85: TPOT = 0.6 / 3, ITL = 0.6.
    second = timing(2.0, 2.25, 2.85, n=4)
    assert second.tpot == pytest.approx(0.2)

    metrics = summarize([first, second])
    assert metrics.duration_s == pytest.approx(1.85)  # 1.0 to 2.85
    assert (metrics.completed, metrics.failed, metrics.error_rate) == (2, 0, 0)
    assert (metrics.input_tokens, metrics.output_tokens) == (20, 7)
    assert metrics.request_throughput == pytest.approx(2 / 1.85)
    assert metrics.output_throughput == pytest.approx(7 / 1.85)
    assert metrics.total_throughput == pytest.approx(27 / 1.85)
    assert metrics.concurrency == pytest.approx((0.9 + 0.85) / 1.85)
    assert metrics.tokens_per_event == pytest.approx(7 / 5)
    assert metrics.ttft_ms is not None and metrics.itl_ms is not None
    assert metrics.ttft_ms.mean == pytest.approx(375)
    assert metrics.ttft_ms.std == pytest.approx(125)
    assert metrics.itl_ms.count == 3  # gaps of all requests together
    assert metrics.itl_ms.mean == pytest.approx(300)
    assert metrics.itl_ms.median == pytest.approx(200)


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, written out."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_the_definitions_of_vllm_written_independently(seed: int) -> None:
    rng = np.random.default_rng(seed)
    timings = []
    for _ in range(40):
        start = float(rng.uniform(0, 10))
        tokens = start + np.cumsum(rng.uniform(0.001, 0.4, rng.integers(1, 30)))
        timings.append(timing(start, *tokens.tolist(), n=len(tokens) + int(rng.integers(0, 3))))
    ttfts, tpots, all_tpots, itls, latencies = [], [], [], [], []
    for t in timings:
        latency, ttft, n = t.end - t.start, t.token_times[0] - t.start, t.output_tokens
        tpot = 0.0
        if n > 1:
            tpot = (latency - ttft) / (n - 1)
            tpots.append(1e3 * tpot)
        all_tpots.append(1e3 * tpot)
        last = t.token_times[0]
        for moment in t.token_times[1:]:
            itls.append(1e3 * (moment - last))
            last = moment
        ttfts.append(1e3 * ttft)
        latencies.append(1e3 * latency)
    duration = max(t.end for t in timings) - min(t.start for t in timings)
    good = sum(
        a <= 250 and b <= 200 and c <= 3000
        for a, b, c in zip(ttfts, all_tpots, latencies, strict=True)
    )
    assert 0 < good < len(timings)

    metrics = summarize(timings, objectives=Objectives(ttft=250, tpot=200, e2el=3000))
    assert metrics.goodput == pytest.approx(good / duration)
    assert metrics.good_share == pytest.approx(good / len(timings))
    for values, found in (
        (ttfts, metrics.ttft_ms),
        (tpots, metrics.tpot_ms),
        (itls, metrics.itl_ms),
        (latencies, metrics.e2el_ms),
    ):
        assert found is not None
        assert found.count == len(values)
        assert found.mean == pytest.approx(statistics.fmean(values))
        assert found.std == pytest.approx(statistics.pstdev(values))
        for percent, figure in ((50, found.p50), (90, found.p90), (95, found.p95), (99, found.p99)):
            assert figure == pytest.approx(percentile(values, percent))


def test_an_answer_of_one_token_has_no_time_per_token_and_meets_any_bound_on_it() -> None:
    single = timing(0.0, 0.1)
    metrics = summarize([single], objectives=Objectives(tpot=0.001))
    assert metrics.tpot_ms is None
    assert metrics.itl_ms is None
    assert metrics.good_share == 1


def test_failures_are_counted_by_kind_and_are_in_no_latency() -> None:
    answered = timing(0.0, 1.0, 2.0)
    busy = Failure(kind="rejected 429", message="busy", rejected=True)
    broken = Failure(kind="http 500", message="first")
    failed = [
        RequestTiming(start=0.5, end=0.6, failure=busy),
        RequestTiming(start=0.5, end=0.7, failure=broken),
        RequestTiming(start=0.5, end=4.0, failure=replace(broken, message="second")),
    ]
    metrics = summarize([answered, *failed], objectives=Objectives(ttft=5000))
    assert (metrics.completed, metrics.failed, metrics.rejected) == (1, 3, 1)
    assert metrics.error_rate == 0.75
    assert metrics.errors == {"rejected 429": 1, "http 500": 2}
    assert metrics.error_examples == {"rejected 429": "busy", "http 500": "first"}
    assert metrics.duration_s == 4
    assert metrics.ttft_ms is not None and metrics.ttft_ms.count == 1
    assert metrics.goodput == pytest.approx(0.25)
    assert metrics.good_share == 0.25


def test_what_was_not_measured_is_none_and_never_zero() -> None:
    for timings in ([], [RequestTiming(start=0, end=1, failure=Failure(kind="x", message=""))]):
        metrics = summarize(timings)
        assert metrics.ttft_ms is metrics.tpot_ms is metrics.itl_ms is metrics.e2el_ms is None
        assert metrics.input_tokens is metrics.cached_tokens is metrics.tokens_per_event is None
        assert metrics.goodput is None
    assert summarize([]).error_rate is None
    unsaid = [timing(0, 1), replace(timing(0, 1), prompt_tokens=None)]
    assert summarize(unsaid).input_tokens is None
    assert summarize(unsaid).total_throughput is None
    assert Distribution.of([]) is None


def test_lengths_other_than_asked_are_counted() -> None:
    right = replace(timing(0, 1, 2), asked_prompt_tokens=10, asked_output_tokens=2)
    metrics = summarize(
        [
            right,
            replace(right, prompt_tokens=11),
            replace(right, prompt_tokens=None),
            replace(right, output_tokens=1),
            replace(right, asked_prompt_tokens=None),
        ]
    )
    assert (metrics.wrong_prompt_lengths, metrics.wrong_output_lengths) == (2, 1)


@pytest.mark.parametrize("text", ("", "ttft", "ttft:0", "ttft:x", "ttft:inf", "itl:5", "ttft:5,"))
def test_objectives_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="ttft:200,tpot:20"):
        Objectives.parse(text)


def test_objectives() -> None:
    assert Objectives.parse("ttft:200, e2el:1e3") == Objectives(ttft=200, e2el=1000)


def event(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def exchange(*payloads: bytes) -> Exchange:
    times = [float(i + 1) for i in range(len(payloads))]
    return Exchange(start=0.0, end=99.0, times=times, payloads=list(payloads))


def chat(finish: str | None = None, **delta: object) -> bytes:
    return event(choices=[{"delta": delta, "finish_reason": finish}])


def test_roles_usage_and_empty_deltas_are_no_tokens() -> None:
    usage = {"completion_tokens": 3, "prompt_tokens": 8}
    found = exchange(
        chat(role="assistant", content=""),
        chat(reasoning_content="hm"),
        chat(content="yes"),
        chat(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
        chat(finish="stop"),
        event(choices=[], usage=usage),
        b"[DONE]",
    ).timing()
    assert found.failure is None
    assert found.token_times == (2, 3, 4)
    assert found.end == 5  # the finish, neither usage nor the end of the stream
    assert (found.output_tokens, found.prompt_tokens, found.counted_from) == (3, 8, "usage")
    assert found.cached_tokens is None


def test_without_usage_events_are_counted_and_it_says_so() -> None:
    found = exchange(
        event(choices=[{"text": "a"}]), event(choices=[{"text": "b", "finish_reason": "length"}])
    ).timing()
    assert (found.output_tokens, found.counted_from, found.prompt_tokens) == (2, "events", None)
    assert summarize([found, timing(0, 1)]).tokens_counted_from == "events"


def test_tokens_without_text_arrive_with_the_finish() -> None:
    found = exchange(
        event(choices=[{"text": ""}]),
        event(choices=[{"text": "", "finish_reason": "length"}], usage={"completion_tokens": 5}),
    ).timing()
    assert (found.token_times, found.output_tokens) == ((2,), 5)


@pytest.mark.parametrize(
    ("payloads", "kind"),
    (
        ((event(choices=[{"text": "a"}]),), "truncated"),
        ((), "truncated"),
        ((b"[DONE]",), "empty"),
        ((event(choices=[{"text": "a"}]), b"{", b"[DONE]"), "malformed event"),
        ((event(choices=[{"text": "a"}]), b"[1]", b"[DONE]"), "malformed event"),
        ((event(error={"type": "server_error"}), b"[DONE]"), "error event server_error"),
        ((event(error="no"),), "error event"),
    ),
)
def test_streams_that_end_badly_are_failures(payloads: tuple[bytes, ...], kind: str) -> None:
    found = exchange(*payloads).timing()
    assert found.failure is not None
    assert found.failure.kind == kind
    assert found.end == 99


@given(st.lists(st.integers(1, 40)))
def test_events_do_not_depend_on_how_the_network_cuts_them(cuts: list[int]) -> None:
    stream = (
        b": a comment\r\n\r\nevent: x\ndata: one\n\ndata:two\r\n\r\nid: 3\ndata: a\ndata: b\n\n\n"
        b"data: [DONE]\n\ndata: not complete\n"
    )
    splitter = SseSplitter()
    found: list[bytes] = []
    for size in [*cuts, len(stream)]:
        found += splitter.push(stream[:size])
        stream = stream[size:]
    assert found == [b"one", b"two", b"a\nb", b"[DONE]"]
