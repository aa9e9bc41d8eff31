"""The calls to NCCL: on a library that runs on the CPU, whose ranks are threads, and as far as a
real one goes here."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda.attention_reference import from_bits, to_bits
from sagellm.backends import nccl
from sagellm.errors import DeviceUnavailableError, SagellmError

RANKS = 3


@pytest.fixture
def library(emulated: ModuleType, fake_nccl_folder: str) -> Any:
    return emulated.Nccl([fake_nccl_folder])


@pytest.fixture
def run(emulated: ModuleType, library: Any) -> Callable[[Callable[[Any], Any]], list[Any]]:
    """Calls work(communicator) in one thread per rank; the results in their order."""

    def run_ranks(work: Callable[[Any], Any]) -> list[Any]:
        name = library.make_id()

        def rank(index: int) -> Any:
            return work(emulated.Communicator(library, name, index, RANKS))

        with ThreadPoolExecutor(RANKS) as threads:
            return list(threads.map(rank, range(RANKS)))

    return run_ranks


def values_of(rank: int, count: int = RANKS * 8) -> NDArray[np.float32]:
    return np.random.default_rng(rank).integers(-8, 9, count).astype(np.float32)


ALL = np.stack([values_of(rank) for rank in range(RANKS)])


pytestmark = pytest.mark.build


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reductions_run_over_all_ranks(
    emulated: ModuleType, run: Any, dtype: str, reduction: str
) -> None:
    def bits(values: NDArray[Any]) -> NDArray[Any]:
        return values if dtype == "float32" else to_bits(values, dtype)

    def values(array: Any) -> NDArray[Any]:
        got: NDArray[Any] = array.numpy()
        return got if dtype == "float32" else from_bits(got, dtype)

    def work(c: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        whole = emulated.array(bits(ALL[c.rank]))
        part = emulated.array(bits(np.zeros(8, np.float32)))
        c.reduce_scatter(whole, part, type=dtype, reduction=reduction)
        c.all_reduce(whole, whole, type=dtype, reduction=reduction)
        c.finish()
        return values(whole), values(part)

    expected = ALL.sum(axis=0) if reduction == "sum" else ALL.max(axis=0)
    for rank, (whole, part) in enumerate(run(work)):
        assert np.array_equal(whole, expected)
        assert np.array_equal(part, expected[rank * 8 : rank * 8 + 8])


def test_bytes_move_between_ranks(emulated: ModuleType, run: Any) -> None:
    def work(c: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        mine = emulated.array(ALL[c.rank])
        gathered = emulated.empty([RANKS, RANKS * 8], np.dtype(np.float32))
        c.all_gather(mine, gathered)
        received = emulated.empty([RANKS * 8], np.dtype(np.float32))

        def pass_on() -> None:  # a ring: every send waits for its receiver
            c.receive(received, (c.rank - 1) % RANKS)
            c.send(mine, (c.rank + 1) % RANKS)

        c.group(pass_on)
        c.broadcast(mine, root=1)
        c.finish()
        return gathered.numpy(), received.numpy(), mine.numpy()

    for rank, (gathered, received, broadcast) in enumerate(run(work)):
        assert np.array_equal(gathered, ALL)
        assert np.array_equal(received, ALL[(rank - 1) % RANKS])
        assert np.array_equal(broadcast, ALL[1])


def test_a_group_starts_at_its_end_and_ends_after_an_error(emulated: ModuleType, run: Any) -> None:
    def work(c: Any) -> NDArray[Any]:
        x = emulated.array(ALL[c.rank])
        y = emulated.array(ALL[c.rank])

        def both() -> None:
            c.all_reduce(x, x)
            c.all_reduce(y, y, reduction="max")
            assert np.array_equal(x.numpy(), ALL[c.rank])

        c.group(both)
        with pytest.raises(KeyError, match="wrong"):
            c.group(lambda: {}["wrong"])
        c.all_reduce(y, y)  # at once: no group is open
        c.finish()
        result: NDArray[Any] = x.numpy() + y.numpy()
        return result

    expected = ALL.sum(axis=0) + RANKS * ALL.max(axis=0)
    assert all(np.array_equal(result, expected) for result in run(work))


def test_ranks_that_ask_for_different_things_are_told(emulated: ModuleType, run: Any) -> None:
    def work(c: Any) -> str:
        x = emulated.array(ALL[c.rank])
        with pytest.raises(SagellmError) as error:
            c.all_reduce(x, x, reduction="max" if c.rank == 1 else "sum")
        return str(error.value)

    for message in run(work):
        assert message == "ncclAllReduce: invalid usage (NCCL status 5): fake"


def test_a_rank_that_cancels_is_seen_by_the_others(
    emulated: ModuleType, library: Any, count_alive: Callable[[], int]
) -> None:
    before = count_alive()
    name = library.make_id()
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda r: emulated.Communicator(library, name, r, 2), range(2))
    assert first.async_error() == "" and count_alive() == before + 2
    second.cancel()
    assert "remote process exited" in first.async_error()
    x = emulated.array(ALL[0])
    with pytest.raises(SagellmError, match="ncclAllReduce: remote process exited"):
        first.all_reduce(x, x)
    with pytest.raises(SagellmError, match="has ended"):
        second.all_reduce(x, x)
    del first  # as an exception would leave it
    assert count_alive() == before


@pytest.fixture
def count_alive(fake_nccl_folder: str) -> Callable[[], int]:
    """Communicators that nobody has ended."""
    count: Callable[[], int] = ctypes.CDLL(f"{fake_nccl_folder}/libnccl.so.2").fake_nccl_alive
    return count


def test_a_rank_that_never_joins_is_not_waited_for_beyond_the_timeout(
    emulated: ModuleType, library: Any, count_alive: Callable[[], int]
) -> None:
    before = count_alive()
    with pytest.raises(
        SagellmError,
        match=r"ncclCommInitRankConfig: rank 0 of 2 waited 0.01 s for the other ranks; start every",
    ):
        emulated.Communicator(library, library.make_id(), 0, 2, timeout_s=0.01)
    assert count_alive() == before


def test_a_rank_that_never_sends_is_not_waited_for_beyond_the_timeout(
    emulated: ModuleType, library: Any, count_alive: Callable[[], int]
) -> None:
    before = count_alive()
    x = emulated.array(ALL[0])
    for ask, name in (
        (lambda c: c.receive(x, 0), "ncclRecv"),
        (lambda c: c.group(lambda: c.receive(x, 0)), "ncclGroupEnd"),
    ):
        alone = emulated.Communicator(library, library.make_id(), 0, 1, timeout_s=0.01)
        with pytest.raises(SagellmError, match=rf"^{name}: rank 0 of 1 waited .* raise timeout_s$"):
            ask(alone)
        assert count_alive() == before
        with pytest.raises(SagellmError, match="has ended"):
            alone.all_reduce(x, x)


def test_what_cannot_be_is_refused_before_nccl_sees_it(emulated: ModuleType, library: Any) -> None:
    name = library.make_id()
    assert len(name) == 128 and name != library.make_id()
    with pytest.raises(ValueError, match="an id has 128 bytes, not 5"):
        emulated.Communicator(library, b"wrong", 0, 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        emulated.Communicator(library, name, 2, 2)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"timeout is .* s; it must be above 0"):
            emulated.Communicator(library, name, 0, 1, timeout_s=seconds)
    alone = emulated.Communicator(library, name, 0, 1)
    x = emulated.array(ALL[0])
    for call in (
        lambda: alone.broadcast(x, root=1),
        lambda: alone.send(x, -1),
        lambda: alone.receive(x, 1),
    ):
        with pytest.raises(ValueError, match="there are 1 ranks"):
            call()
    with pytest.raises(ValueError, match="reduction is 'mean'; choose sum or max"):
        alone.all_reduce(x, x, reduction="mean")
    with pytest.raises(ValueError, match="out has 2 elements"):
        alone.all_reduce(x, emulated.array(ALL[0][:2]))
    with pytest.raises(ValueError, match="out has 8 bytes; 96 are needed"):
        alone.all_gather(x, emulated.array(ALL[0][:2]))
    alone.finish()


def test_a_missing_nccl_says_how_to_get_it(emulated: ModuleType, tmp_path: Path) -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnccl.so.2")
        pytest.skip("this system has NCCL")
    (tmp_path / "libnccl.so.2").write_text("not a library")
    with pytest.raises(
        DeviceUnavailableError, match=r"NCCL was not found .*too short.*pip install 'sagellm\[nccl"
    ):
        emulated.Nccl([str(tmp_path)])


def test_a_library_that_is_another_says_what_it_lacks(
    emulated: ModuleType, fake_cublas_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "libnccl.so.2").symlink_to(f"{fake_cublas_folder}/libcublasLt.so.13")
    with pytest.raises(DeviceUnavailableError, match="has no function ncclGetVersion; pip install"):
        emulated.Nccl([str(tmp_path)])


def test_the_description_names_version_and_path(
    emulated: ModuleType, fake_nccl_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "nccl_folders", lambda: [fake_nccl_folder])
    assert nccl.describe_nccl(emulated) == f"2.28.9, {fake_nccl_folder}/libnccl.so.2"


def test_wheels_are_found_where_they_unpack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nccl" / "lib").mkdir(parents=True)

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    assert nccl.nccl_folders() == [str(tmp_path / "nccl" / "lib")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert nccl.nccl_folders() == []


def test_the_installed_nccl_has_every_function(emulated: ModuleType) -> None:
    """The real library, where there is one: it loads without a driver, and says what it misses."""
    try:
        library = emulated.Nccl(nccl.nccl_folders())
    except DeviceUnavailableError as error:
        pytest.skip(str(error))
    assert 21800 <= library.version < 30000
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return  # with a driver the emulator's arrays are not its device's
    with pytest.raises(SagellmError, match=r"^nccl\w+: .* \(NCCL status [1-9]\)"):
        emulated.Communicator(library, library.make_id(), 0, 1)
