"""What a KV cache promises, case by case, for the native and the reference implementation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sagellm.errors import InvalidArgumentError
from sagellm.kv import KvCache, create_kv_cache

MakeCache = Callable[..., KvCache]


@pytest.fixture(params=["native", "reference"])
def make_cache(request: pytest.FixtureRequest) -> MakeCache:
    native = request.param == "native"
    if native:
        pytest.importorskip("sagellm._core")

    def make(
        num_blocks: int, block_size: int = 4, windows: tuple[int, ...] = (0,), **more: bool
    ) -> KvCache:
        return create_kv_cache(num_blocks, block_size, windows, native=native, **more)

    return make


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)


def compute(cache: KvCache, sequence_id: int, tokens: np.ndarray) -> None:
    """Reserves, lets the device run, commits."""
    assert cache.reserve(sequence_id, len(tokens))
    cache.take_copies()
    cache.commit(sequence_id, tokens, len(tokens))
    cache.check_integrity()


def run_request(cache: KvCache, sequence_id: int, tokens: np.ndarray, salt: int = 0) -> int:
    """A whole request; returns its number of cached tokens."""
    cache.add(sequence_id, salt)
    cached = cache.match_prefix(sequence_id, tokens)
    compute(cache, sequence_id, tokens)
    cache.release(sequence_id)
    cache.check_integrity()
    return cached


def cached_tokens(cache: KvCache, tokens: np.ndarray, salt: int = 0) -> int:
    """How many tokens of ``tokens`` a new request would find (touches them in the LRU order)."""
    cache.add(10**6, salt)
    cached = cache.match_prefix(10**6, tokens)
    cache.release(10**6)
    return cached


def table(cache: KvCache, sequence_id: int, group: int = 0) -> list[int]:
    return cache.block_tables([sequence_id])[group, 0].tolist()


# ---------------------------------------------------------------------------------- pool and tables


def test_blocks_are_handed_out_in_ascending_order_from_1(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    cache.add(1)
    assert cache.reserve(1, 16)
    assert table(cache, 1) == [1, 2, 3, 4]


def test_tables_are_padded_with_block_0(make_cache: MakeCache) -> None:
    cache = make_cache(8, windows=(0, 0))
    cache.add(1)
    cache.add(2)
    assert cache.reserve(2, 9)
    tables = cache.block_tables([1, 2, 1])
    assert tables.dtype == np.int32
    assert tables.tolist() == [[[0, 0, 0], [1, 3, 5], [0, 0, 0]], [[0, 0, 0], [2, 4, 6], [0, 0, 0]]]
    assert cache.block_tables([]).shape == (2, 0, 1)
    assert cache.block_tables([1]).shape == (2, 1, 1)
    assert cache.num_blocks_of(2) == 6


def test_reserve_without_room_changes_nothing(make_cache: MakeCache) -> None:
    cache = make_cache(3)
    cache.add(1)
    cache.add(2)
    assert cache.reserve(1, 8)
    before = (cache.stats(), table(cache, 2))
    assert not cache.reserve(2, 5)
    assert not cache.reserve(2, 2**31 - 1)
    assert (cache.stats(), table(cache, 2)) == before
    assert cache.reserve(2, 4)
    cache.release(1)
    assert cache.reserve(2, 12)


def test_reserve_of_committed_positions_is_free(make_cache: MakeCache) -> None:
    cache = make_cache(1)
    cache.add(1)
    compute(cache, 1, prompt(3))
    cache.fork(1, 2)
    assert cache.reserve(1, 3)
    assert cache.take_copies().shape == (0, 2)


def test_blocks_without_cached_contents_are_reused_first(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    run_request(cache, 1, prompt(8))  # blocks 1 and 2 are cached
    cache.add(2)
    assert cache.reserve(2, 4)
    assert table(cache, 2) == [3]
    cache.release(2)
    cache.add(3)
    assert cache.reserve(3, 8)
    assert table(cache, 3) == [3, 4]
    assert cache.stats().evicted_blocks == 0


# ------------------------------------------------------------------------------------- prefix cache


def test_a_hit_has_whole_blocks_and_leaves_the_last_token(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    tokens = prompt(12)
    assert run_request(cache, 1, tokens) == 0
    assert cached_tokens(cache, tokens) == 8
    assert cached_tokens(cache, np.append(tokens, np.int32(1))) == 12
    assert cached_tokens(cache, tokens[:11]) == 8
    assert cached_tokens(cache, tokens[:4]) == 0
    assert cached_tokens(cache, tokens[:0]) == 0


def test_a_hit_shares_the_blocks_of_a_live_sequence(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    tokens = prompt(9)
    cache.add(1)
    compute(cache, 1, tokens)
    cache.add(2)
    assert cache.match_prefix(2, tokens) == 8
    assert table(cache, 2) == table(cache, 1)[:2]
    assert cache.num_tokens(2) == 8
    compute(cache, 2, tokens)
    assert table(cache, 2)[2] != table(cache, 1)[2]
    assert cache.stats().copied_blocks == 0


def test_prefixes_are_not_shared_between_salts(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    tokens = prompt(9)
    run_request(cache, 1, tokens, salt=2**64 - 1)
    assert cached_tokens(cache, tokens) == 0
    assert cached_tokens(cache, tokens, salt=2**64 - 1) == 8


def test_a_block_matches_only_after_the_same_beginning(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    first, second = prompt(8, seed=1), prompt(8, seed=2)
    run_request(cache, 1, first)
    run_request(cache, 2, second)
    assert cached_tokens(cache, np.concatenate([first[:4], second[4:], first])) == 4


def test_statistics_count_queried_and_hit_tokens(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    run_request(cache, 1, prompt(9))
    run_request(cache, 2, prompt(9))
    stats = cache.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (18, 8)
    assert (stats.num_blocks, stats.free_blocks, stats.cached_blocks) == (8, 8, 2)


def test_tails_are_evicted_before_heads(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    tokens = prompt(16)
    run_request(cache, 1, tokens)
    for blocks_taken, remaining in [(1, 12), (2, 8), (3, 4)]:
        cache.add(2)
        assert cache.reserve(2, 4 * blocks_taken)
        cache.release(2)
        assert cached_tokens(cache, np.append(tokens, np.int32(0))) == remaining
    assert cache.stats().evicted_blocks == 3


def test_the_least_recently_used_prefix_is_evicted_first(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    old, new = prompt(9, seed=1)[:8], prompt(9, seed=2)[:8]
    run_request(cache, 1, old)
    run_request(cache, 2, new)
    assert cached_tokens(cache, np.append(old, np.int32(0))) == 8  # `new` is now older
    cache.add(3)
    assert cache.reserve(3, 8)
    cache.release(3)
    assert cached_tokens(cache, np.append(old, np.int32(0))) == 8
    assert cached_tokens(cache, np.append(new, np.int32(0))) == 0


def test_a_prefix_whose_head_is_gone_does_not_match_until_it_is_computed_again(
    make_cache: MakeCache,
) -> None:
    cache = make_cache(4)
    tokens = prompt(9)
    for sequence_id in (1, 2):  # both compute block 0; that of 2 stays private
        cache.add(sequence_id)
        compute(cache, sequence_id, tokens[:4])
    compute(cache, 2, tokens[:8])  # 2 publishes block 1 after the head of 1
    cache.release(1)
    cache.add(3)
    assert cache.reserve(3, 8)  # takes the last free block, then evicts the head
    cache.release(3)
    cache.check_integrity()
    assert cached_tokens(cache, tokens) == 0
    assert cache.stats().cached_blocks == 1
    cache.release(2)
    run_request(cache, 4, tokens[:4])
    assert cached_tokens(cache, tokens) == 8


def test_of_two_that_compute_the_same_block_the_first_is_cached(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    tokens = prompt(5)
    cache.add(1)
    cache.add(2)
    compute(cache, 1, tokens)
    compute(cache, 2, tokens)
    assert set(table(cache, 1)).isdisjoint(table(cache, 2))
    assert cache.stats().cached_blocks == 1
    cache.add(3)
    cache.match_prefix(3, tokens)
    assert table(cache, 3) == table(cache, 1)[:1]


def test_reset_forgets_what_no_sequence_uses(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    gone, live = prompt(9, seed=1), prompt(9, seed=2)
    run_request(cache, 1, gone)
    cache.add(2)
    compute(cache, 2, live)
    cache.reset_prefix_index()
    cache.check_integrity()
    assert cached_tokens(cache, gone) == 0
    assert cached_tokens(cache, live) == 8
    assert cache.stats().cached_blocks == 2


def test_without_prefix_caching_nothing_is_published(make_cache: MakeCache) -> None:
    cache = make_cache(8, enable_prefix_caching=False)
    assert run_request(cache, 1, prompt(9)) == 0
    assert run_request(cache, 2, prompt(9)) == 0
    assert cache.stats().cached_blocks == 0


# ------------------------------------------------------------------------------ fork, copy-on-write


def test_a_shared_tail_is_copied_before_it_is_written(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    tokens = prompt(6)
    cache.add(1)
    compute(cache, 1, tokens)
    cache.fork(1, 2)
    assert table(cache, 2) == table(cache, 1) == [1, 2]
    assert cache.reserve(1, 7)
    assert table(cache, 1) == [1, 3]
    assert cache.reserve(2, 7)  # now the only one that writes there
    assert table(cache, 2) == [1, 2]
    assert cache.take_copies().tolist() == [[2, 3]]
    assert cache.take_copies().shape == (0, 2)
    assert cache.stats().copied_blocks == 1


def test_n_samples_of_one_prompt_need_n_minus_1_copies(make_cache: MakeCache) -> None:
    cache = make_cache(16, windows=(0, 5))
    tokens = prompt(6)
    cache.add(0)
    compute(cache, 0, tokens)
    for child in (1, 2, 3):
        cache.fork(0, child)
    for sequence_id in range(4):
        assert cache.reserve(sequence_id, 7)
    copies = cache.take_copies()
    assert copies.shape == (6, 2)  # 3 per group
    assert len(set(copies[:, 1].tolist())) == 6
    tails = cache.block_tables([0, 1, 2, 3])[:, :, 1]
    assert len(set(tails.ravel().tolist())) == 8


def test_a_fork_at_a_block_boundary_copies_nothing(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    cache.add(1)
    compute(cache, 1, prompt(8))
    cache.fork(1, 2)
    assert cache.reserve(1, 9)
    assert cache.reserve(2, 9)
    assert cache.take_copies().shape == (0, 2)
    assert table(cache, 1)[:2] == table(cache, 2)[:2]
    assert table(cache, 1)[2] != table(cache, 2)[2]


def test_a_fork_shares_committed_tokens_only(make_cache: MakeCache) -> None:
    cache = make_cache(8)
    cache.add(1)
    compute(cache, 1, prompt(4))
    assert cache.reserve(1, 12)
    cache.fork(1, 2)
    assert cache.num_tokens(2) == 4
    assert table(cache, 2) == [1]


def test_the_source_of_a_pending_copy_is_not_reused(make_cache: MakeCache) -> None:
    cache = make_cache(3)
    cache.add(1)
    compute(cache, 1, prompt(2))
    cache.fork(1, 2)
    assert cache.reserve(1, 3)  # copy 1 -> 2
    cache.release(2)  # now only the copy needs block 1
    cache.add(3)
    assert cache.reserve(3, 4)
    assert not cache.reserve(3, 8)
    assert cache.take_copies().tolist() == [[1, 2]]
    assert cache.reserve(3, 8)
    cache.check_integrity()


def test_a_copy_is_dropped_when_its_destination_is_released(make_cache: MakeCache) -> None:
    cache = make_cache(3)
    cache.add(1)
    compute(cache, 1, prompt(2))
    cache.fork(1, 2)
    assert cache.reserve(1, 3)
    cache.fork(1, 3)
    assert cache.reserve(1, 3)  # a copy of the copy
    cache.check_integrity()
    for sequence_id in (2, 3, 1):
        cache.release(sequence_id)
        cache.check_integrity()
    assert cache.stats().free_blocks == 3
    assert cache.take_copies().shape == (0, 2)


def test_computing_into_a_shared_tail_without_reserve_is_refused(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    tokens = prompt(3)
    cache.add(1)
    compute(cache, 1, tokens[:2])
    assert cache.reserve(1, 3)
    cache.fork(1, 2)
    with pytest.raises(InvalidArgumentError, match="shares its last block"):
        cache.commit(1, tokens, 3)
    assert cache.num_tokens(1) == 2


# ---------------------------------------------------------------------------------- sliding windows


def test_blocks_before_the_window_are_given_back(make_cache: MakeCache) -> None:
    cache = make_cache(16, block_size=4, windows=(0, 6))
    tokens = prompt(17)
    cache.add(1)
    compute(cache, 1, tokens[:8])
    assert 0 not in table(cache, 1, group=1)  # position 8 sees 3..8
    compute(cache, 1, tokens[:9])
    assert table(cache, 1, group=1)[0] == 0  # position 9 sees 4..9
    assert 0 not in table(cache, 1, group=1)[1:]
    compute(cache, 1, tokens)
    assert table(cache, 1, group=1)[:3] == [0, 0, 0]  # position 17 sees 12..17
    assert 0 not in table(cache, 1, group=0)
    assert cache.num_blocks_of(1) == 5 + 2


def test_a_long_sequence_needs_a_windows_worth_of_blocks(make_cache: MakeCache) -> None:
    cache = make_cache(3, block_size=4, windows=(6,))
    tokens = prompt(400)
    cache.add(1)
    for length in range(1, 401):
        compute(cache, 1, tokens[:length])
    assert cache.stats().free_blocks >= 0
    cache.release(1)
    cache.check_integrity()
    assert cache.stats().free_blocks == 3


def test_a_sliding_hit_needs_only_the_last_blocks_of_the_window(make_cache: MakeCache) -> None:
    cache = make_cache(5, block_size=4, windows=(6,))
    tokens = prompt(17)
    cache.add(1)
    for end in (4, 8, 12, 16):
        compute(cache, 1, tokens[:end])
    cache.release(1)
    cache.add(2)
    assert cache.reserve(2, 8)  # the block never used, and the oldest of the prefix
    cache.release(2)
    assert cache.stats().evicted_blocks == 1
    cache.add(3)
    assert cache.match_prefix(3, tokens) == 16
    entries = table(cache, 3)
    assert entries[:2] == [0, 0]
    assert 0 not in entries[2:]
    other = tokens.copy()
    other[0] += 1  # far outside of the window, and still another prefix
    assert cached_tokens(cache, other) == 0


def test_a_hit_is_the_longest_prefix_that_every_group_can_serve(make_cache: MakeCache) -> None:
    cache = make_cache(12, block_size=2, windows=(0, 3))
    tokens = prompt(9)
    run_request(cache, 1, tokens[:8])  # 4 blocks in both groups
    # The sliding group needs the last block before a hit. Make that of a hit of 2 blocks recent.
    assert cached_tokens(cache, tokens[:5]) == 4
    cache.add(2)
    assert cache.reserve(2, 8)  # 8 blocks: 4 never used, 4 cached (3 of them sliding)
    assert cache.stats().evicted_blocks == 4
    cache.release(2)
    cache.add(3)
    assert cache.match_prefix(3, tokens) == 4  # the full group would have 6
    full, sliding = cache.block_tables([3])[:, 0]
    assert 0 not in full
    assert sliding[0] == 0
    assert sliding[1] != 0


def test_a_window_of_1_needs_no_cached_block(make_cache: MakeCache) -> None:
    cache = make_cache(8, block_size=2, windows=(0, 1))
    tokens = prompt(5)
    run_request(cache, 1, tokens)
    cache.add(2)
    assert cache.match_prefix(2, tokens) == 4
    assert table(cache, 2, group=1) == [0, 0]


def test_the_prefix_index_is_bounded_and_recovers(make_cache: MakeCache) -> None:
    cache = make_cache(2, block_size=1, windows=(1,))
    long = prompt(100)
    cache.add(1)
    for end in range(1, 101):
        compute(cache, 1, long[:end])
    assert cache.stats().cached_blocks <= 2
    cache.release(1)
    cache.reset_prefix_index()
    cache.check_integrity()
    assert run_request(cache, 2, long[:2]) == 0
    assert cached_tokens(cache, long[:2]) == 1


# --------------------------------------------------------------------------------------------- pins


def test_a_pinned_prefix_survives_pressure_until_unpinned(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    tokens = prompt(9)
    cache.add(1)
    compute(cache, 1, tokens)
    cache.pin(1)
    cache.pin(1)
    cache.release(1)
    cache.check_integrity()
    assert cache.stats().free_blocks == 2
    cache.add(2)
    assert cache.reserve(2, 8)
    assert not cache.reserve(2, 9)
    cache.release(2)
    cache.reset_prefix_index()
    assert cached_tokens(cache, tokens) == 8
    cache.unpin(1)
    cache.check_integrity()
    assert cache.stats().free_blocks == 4
    assert cached_tokens(cache, tokens) == 8
    cache.add(2)
    assert cache.reserve(2, 16)


def test_a_pinned_id_is_taken_and_has_no_sequence(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    cache.add(1)
    compute(cache, 1, prompt(4))
    cache.pin(1)
    cache.release(1)
    with pytest.raises(InvalidArgumentError):
        cache.num_tokens(1)
    with pytest.raises(InvalidArgumentError):
        cache.pin(1)
    with pytest.raises(InvalidArgumentError):
        cache.add(1)
    cache.unpin(1)
    with pytest.raises(InvalidArgumentError):
        cache.unpin(1)
    cache.add(1)


def test_unpin_of_a_live_sequence_keeps_it(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    cache.add(1)
    compute(cache, 1, prompt(4))
    cache.pin(1)
    cache.unpin(1)
    assert cache.num_tokens(1) == 4
    cache.release(1)
    assert cache.stats().free_blocks == 4


# ------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "windows"),
    [(0, 4, (0,)), (-1, 4, (0,)), (4, 0, (0,)), (4, 4, ()), (4, 4, (-1,)), (2**40, 4, (0,))],
)
def test_sizes_out_of_range_are_refused(
    make_cache: MakeCache, num_blocks: int, block_size: int, windows: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidArgumentError):
        make_cache(num_blocks, block_size, windows)


def test_misuse_names_the_sequence(make_cache: MakeCache) -> None:
    cache = make_cache(4)
    cache.add(7)
    with pytest.raises(InvalidArgumentError, match="7"):
        cache.add(7)
    with pytest.raises(InvalidArgumentError, match="8"):
        cache.release(8)
    with pytest.raises(InvalidArgumentError, match="-1"):
        cache.add(-1)
    with pytest.raises(InvalidArgumentError, match="9"):
        cache.block_tables([7, 9])
    assert cache.reserve(7, 4)
    with pytest.raises(InvalidArgumentError, match="not empty"):
        cache.match_prefix(7, prompt(4))
    cache.commit(7, prompt(4), 2)
    with pytest.raises(InvalidArgumentError):
        cache.commit(7, prompt(4), 1)


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(8, np.int64), np.zeros(8, np.float32), np.zeros((2, 4), np.int32), [1, 2, 3]],
)
def test_tokens_of_another_type_or_shape_are_refused(make_cache: MakeCache, tokens: object) -> None:
    cache = make_cache(4)
    cache.add(1)
    assert cache.reserve(1, 8)
    with pytest.raises((TypeError, InvalidArgumentError)):
        cache.commit(1, tokens, 2)  # type: ignore[arg-type]
    assert cache.num_tokens(1) == 0
