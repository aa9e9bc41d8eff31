"""What only the native KV module has: forced hash collisions, page storage, the benchmark."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from sagellm.errors import InvalidArgumentError, UnsupportedError
from sagellm.kv import KvStats, create_kv_cache

core = pytest.importorskip("sagellm._core")


def test_colliding_hashes_are_told_apart_by_exact_comparison() -> None:
    cache = core.kv.KvCache(128, 2, [0], hash_mask=0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 2, 7).astype(np.int32) for _ in range(24)]
    tables = {}
    for sequence_id, tokens in enumerate(prompts):
        salt = sequence_id % 2
        cache.add(sequence_id, salt)
        hit = cache.match_prefix(sequence_id, tokens)
        shared = [
            len(np.flatnonzero(np.cumprod(tokens == other)))
            for earlier, other in enumerate(prompts[:sequence_id])
            if earlier % 2 == salt
        ]
        assert hit == max([0, *shared]) // 2 * 2
        assert cache.reserve(sequence_id, 7)
        cache.commit(sequence_id, tokens, 7)
        tables[sequence_id] = cache.block_tables([sequence_id])
        cache.check_integrity()
    for sequence_id in tables:
        cache.release(sequence_id)
        cache.check_integrity()
    cache.reset_prefix_index()
    cache.check_integrity()
    assert cache.stats().cached_blocks == 0


def test_stats_are_the_shared_dataclass() -> None:
    assert isinstance(create_kv_cache(4, 4, (0,), native=True).stats(), KvStats)


def test_an_absent_core_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sagellm._core", None)
    with pytest.raises(UnsupportedError, match="C\\+\\+ core"):
        create_kv_cache(4, 4, (0,), native=True)


def test_pages_are_zero_and_copied_over_all_slots() -> None:
    storage = core.kv.KvStorage(
        num_blocks=3, num_slots=2, num_kv_heads=2, head_dim=8, block_size=32
    )
    assert storage.bytes_per_block == 2 * 2 * 2 * 32 * 8 * 2
    assert storage.bytes == 4 * storage.bytes_per_block
    assert core.kv.bytes_per_block(2, 2, 8, 32) == storage.bytes_per_block
    pages = [storage.pages(slot) for slot in range(2)]
    assert all(page.shape == (4, 2, 512) and not page.any() for page in pages)
    pages[0][1] = 7
    pages[1][1] = 9
    storage.copy_block(1, 3)
    assert (storage.pages(0)[3] == 7).all()
    assert (storage.pages(1)[3] == 9).all()
    assert not storage.pages(0)[[0, 2]].any()
    del storage
    gc.collect()
    assert (pages[0][1] == 7).all()  # the view keeps the storage alive


def test_int8_pages_are_bytes_with_two_scales_per_token() -> None:
    storage = core.kv.KvStorage(3, 2, 2, 64, 32, dtype="int8")
    assert storage.dtype == "int8"
    assert storage.bytes_per_block == 2 * 2 * (2 * 32 * 64 + 2 * 32 * 4)
    assert core.kv.bytes_per_block(2, 2, 64, 32, "int8") == storage.bytes_per_block
    assert storage.bytes_per_block < 0.54 * core.kv.bytes_per_block(2, 2, 64, 32, "bf16")
    pages = storage.pages(1)
    assert pages.dtype == np.int8
    assert pages.shape == (4, 2, 2 * 32 * 64 + 256)
    pages[1] = 7
    storage.copy_block(1, 3)
    assert (storage.pages(1)[3] == 7).all()
    assert not storage.pages(0).any()
    with pytest.raises(InvalidArgumentError, match=r"fp8.*choose bf16 or int8"):
        core.kv.KvStorage(3, 2, 2, 64, 32, dtype="fp8")


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1, 8, 16), (1, 1, 1, 8, 17), (1, 1, 1, 7, 16), (1, 1, 1, 258, 16)]
)
def test_storage_sizes_out_of_range_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        core.kv.KvStorage(*sizes)


def test_copies_outside_of_the_storage_are_refused() -> None:
    storage = core.kv.KvStorage(2, 1, 1, 8, 16)
    for pair in [(0, 1), (1, 3), (-1, 1)]:
        with pytest.raises(InvalidArgumentError):
            storage.copy_block(*pair)


def test_the_benchmark_reports_what_it_ran() -> None:
    result = core.kv.benchmark(num_blocks=256, block_size=16, num_requests=20, repeat=1)
    assert result["num_blocks"] == 256
    assert result["allocate_free_ns"] > 0
    assert result["prefix_path_ns"] > 0
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        core.kv.benchmark(num_blocks=8)
