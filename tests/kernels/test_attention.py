"""Paged attention and KV writes of every instruction set: float64 and bitwise invariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from sagellm import _core
from sagellm.errors import InvalidArgumentError, UnsupportedError

kernels = _core.kernels
Floats = NDArray[np.float32]
SPLIT = 512
DTYPES = ("bf16", "int8")


def _runnable(isa: str) -> bool:
    try:
        kernels.add(isa, np.zeros(1, np.float32), np.zeros(1, np.float32))
    except UnsupportedError:
        return False
    return True


ISAS = [isa for isa in ("generic", "avx2", "avx512", "avx512_bf16") if _runnable(isa)]


def tolerance(isa: str, dtype: str) -> float:
    """Largest difference from float64 over the same stored K and V.

    avx512_bf16 rounds q and weights to bfloat16 over bf16 pages; over int8 pages every SIMD path
    rounds them to 16-bit codes.
    """
    if dtype == "int8":
        return 2e-5 if isa == "generic" else 4e-4
    return 8e-3 if isa == "avx512_bf16" else 2e-5


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: NDArray[np.uint16]) -> Floats:
    return (x.astype(np.uint32) << 16).view(np.float32)


def codes(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """int8 codes [tokens, head_dim] and scales [tokens], by the rule in kernels/params.h."""
    largest = np.abs(x).max(axis=-1)
    inverse = np.float32(127) / largest
    scaled: Floats = np.rint(x * inverse[:, None])
    return scaled.astype(np.int8), largest / np.float32(127)


def stored(x: Floats, dtype: str) -> Floats:
    """What the pages hold of K or V."""
    if dtype == "bf16":
        return from_bf16(to_bf16(x))
    q, scale = codes(x)
    return q * scale[:, None]


@dataclass(slots=True, kw_only=True)
class PagedSequence:
    """One sequence in a pool full of NaN, two kv heads, blocks in random order."""

    k: Floats  # [tokens, head_dim]
    v: Floats
    pool: NDArray[np.uint16] | NDArray[np.int8]  # the element type is the KV dtype
    table: NDArray[np.int32]
    geometry: dict[str, int]

    @classmethod
    def random(
        cls, *, tokens: int, head_dim: int, block_size: int, seed: int, dtype: str = "bf16"
    ) -> PagedSequence:
        rng = np.random.default_rng(seed)
        page = 2 * block_size * head_dim + (8 * block_size if dtype == "int8" else 0)
        blocks = -(-tokens // block_size)
        table = rng.permutation(blocks + 3)[:blocks].astype(np.int32)
        k, v = rng.standard_normal((2, tokens, head_dim)).astype(np.float32)
        geometry = {
            "kv_head": 1,
            "block_stride": 2 * page + 32,
            "head_stride": page,
            "block_size": block_size,
        }
        pool = np.full((blocks + 3) * (2 * page + 32), -1, np.int8 if dtype == "int8" else np.int16)
        if dtype == "bf16":
            pool = pool.view(np.uint16)
        return cls(k=k, v=v, pool=pool, table=table, geometry=geometry)

    def write(self, isa: str, begin: int = 0, end: int | None = None) -> PagedSequence:
        kernels.kv_write(
            isa,
            self.pool,
            self.table,
            self.k[begin:end],
            self.v[begin:end],
            first_position=begin,
            **self.geometry,
        )
        return self

    def attend(self, isa: str, q: Floats, first: int, **options: Any) -> tuple[Floats, ...]:
        options.setdefault("splits", (0, (first + len(q) - 1) // SPLIT + 1))
        state: tuple[Floats, ...] = kernels.attention(
            isa, q, self.pool, self.table, first_position=first, **self.geometry, **options
        )
        return state


def finish(isa: str, *states: tuple[Floats, ...]) -> Floats:
    m, total, acc = (np.stack([s[i] for s in states]) for i in range(3))
    out: Floats = kernels.attention_finish(isa, m, total, acc)
    return out


def reference(
    q: Floats, k: Floats, v: Floats, first: int, scale: float, window: int = 0, softcap: float = 0.0
) -> NDArray[np.float64]:
    """[tokens * group, head_dim] in float64."""
    tokens, group, head_dim = q.shape
    out = np.zeros((tokens, group, head_dim))
    for t in range(tokens):
        end = first + t + 1
        begin = max(0, end - window) if window else 0
        s = q[t].astype(np.float64) @ k[begin:end].T.astype(np.float64) * scale
        if softcap:
            s = softcap * np.tanh(s / softcap)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        out[t] = (p / p.sum(axis=1, keepdims=True)) @ v[begin:end]
    return out.reshape(-1, head_dim)


def queries(tokens: int, group: int, head_dim: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((tokens, group, head_dim)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_decode_matches_float64(isa: str, head_dim: int, group: int, dtype: str) -> None:
    scale = head_dim**-0.5
    for context, block_size in (
        (1, 16),
        (15, 32),
        (17, 16),
        (64, 64),
        (65, 32),
        (513, 64),
        (700, 48),
    ):
        seq = PagedSequence.random(
            tokens=context, head_dim=head_dim, block_size=block_size, seed=context, dtype=dtype
        ).write(isa)
        q = queries(1, group, head_dim)
        out = finish(isa, seq.attend(isa, q, context - 1, scale=scale))
        exact = reference(q, stored(seq.k, dtype), stored(seq.v, dtype), context - 1, scale)
        np.testing.assert_allclose(out, exact, atol=tolerance(isa, dtype), rtol=0)
        unrounded = reference(q, seq.k, seq.v, context - 1, scale)
        # A lone token shows the rounding of V itself, up to 2^-9 of a value of 3 or 4.
        atol = (5e-3 if context > 64 else 2e-2) * (2 if dtype == "int8" else 1)
        np.testing.assert_allclose(out, unrounded, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("window", "softcap"),
    [(0, 0.0), (1, 0.0), (20, 0.0), (64, 0.0), (100, 0.0), (0, 5.0), (33, 50.0)],
)
@pytest.mark.parametrize(("group", "tokens"), [(1, 32), (3, 10), (4, 8), (7, 4)])
def test_prefill_tile_matches_float64(
    isa: str, group: int, tokens: int, window: int, softcap: float, dtype: str
) -> None:
    head_dim, scale = 64, 0.2
    for first in (0, 5, 50, 63, 500, 1020):
        seq = PagedSequence.random(
            tokens=first + tokens, head_dim=head_dim, block_size=32, seed=7, dtype=dtype
        )
        seq.write(isa)
        q = queries(tokens, group, head_dim)
        state = seq.attend(isa, q, first, scale=scale, window=window, softcap=softcap)
        k, v = stored(seq.k, dtype), stored(seq.v, dtype)
        exact = reference(q, k, v, first, scale, window, softcap)
        atol = tolerance(isa, dtype) * (2 if isa == "avx512_bf16" else 1)  # larger scores
        np.testing.assert_allclose(finish(isa, state), exact, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (37, 0.0), (0, 30.0)])
@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 64), (2, 80), (3, 64), (4, 256), (5, 96), (7, 64)]
)
def test_row_is_bitwise_the_same_alone_and_in_a_tile(
    isa: str, group: int, head_dim: int, window: int, softcap: float, dtype: str
) -> None:
    tokens = max(1, 32 // group)
    for first in (0, 45, 498):
        seq = PagedSequence.random(
            tokens=first + tokens, head_dim=head_dim, block_size=16, seed=first, dtype=dtype
        )
        q = queries(tokens, group, head_dim)
        options: dict[str, Any] = {"scale": 0.1, "window": window, "softcap": softcap}
        # Alone, as while decoding: the pool still holds NaN where later tokens will be.
        seq.write(isa, 0, first)
        alone = []
        for t in range(tokens):
            seq.write(isa, first + t, first + t + 1)
            alone.append(seq.attend(isa, q[t : t + 1], first + t, **options))
        tile = seq.attend(isa, q, first, **options)
        for part, name in enumerate(("m", "l", "acc")):
            joined = np.concatenate([a[part] for a in alone])
            assert joined.tobytes() == tile[part].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_later_tokens_cannot_disturb_a_row_even_when_not_finite(isa: str, dtype: str) -> None:
    head_dim, first, tokens = 64, 60, 6
    q = queries(tokens, 2, head_dim)
    seq = PagedSequence.random(
        tokens=first + tokens, head_dim=head_dim, block_size=16, seed=3, dtype=dtype
    )
    clean = seq.write(isa).attend(isa, q, first, scale=0.125)
    seq.k[first + 3 :] = np.nan
    seq.v[first + 3 :] = np.inf
    dirty = seq.write(isa).attend(isa, q, first, scale=0.125)
    assert clean[2][:6].tobytes() == dirty[2][:6].tobytes()  # tokens 0 to 2, two heads each
    assert np.isnan(dirty[2][6:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 600])
def test_split_calls_merge_to_the_bits_of_one_call(isa: str, window: int, dtype: str) -> None:
    head_dim, group, context = 64, 3, 1600
    seq = PagedSequence.random(
        tokens=context, head_dim=head_dim, block_size=64, seed=11, dtype=dtype
    ).write(isa)
    q = queries(1, group, head_dim)
    options: dict[str, Any] = {"scale": 0.5, "window": window}
    whole = seq.attend(isa, q, context - 1, **options)
    parts = [seq.attend(isa, q, context - 1, splits=(s, s + 1), **options) for s in range(4)]
    assert finish(isa, whole).tobytes() == finish(isa, *parts).tobytes()
    if window:
        assert (parts[0][1] == 0).all()  # nothing visible there


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_tile_across_a_split_boundary_equals_its_rows(isa: str, dtype: str) -> None:
    seq = PagedSequence.random(tokens=530, head_dim=128, block_size=16, seed=5, dtype=dtype).write(
        isa
    )
    q = queries(30, 1, 128)
    tile = finish(isa, seq.attend(isa, q, 500, scale=0.3))
    for t in range(30):
        assert (
            finish(isa, seq.attend(isa, q[t : t + 1], 500 + t, scale=0.3)).tobytes()
            == tile[t].tobytes()
        )


@pytest.mark.parametrize("isa", ISAS)
def test_finish_of_rows_that_saw_nothing_is_zero(isa: str) -> None:
    m = np.full((2, 3), -np.inf, np.float32)
    total = np.zeros((2, 3), np.float32)
    acc = np.zeros((2, 3, 32), np.float32)
    assert (kernels.attention_finish(isa, m, total, acc) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_more_query_heads_than_a_tile_has_rows(isa: str, dtype: str) -> None:
    seq = PagedSequence.random(tokens=90, head_dim=32, block_size=16, seed=2, dtype=dtype).write(
        isa
    )
    q = queries(1, 71, 32)
    out = finish(isa, seq.attend(isa, q, 89, scale=0.2))
    exact = reference(q, stored(seq.k, dtype), stored(seq.v, dtype), 89, 0.2)
    np.testing.assert_allclose(out, exact, atol=tolerance(isa, dtype), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_scores_stay_finite_and_pick_the_largest(isa: str, dtype: str) -> None:
    seq = PagedSequence.random(tokens=200, head_dim=64, block_size=16, seed=2, dtype=dtype)
    seq.k *= 40
    seq.write(isa)
    q = stored(queries(1, 2, 64) * 40, "bf16")
    out = finish(isa, seq.attend(isa, q, 199, scale=1.0))
    exact = reference(q, stored(seq.k, dtype), stored(seq.v, dtype), 199, 1.0)
    np.testing.assert_allclose(out, exact, atol=1e-2, rtol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_kv_write_fills_the_documented_layout(isa: str, block_size: int) -> None:
    head_dim, tokens = 80, 75
    seq = PagedSequence.random(tokens=tokens, head_dim=head_dim, block_size=block_size, seed=9)
    expected = seq.pool.copy()
    for t in range(tokens):
        base = int(seq.table[t // block_size]) * seq.geometry["block_stride"]
        base += seq.geometry["head_stride"] + (t % block_size // 16) * 32 * head_dim
        slot = t % 16
        for d in range(head_dim):
            expected[base + d // 2 * 32 + slot * 2 + d % 2] = to_bf16(seq.k[t, d : d + 1])[0]
            at = base + 16 * head_dim + slot // 2 * 2 * head_dim + d * 2
            expected[at + slot % 2] = to_bf16(seq.v[t, d : d + 1])[0]
            if slot % 2 == 0:
                expected[at + 1] = 0  # the stale partner
    seq.write(isa, 0, 20).write(isa, 20, 21).write(isa, 21, None)
    np.testing.assert_array_equal(seq.pool, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_kv_write_fills_the_documented_int8_layout(isa: str, block_size: int) -> None:
    head_dim, tokens = 80, 75
    seq = PagedSequence.random(
        tokens=tokens, head_dim=head_dim, block_size=block_size, seed=9, dtype="int8"
    )
    expected = seq.pool.copy()
    (k, k_scale), (v, v_scale) = codes(seq.k), codes(seq.v)
    for t in range(tokens):
        base = int(seq.table[t // block_size]) * seq.geometry["block_stride"]
        base += seq.geometry["head_stride"] + (t % block_size // 16) * (32 * head_dim + 128)
        slot = t % 16
        for d in range(head_dim):
            expected[base + d // 2 * 32 + slot * 2 + d % 2] = k[t, d]
            at = base + 16 * head_dim + slot // 2 * 2 * head_dim + d * 2
            expected[at + slot % 2] = v[t, d]
        scales = base + 32 * head_dim + 4 * slot
        expected[scales : scales + 4] = k_scale[t : t + 1].view(np.int8)
        expected[scales + 64 : scales + 68] = v_scale[t : t + 1].view(np.int8)
    seq.write(isa, 0, 20).write(isa, 20, 21).write(isa, 21, None)
    np.testing.assert_array_equal(seq.pool, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_value_that_is_not_finite_shows_in_every_row_that_sees_it(
    isa: str, bad: float, which: str
) -> None:
    seq = PagedSequence.random(tokens=80, head_dim=64, block_size=16, seed=4, dtype="int8")
    getattr(seq, which)[70, 13] = bad
    seq.write(isa)
    q = queries(20, 1, 64)
    out = finish(isa, seq.attend(isa, q, 60, scale=0.125))
    assert np.isfinite(out[:10]).all()
    assert not np.isfinite(out[10:]).any()
    q[3, 0, 5] = bad
    assert not np.isfinite(finish(isa, seq.attend(isa, q, 40, scale=0.125))[3]).any()


@pytest.mark.parametrize("isa", ISAS)
def test_zero_and_tiny_rows_are_stored_as_zeros(isa: str) -> None:
    seq = PagedSequence.random(tokens=40, head_dim=64, block_size=16, seed=4, dtype="int8")
    seq.k[:20], seq.v[:] = 1e-33, 0
    out = finish(isa, seq.write(isa).attend(isa, queries(3, 2, 64), 37, scale=0.125))
    assert (out == 0).all()


def test_a_pool_of_another_type_is_refused() -> None:
    seq = PagedSequence.random(tokens=16, head_dim=64, block_size=16, seed=4)
    seq.pool = seq.pool.view(np.int16)  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match=r"uint16 .* or int8"):
        seq.write("generic")
