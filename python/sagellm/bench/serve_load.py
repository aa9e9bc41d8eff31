"""When requests are sent: so many clients at once, or arrivals that no answer slows down."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np

from sagellm.bench.serve_client import clock
from sagellm.errors import InvalidArgumentError

Arrival = Literal["poisson", "gamma", "fixed"]
Job = TypeVar("Job")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """``concurrency`` clients, each of which sends when its last answer is complete."""

    concurrency: int

    unit: ClassVar[str] = "clients at once"

    @property
    def label(self) -> str:
        """For tables and plots."""
        return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"

    @property
    def value(self) -> float:
        """Position on the axis of loads."""
        return float(self.concurrency)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Arrivals at ``rate`` requests per second on average, whatever the server does.

    Attributes:
        burstiness: Shape of the gamma distribution of gaps; 1 is Poisson, below 1 is burstier.
        ramp_from: The rate rises linearly from here to ``rate`` over the requests or the duration.
    """

    rate: float
    arrival: Arrival = "poisson"
    burstiness: float = 1.0
    ramp_from: float | None = None

    unit: ClassVar[str] = "requests/s"

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise InvalidArgumentError(f"--rate is {self.rate:g}; give requests per second above 0")
        if not 0 < self.burstiness < math.inf:
            raise InvalidArgumentError(f"--burstiness is {self.burstiness:g}; it is above 0")
        if self.burstiness != 1 and self.arrival != "gamma":
            raise InvalidArgumentError("--burstiness shapes --arrival gamma; give both")
        if self.ramp_from is not None and not 0 < self.ramp_from < math.inf:
            raise InvalidArgumentError(f"--ramp-from is {self.ramp_from:g}; it is above 0")

    @property
    def label(self) -> str:
        """For tables and plots."""
        ramp = "" if self.ramp_from is None else f"{self.ramp_from:g} to "
        return f"{ramp}{self.rate:g} requests/s"

    @property
    def value(self) -> float:
        """Position on the axis of loads."""
        return self.rate

    def gaps(
        self, seed: int, *, requests: int | None = None, duration_s: float | None = None
    ) -> Iterator[float]:
        """Seconds before each next request, without end; the first request does not wait.

        A ramp needs one of ``requests`` and ``duration_s`` to know how far it has come.
        """
        rng = np.random.default_rng(seed)
        elapsed = 0.0
        sent = 1
        yield 0.0
        while True:
            rate = self.rate
            if self.ramp_from is not None:
                shares = [sent / requests] if requests else []
                shares += [elapsed / duration_s] if duration_s else []
                rate = self.ramp_from + (rate - self.ramp_from) * min(1.0, max(shares, default=1.0))
            gap = 1.0 / rate
            if self.arrival == "poisson":
                gap = float(rng.exponential(gap))
            elif self.arrival == "gamma":
                gap = float(rng.gamma(self.burstiness, gap / self.burstiness))
            yield gap
            elapsed += gap
            sent += 1


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When no more requests are sent: after so many, or so many seconds, whichever is first."""

    requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.requests is None and self.duration_s is None:
            raise InvalidArgumentError("give --requests or --duration")


async def drive(
    load: Load,
    jobs: Iterator[Job],
    work: Callable[[Job, float], Awaitable[None]],
    *,
    limits: Limits,
    stop: asyncio.Event,
    seed: int = 0,
) -> int:
    """Runs ``work(job, late_s)`` as the load asks until the limits are reached.

    Requests in flight at the limits are finished. When ``stop`` is set, they are cancelled.

    Returns:
        How many jobs were cancelled.
    """
    active = 0

    async def counted(job: Job, late_s: float) -> None:
        nonlocal active
        active += 1
        try:
            await work(job, late_s)
        finally:
            active -= 1

    if isinstance(load, ClosedLoop):
        sending = asyncio.ensure_future(_closed(load, jobs, counted, limits))
    else:
        sending = asyncio.ensure_future(_open(load, jobs, counted, limits, seed))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({sending, stopped}, return_when=asyncio.FIRST_COMPLETED)
        unfinished = active
        if sending.done():
            sending.result()
    finally:
        sending.cancel()
        stopped.cancel()
        await asyncio.gather(sending, stopped, return_exceptions=True)
    return unfinished


async def _closed(
    load: ClosedLoop,
    jobs: Iterator[Job],
    work: Callable[[Job, float], Awaitable[None]],
    limits: Limits,
) -> None:
    until = math.inf if limits.duration_s is None else clock() + limits.duration_s
    limited = itertools.islice(jobs, limits.requests)

    async def client() -> None:
        while clock() < until and (job := next(limited, None)) is not None:
            await work(job, 0.0)

    await _all([asyncio.ensure_future(client()) for _ in range(load.concurrency)])


async def _open(
    load: OpenLoop,
    jobs: Iterator[Job],
    work: Callable[[Job, float], Awaitable[None]],
    limits: Limits,
    seed: int,
) -> None:
    start = clock()
    gaps = load.gaps(seed, requests=limits.requests, duration_s=limits.duration_s)
    planned = 0.0
    tasks: list[asyncio.Future[None]] = []
    try:
        for job in itertools.islice(jobs, limits.requests):
            planned += next(gaps)
            if limits.duration_s is not None and planned >= limits.duration_s:
                break
            await asyncio.sleep(max(0.0, start + planned - clock()))
            tasks.append(asyncio.ensure_future(work(job, clock() - start - planned)))
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    await _all(tasks)


async def _all(tasks: list[asyncio.Future[None]]) -> None:
    """Waits for all; when one fails or this is cancelled, the others are cancelled."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
