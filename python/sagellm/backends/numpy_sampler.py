"""The sampling rule of `SamplingRow` in NumPy: oracle of the native sampler, and its stand-in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sagellm.backends.interface import SampledRow, SamplingRow
from sagellm.errors import InvalidArgumentError

_MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1): output ``position`` of the splitmix64 stream of ``seed``."""
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return (z >> 11) * 2.0**-53


def sample_rows(logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> tuple[SampledRow, ...]:
    """Chooses one token per row.

    Args:
        logits: ``[R, vocab]`` raw logits.
        rows: One rule per row of logits.

    Returns:
        One SampledRow per row; one whose logits are not finite, or that allows no token, carries
        an ``error``.

    Raises:
        InvalidArgumentError: The shapes disagree, or a parameter is outside its range.
    """
    if logits.ndim != 2 or len(logits) != len(rows):
        raise InvalidArgumentError(
            f"logits have shape {logits.shape}, {len(rows)} rows of [rows, vocab] are needed"
        )
    return tuple(_sample_row(x, row) for x, row in zip(logits, rows, strict=True))


def _sample_row(logits: NDArray[np.float32], row: SamplingRow) -> SampledRow:
    _validate(row, logits.size)
    if not np.isfinite(logits).all():
        return SampledRow(token_id=-1, error="logits are not finite")
    if row.forced_token >= 0:
        return _report(logits, row, row.forced_token)
    adjusted = _adjust(logits.astype(np.float32), row)
    largest = float(adjusted.max())
    if largest == -np.inf:
        return SampledRow(token_id=-1, error="no token is allowed")
    if not np.isfinite(largest):
        return SampledRow(token_id=-1, error="logits are not finite after bias and penalties")
    token_id = int(adjusted.argmax()) if row.temperature == 0 else _draw(adjusted, row)
    return _report(logits, row, token_id)


def _report(logits: NDArray[np.float32], row: SamplingRow, token_id: int) -> SampledRow:
    """The row of a token, with the log-probabilities that were asked for."""
    if row.num_logprobs < 0:
        return SampledRow(token_id=token_id)
    raw = logits.astype(np.float64)
    logprobs = raw - (raw.max() + np.log(np.exp(raw - raw.max()).sum()))
    top = np.argsort(-raw, kind="stable")[: row.num_logprobs]
    return SampledRow(
        token_id=token_id,
        logprob=float(logprobs[token_id]),
        top_ids=tuple(int(i) for i in top),
        top_logprobs=tuple(float(logprobs[i]) for i in top),
    )


def _has_penalties(row: SamplingRow) -> bool:
    return row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0


def _adjust(x: NDArray[np.float32], row: SamplingRow) -> NDArray[np.float32]:
    """Steps 1 to 4, each rounded to float32; ``x`` is modified."""
    with np.errstate(over="ignore"):
        if row.bias_ids is not None and row.bias_values is not None:
            np.add.at(x, row.bias_ids, row.bias_values)
        if row.history is not None and _has_penalties(row):
            used = np.unique(row.history)
            penalty = np.float32(row.repetition_penalty)
            x[used] = np.where(x[used] > 0, x[used] / penalty, x[used] * penalty)
            ids, counts = np.unique(row.history[row.prompt_length :], return_counts=True)
            subtract = (
                float(np.float32(row.presence_penalty))
                + float(np.float32(row.frequency_penalty)) * counts
            )
            x[ids] = (x[ids].astype(np.float64) - subtract).astype(np.float32)
    if row.allowed is not None:
        bits = np.unpackbits(row.allowed.view(np.uint8), bitorder="little")[: x.size]
        x[bits == 0] = -np.inf
    return x


def _draw(x: NDArray[np.float32], row: SamplingRow) -> int:
    """Steps 5 to 7 for a positive temperature."""
    order = np.argsort(-x, kind="stable")  # largest first, lowest id on a tie
    order = order[x[order] > -np.inf]
    if row.top_k > 0:
        order = order[: row.top_k]
    with np.errstate(over="ignore"):  # a temperature near 0 gives -inf, and the weight 0
        weights = np.exp((x.astype(np.float64) - float(x.max())) / row.temperature)
    if row.top_p < 1:
        total = np.cumsum(weights[np.sort(order)])[-1]
        count = int(np.searchsorted(np.cumsum(weights[order]), row.top_p * total, side="left")) + 1
        order = order[:count]
    if row.min_p > 0:
        order = order[weights[order] >= row.min_p]
    survivors = np.sort(order)
    cumulative = np.cumsum(weights[survivors])
    target = uniform(row.seed, row.position) * cumulative[-1]
    index = int(np.searchsorted(cumulative, target, side="right"))
    return int(survivors[min(index, survivors.size - 1)])


def _validate(row: SamplingRow, vocab: int) -> None:
    checks = (
        ("temperature", np.isfinite(row.temperature) and row.temperature >= 0, "finite and >= 0"),
        ("top_k", row.top_k >= 0, ">= 0 (0 turns it off)"),
        ("top_p", 0 < row.top_p <= 1, "in (0, 1]"),
        ("min_p", 0 <= row.min_p <= 1, "in [0, 1]"),
        (
            "repetition_penalty",
            np.isfinite(row.repetition_penalty) and row.repetition_penalty > 0,
            "finite and > 0",
        ),
        ("presence_penalty", np.isfinite(row.presence_penalty), "finite"),
        ("frequency_penalty", np.isfinite(row.frequency_penalty), "finite"),
        ("num_logprobs", row.num_logprobs >= -1, ">= -1"),
        ("forced_token", -1 <= row.forced_token < vocab, f"-1 or in [0, {vocab})"),
        ("prompt_length", row.prompt_length >= 0, ">= 0"),
    )
    for name, ok, rule in checks:
        if not ok:
            raise InvalidArgumentError(f"{name} is {getattr(row, name)}, must be {rule}")
    if row.history is None and _has_penalties(row):
        raise InvalidArgumentError("penalties need the token history")
    bias_ids = row.bias_ids if row.bias_ids is not None else np.empty(0, np.int32)
    bias_values = row.bias_values if row.bias_values is not None else np.empty(0, np.float32)
    if bias_ids.size != bias_values.size or not np.isfinite(bias_values).all():
        raise InvalidArgumentError("bias_values must hold one finite value per entry of bias_ids")
    if row.allowed is not None and row.allowed.size != -(-vocab // 32):
        raise InvalidArgumentError(
            f"allowed has {row.allowed.size} words, must have {-(-vocab // 32)}"
        )
    history = row.history if row.history is not None and _has_penalties(row) else bias_ids[:0]
    for name, ids in (("bias_ids", bias_ids), ("history", history)):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise InvalidArgumentError(f"{name} holds a token id outside [0, {vocab})")
