"""A load on an OpenAI-compatible server, measured from outside.

The order of things: learn what the server accepts and how it counts tokens, warm up, then run every
workload at every load, one after the other. See ``docs/benchmarking.md``.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvloop

from sagellm.bench import report
from sagellm.bench.serve_client import Client, Exchange
from sagellm.bench.serve_contract import (
    CONTRACTS,
    Clause,
    ContractName,
    ServerFigures,
    judge,
    read_samples,
    server_figures,
)
from sagellm.bench.serve_dialect import (
    Dialect,
    Endpoint,
    TokenCounter,
    Vocabulary,
    learn_dialect,
    learn_vocabulary,
    model_name,
)
from sagellm.bench.serve_load import ClosedLoop, Limits, Load, OpenLoop, drive
from sagellm.bench.serve_metrics import LoadMetrics, Objectives, RequestTiming, summarize
from sagellm.bench.workloads import Conversation, Workload, conversations
from sagellm.errors import InvalidArgumentError, UnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What to measure.

    Attributes:
        model: None: the first that the server lists.
        endpoint: None: chat for conversations of several turns, else completions.
        loads: Empty: the closed loop that each workload names.
        requests: Conversations per load; None: what the workload names, but at least two per
            client, unless ``duration_s`` is given.
        warmup: Requests before the first load.
        seed: Of prompts and arrivals. None: a new one, because a server still caches the prompts of
            an earlier run with the same seed.
    """

    url: str
    workloads: Sequence[Workload]
    model: str | None = None
    endpoint: Endpoint | None = None
    api_key: str | None = None
    loads: Sequence[Load] = ()
    requests: int | None = None
    duration_s: float | None = None
    warmup: int = 2
    timeout_s: float = 600.0
    seed: int | None = None
    temperature: float = 0.0
    objectives: Objectives | None = None
    contract: ContractName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One workload at one load."""

    workload: Workload
    load: Load
    metrics: LoadMetrics
    server: ServerFigures
    contract: tuple[Clause, ...] = ()
    timings: tuple[RequestTiming, ...] = field(repr=False)

    @property
    def label(self) -> str:
        """For tables and plots."""
        return f"{self.workload.name}, {self.load.label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeResult:
    """All points, and what they were measured on.

    Attributes:
        lengths_enforced_by: Request fields that the server took to make answers as long as asked.
        interrupted: Ctrl-C ended the run; the last point holds what was complete.
    """

    url: str
    model: str
    endpoint: Endpoint
    lengths_enforced_by: tuple[str, ...]
    seed: int
    started_at: str
    cpus: int
    contract: ContractName | None
    objectives: Objectives | None
    interrupted: bool
    points: tuple[Point, ...]

    @property
    def passed(self) -> bool:
        """Whether every clause of the contract holds at every point, and every point was run."""
        clauses = [clause for point in self.points for clause in point.contract]
        return bool(clauses) and not self.interrupted and all(clause.passed for clause in clauses)


def run(options: ServeOptions) -> ServeResult:
    """Measures a server. Ctrl-C ends the run; what was complete by then is reported.

    Raises:
        UnavailableError: No server answers at the address, or not to the first requests.
        UnsupportedError: aiohttp is missing, or the server does not count tokens.
        InvalidArgumentError: Options that do not go together.
    """
    return uvloop.run(_measure(options))


async def _measure(options: ServeOptions) -> ServeResult:
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    endpoint = options.endpoint or _natural_endpoint(options.workloads)
    if endpoint == "completions" and any(w.turns > 1 for w in options.workloads):
        raise InvalidArgumentError("multi-turn is a chat; use --endpoint chat")
    started_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    async with Client(options.url, api_key=options.api_key, timeout_s=options.timeout_s) as client:
        model = options.model or await model_name(client)
        dialect = await learn_dialect(
            client, endpoint=endpoint, model=model, temperature=options.temperature
        )
        vocabulary = await learn_vocabulary(
            TokenCounter(client, dialect).count,
            endpoint,
            with_system=any(w.prefix_tokens for w in options.workloads),
        )
        bench = _Bench(client, dialect, vocabulary, options, seed)
        await bench.warm_up()
        with _stopping_at_interrupt() as stop:
            points = await bench.points(stop)
            interrupted = stop.is_set()
    return ServeResult(
        url=options.url,
        model=model,
        endpoint=endpoint,
        lengths_enforced_by=tuple(dialect.enforced_by),
        seed=seed,
        started_at=started_at,
        cpus=len(os.sched_getaffinity(0)),
        contract=options.contract,
        objectives=options.objectives,
        interrupted=interrupted,
        points=tuple(points),
    )


def _natural_endpoint(workloads: Sequence[Workload]) -> Endpoint:
    return "chat" if any(workload.turns > 1 for workload in workloads) else "completions"


class _Bench:
    def __init__(
        self,
        client: Client,
        dialect: Dialect,
        vocabulary: Vocabulary,
        options: ServeOptions,
        seed: int,
    ) -> None:
        self.client = client
        self.dialect = dialect
        self.vocabulary = vocabulary
        self.options = options
        self.seed = seed

    async def warm_up(self) -> None:
        """Some requests of each workload, one at a time; a failure means that nothing will work."""
        for workload in self.options.workloads:
            waiting = self._conversations(workload, "warm-up")
            for _ in range(self.options.warmup):
                for exchange in await self._converse(next(waiting), 0.0):
                    failure = exchange.answer().failure
                    if failure is not None:
                        raise UnavailableError(
                            f"the warm-up of {workload.name} failed: {failure.kind}: "
                            f"{failure.message}"
                        )

    async def points(self, stop: asyncio.Event) -> list[Point]:
        """Every workload at every load, up to where ``stop`` is set."""
        points: list[Point] = []
        for workload in self.options.workloads:
            loads = self.options.loads or (ClosedLoop(concurrency=workload.concurrency),)
            for load in loads:
                if not stop.is_set():
                    points.append(await self._point(workload, load, len(points), stop))
        return points

    async def _point(
        self, workload: Workload, load: Load, number: int, stop: asyncio.Event
    ) -> Point:
        limits = self._limits(workload, load)
        exchanges: list[Exchange] = []
        before = await self._samples()
        with report.progress() as bar:
            task = bar.add_task(f"{workload.name}, {load.label}", total=limits.requests)

            async def work(conversation: Conversation, late_s: float) -> None:
                await self._converse(conversation, late_s, keep=exchanges.append)
                bar.advance(task)

            unfinished = await drive(
                load,
                self._conversations(workload, number),
                work,
                limits=limits,
                stop=stop,
                seed=self.seed + number,
            )
        server = server_figures(before, await self._samples())
        timings = tuple(exchange.timing() for exchange in exchanges)
        metrics = summarize(
            timings,
            objectives=self.options.objectives,
            unfinished=unfinished,
            open_loop=isinstance(load, OpenLoop),
        )
        clauses: list[Clause] = []
        if self.options.contract is not None:
            clauses = judge(CONTRACTS[self.options.contract], metrics, server)
        return Point(
            workload=workload,
            load=load,
            metrics=metrics,
            server=server,
            contract=tuple(clauses),
            timings=timings,
        )

    def _conversations(self, workload: Workload, part: object) -> Iterator[Conversation]:
        return conversations(
            workload, self.vocabulary, self.dialect.endpoint, seed=f"{self.seed} {part}"
        )

    def _limits(self, workload: Workload, load: Load) -> Limits:
        requests = self.options.requests
        if requests is None and self.options.duration_s is None:
            requests = workload.requests
            if self.options.loads and isinstance(load, ClosedLoop):
                requests = max(requests, 2 * load.concurrency)
        return Limits(requests=requests, duration_s=self.options.duration_s)

    async def _converse(
        self,
        conversation: Conversation,
        late_s: float,
        keep: Callable[[Exchange], None] = lambda exchange: None,
    ) -> list[Exchange]:
        """Sends the requests of a conversation; the server's answers become its history."""
        content = conversation.opening
        exchanges: list[Exchange] = []
        for turn in range(1 + len(conversation.follow_ups)):
            if turn > 0:
                answer = exchanges[-1].answer()
                if answer.failure is not None or isinstance(content, str):
                    break
                said = {"role": "assistant", "content": answer.text}
                asked = {"role": "user", "content": conversation.follow_ups[turn - 1]}
                content = [*content, said, asked]
            body = self.dialect.body(content, conversation.output_tokens)
            exchange = await self.client.stream(
                self.dialect.path, body, late_s=late_s if turn == 0 else 0.0
            )
            exchange.asked_prompt_tokens = conversation.prompt_tokens if turn == 0 else None
            exchange.asked_output_tokens = conversation.output_tokens
            exchanges.append(exchange)
            keep(exchange)
        return exchanges

    async def _samples(self) -> dict[str, float] | None:
        """The server's own figures; None when it has none, or is no more."""
        try:
            status, content = await self.client.fetch("/metrics")
        except UnavailableError:
            return None
        return read_samples(content.decode(errors="replace")) if status == 200 else None


@contextmanager
def _stopping_at_interrupt() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C sets; the second is an ordinary one."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    previous = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, previous)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        if not stop.is_set():
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, previous)
