"""Runs a plan: rounds of drivers, one after the other, on an idle machine."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from sagellm.bench import machine
from sagellm.bench.compare import plan as planned
from sagellm.bench.compare.kept import KeptDrivers
from sagellm.bench.compare.plan import Case, Entrant, Plan
from sagellm.errors import SagellmError, UnavailableError

_GIVE_UP_AFTER = 2  # failures in a row
_SHORTEST = 32  # drivers warm up with so many tokens

Say = Callable[[str], None]
Save = Callable[["Comparison"], None]


@dataclass(slots=True, kw_only=True)
class Measurement:
    """One entrant in one round.

    Attributes:
        values: By the names of figures; what a failure cut off is missing.
        bytes_per_token: By the names of decode cases, where the engine knows.
        foreign_cpu: Share of all CPU time, 0 to 1, that neither the entrant nor this process used;
            0 with a failure, since what is ended with force leaves no account.
        facts: What the driver says of itself.
        failure: Why figures are missing.
    """

    round: int
    engine: str
    model: str
    values: dict[str, float] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    foreign_cpu: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


@dataclass(slots=True, kw_only=True)
class Round:
    """What was seen of the machine before a round."""

    index: int
    load: float
    busiest: tuple[str, ...]
    was_idle: bool


@dataclass(slots=True, kw_only=True)
class Comparison:
    """All that was measured so far.

    Attributes:
        interrupted: Whether Ctrl-C ended it.
        stopped: Why it ended before its last round, Ctrl-C apart.
    """

    plan: Plan
    started_at: str
    machine: dict[str, str | int | float]
    rounds: list[Round] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    interrupted: bool = False
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but the derived figures."""
        return {
            "started_at": self.started_at,
            "interrupted": self.interrupted,
            "stopped": self.stopped,
            "machine": self.machine,
            "plan": asdict(self.plan),
            "rounds": [asdict(one) for one in self.rounds],
            "measurements": [asdict(one) for one in self.measurements],
        }


def run(plan: Plan, *, say: Say, save: Save) -> Comparison:
    """Measures; Ctrl-C, and a machine that gets busy, end it with what is complete.

    Args:
        plan: What to measure.
        say: Told of every step.
        save: Given the comparison after every round, and at an interruption.

    Raises:
        UnavailableError: The machine is busy from the start and may not be.
    """
    comparison = Comparison(
        plan=plan,
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine.describe(),
    )
    failures: dict[Entrant, int] = {}
    try:
        with KeptDrivers() as kept:
            for index in range(plan.rounds):
                _run_round(comparison, index, kept, failures, say)
                save(comparison)
    except KeyboardInterrupt:
        comparison.interrupted = True
        save(comparison)
    except UnavailableError as error:
        if not comparison.measurements:
            raise
        comparison.stopped = str(error)
        save(comparison)
    return comparison


def _run_round(
    comparison: Comparison,
    index: int,
    kept: KeptDrivers,
    failures: dict[Entrant, int],
    say: Say,
) -> None:
    plan = comparison.plan
    where = f"round {index + 1} of {plan.rounds}"
    _check_machine(comparison, index, lambda words: say(f"{where}: {words}"))
    for entrant in plan.order(index):
        if failures.get(entrant, 0) >= _GIVE_UP_AFTER:
            continue
        measurement = _measure(plan, entrant, index, kept, lambda words: say(f"{where}, {words}"))
        comparison.measurements.append(measurement)
        if index == plan.last_round(entrant):
            kept.end(entrant)
        failed = measurement.failure is not None
        failures[entrant] = failures.get(entrant, 0) + 1 if failed else 0


def _check_machine(comparison: Comparison, index: int, say: Say) -> None:
    plan = comparison.plan
    load = machine.wait_until_idle(patience_s=plan.patience_s, allow_busy=plan.allow_busy, say=say)
    if not load.is_idle:
        say(f"the machine is busy, and --allow-busy: {load}")
    comparison.rounds.append(
        Round(index=index, load=load.share, busiest=load.processes, was_idle=load.is_idle)
    )


def _measure(plan: Plan, entrant: Entrant, index: int, kept: KeptDrivers, say: Say) -> Measurement:
    result = Measurement(round=index, engine=entrant.engine, model=entrant.model)
    is_new = not kept.has(entrant)
    say(f"{entrant.title}: {'starting' if is_new else 'continuing'}")
    command = [*entrant.command, json.dumps(_specification(plan, entrant, index))]
    environment = _environment(plan, entrant)
    before, own_before = machine.cpu_times(by_process=False), _own_cpu_seconds(kept)
    try:
        start = time.perf_counter()
        with kept.turn(entrant, command, environment, seed=index) as driver:
            for event in driver.events(plan.timeout_s):
                _take(result, event, time.perf_counter() - start)
                if event["event"] == "case" and is_new and planned.MEMORY not in result.values:
                    peak = event.get("peak_mb")
                    result.values[planned.MEMORY] = peak or driver.peak_memory_mb()
                if event["event"] == "case":
                    say(f"{entrant.title}: {event['name']} {event['value']:,.1f}")
    except (SagellmError, OSError, ValueError, KeyError) as error:
        result.failure = str(error)
        say(f"{entrant.title}: FAILED: {error}")
        return result
    after = machine.cpu_times(by_process=False)
    foreign = after.busy - before.busy - (_own_cpu_seconds(kept) - own_before)
    result.foreign_cpu = max(0.0, foreign) / max(after.total - before.total, 1e-9)
    return result


def _take(result: Measurement, event: dict[str, Any], seconds: float) -> None:
    if event["event"] == "first_token":
        own = event.get("seconds")
        result.values[planned.START] = seconds if own is None else float(own)
    elif event["event"] == "case":
        result.values[event["name"]] = float(event["value"])
        if event.get("bytes_per_token") is not None:
            result.bytes_per_token[event["name"]] = float(event["bytes_per_token"])
    elif event["event"] == "end":
        result.facts = dict(event["facts"])


def _specification(plan: Plan, entrant: Entrant, index: int) -> dict[str, Any]:
    return {
        "driver": entrant.driver,
        "model": entrant.model,
        "bin": entrant.programs,
        "threads": plan.threads,
        "seed": index,
        "max_streams": max(case.streams for case in plan.cases),
        "max_length": max(_SHORTEST, *(_length(case) for case in plan.cases)) + 1,
        "max_tokens": max(case.streams * _length(case) for case in plan.cases),
        "cases": [{"name": case.name, **asdict(case)} for case in plan.cases],
    }


def _length(case: Case) -> int:
    return case.prompt_tokens + case.output_tokens


def _environment(plan: Plan, entrant: Entrant) -> dict[str, str]:
    """Ours without what steers Python, and the number of threads for libraries that take it so."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if entrant.engine == planned.SAGELLM:
        kept = dict(os.environ)
    threads = str(plan.threads)
    settings = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept | settings | dict(entrant.environment)


def _own_cpu_seconds(kept: KeptDrivers) -> float:
    """Of this process, of all that it has waited for, and of the drivers that wait."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kept.cpu_seconds() + sum(usage.ru_utime + usage.ru_stime for usage in usages)
