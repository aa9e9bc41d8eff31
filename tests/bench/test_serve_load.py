"""When `bench serve` sends: distributions of arrivals, limits, and the end of a run."""

from __future__ import annotations

import asyncio
import itertools
import math
from concurrent.futures import Future

import numpy as np
import pytest

from sagellm.bench import serve_load
from sagellm.bench.serve_load import Arrival, ClosedLoop, Limits, OpenLoop, drive
from sagellm.errors import InvalidArgumentError


def gaps(load: OpenLoop, count: int = 20000, seed: int = 1, **options: float) -> np.ndarray:
    found = list(itertools.islice(load.gaps(seed, **options), count + 1))  # type: ignore[arg-type]
    assert found[0] == 0
    return np.array(found[1:])


@pytest.mark.parametrize(
    ("arrival", "burstiness", "variation"),
    (("poisson", 1, 1.0), ("gamma", 1, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4, 0.5)),
)
def test_gaps_have_the_mean_and_the_variation_of_their_process(
    arrival: Arrival, burstiness: float, variation: float
) -> None:
    found = gaps(OpenLoop(rate=8, arrival=arrival, burstiness=burstiness))
    assert found.mean() == pytest.approx(1 / 8, rel=0.05)
    assert found.std() / found.mean() == pytest.approx(variation, rel=0.05)  # 1 / sqrt(shape)


def test_fixed_gaps_are_equal_and_random_ones_follow_the_seed() -> None:
    assert set(gaps(OpenLoop(rate=4, arrival="fixed"), 100)) == {0.25}
    load = OpenLoop(rate=4)
    assert (gaps(load, seed=1) == gaps(load, seed=1)).all()
    assert (gaps(load, seed=1) != gaps(load, seed=2)).any()


def test_a_ramp_rises_linearly_over_the_requests_or_the_duration() -> None:
    load = OpenLoop(rate=10, arrival="fixed", ramp_from=2)
    found = gaps(load, 8, requests=8)
    assert 1 / found == pytest.approx([3, 4, 5, 6, 7, 8, 9, 10])
    found = gaps(load, 100, duration_s=5)
    moments = np.concatenate([[0], np.cumsum(found)[:-1]])
    assert 1 / found == pytest.approx(np.minimum(10, 2 + 8 * moments / 5))


@pytest.mark.parametrize(
    "wrong",
    (
        {"rate": 0.0},
        {"rate": math.inf},
        {"rate": math.nan},
        {"rate": 1.0, "burstiness": 0.0, "arrival": "gamma"},
        {"rate": 1.0, "burstiness": 0.5},
        {"rate": 1.0, "ramp_from": 0.0},
    ),
)
def test_loads_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError):
        OpenLoop(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="--requests or --duration"):
        Limits()


class Work:
    """Jobs that end when told, and how many ran at once."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.finished: list[int] = []
        self.most = 0
        self.release = asyncio.Event()

    async def __call__(self, job: int, late_s: float) -> None:
        assert late_s >= 0
        self.started.append(job)
        self.most = max(self.most, len(self.started) - len(self.finished))
        await self.release.wait()
        for _ in range(job % 3):
            await asyncio.sleep(0)
        self.finished.append(job)


def test_a_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    async def scenario() -> None:
        work = Work()
        run = asyncio.ensure_future(
            drive(
                ClosedLoop(concurrency=4),
                itertools.count(),
                work,
                limits=Limits(requests=50),
                stop=asyncio.Event(),
            )
        )
        while len(work.started) < 4:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert work.started == [0, 1, 2, 3]
        work.release.set()
        assert await run == 0
        assert sorted(work.finished) == list(range(50))
        assert work.most == 4

    asyncio.run(scenario())


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def scenario() -> None:
        work = Work()
        run = asyncio.ensure_future(
            drive(
                OpenLoop(rate=1e6),
                itertools.count(),
                work,
                limits=Limits(requests=50),
                stop=asyncio.Event(),
            )
        )
        while len(work.started) < 50:
            await asyncio.sleep(0)
        work.release.set()
        assert await run == 0
        assert len(work.finished) == work.most == 50

    asyncio.run(scenario())


@pytest.mark.parametrize("load", (ClosedLoop(concurrency=3), OpenLoop(rate=1e6)))
def test_a_stop_cancels_what_is_in_flight_and_counts_it(load: ClosedLoop | OpenLoop) -> None:
    async def scenario() -> None:
        work = Work()
        stop = asyncio.Event()
        run = asyncio.ensure_future(
            drive(load, iter(range(3)), work, limits=Limits(requests=9), stop=stop)
        )
        while len(work.started) < 3:
            await asyncio.sleep(0)
        stop.set()
        assert await run == 3
        assert work.finished == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


@pytest.mark.parametrize("load", (ClosedLoop(concurrency=3), OpenLoop(rate=1e6)))
def test_a_fault_of_the_client_itself_ends_the_run(load: ClosedLoop | OpenLoop) -> None:
    async def work(job: int, late_s: float) -> None:
        if job == 2:
            raise ZeroDivisionError
        await asyncio.Event().wait()

    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):
            await drive(load, iter(range(3)), work, limits=Limits(requests=3), stop=asyncio.Event())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_nothing_is_sent_after_the_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(serve_load, "clock", lambda: now)
    sent = []

    async def work(job: int, late_s: float) -> None:
        nonlocal now
        now += 1.0
        sent.append(job)

    async def scenario(load: ClosedLoop | OpenLoop) -> int:
        nonlocal now
        now = 0.0
        sent.clear()
        limits = Limits(duration_s=4.5)
        await drive(load, itertools.count(), work, limits=limits, stop=asyncio.Event())
        return len(sent)

    assert asyncio.run(scenario(ClosedLoop(concurrency=1))) == 5
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: asyncio.wrap_future(_done()))
    assert asyncio.run(scenario(OpenLoop(rate=2, arrival="fixed"))) == 9  # 0, 0.5, ... 4.0


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
