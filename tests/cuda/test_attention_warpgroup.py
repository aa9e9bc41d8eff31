"""Prefill on wgmma and the copy engine against float64, and beside the wide kernel."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cuda.attention_reference import Case, build, from_bits
from cuda.test_attention import attend, attention_of, check
from sagellm.errors import UnsupportedError


@pytest.fixture(autouse=True)
def _needs_compute_capability_9(cuda: ModuleType) -> None:
    if cuda.device_info(0)["compute_capability"] != (9, 0):
        pytest.skip("the warpgroup kernel runs on compute capability 9.0")


def warpgroup(**options: Any) -> Case:
    return Case(prefill_kernel="warpgroup", kv_type=options.get("dtype", "bfloat16"), **options)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_head_size_type_and_page(
    cuda: ModuleType, head_dim: int, dtype: str, page_size: int
) -> None:
    check(
        cuda,
        warpgroup(
            contexts=[150, 37],
            queries=[70, 37],
            num_kv_heads=2,
            head_dim=head_dim,
            dtype=dtype,
            page_size=page_size,
            seed=head_dim + page_size,
        ),
    )


@pytest.mark.parametrize("head_dim", [8, 40, 72, 80, 96, 120])
def test_dimensions_beyond_the_head_are_zeros(cuda: ModuleType, head_dim: int) -> None:
    check(cuda, warpgroup(contexts=[90], queries=[30], group=2, head_dim=head_dim))


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 20, 130])
def test_every_group(cuda: ModuleType, group: int) -> None:
    check(cuda, warpgroup(contexts=[300, 33], queries=[40, 33], group=group, seed=group))


def test_lengths_around_every_edge(cuda: ModuleType) -> None:
    lengths = [17, 63, 64, 65, 127, 128, 129, 255, 256, 257]
    for page_size in (16, 64):
        check(
            cuda, warpgroup(contexts=lengths, queries=lengths, group=1, page_size=page_size, seed=3)
        )


@pytest.mark.parametrize("past", [0, 1, 63, 64, 128, 200, 500])
def test_chunks_of_a_prompt_with_a_past(cuda: ModuleType, past: int) -> None:
    check(cuda, warpgroup(contexts=[past + 60], queries=[60], group=3, head_dim=128, seed=past))


@pytest.mark.parametrize("window", [1, 16, 50, 128, 200])
def test_sliding_windows(cuda: ModuleType, window: int) -> None:
    check(cuda, warpgroup(contexts=[400, 130], queries=[200, 70], group=2, window=window))


def test_blocks_outside_the_window_are_never_read(cuda: ModuleType) -> None:
    step = build(warpgroup(contexts=[310], queries=[40], window=60))
    before = attend(cuda, step)
    step.block_tables[0, : (310 - 40 - 60 + 1) // 16] = 0  # the block that nobody owns holds NaN
    assert np.array_equal(before, attend(cuda, step))


@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_softcap(cuda: ModuleType, softcap: float) -> None:
    check(cuda, warpgroup(contexts=[190], queries=[90], group=4, softcap=softcap))


def test_pages_that_were_never_written_do_not_matter(cuda: ModuleType) -> None:
    for length in (1 + 64, 15 + 64, 33, 100, 130):
        step = build(
            warpgroup(contexts=[length], queries=[20], page_size=64, head_dim=128, seed=length)
        )
        results = []
        for garbage in (0xFF, 0x7F, 0x00):  # NaN, the largest numbers or NaN, zero
            filled = replace(step, pool=step.pool.copy())
            unwritten = step.pool == 0xFF
            # Rows behind the end; a written row has no such run of bytes.
            blocks = filled.pool[:, step.slot_offset : step.slot_offset + 2 * 64 * 128 * 2]
            rows = blocks.reshape(len(blocks), -1, 256)
            empty = unwritten[:, step.slot_offset : step.slot_offset + 2 * 64 * 128 * 2].reshape(
                rows.shape
            )
            rows[empty.all(axis=-1)] = garbage
            filled.pool[:, step.slot_offset : step.slot_offset + 2 * 64 * 128 * 2] = rows.reshape(
                len(blocks), -1
            )
            results.append(attend(cuda, filled).tobytes())
        assert len(set(results)) == 1


@pytest.mark.parametrize("group", [3, 4])  # of 3, rows of one token lie in both warpgroups
def test_split_items_merge(cuda: ModuleType, group: int) -> None:
    case = warpgroup(contexts=[1500], queries=[40], group=group, head_dim=128)
    attention = attention_of(cuda, case)
    attend(cuda, build(case), attention)
    assert attention.described["prefill_kernel"] == "warpgroup"
    assert attention.described["states"] > 0
    check(cuda, case)


def test_several_items_in_one_block(cuda: ModuleType) -> None:
    case = warpgroup(contexts=[130] * 6, queries=[100] * 6, group=4, num_kv_heads=4)
    attention = attention_of(cuda, case)
    attend(cuda, build(case), attention)
    assert attention.described["wide_items"] > 2 * attention.described["wide_bins"]
    check(cuda, case)


def test_shared_prefixes(cuda: ModuleType) -> None:
    case = warpgroup(
        contexts=[150, 140, 131, 200], queries=[1, 1, 2, 1], shared=128, group=8, cascade=(128, 3)
    )
    attention = attention_of(cuda, case)
    attend(cuda, build(case), attention)
    assert attention.described["wide_items"] > 0
    check(cuda, case)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_results_are_the_same_bits_in_every_order(
    cuda: ModuleType, orders: range, head_dim: int
) -> None:
    step = build(warpgroup(contexts=[500, 150], queries=[30, 90], group=4, head_dim=head_dim))
    attention = attention_of(cuda, step.case)
    results = []
    for seed in [*orders, *orders]:
        if len(orders) > 1:
            cuda.set_order(seed)
        results.append(attend(cuda, step, attention).tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_ring_turns_over_in_every_order(cuda: ModuleType, orders: range, head_dim: int) -> None:
    case = warpgroup(contexts=[1300, 700], queries=[9, 20], num_kv_heads=4, head_dim=head_dim)
    step = build(case)
    expected = step.expected()
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        got = from_bits(attend(cuda, step), case.dtype)
        assert np.linalg.norm(got - expected) < 4e-3 * np.linalg.norm(expected)


def test_a_recorded_launch_writes_what_a_direct_one_does(cuda: ModuleType) -> None:
    step = build(warpgroup(contexts=[300, 40], queries=[60, 20], group=4))
    attention = attention_of(cuda, step.case)
    direct = attend(cuda, step, attention)
    out = cuda.empty(step.q_bits.shape, np.dtype(np.uint16))
    pools = [cuda.array(step.pool), cuda.array(step.pool)]
    attention.time(
        cuda.array(step.q_bits), pools, step.slot_offset, step.block_stride, out, replays=2
    )
    assert np.array_equal(direct, out.numpy())


def test_both_kernels_agree(cuda: ModuleType) -> None:
    step = build(warpgroup(contexts=[260, 90], queries=[130, 90], group=4, head_dim=128))
    wide = attention_of(cuda, replace(step.case, prefill_kernel="wide"))
    got = from_bits(attend(cuda, step), "bfloat16")
    expected = from_bits(attend(cuda, step, wide), "bfloat16")
    assert wide.described["prefill_kernel"] == "wide"
    assert np.linalg.norm(got - expected) < 4e-3 * np.linalg.norm(expected)


def test_it_is_what_runs_where_it_can(cuda: ModuleType) -> None:
    def chosen(**options: Any) -> str:
        made: str = attention_of(
            cuda, Case(contexts=[1], queries=[1], prefill_kernel="auto", **options)
        ).described["prefill_kernel"]
        return made

    assert chosen() == "warpgroup"
    assert chosen(head_dim=256) == "wide"
    assert chosen(kv_type="int8") == "wide"


def test_products_run_on_warpgroups_and_copies_on_the_copy_engine(cuda: ModuleType) -> None:
    if not hasattr(cuda, "statistics"):
        pytest.skip("counted by the emulator")
    cuda.statistics()
    attend(cuda, build(warpgroup(contexts=[128], queries=[128], group=1, head_dim=128)))
    counts = cuda.statistics()
    # One step: 8 products of Q with K and 8 of P with V, of two groups of four warps; 8 pages of K
    # and V, two boxes each.
    assert counts["warpgroup_products"] == 16 * 8
    assert counts["box_copies"] == 2 * 8 * 2
    assert counts["matrix_products"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_type": "int8"}, "16-bit pages"),
        ({"head_dim": 256}, "head_dim"),
        ({"prefill_kernel": "fast"}, "prefill_kernel"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(
    cuda: ModuleType, change: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 64,
        "page_size": 16,
        "prefill_kernel": "warpgroup",
    }
    with pytest.raises((ValueError, UnsupportedError), match=message):
        cuda.PagedAttention(**{**options, **change})
