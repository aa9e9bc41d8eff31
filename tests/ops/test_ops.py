"""Whole-tensor operations against float64 NumPy, and every refusal of a wrong argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from sagellm import _core
from sagellm.errors import InvalidArgumentError

pytestmark = pytest.mark.native

ops = _core.ops
Floats = NDArray[np.float32]
Exact = NDArray[np.float64]
#: The bf16 instruction set rounds activations, queries and weights to bfloat16.
ROUNDS = _core.kernels.selected_isa() == "avx512_bf16"


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(fmt: str, values: Floats) -> Any:
    n, k = values.shape
    return _core.quant.pack(fmt, _core.quant.quantize(fmt, values), n, k)


def unpacked(matrix: Any) -> Exact:
    return np.stack([matrix.unpack_row(row) for row in range(matrix.n)]).astype(np.float64)


def relative_error(actual: Floats, exact: Exact) -> float:
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("tokens", [1, 3, 50, 97])
@pytest.mark.parametrize("n", [5, 48])
@pytest.mark.parametrize(
    ("fmt", "precision", "tolerance"),
    [
        ("F32", "a8", 1e-6),
        ("F16", "a8", 1e-6),
        ("BF16", "a8", 4e-3 if ROUNDS else 1e-6),
        ("Q4_1", "a8", 1e-2),
        ("Q8_0", "a8", 1e-2),
        ("Q8_0", "a15", 1e-4),
    ],
)
def test_linear(fmt: str, precision: str, tolerance: float, n: int, tokens: int) -> None:
    matrix = packed(fmt, random(n, 96, seed=1))
    x = random(tokens, 96, seed=2)
    out = ops.linear(matrix, x, precision)
    assert out.shape == (tokens, n)
    assert relative_error(out, x.astype(np.float64) @ unpacked(matrix).T) < tolerance


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (5, 256)])
def test_rms_norm(shape: tuple[int, int]) -> None:
    x, weight = random(*shape), random(shape[1], seed=1)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(ops.rms_norm(x, weight, 1e-5), exact, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("half", [8, 20, 32])
def test_rope_rotates_the_first_values_of_every_head(half: int) -> None:
    x = random(5, 3, 64)
    before = x.copy()
    angle = np.random.default_rng(1).uniform(0, 9, (5, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    exact = x.astype(np.float64)
    a, b = x[..., :half].astype(np.float64), x[..., half : 2 * half].astype(np.float64)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    exact[..., :half], exact[..., half : 2 * half] = a * c - b * s, b * c + a * s
    np.testing.assert_allclose(ops.rope(x, cos, sin), exact, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 128)])
def test_gated_activations(shape: tuple[int, int]) -> None:
    gate, up = 3 * random(*shape), random(*shape, seed=1)
    g = gate.astype(np.float64)
    silu = g / (1 + np.exp(-g)) * up
    gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * up
    np.testing.assert_allclose(ops.silu_mul(gate, up), silu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ops.gelu_tanh_mul(gate, up), gelu, rtol=1e-5, atol=1e-6)


def bf16(x: Floats) -> Floats:
    bits = x.view(np.uint32)
    rounded: Floats = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    return rounded


@dataclass(slots=True, kw_only=True)
class Paged:
    """Sequences of known keys and values in slot 1 of a storage of 2 kv heads of 32."""

    storage: Any
    keys: list[Floats]  # [length, kv_heads, head_dim] per sequence
    values: list[Floats]
    tables: NDArray[np.int32]

    @classmethod
    def of(cls, *lengths: int) -> Paged:
        blocks = -(-max(lengths) // 16)
        order = 1 + np.random.default_rng(5).permutation(blocks * len(lengths))
        keys = [random(length, 2, 32, seed=length) for length in lengths]
        values = [random(length, 2, 32, seed=length + 1) for length in lengths]
        return cls(
            storage=_core.kv.KvStorage(blocks * len(lengths), 2, 2, 32, 16),
            keys=keys,
            values=values,
            tables=order.reshape(len(lengths), blocks).astype(np.int32),
        )

    def batch(self, ranges: list[tuple[int, int]]) -> dict[str, NDArray[np.int32]]:
        counts = [end - begin for begin, end in ranges]
        return {
            "block_tables": self.tables,
            "query_starts": np.cumsum([0, *counts]).astype(np.int32),
            "positions": np.concatenate([np.arange(*r) for r in ranges]).astype(np.int32),
        }

    def write(self, ranges: list[tuple[int, int]]) -> None:
        k, v = (
            np.concatenate([rows[slice(*r)] for rows, r in zip(source, ranges, strict=True)])
            for source in (self.keys, self.values)
        )
        ops.kv_write(self.storage, 1, k, v, **self.batch(ranges))


def attention(
    q: Floats, paged: Paged, ranges: list[tuple[int, int]], scale: float, window: int, cap: float
) -> Exact:
    rows = []
    group = q.shape[1] // 2
    for s, (begin, end) in enumerate(ranges):
        k = np.repeat(bf16(paged.keys[s]).astype(np.float64), group, axis=1)
        v = np.repeat(bf16(paged.values[s]).astype(np.float64), group, axis=1)
        for p in range(begin, end):
            seen = slice(max(0, p - window + 1) if window else 0, p + 1)
            score = scale * np.einsum("hd,thd->ht", q[len(rows)].astype(np.float64), k[seen])
            if cap:
                score = cap * np.tanh(score / cap)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            rows.append(np.einsum("ht,thd->hd", weight, v[seen]))
    return np.stack(rows)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (20, 0.0), (600, 3.0)])
@pytest.mark.parametrize("group", [1, 3])
def test_kv_write_and_paged_attention_of_a_ragged_batch(
    group: int, window: int, cap: float
) -> None:
    paged = Paged.of(70, 9, 1050)
    paged.write([(0, 30), (0, 9), (0, 1049)])
    ranges = [(30, 70), (9, 9), (1049, 1050)]  # a chunk, a sequence that rests, a decode step
    paged.write(ranges)
    q = random(41, 2 * group, 32, seed=3)
    out = ops.paged_attention(
        paged.storage, 1, q, **paged.batch(ranges), scale=0.2, window=window, softcap=cap
    )
    exact = attention(q, paged, ranges, 0.2, window, cap)
    np.testing.assert_allclose(out, exact, rtol=0, atol=8e-3 if ROUNDS else 2e-5)
    assert (paged.storage.pages(0) == 0).all()  # the other slot is untouched


def test_blocks_behind_the_window_need_not_be_there() -> None:
    paged = Paged.of(100)
    paged.write([(0, 100)])
    q = random(1, 2, 32)
    batch = paged.batch([(99, 100)])
    whole = ops.paged_attention(paged.storage, 1, q, **batch, scale=0.2, window=20)
    paged.tables[0, :5] = 0  # positions 0 .. 79; the window begins at 80
    assert (
        ops.paged_attention(paged.storage, 1, q, **batch, scale=0.2, window=20).tobytes()
        == whole.tobytes()
    )
    with pytest.raises(InvalidArgumentError, match="block 0 at index 4, valid are"):
        ops.paged_attention(paged.storage, 1, q, **batch, scale=0.2, window=21)


def test_empty_batches_give_empty_results() -> None:
    assert ops.linear(packed("F32", random(5, 32)), random(0, 32)).shape == (0, 5)
    assert ops.rms_norm(random(0, 4), random(4), 0.0).shape == (0, 4)
    assert ops.silu_mul(random(0, 4), random(0, 4)).shape == (0, 4)
    paged = Paged.of(1)
    batch = paged.batch([(0, 0)])
    ops.kv_write(paged.storage, 1, random(0, 2, 32), random(0, 2, 32), **batch)
    out = ops.paged_attention(paged.storage, 1, random(0, 4, 32), **batch, scale=1.0)
    assert out.shape == (0, 4, 32)


def test_rows_of_a_larger_array_are_taken_whatever_numpy_calls_their_stride() -> None:
    x = random(6, 32)[::3][:1]
    weight = random(32, seed=1)
    np.testing.assert_array_equal(ops.rms_norm(x, weight, 0.0), ops.rms_norm(x.copy(), weight, 0.0))


Call = Callable[[], Any]
W = packed("F32", random(5, 32))
WRONG_SHAPES: list[tuple[Call, str]] = [
    (lambda: ops.linear(W, random(32)), r"linear: x has 1 axes, must have shape \[tokens, k\]"),
    (lambda: ops.linear(W, random(2, 31)), r"linear: axis 1 of x is 31, must be 32 \(k of weight"),
    (lambda: ops.linear(W, random(2, 32), "a7"), "precision is 'a7'"),
    (lambda: ops.linear(W, random(1, 1, 1, 1, 1)), "x has 5 axes; at most 4"),
    (lambda: ops.rms_norm(random(4), random(4), 0.0), "rms_norm: x has 1 axes"),
    (lambda: ops.rms_norm(random(2, 4), random(5), 0.0), r"axis 0 of weight is 5, must be 4 \(n"),
    (lambda: ops.rms_norm(random(2, 0), random(0), 0.0), "axis 1 of x is 0, must be positive"),
    (lambda: ops.rms_norm(random(2, 4), random(4), -1.0), "eps is -1, must not be negative"),
    (lambda: ops.rms_norm(random(2, 4), random(4), np.nan), "eps is nan"),
    (lambda: ops.rope(random(2, 8), random(2, 4), random(2, 4)), "rope: x has 2 axes"),
    (lambda: ops.rope(random(2, 1, 8), random(3, 4), random(2, 4)), "axis 0 of cos is 3, must be"),
    (lambda: ops.rope(random(2, 1, 8), random(2, 4), random(2, 3)), "axis 1 of sin is 3, must be"),
    (lambda: ops.rope(random(2, 1, 8), random(2, 5), random(2, 5)), "at most half of head_dim 8"),
    (lambda: ops.silu_mul(random(2, 4), random(2, 5)), "axis 1 of up is 5, must be 4"),
    (lambda: ops.gelu_tanh_mul(random(2, 4), random(3, 4)), "axis 0 of up is 3, must be 2"),
    (lambda: ops.silu_mul(random(4), random(4)), "gate has 1 axes"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_SHAPES)
def test_wrong_shapes_are_refused_by_name(call: Call, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def ints(*values: Any) -> NDArray[np.int32]:
    return np.array(values, np.int32)


BATCH = {
    "block_tables": ints([1, 2], [3, 4]),
    "query_starts": ints(0, 2, 3),
    "positions": ints(15, 16, 7),
}
WRONG_BATCHES: list[tuple[dict[str, Any], str]] = [
    ({"positions": ints(15, 16)}, "axis 0 of positions is 2, must be 3"),
    ({"positions": ints(15, 17, 7)}, "positions of sequence 0 are not consecutive: 17 at row 1"),
    ({"positions": ints(-1, 0, 7)}, "positions of sequence 0 start at -1"),
    ({"positions": ints(2**31 - 2, 2**31 - 1, 7)}, "positions of sequence 0 start at"),
    ({"positions": ints(15, 16, 32)}, "holds 32 positions of sequence 1, position 32 is beyond"),
    ({"query_starts": ints(0, 3)}, "axis 0 of query_starts is 2, must be 3"),
    ({"query_starts": ints(1, 2, 3)}, "query_starts runs from 1 to 3"),
    ({"query_starts": ints(0, 2, 2)}, "query_starts runs from 0 to 2, must run from 0 to 3"),
    ({"query_starts": ints(0, 4, 3)}, "query_starts of sequence 0 are 0 and 4"),
    ({"query_starts": ints(0, -1, 3)}, "query_starts of sequence 0 are 0 and -1"),
    ({"block_tables": ints(1, 2)}, "block_tables has 1 axes"),
    ({"block_tables": ints([1, 0], [3, 4])}, "sequence 0 has block 0 at index 1, valid are 1..4"),
    ({"block_tables": ints([1, 2], [5, 4])}, "sequence 1 has block 5 at index 0"),
    ({"block_tables": ints([-1, 2], [3, 4])}, "sequence 0 has block -1 at index 0"),
    ({"slot": 1}, "slot is 1, must be in 0..0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_BATCHES)
def test_wrong_batches_are_refused_before_memory_is_touched(
    change: dict[str, Any], message: str
) -> None:
    storage = _core.kv.KvStorage(4, 1, 2, 32, 16)
    arguments = {"slot": 0, **BATCH, **change}
    with pytest.raises(InvalidArgumentError, match=message):
        ops.kv_write(storage, k=random(3, 2, 32), v=random(3, 2, 32), **arguments)
    assert (storage.pages(0) == 0).all()
    with pytest.raises(InvalidArgumentError, match=message):
        ops.paged_attention(storage, q=random(3, 2, 32), scale=1.0, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": random(3, 3, 32)}, "axis 1 of q is 3, must be a multiple of 2"),
        ({"q": random(3, 2, 16)}, "axis 2 of q is 16, must be 32"),
        ({"q": random(2, 2, 32)}, "axis 0 of positions is 3, must be 2"),
        ({"window": -1}, "window is -1"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"softcap": np.inf}, "softcap is inf"),
        ({"scale": np.nan}, "scale is nan"),
    ],
)
def test_wrong_queries_and_options_are_refused(change: dict[str, Any], message: str) -> None:
    storage = _core.kv.KvStorage(4, 1, 2, 32, 16)
    arguments = {"q": random(3, 2, 32), "scale": 1.0, **BATCH, **change}
    with pytest.raises(InvalidArgumentError, match=message):
        ops.paged_attention(storage, 0, **arguments)


def test_keys_and_values_must_fit_the_storage_and_each_other() -> None:
    storage = _core.kv.KvStorage(4, 1, 2, 32, 16)
    good = random(3, 2, 32)
    for k, v, message in (
        (random(3, 1, 32), good, "axis 1 of k is 1, must be 2"),
        (good, random(3, 2, 16), "axis 2 of v is 16, must be 32"),
        (good, random(2, 2, 32), "axis 0 of v is 2, must be 3"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            ops.kv_write(storage, 0, k, v, **BATCH)
    odd = _core.kv.KvStorage(4, 1, 1, 24, 16)
    with pytest.raises(InvalidArgumentError, match="head_dim of the KV pages is 24"):
        ops.kv_write(odd, 0, random(3, 1, 24), random(3, 1, 24), **BATCH)


def test_arrays_of_another_type_or_order_are_not_converted() -> None:
    for bad in (np.zeros((2, 4)), np.asfortranarray(random(2, 4)), random(2, 8)[:, ::2]):
        with pytest.raises(TypeError):
            ops.rms_norm(bad, random(4), 0.0)
    with pytest.raises(TypeError):
        ops.rms_norm([[1.0]], random(1), 0.0)
