"""What comes out of a sequence: new text, the end of it, figures, and the protocol's events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sagellm.protocol import (
    Error,
    Metrics,
    Response,
    StreamEventDelta,
    StreamEventEnd,
    Timestamps,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from sagellm.backends.interface import SampledRow
    from sagellm.engine.request import Failure, RequestState, Sequence
    from sagellm.protocol import FinishReason, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a sequence ended, and all of its output.

    Attributes:
        timestamps: None if it ended without a token.
        matched_stop: The stop string or named stop token that ended it, if one did.
        prompt_logprobs: As in the request's first output.
    """

    reason: FinishReason
    text: str
    token_ids: list[int]
    logprobs: list[SampledRow]
    failure: Failure | None
    metrics: Metrics
    timestamps: Timestamps | None = None
    matched_stop: str | int | None = None
    prompt_logprobs: list[SampledRow | None] | None = None


@dataclass(slots=True, kw_only=True)  # not frozen: made for every streamed token
class SequenceOutput:
    """New output of one sequence after a step.

    Attributes:
        key: The request's id in the engine.
        index: Which completion.
        text, token_ids, logprobs: What is new, for streaming requests and at the end.
        num_prompt_tokens, num_cached_tokens: Length of the prompt, and how much was cached.
        finished: Set on the last output of the sequence.
        request_finished: This was the last output of the whole request.
        prompt_logprobs: One entry per prompt token, None for the first; on the first output of a
            request that asked for them.
    """

    key: int
    request: Request
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[SampledRow] = field(default_factory=list)
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    finished: Finished | None = None
    request_finished: bool = False
    prompt_logprobs: list[SampledRow | None] | None = None


def output_of(sequence: Sequence, text: str, finished: Finished | None = None) -> SequenceOutput:
    """The next output of a sequence: what was not sent before."""
    sent = sequence.num_sent_tokens
    sequence.num_sent_tokens = len(sequence.output_tokens)
    scores, prompt_logprobs = sequence.state.scores, None
    if scores is not None and not scores.is_sent:
        scores.is_sent = True
        prompt_logprobs = scored(sequence.state)
    return SequenceOutput(
        key=sequence.state.key,
        request=sequence.state.request,
        index=sequence.index,
        text=text,
        token_ids=sequence.output_tokens[sent:],
        logprobs=sequence.logprobs[sent:],
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=sequence.num_cached,
        finished=finished,
        request_finished=finished is not None and sequence.state.num_unfinished == 0,
        prompt_logprobs=prompt_logprobs,
    )


def scored(state: RequestState) -> list[SampledRow | None] | None:
    """The prompt's log-probabilities, if they were asked for and are all there."""
    return state.scores.rows if state.scores is not None and state.scores.is_complete else None


def delta_of(output: SequenceOutput) -> StreamEventDelta | None:
    """The delta event of an output, None when it brings nothing new."""
    if not output.text and not output.token_ids:
        return None
    request = output.request
    return StreamEventDelta(
        request_id=request.request_id,
        trace_id=request.trace_id,
        chunk=output.text,
        chunk_tokens=output.token_ids,
        index=output.index,
        chunk_logprobs=_logprobs(request, output.logprobs),
    )


def end_of(output: SequenceOutput) -> StreamEventEnd:
    """The end event of a finished output."""
    return StreamEventEnd(**_outcome(output))


def response_of(output: SequenceOutput) -> Response:
    """The whole answer of a finished output."""
    return Response(**_outcome(output))


def _outcome(output: SequenceOutput) -> dict[str, Any]:
    """The fields that an answer and an end event share."""
    finished, request = output.finished, output.request
    assert finished is not None
    return {
        "request_id": request.request_id,
        "trace_id": request.trace_id,
        "output_text": finished.text,
        "output_tokens": finished.token_ids,
        "finish_reason": finished.reason,
        "metrics": finished.metrics,
        "error": None if finished.failure is None else error_of(finished.failure),
        "index": output.index,
        "logprobs": _logprobs(request, finished.logprobs),
        "prompt_logprobs": (
            None
            if finished.prompt_logprobs is None
            else [None if row is None else _token_logprobs(row) for row in finished.prompt_logprobs]
        ),
        "prompt_tokens": output.num_prompt_tokens,
        "cached_tokens": output.num_cached_tokens,
        "timestamps": finished.timestamps,
        "matched_stop": finished.matched_stop,
    }


def error_of(failure: Failure) -> Error:
    """The protocol's form of a failure."""
    return Error(code=failure.code, message=failure.message, retryable=failure.retryable)


def _logprobs(request: Request, rows: list[SampledRow]) -> list[TokenLogprobs] | None:
    if request.sampling.logprobs is None:
        return None
    return [_token_logprobs(row) for row in rows]


def _token_logprobs(row: SampledRow) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=row.token_id,
        logprob=0.0 if row.logprob is None else row.logprob,
        top_ids=list(row.top_ids),
        top_logprobs=list(row.top_logprobs),
    )


def stages(sequence: Sequence) -> Timestamps | None:
    """When a sequence passed each stage; None without a token."""
    state, first, last = sequence.state, sequence.first_token_at, sequence.last_token_at
    if state.scheduled_at is None or first is None or last is None:
        return None
    return Timestamps(
        queued_at=state.queued_at,
        scheduled_at=state.scheduled_at,
        executed_at=first,
        completed_at=last,
    )


def measure(
    sequence: Sequence, *, now: float, bytes_per_block: int, peak_mem_mb: int, caching: bool
) -> Metrics:
    """The figures of a sequence that ends now.

    With one output token there is no pace after the first: ``tpot_ms`` is then the time from
    admission to that token. Without any, ``ttft_ms`` and ``tpot_ms`` are the time to the answer.
    """
    state, count = sequence.state, len(sequence.output_tokens)
    first = now if sequence.first_token_at is None else sequence.first_token_at
    last = now if sequence.last_token_at is None else sequence.last_token_at
    began = state.queued_at if state.scheduled_at is None or count == 0 else state.scheduled_at
    pace = (last - first) / (count - 1) if count > 1 else last - began
    elapsed = now - state.queued_at
    ran = state.scheduled_at is not None
    return Metrics(
        ttft_ms=max(0.0, (first - state.queued_at) * 1000.0),
        tbt_ms=max(0.0, pace * 1000.0) if count > 1 else None,
        tpot_ms=max(0.0, pace * 1000.0),
        throughput_tps=count / elapsed if elapsed > 0 else 0.0,
        peak_mem_mb=peak_mem_mb,
        error_rate=0.0 if sequence.failure is None else 1.0,
        kv_used_tokens=sequence.peak_tokens if ran else None,
        kv_used_bytes=sequence.peak_blocks * bytes_per_block if ran else None,
        prefix_hit_rate=(
            sequence.num_cached / sequence.num_prompt_tokens if ran and caching else None
        ),
        evict_count=sequence.num_preemptions if ran else None,
        spec_accept_rate=sequence.num_accepted / sequence.num_drafted
        if sequence.num_drafted
        else None,
    )
