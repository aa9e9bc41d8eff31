"""Protocol types accept what v0.1 allows and reject everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from sagellm.protocol import (
    LIMITS,
    Error,
    ErrorCode,
    KVAllocateParams,
    KVDType,
    KVHandle,
    KVLayout,
    KVMigrateParams,
    Message,
    Metrics,
    Request,
    Response,
    ResponseFormat,
    SamplingParams,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    Timestamps,
)

REQUEST: dict[str, Any] = {
    "request_id": "r",
    "trace_id": "t",
    "model": "m",
    "prompt": "p",
    "max_tokens": 1,
    "stream": False,
}
METRICS: dict[str, Any] = {
    "ttft_ms": 1.0,
    "tbt_ms": 1.0,
    "throughput_tps": 1.0,
    "peak_mem_mb": 1,
    "error_rate": 0.0,
}
OUTCOME: dict[str, Any] = {
    "request_id": "r",
    "trace_id": "t",
    "output_text": "",
    "output_tokens": [],
    "finish_reason": "stop",
    "metrics": Metrics(**METRICS),
}
STAMPS: dict[str, Any] = {
    "queued_at": 1.0,
    "scheduled_at": 2.0,
    "executed_at": 4.0,
    "completed_at": 8.0,
}
ALLOCATE: dict[str, Any] = {
    "request_id": "r",
    "num_tokens": 1,
    "kv_dtype": KVDType.FP16,
    "layout": KVLayout.BSHD,
    "block_size": 16,
}
HANDLE: dict[str, Any] = {
    "handle_id": "h",
    "request_id": "r",
    "num_tokens": 0,
    "device": "cuda:0",
}
VALID: list[tuple[type[Any], dict[str, Any]]] = [
    (Request, REQUEST),
    (Metrics, METRICS),
    (Response, OUTCOME),
    (StreamEventStart, {"request_id": "r", "trace_id": "t"}),
    (
        StreamEventDelta,
        {"request_id": "r", "trace_id": "t", "chunk": "", "chunk_tokens": []},
    ),
    (StreamEventEnd, OUTCOME),
    (Error, {"code": ErrorCode.UNAVAILABLE, "message": "m"}),
    (Timestamps, STAMPS),
    (KVAllocateParams, ALLOCATE),
    (KVHandle, HANDLE),
    (KVMigrateParams, {"kv_handle": KVHandle(**HANDLE), "target_device": "cpu"}),
    (SamplingParams, {}),
    (Message, {"role": "user", "content": "c"}),
    (ResponseFormat, {"type": "text"}),
]

not_finite = st.sampled_from([math.nan, math.inf, -math.inf])


def rejects(kind: type[Any], values: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        kind(**{**values, **changes})
    return str(caught.value)


@pytest.mark.parametrize(("kind", "values"), VALID)
def test_round_trip_through_json(kind: type[Any], values: dict[str, Any]) -> None:
    value = kind(**values)
    assert kind.model_validate_json(value.model_dump_json()) == value


@pytest.mark.parametrize(("kind", "values"), VALID)
def test_unknown_field_is_rejected(kind: type[Any], values: dict[str, Any]) -> None:
    assert "extra_forbidden" in rejects(kind, values, surprise=1)


@pytest.mark.parametrize(("kind", "values"), VALID)
def test_required_fields_have_no_implied_default(kind: type[Any], values: dict[str, Any]) -> None:
    for name in values:
        if kind.model_fields[name].is_required():
            rest = {key: value for key, value in values.items() if key != name}
            assert "Field required" in rejects(kind, rest)


@pytest.mark.parametrize(("kind", "values"), VALID)
@given(bad=not_finite)
def test_no_float_field_takes_nan_or_infinity(
    kind: type[Any], values: dict[str, Any], bad: float
) -> None:
    for name, field in kind.model_fields.items():
        if "float" in str(field.annotation):
            rejects(kind, values, **{name: bad})


@pytest.mark.parametrize(("kind", "values"), VALID)
def test_numbers_are_not_read_from_strings_or_booleans(
    kind: type[Any], values: dict[str, Any]
) -> None:
    for name, field in kind.model_fields.items():
        if name == "matched_stop":
            continue  # a string or a token id
        if "float" in str(field.annotation) or "int" in str(field.annotation):
            rejects(kind, values, **{name: "1"})
            rejects(kind, values, **{name: True})


@pytest.mark.parametrize(("kind", "values"), VALID)
def test_identifiers_are_not_empty(kind: type[Any], values: dict[str, Any]) -> None:
    for name in ("request_id", "trace_id", "model", "handle_id", "device", "target_device"):
        if name in kind.model_fields:
            rejects(kind, values, **{name: ""})


def test_values_are_immutable() -> None:
    request = Request(**REQUEST)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(request, "max_tokens", 0)  # noqa: B010


@given(value=st.one_of(st.integers(max_value=0), st.floats(), st.text()))
def test_max_tokens_rejects_all_but_positive_integers(value: Any) -> None:
    rejects(Request, REQUEST, max_tokens=value)


@given(value=st.floats(min_value=0, max_value=2, exclude_min=True))
def test_temperature_accepts_its_range(value: float) -> None:
    assert Request(**REQUEST, temperature=value).temperature == value


@given(value=st.one_of(st.floats(max_value=0), st.floats(min_value=2, exclude_min=True)))
def test_temperature_rejects_outside_its_range(value: float) -> None:
    rejects(Request, REQUEST, temperature=value)


@given(value=st.one_of(st.floats(max_value=0), st.floats(min_value=1, exclude_min=True)))
def test_top_p_rejects_outside_its_range(value: float) -> None:
    rejects(Request, REQUEST, top_p=value)


def test_integer_is_accepted_for_a_float_field() -> None:
    assert Request(**REQUEST, temperature=1).temperature == 1.0


@pytest.mark.parametrize("name", ["kv_budget_tokens", "deadline_ms"])
def test_budgets_are_positive(name: str) -> None:
    rejects(Request, REQUEST, **{name: 0})


def test_empty_prompt_passes_the_schema() -> None:
    assert Request(**{**REQUEST, "prompt": ""}).prompt == ""


def test_messages_exclude_a_prompt() -> None:
    turns = [Message(role="user", content="hi")]
    assert Request(**{**REQUEST, "prompt": ""}, messages=turns).messages == turns
    assert "exclude each other" in rejects(Request, REQUEST, messages=turns)
    rejects(Request, {**REQUEST, "prompt": ""}, messages=[])


def test_metadata_comes_back_untouched() -> None:
    metadata = {"a": [1, 2.5, None, {"b": "c"}], "d": True}
    assert Request(**REQUEST, metadata=metadata).metadata == metadata


@given(bad=not_finite)
def test_metadata_holds_no_nan_or_infinity(bad: float) -> None:
    rejects(Request, REQUEST, metadata={"a": [{"b": bad}]})


def test_message_without_content_needs_tool_calls() -> None:
    rejects(Message, {"role": "assistant", "content": None})
    rejects(Message, {"role": "user", "content": None, "tool_calls": [{}]})
    assert Message(role="assistant", content=None, tool_calls=[{"id": "1"}])


def test_metrics_need_tbt_or_tpot() -> None:
    rest = {key: value for key, value in METRICS.items() if key != "tbt_ms"}
    assert "tbt_ms and tpot_ms" in rejects(Metrics, rest)
    assert Metrics(**rest, tpot_ms=0).tbt_ms is None


@pytest.mark.parametrize("name", ["error_rate", "prefix_hit_rate", "spec_accept_rate"])
@given(value=st.one_of(st.floats(min_value=1, exclude_min=True), st.floats(max_value=-1e-9)))
def test_ratios_stay_between_0_and_1(name: str, value: float) -> None:
    rejects(Metrics, METRICS, **{name: value})


@pytest.mark.parametrize(
    "name",
    [
        "ttft_ms",
        "tbt_ms",
        "tpot_ms",
        "throughput_tps",
        "peak_mem_mb",
        "kv_used_tokens",
        "kv_used_bytes",
        "evict_count",
        "evict_ms",
    ],
)
def test_metrics_are_not_negative(name: str) -> None:
    rejects(Metrics, METRICS, **{name: -1})


def test_unmeasured_metrics_are_none() -> None:
    optional = [n for n, f in Metrics.model_fields.items() if not f.is_required()]
    metrics = Metrics(**METRICS)
    assert all(getattr(metrics, name) is None for name in optional if name != "tbt_ms")


@pytest.mark.parametrize("kind", [Response, StreamEventEnd])
def test_error_is_set_exactly_when_the_request_failed(kind: type[Any]) -> None:
    error = Error(code=ErrorCode.UNAVAILABLE, message="backend gone; restart it")
    assert kind(**{**OUTCOME, "finish_reason": "error"}, error=error).error == error
    rejects(kind, OUTCOME, finish_reason="error")
    rejects(kind, OUTCOME, error=error)
    rejects(kind, OUTCOME, finish_reason="cancelled")


def test_stream_event_is_told_apart_by_its_tag() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(StreamEvent)
    head = {"request_id": "r", "trace_id": "t"}
    assert isinstance(adapter.validate_python({"event": "start", **head}), StreamEventStart)
    delta = {"event": "delta", **head, "chunk": "a", "chunk_tokens": [1]}
    assert isinstance(adapter.validate_python(delta), StreamEventDelta)
    for bad in ({**delta, "event": "start"}, {**delta, "event": "other"}, head):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_argument", 400),
        ("resource_exhausted", 429),
        ("unavailable", 503),
        ("deadline_exceeded", 504),
        ("not_implemented", 501),
    ],
)
def test_error_codes_have_their_http_status(code: str, status: int) -> None:
    assert Error(code=code, message="m").code.http_status == status  # type: ignore[arg-type]


def test_every_error_code_has_an_http_status() -> None:
    assert all(code.http_status >= 400 for code in ErrorCode)


def test_timestamps_derive_durations_in_milliseconds() -> None:
    stamps = Timestamps(**STAMPS)
    assert stamps.ttft_ms == 3000
    assert stamps.engine_ttft_ms == 2000
    assert stamps.queue_ms == 1000
    assert stamps.total_time_ms == 7000


@given(times=st.lists(st.floats(0, 1e10), min_size=4, max_size=4).filter(lambda t: t != sorted(t)))
def test_timestamps_out_of_order_are_rejected(times: list[float]) -> None:
    rejects(Timestamps, dict(zip(STAMPS, times, strict=True)))


@pytest.mark.parametrize("device", ["CUDA:0", "cuda:", "cuda:x", "cpu ", "0"])
def test_malformed_device_is_rejected(device: str) -> None:
    rejects(KVHandle, HANDLE, device=device)


def test_kv_enums_read_their_wire_names_only() -> None:
    assert KVAllocateParams(**{**ALLOCATE, "kv_dtype": "int8"}).kv_dtype is KVDType.INT8
    rejects(KVAllocateParams, ALLOCATE, kv_dtype="fp32")
    rejects(KVAllocateParams, ALLOCATE, layout="BSHD")


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": LIMITS.repetition_penalty + 1},
        {"presence_penalty": LIMITS.additive_penalty + 0.1},
        {"frequency_penalty": -LIMITS.additive_penalty - 0.1},
        {"stop": [""]},
        {"stop": ["a" * (LIMITS.stop_string_chars + 1)]},
        {"stop": ["a"] * (LIMITS.stop_strings + 1)},
        {"stop": "a"},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [2**31]},
        {"stop_token_ids": [1] * (LIMITS.stop_token_ids + 1)},
        {"seed": -1},
        {"seed": 2**64},
        {"logprobs": -1},
        {"logprobs": LIMITS.logprobs + 1},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {"1": 0.0}},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": dict.fromkeys(range(LIMITS.logit_bias_entries + 1), 0.0)},
        {"n": 0},
        {"n": LIMITS.n + 1},
        {"ignore_eos": 1},
        {"prompt_logprobs": -1},
        {"prompt_logprobs": LIMITS.logprobs + 1},
        {"skip_special_tokens": 0},
        {"min_tokens": -1},
    ],
)
def test_sampling_bounds(change: dict[str, Any]) -> None:
    rejects(SamplingParams, {}, **change)


def test_sampling_reads_token_ids_from_json_keys() -> None:
    params = SamplingParams.model_validate_json('{"logit_bias": {"5": 1.5}}')
    assert params.logit_bias == {5: 1.5}


def test_response_format_has_a_schema_exactly_when_it_needs_one() -> None:
    assert ResponseFormat(type="json_schema", json_schema={"type": "object"})
    rejects(ResponseFormat, {"type": "json_schema"})
    rejects(ResponseFormat, {"type": "text", "json_schema": {}})
    rejects(ResponseFormat, {"type": "json_schema", "json_schema": {"a": object()}})
    rejects(ResponseFormat, {"type": "json_schema", "json_schema": {"a": math.inf}})
    huge = {"description": "x" * LIMITS.schema_bytes}
    rejects(ResponseFormat, {"type": "json_schema", "json_schema": huge})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("regex", "regex", "a+"), ("choice", "choices", ["a"]), ("lark", "grammar", 'start: "a"')],
)
def test_response_format_has_the_field_of_its_type_and_no_other(
    kind: str, field: str, value: Any
) -> None:
    assert getattr(ResponseFormat(**{"type": kind, field: value}), field) == value
    assert field in rejects(ResponseFormat, {"type": kind})
    assert field in rejects(ResponseFormat, {"type": "json_object", field: value})
    rejects(ResponseFormat, {"type": kind, field: value, "json_schema": {}})
    empty = value[:0]
    rejects(ResponseFormat, {"type": kind, field: empty})
    long = "x" * (LIMITS.grammar_bytes + 1)
    large = [long] if isinstance(value, list) else long
    assert "bytes" in rejects(ResponseFormat, {"type": kind, field: large})
    surrogate = ["\ud800"] if isinstance(value, list) else "\ud800"
    rejects(ResponseFormat, {"type": kind, field: surrogate})


def test_choices_are_limited_in_number_and_not_empty() -> None:
    rejects(ResponseFormat, {"type": "choice", "choices": ["a"] * (LIMITS.choices + 1)})
    rejects(ResponseFormat, {"type": "choice", "choices": ["a", ""]})
