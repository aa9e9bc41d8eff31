"""Paged attention against float64: every head size, page, type and shape of step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda.attention_reference import Case, Step, build, from_bits

# Of the norm of the result: rounding of P and of the output, and for 8-bit K and V, whose values
# the reference takes as stored, of P times their scales.
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}


def attention_of(cuda: ModuleType, case: Case) -> Any:
    return cuda.PagedAttention(
        num_heads=case.num_kv_heads * case.group,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        type=case.dtype,
        kv_type=case.kv_type,
        scale=case.scale,
        window=case.window,
        softcap=case.softcap,
        deterministic=case.deterministic,
        cascade_tokens=case.cascade[0],
        cascade_sequences=case.cascade[1],
        prefill_kernel=case.prefill_kernel,
    )


def attend(cuda: ModuleType, step: Step, attention: Any = None) -> NDArray[np.uint16]:
    """Bits of the output, which starts as NaN."""
    attention = attention or attention_of(cuda, step.case)
    attention.plan(step.query_starts, step.positions, step.block_tables)
    out = cuda.empty(step.q_bits.shape, np.dtype(np.uint16))
    q, pool = cuda.array(step.q_bits), cuda.array(step.pool)
    attention.run(q, pool, step.slot_offset, step.block_stride, out)
    bits: NDArray[np.uint16] = out.numpy()
    return bits


def check(cuda: ModuleType, case: Case) -> None:
    step = build(case)
    got = from_bits(attend(cuda, step), case.dtype)
    expected = step.expected()
    error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 3 * TOLERANCE[case.dtype], f"worst row {error.max():.2e}"
    assert np.linalg.norm(got - expected) < TOLERANCE[case.dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("kv_type", ["bfloat16", "float16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_size_and_type(cuda: ModuleType, head_dim: int, kv_type: str) -> None:
    dtype = "float16" if kv_type in ("float16", "fp8_e4m3") else "bfloat16"
    check(
        cuda,
        Case(
            contexts=[70, 33],
            queries=[1, 9],
            group=4,
            head_dim=head_dim,
            dtype=dtype,
            kv_type=kv_type,
            seed=head_dim,
        ),
    )


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_every_page_and_group(cuda: ModuleType, page_size: int, group: int) -> None:
    check(
        cuda,
        Case(
            contexts=[97, 64, 1],
            queries=[1, 2, 1],
            num_kv_heads=2,
            group=group,
            page_size=page_size,
            seed=group,
        ),
    )


@pytest.mark.parametrize("group", [20, 130])
@pytest.mark.parametrize("queries", [1, 2])
def test_groups_larger_than_a_tile(cuda: ModuleType, group: int, queries: int) -> None:
    check(cuda, Case(contexts=[130], queries=[queries], group=group))


def test_lengths_around_every_edge(cuda: ModuleType) -> None:
    lengths = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
    check(cuda, Case(contexts=lengths, queries=[1] * len(lengths), group=4, page_size=32))


@pytest.mark.parametrize("queries", [3, 17, 64, 129, 150])
def test_prompts_with_and_without_a_past(cuda: ModuleType, queries: int) -> None:
    check(cuda, Case(contexts=[queries, 150], queries=[queries, queries], group=3))


@pytest.mark.parametrize("window", [1, 16, 50, 64, 100])
@pytest.mark.parametrize("kv_type", ["bfloat16", "int8"])
def test_sliding_windows(cuda: ModuleType, window: int, kv_type: str) -> None:
    check(
        cuda,
        Case(contexts=[170, 130, 40], queries=[1, 70, 2], group=2, window=window, kv_type=kv_type),
    )


def test_blocks_outside_the_window_are_never_read(cuda: ModuleType) -> None:
    step = build(Case(contexts=[300, 310], queries=[1, 40], window=60))
    before = attend(cuda, step)
    for s, first in enumerate((300 - 60, 310 - 40 - 60 + 1)):
        step.block_tables[s, : first // 16] = 0  # the block that nobody owns holds NaN
    assert np.array_equal(before, attend(cuda, step))


@pytest.mark.parametrize("queries", [1, 40])
def test_softcap(cuda: ModuleType, queries: int) -> None:
    check(cuda, Case(contexts=[90], queries=[queries], group=4, softcap=2.0))


def test_mixed_steps_share_one_launch_of_each_kernel(cuda: ModuleType) -> None:
    case = Case(contexts=[500, 70, 3, 260], queries=[1, 70, 1, 30], group=4, num_kv_heads=2)
    attention = attention_of(cuda, case)
    step = build(case)
    attend(cuda, step, attention)
    assert attention.described["narrow_items"] > 2
    assert attention.described["wide_items"] > 2
    assert attention.described["states"] > 0
    check(cuda, case)


def test_results_are_the_same_bits_every_time(cuda: ModuleType, orders: range) -> None:
    step = build(Case(contexts=[400, 90], queries=[1, 50], group=4, kv_type="fp8_e4m3"))
    attention = attention_of(cuda, step.case)
    results = []
    for seed in [*orders, *orders]:
        if len(orders) > 1:
            cuda.set_order(seed)
        results.append(attend(cuda, step, attention).tobytes())
    assert len(set(results)) == 1


def test_a_recorded_launch_writes_what_a_direct_one_does(cuda: ModuleType) -> None:
    step = build(Case(contexts=[300, 40], queries=[1, 20], group=4))
    attention = attention_of(cuda, step.case)
    direct = attend(cuda, step, attention)
    out = cuda.empty(step.q_bits.shape, np.dtype(np.uint16))
    pools = [cuda.array(step.pool), cuda.array(step.pool)]
    times = attention.time(
        cuda.array(step.q_bits), pools, step.slot_offset, step.block_stride, out, replays=3
    )
    assert len(times) == 3
    assert np.array_equal(direct, out.numpy())


@pytest.mark.parametrize("kv_type", ["bfloat16", "int8"])
def test_shared_prefixes_are_read_once_and_change_little(cuda: ModuleType, kv_type: str) -> None:
    case = Case(
        contexts=[150, 140, 131, 200],
        queries=[1, 1, 2, 1],
        shared=128,
        group=8,
        kv_type=kv_type,
        cascade=(128, 3),
    )
    attention = attention_of(cuda, case)
    attend(cuda, build(case), attention)
    assert attention.described["wide_items"] > 0
    check(cuda, case)


def rows_of(bits: NDArray[np.uint16], step: Step, sequence: int) -> bytes:
    rows: bytes = bits[step.query_starts[sequence] : step.query_starts[sequence + 1]].tobytes()
    return rows


def part(step: Step, sequences: list[tuple[int, int, int]]) -> Step:
    """The tokens [begin, end) of each named sequence of a step, as a step of their own."""
    rows = np.concatenate([np.arange(b, e) + step.query_starts[s] for s, b, e in sequences]).astype(
        np.intp
    )
    return Step(
        case=step.case,
        query_starts=np.cumsum([0, *(e - b for _, b, e in sequences)]).astype(np.int32),
        positions=step.positions[rows],
        block_tables=step.block_tables[[s for s, _, _ in sequences]],
        q_bits=step.q_bits[rows],
        pool=step.pool,
        slot_offset=step.slot_offset,
        block_stride=step.block_stride,
        keys=[step.keys[s] for s, _, _ in sequences],
        values=[step.values[s] for s, _, _ in sequences],
    )


@pytest.mark.parametrize("window", [0, 90])
def test_deterministic_bits_do_not_depend_on_the_batch_or_on_chunks(
    cuda: ModuleType, window: int
) -> None:
    case = Case(
        contexts=[1100, 60, 37], queries=[13, 1, 37], group=3, window=window, deterministic=True
    )
    step = build(case)
    together = attend(cuda, step)
    assert rows_of(together, step, 0) == attend(cuda, part(step, [(0, 0, 13)])).tobytes()
    assert rows_of(together, step, 1) == attend(cuda, part(step, [(1, 0, 1)])).tobytes()
    chunks = [attend(cuda, part(step, [(2, b, e)])) for b, e in ((0, 1), (1, 20), (20, 37))]
    assert rows_of(together, step, 2) == np.concatenate(chunks).tobytes()
    check(cuda, case)


def test_deterministic_bits_do_not_depend_on_sharing(cuda: ModuleType) -> None:
    shared = Case(
        contexts=[1060, 1030],
        queries=[1, 1],
        shared=1024,
        group=2,
        deterministic=True,
        cascade=(1024, 2),
    )
    apart = Case(
        contexts=[1060, 1030],
        queries=[1, 1],
        shared=1024,
        group=2,
        deterministic=True,
        cascade=(1024, 0),
    )
    step = build(shared)
    cascaded = attention_of(cuda, shared)
    first = attend(cuda, step, cascaded)
    assert cascaded.described["narrow_items"] == 3
    assert first.tobytes() == attend(cuda, step, attention_of(cuda, apart)).tobytes()


def test_matrix_loads_meet_no_bank_conflict(cuda: ModuleType) -> None:
    if not hasattr(cuda, "statistics"):
        pytest.skip("counted by the emulator")
    for head_dim in (64, 96, 128, 256):
        for kv_type in ("bfloat16", "int8"):
            step = build(
                Case(contexts=[70, 70], queries=[1, 20], head_dim=head_dim, kv_type=kv_type)
            )
            cuda.statistics()
            attend(cuda, step)
            counts = cuda.statistics()
            assert counts["matrix_load_phases"] == 4 * counts["matrix_loads"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 260}, "head_dim"),
        ({"head_dim": 72, "kv_type": "int8"}, "head_dim"),
        ({"page_size": 8}, "page_size"),
        ({"kv_type": "int4"}, "kv_type"),
        ({"window": -1}, "window"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    cuda: ModuleType, change: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "page_size": 16}
    with pytest.raises(ValueError, match=message):
        cuda.PagedAttention(**{**options, **change})


def test_queries_of_another_type_than_16_bit_pages_are_refused(cuda: ModuleType) -> None:
    step = build(Case(contexts=[5], queries=[1]))
    attention = cuda.PagedAttention(
        num_heads=2, num_kv_heads=1, head_dim=64, page_size=16, kv_type="float16"
    )
    with pytest.raises(ValueError, match="type of q"):
        attend(cuda, step, attention)
