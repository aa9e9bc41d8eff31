"""Rotary frequencies: the one place where linear, llama3 and yarn scaling are computed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> tuple[NDArray[np.float64], float]:
    """Angles per position of every rotated pair.

    Returns:
        ``(inv_freq, attention_factor)``: radians per position, float64 ``[dim / 2]``, and the
        number that multiplies cos and sin.
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    inv_freq = rope.theta**-exponents
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif rope.kind == "yarn":
        inv_freq = _yarn(inv_freq, rope)
    if rope.freq_factors:
        inv_freq = inv_freq / np.asarray(rope.freq_factors, dtype=np.float64)
    return inv_freq, rope.attention_factor


def yarn_attention_factor(factor: float) -> float:
    """The factor on cos and sin that the YaRN paper recommends for an extension by ``factor``."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _llama3(inv_freq: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    """Divides low frequencies by the factor, keeps high ones, blends between the limits."""
    turns = rope.original_max_position * inv_freq / (2.0 * math.pi)  # over the original context
    band = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((turns - rope.low_freq_factor) / band, 0.0, 1.0)
    return (1.0 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(inv_freq: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    """Interpolates slow pairs, keeps fast ones, with a ramp over the pair index between."""

    def pair_index(turns: float) -> float:
        """The (fractional) pair that makes ``turns`` rotations over the original context."""
        context = rope.original_max_position / (turns * 2.0 * math.pi)
        return rope.dim * math.log(context) / (2.0 * math.log(rope.theta))

    low = max(math.floor(pair_index(rope.beta_fast)), 0)
    high = min(math.ceil(pair_index(rope.beta_slow)), rope.dim - 1)
    ramp = (np.arange(rope.dim // 2) - low) / max(high - low, 0.001)
    slow = np.clip(ramp, 0.0, 1.0)
    return slow * inv_freq / rope.factor + (1.0 - slow) * inv_freq
