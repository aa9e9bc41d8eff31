"""`bench serve` against a server whose tokenizer, faults and figures are known."""

from __future__ import annotations

import asyncio
import builtins
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.fake_openai import FakeOpenAI, Fault, serving
from cli.support import command, environment, fail, run, running
from sagellm.bench import serve_client
from sagellm.bench.serve import Point, ServeOptions, ServeResult
from sagellm.bench.serve import run as measure
from sagellm.bench.serve_load import ClosedLoop, Load, OpenLoop
from sagellm.bench.workloads import QUERIES, WORKLOADS, Workload, choose
from sagellm.errors import InvalidArgumentError, UnavailableError, UnsupportedError

BENCH = "sagellm.bench"
SMALL = Workload(name="small", prompt_tokens=30, output_tokens=6, requests=6)


def bench(fake: FakeOpenAI, *workloads: Workload, **options: Any) -> ServeResult:
    with serving(fake) as url:
        return measure(ServeOptions(url=url, workloads=workloads or (SMALL,), **options))


def measured(fake: FakeOpenAI, result: ServeResult) -> list[dict[str, Any]]:
    """The requests of the measurement, without those before it."""
    count = sum(len(point.timings) for point in result.points)
    return fake.requests[-count:]


@pytest.mark.parametrize("tokenizer", ("words", "bytes"))
@pytest.mark.parametrize("endpoint", ("completions", "chat"))
def test_prompts_have_exactly_the_length_asked(tokenizer: Any, endpoint: Any) -> None:
    fake = FakeOpenAI(tokenizer=tokenizer)
    result = bench(fake, endpoint=endpoint)
    requests = measured(fake, result)
    assert len(requests) == 6
    assert [fake.count(body) for body in requests] == [30] * 6
    assert len({json.dumps(body) for body in requests}) == 6
    metrics = result.points[0].metrics
    assert (metrics.input_tokens, metrics.output_tokens) == (180, 36)
    assert (metrics.wrong_prompt_lengths, metrics.wrong_output_lengths) == (0, 0)
    assert all(len(timing.token_times) == 6 for timing in result.points[0].timings)


def test_no_measured_prompt_was_seen_before() -> None:
    fake = FakeOpenAI()
    result = bench(fake, warmup=3, loads=[ClosedLoop(concurrency=1), ClosedLoop(concurrency=2)])
    prompts = [body["prompt"] for body in fake.requests if body["max_tokens"] == 6]
    assert len(prompts) == len(set(prompts)) == 3 + 6 + 6
    again = bench(fake)
    assert again.seed != result.seed
    assert not set(prompts) & {body["prompt"] for body in measured(fake, again)}


def test_the_same_seed_asks_the_same() -> None:
    first, second = FakeOpenAI(), FakeOpenAI()
    bench(first, seed=5)
    bench(second, seed=5)
    assert first.requests == second.requests


def test_tokenize_replaces_forward_passes_where_it_agrees() -> None:
    without, agreeing = FakeOpenAI(), FakeOpenAI(has_tokenize=True)
    bench(without)
    bench(agreeing)
    assert agreeing.num_tokenized > 5
    assert len(agreeing.requests) < len(without.requests)


def test_a_tokenizer_without_pieces_of_one_token_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no text of an exact length"):
        bench(FakeOpenAI(tokenizer="pairs"))


def test_a_prompt_shorter_than_the_chat_template_is_refused() -> None:
    short = Workload(name="short", prompt_tokens=7, output_tokens=4)
    with pytest.raises(InvalidArgumentError, match="the server adds 7 to every prompt"):
        bench(FakeOpenAI(), short, endpoint="chat")


@pytest.mark.parametrize("endpoint", ("completions", "chat"))
def test_shared_prefix(endpoint: Any) -> None:
    fake = FakeOpenAI()
    workload = choose("shared-prefix", prompt_tokens=30, output_tokens=4, prefix_tokens=100)
    result = bench(fake, *workload, requests=3, endpoint=endpoint)
    requests = measured(fake, result)
    assert [fake.count(body) for body in requests] == [130] * 3
    assert result.points[0].metrics.wrong_prompt_lengths == 0
    if endpoint == "chat":
        assert len({body["messages"][0]["content"] for body in requests}) == 1
        assert len({body["messages"][1]["content"] for body in requests}) == 3
    else:
        words = [body["prompt"].split() for body in requests]
        assert len({tuple(prompt[:100]) for prompt in words}) == 1
        assert len({tuple(prompt[100:]) for prompt in words}) == 3


def test_multi_turn_holds_the_answers_of_the_server() -> None:
    fake = FakeOpenAI()
    workload = choose("multi-turn", prompt_tokens=20, output_tokens=4, turns=3)
    result = bench(fake, *workload, requests=1)
    first, second, third = (body["messages"] for body in measured(fake, result))
    assert second[:1] == first
    assert third[:3] == second
    assert second[1] == {"role": "assistant", "content": "a b c d "}
    assert [message["role"] for message in third] == [
        *("user", "assistant", "user", "assistant", "user")
    ]
    timings = result.points[0].timings
    assert [timing.prompt_tokens for timing in timings] == [20, 20 + 11 + 20, 20 + 2 * (11 + 20)]
    assert result.points[0].metrics.wrong_prompt_lengths == 0


def test_the_built_in_queries_run_as_named() -> None:
    expected = {
        **{"Q1": (32, 64, 5, 1), "Q2": (512, 128, 3, 1), "Q3": (128, 256, 3, 1)},
        **{"Q4": (256, 256, 3, 1), "Q5": (32, 64, 10, 10), "Q6": (512, 256, 10, 10)},
        **{"Q7": (256, 512, 3, 1), "Q8": (192, 128, 4, 4)},
    }
    assert choose("queries") == list(QUERIES)
    fake = FakeOpenAI()
    result = bench(fake, *QUERIES, warmup=0)
    for point in result.points:
        prompt, output, count, clients = expected.pop(point.workload.name)
        assert point.load == ClosedLoop(concurrency=clients)
        assert len(point.timings) == count
        assert {timing.prompt_tokens for timing in point.timings} == {prompt}
        assert {timing.output_tokens for timing in point.timings} == {output}
    assert not expected


def test_lengths_are_enforced_as_far_as_the_server_knows_how() -> None:
    both = FakeOpenAI(natural_length=3)
    result = bench(both)
    assert result.lengths_enforced_by == ("ignore_eos", "min_tokens")
    assert measured(both, result)[0]["min_tokens"] == 6
    assert result.points[0].metrics.output_tokens == 36

    one = bench(FakeOpenAI(natural_length=3, rejected=frozenset({"min_tokens"})))
    assert one.lengths_enforced_by == ("ignore_eos",)

    neither = bench(FakeOpenAI(natural_length=3, rejected=frozenset({"min_tokens", "ignore_eos"})))
    assert neither.lengths_enforced_by == ()
    metrics = neither.points[0].metrics
    assert (metrics.output_tokens, metrics.wrong_output_lengths) == (18, 6)


@pytest.mark.parametrize(
    "fake", (FakeOpenAI(usage=False), FakeOpenAI(rejected=frozenset({"stream_options"})))
)
def test_without_usage_in_the_stream_events_are_counted_and_it_says_so(fake: FakeOpenAI) -> None:
    result = bench(fake)
    metrics = result.points[0].metrics
    assert (metrics.output_tokens, metrics.tokens_counted_from) == (36, "events")
    assert metrics.input_tokens is None
    assert metrics.wrong_prompt_lengths == 6  # not confirmed is not right


@pytest.mark.parametrize(
    ("fault", "kind"),
    (
        ("busy", "rejected 429"),
        ("error", "http 500"),
        ("error event", "error event server_error"),
        ("garbage", "malformed event"),
        ("truncated", "truncated"),
        ("no stream", "no stream"),
        ("hang", "timeout"),
    ),
)
def test_failures_are_counted_by_kind(fault: Fault, kind: str) -> None:
    result = bench(FakeOpenAI(fault=fault), warmup=0, requests=2, timeout_s=0.5)
    metrics = result.points[0].metrics
    assert metrics.errors == {kind: 2}
    assert (metrics.completed, metrics.error_rate, metrics.ttft_ms) == (0, 1, None)
    assert metrics.rejected == (2 if fault == "busy" else 0)


def test_a_failed_warm_up_ends_the_run() -> None:
    with pytest.raises(UnavailableError, match="the warm-up of small failed: http 500: broken"):
        bench(FakeOpenAI(fault="error"))


def test_keys() -> None:
    assert bench(FakeOpenAI(api_key="secret"), api_key="secret").points[0].metrics.failed == 0
    with pytest.raises(UnavailableError, match=r"http 401.*give --api-key"):
        bench(FakeOpenAI(api_key="secret"), api_key="wrong")


@pytest.mark.parametrize(
    "load", (ClosedLoop(concurrency=3), OpenLoop(rate=500), OpenLoop(rate=500, arrival="fixed"))
)
def test_loads(load: Load) -> None:
    result = bench(FakeOpenAI(cached_tokens=4), loads=[load], requests=9)
    (point,) = result.points
    assert (point.metrics.completed, point.metrics.cached_tokens) == (9, 36)
    assert (point.metrics.client_late_ms is None) == isinstance(load, ClosedLoop)


def test_a_duration_alone_limits_the_requests() -> None:
    point = bench(FakeOpenAI(), duration_s=0.2, loads=[ClosedLoop(concurrency=2)]).points[0]
    assert point.metrics.completed > 2
    started = [timing.start for timing in point.timings]
    assert max(started) - min(started) < 0.2


METRICS = """\
# HELP process_resident_memory_bytes Resident set
process_resident_memory_bytes 104857600.0
vllm:prefix_cache_hits_total{{model="fake"}} {hits}
vllm:prefix_cache_queries_total{{model="fake"}} {queries}
sagellm:spec_accept_rate 0.7
"""


def clauses(point: Point) -> dict[str, str]:
    return {clause.name: clause.reason for clause in point.contract}


def test_a_contract_with_everything_measured_passes() -> None:
    result = bench(FakeOpenAI(metrics=METRICS), contract="year1")
    (point,) = result.points
    assert point.server.memory_mb == 100
    assert point.server.prefix_hit_rate == pytest.approx(0.9)
    assert set(clauses(point).values()) == {""}
    assert result.passed


def test_a_missing_figure_fails_its_clause() -> None:
    result = bench(FakeOpenAI(), contract="year3")
    reasons = clauses(result.points[0])
    assert not result.passed
    for name in ("memory, MB", "prefix hit rate", "speculation accepted"):
        assert reasons[name] == "not measured"
    failed = bench(FakeOpenAI(fault="busy"), contract="year1", warmup=0)
    reasons = clauses(failed.points[0])
    for name in ("TTFT, mean, ms", "TBT, mean, ms", "TPOT, mean, ms"):
        assert reasons[name] == "not measured"
    assert reasons["throughput, output tokens/s"] == "not measured"
    assert reasons["error rate"] == "out of bounds"


def test_names_and_sizes_of_workloads() -> None:
    assert [w.name for w in choose("q1, random,Q8")] == ["Q1", "random", "Q8"]
    for names, options, message in (
        ("Q9", {}, "known: queries, Q1"),
        ("", {}, "known: queries, Q1"),
        ("Q1", {"prompt_tokens": 5}, "Q1 has fixed sizes"),
        ("random", {"turns": 2}, "--turns is for"),
        ("multi-turn", {"prefix_tokens": 2}, "--prefix-tokens is for"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            choose(names, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="use --endpoint chat"):
        bench(FakeOpenAI(), WORKLOADS["multi-turn"], endpoint="completions")


OPTIONS = ("--prompt-tokens", "20", "--output-tokens", "5", "--requests", "4", "--warmup", "1")


def test_the_command_prints_one_json_object_and_writes_all_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "results"
    with serving(FakeOpenAI()) as url:
        printed = run(
            *("serve", "--url", f"{url}/v1", *OPTIONS, "--concurrency", "1,2", "--json"),
            *("--goodput", "ttft:60000", "--save", folder),
            module=BENCH,
        )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("\n") == 1
    shown = json.loads(printed.stdout)
    assert json.loads((folder / "result.json").read_text()) == shown
    assert [point["load"]["concurrency"] for point in shown["points"]] == [1, 2]
    for point in shown["points"]:
        metrics = point["metrics"]
        assert (metrics["completed"], metrics["output_tokens"]) == (4, 20)
        assert metrics["good_share"] == 1
        assert metrics["ttft_ms"]["p99"] >= metrics["ttft_ms"]["p50"] > 0
    for name in ("load-random.png", "distribution.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert "| random, 2 clients | 4 | 0 |" in text
    assert "![](load-random.png)" in text
    requests = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert [request["output_tokens"] for request in requests] == [5] * 8
    assert all(len(request["itl_s"]) == 4 for request in requests)


def test_tables_and_a_failing_contract() -> None:
    with serving(FakeOpenAI()) as url:
        shown = run("serve", "--url", url, *OPTIONS, "--contract", "year1", module=BENCH)
    assert shown.returncode == 1
    assert "FAIL: not measured" in shown.stdout
    assert "TPOT" in shown.stdout
    assert shown.stderr == ""


def test_ctrl_c_reports_what_is_complete(tmp_path: Path) -> None:
    fake = FakeOpenAI()
    with serving(fake) as url:
        line = command(
            "serve", "--url", url, *OPTIONS[:4], "--duration", "100", "--json", module=BENCH
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with running(line, env=environment(), **pipes) as process:
            while sum(body["max_tokens"] == 5 for body in list(fake.requests)) < 10:
                assert process.poll() is None
            fake.fault = "hang"
            assert fake.hanging.wait(60)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    shown = json.loads(output)
    assert shown["interrupted"]
    (point,) = shown["points"]
    assert point["metrics"]["completed"] >= 7
    assert point["metrics"]["unfinished"] == 1
    assert point["metrics"]["failed"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--url", "127.0.0.1:1"), "give the address of a server, such as http://"),
        (("--url", "http://127.0.0.1:1"), "is the server running? --serve MODEL starts one"),
        (("--url", "http://x", "--serve", "smollm2"), "give one of them"),
        (("--serve-args", "--port 1"), "are for the server of --serve"),
        (("--concurrency", "1", "--rate", "1"), "give one of them"),
        (("--concurrency", "1,x"), "--concurrency is '1,x'; give numbers above 0"),
        (("--concurrency", "0"), "give numbers above 0"),
        (("--rate", "-1"), "--rate is '-1'; give numbers above 0"),
        (("--rate", "inf"), "give requests per second above 0"),
        (("--arrival", "fixed"), "give --rate"),
        (("--rate", "1", "--burstiness", "2"), "shapes --arrival gamma"),
        (("--goodput", "x"), "such as ttft:200,tpot:20"),
        (("--workload", "Q9"), "known: queries"),
        (("--serve", "nosuch"), "`sagellm serve nosuch` ended with status"),
    ),
)
def test_wrong_options(options: tuple[str, ...], message: str) -> None:
    assert message in fail("serve", *options, module=BENCH)


def test_without_aiohttp_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[..., Any] = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name == "aiohttp":
            raise ImportError(name)
        return load(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'sagellm\[bench\]'"):
        serve_client.require_aiohttp()


def test_a_server_that_is_gone_is_a_failure_of_each_request() -> None:
    async def scenario() -> str:
        async with serve_client.Client("http://127.0.0.1:1") as client:
            failure = (await client.stream("/v1/completions", b"{}")).answer().failure
        assert failure is not None
        return failure.kind

    assert asyncio.run(scenario()) == "connect"
