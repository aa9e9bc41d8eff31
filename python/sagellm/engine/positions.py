"""What the model computes at every position of one sequence: logits or hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from sagellm.backends.interface import ForwardBatch
from sagellm.errors import ResourceExhaustedError, UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.backends.interface import ModelRunner
    from sagellm.kv.interface import KvCache

Wanted: TypeAlias = Literal["logits", "hidden"]

_MAX_LOGIT_ROWS = 128  # of one step when every row's logits are wanted


def read_positions(
    runner: ModelRunner,
    kv: KvCache,
    sequence_id: int,
    tokens: NDArray[np.int32],
    chunk_tokens: int,
    wanted: Wanted,
) -> NDArray[np.float32]:
    """Computes a sequence through ordinary paged steps; its blocks are free again afterwards.

    Args:
        runner: The model.
        kv: Its KV cache.
        sequence_id: Not in use.
        tokens: At least one.
        chunk_tokens: Most tokens of one step.
        wanted: ``logits`` (``[tokens, vocab]``), or ``hidden`` after the final norm
            (``[tokens, hidden]``).

    Raises:
        ResourceExhaustedError: The KV pool has no room for them now.
        UnsupportedError: The device does not give them out.
    """
    chunk = min(chunk_tokens, _MAX_LOGIT_ROWS) if wanted == "logits" else chunk_tokens
    parts: list[NDArray[np.float32]] = []
    kv.add(sequence_id)
    try:
        for start in range(0, len(tokens), chunk):
            stop = min(start + chunk, len(tokens))
            parts.append(_read_chunk(runner, kv, sequence_id, tokens, range(start, stop), wanted))
    finally:
        kv.release(sequence_id)
    return np.concatenate(parts)


def _read_chunk(
    runner: ModelRunner,
    kv: KvCache,
    sequence_id: int,
    tokens: NDArray[np.int32],
    span: range,
    wanted: Wanted,
) -> NDArray[np.float32]:
    if not kv.reserve(sequence_id, span.stop):
        raise ResourceExhaustedError(
            f"the KV pool has no room for {span.stop} tokens now; wait for other requests, or "
            "raise kv_cache_gb"
        )
    batch = ForwardBatch(
        token_ids=tokens[span.start : span.stop],
        positions=np.arange(span.start, span.stop, dtype=np.int32),
        query_starts=np.array([0, len(span)], dtype=np.int32),
        block_tables=kv.block_tables([sequence_id]),
        block_copies=kv.take_copies(),
        logit_rows=np.arange(len(span), dtype=np.int32),
    )
    output = runner.step(batch, return_logits=wanted == "logits", return_hidden=wanted == "hidden")
    values = output.logits if wanted == "logits" else output.hidden
    if values is None:
        raise UnsupportedError(f"device {runner.device} does not return {wanted}")
    kv.commit(sequence_id, tokens, span.stop)
    return values
