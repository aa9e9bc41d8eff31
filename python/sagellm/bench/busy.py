"""Decode speed while another program takes a core.

Windows of decoding on an otherwise idle machine alternate with windows in which one process counts
in circles: where the system puts it, or tied to the last CPU of this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sagellm.bench import report
from sagellm.bench.decode_load import Streams, loaded_engine
from sagellm.engine.engine import Engine

_PROMPT_TOKENS = 64
_OUTPUT_TOKENS = 256
_WARM_UP_STEPS = 8  # the scheduler finds places for everybody


@dataclass(frozen=True, slots=True, kw_only=True)
class BusyResult:
    """Medians over the rounds.

    Attributes:
        idle_tps: Output tokens per second without the other program.
        free_tps, pinned_tps: With it, free to move or tied to one CPU.
        free_ratio, pinned_ratio: Those as shares of ``idle_tps``, median of the rounds.
        free_cpu, pinned_cpu: CPUs that the other program got: 1.0 is a whole one.
    """

    model: str
    threads: int
    streams: int
    rounds: int
    idle_tps: float
    free_tps: float
    free_ratio: float
    free_cpu: float
    pinned_tps: float
    pinned_ratio: float
    pinned_cpu: float


class Competitor:
    """A process that uses all the CPU time it gets, while it is not stopped."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", "while True: pass"], stdin=subprocess.DEVNULL
        )
        os.kill(self._process.pid, signal.SIGSTOP)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @contextmanager
    def running(self, cpus: set[int]) -> Iterator[None]:
        """Lets it run on ``cpus`` during the body."""
        os.sched_setaffinity(self._process.pid, cpus)
        os.kill(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def run(
    model: str, *, threads: int | None, streams: int, seconds: float, rounds: int
) -> BusyResult:
    """Decodes for ``seconds`` in each of three windows, ``rounds`` times.

    Raises:
        SagellmError: The model cannot be loaded, or its context is too short for the windows.
    """
    cpus = os.sched_getaffinity(0)
    competitor = Competitor()
    speeds: dict[str, list[float]] = {"idle": [], "free": [], "pinned": []}
    shares: dict[str, list[float]] = {"free": [], "pinned": []}
    try:
        with (
            loaded_engine(
                model,
                streams=streams,
                length=_PROMPT_TOKENS + _OUTPUT_TOKENS,
                threads=threads,
            ) as engine,
            report.progress() as bar,
        ):
            load = _Load(engine, streams)
            task = bar.add_task("busy", total=3 * rounds)
            for _ in range(rounds):
                speeds["idle"].append(load.decode(seconds))
                bar.advance(task)
                for kind, where in (("free", cpus), ("pinned", {max(cpus)})):
                    with competitor.running(where):
                        before, start = competitor.cpu_seconds(), time.perf_counter()
                        speeds[kind].append(load.decode(seconds))
                        took = time.perf_counter() - start
                        shares[kind].append((competitor.cpu_seconds() - before) / took)
                    bar.advance(task)
            team = int(getattr(engine.runner, "threads", 1))
    finally:
        competitor.close()
    ratios = {
        kind: [one / idle for one, idle in zip(speeds[kind], speeds["idle"], strict=True)]
        for kind in shares
    }
    return BusyResult(
        model=Path(model).name,
        threads=team,
        streams=streams,
        rounds=rounds,
        idle_tps=report.median(speeds["idle"]),
        free_tps=report.median(speeds["free"]),
        free_ratio=report.median(ratios["free"]),
        free_cpu=report.median(shares["free"]),
        pinned_tps=report.median(speeds["pinned"]),
        pinned_ratio=report.median(ratios["pinned"]),
        pinned_cpu=report.median(shares["pinned"]),
    )


class _Load:
    def __init__(self, engine: Engine, streams: int) -> None:
        self._engine = engine
        self._streams = streams
        self._rng = np.random.default_rng(0)

    def decode(self, seconds: float) -> float:
        """Output tokens per second of a window of decode steps; prefills do not count."""
        tokens, spent = 0, 0.0
        while spent < seconds:
            load = Streams(
                self._engine,
                self._rng,
                streams=self._streams,
                context=_PROMPT_TOKENS,
                tokens=_OUTPUT_TOKENS,
            )
            for _ in range(_WARM_UP_STEPS):
                load.step()
            before, start = load.num_output_tokens, time.perf_counter()
            while self._engine.has_work and spent + time.perf_counter() - start < seconds:
                load.step()
            spent += time.perf_counter() - start
            tokens += load.num_output_tokens - before
            load.stop()
        return tokens / spent


def show(result: BusyResult, *, as_json: bool) -> None:
    """Prints the result."""
    if as_json:
        report.print_json(asdict(result))
    else:
        report.print_table("busy host", ("figure", "value"), list(asdict(result).items()))
