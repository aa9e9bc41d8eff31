"""Where the time of a step goes: every phase of the decoder, waiting, and Python.

The native step notes the time between its phases on every thread; see ``model/phase_timer.h``. A
case is run ``repeat`` times, and the run with the median time per step is reported, so that the
phases add up to the step.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np

from sagellm.backends.cpu import CpuRunner, PhaseTimes
from sagellm.bench import report
from sagellm.bench.decode_load import Streams, loaded_engine
from sagellm.engine.engine import Engine
from sagellm.native import load_core

HOST = "host"
_PROBE_BYTES = 128 << 20
_WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """One case.

    Attributes:
        streams: Sequences in the step; 1 for a prefill.
        context: Positions before the first measured step; of a prefill, its length.
        steps: Measured ones of the reported run.
        step_ms: Wall time of one engine step, or of the whole prefill.
        tokens_per_second: Output tokens, or prompt tokens of a prefill.
        phases: Milliseconds of a step by phase, mean over the threads. ``wait`` is for other
            threads, ``host`` everything outside of the native step: scheduler, batch, output.
        attention_gbps: Bytes of keys and values of a decode step, in 10^9, per second of the
            thread that attends longest. None for a prefill.
        probe_gbps: Read bandwidth in the same minute.
        attention_percent: The one of the other.
        host_percent: ``host`` and sampling of the step: what batching and choosing cost.
        runs: ``step_ms`` of every run.
    """

    case: str
    isa: str
    threads: int
    streams: int
    context: int
    steps: int
    step_ms: float
    tokens_per_second: float
    phases: dict[str, float]
    attention_gbps: float | None
    probe_gbps: float
    attention_percent: float | None
    host_percent: float
    runs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    seconds: float
    tokens: int
    times: PhaseTimes


def run(
    model: str,
    *,
    streams: tuple[int, ...],
    context: int,
    prefill: int,
    steps: int,
    threads: int | None,
    repeat: int,
    precision: str | None = None,
    temperature: float = 0.0,
) -> list[PhaseResult]:
    """Measures ``steps`` decode steps of every number of streams, and a prefill (0: none).

    Raises:
        InvalidArgumentError: The sizes exceed the model's context.
        SagellmError: The model cannot be loaded.
    """
    length = max(context + steps + _WARM_UP_STEPS + 1, prefill + 1)
    with (
        loaded_engine(
            model,
            streams=max(1, *streams) if streams else 1,
            length=length,
            threads=threads,
            precision=precision,
        ) as engine,
        report.progress() as bar,
    ):
        bench = _Bench(engine, context, temperature)
        task = bar.add_task("phases", total=(len(streams) + bool(prefill)) * repeat)
        results = []
        for count in streams:
            runs = []
            for _ in range(repeat):
                runs.append(bench.decode(count, steps))
                bar.advance(task)
            results.append(bench.decode_result(count, runs))
        if prefill:
            runs = []
            bench.prefill(prefill)  # touches the pages
            for _ in range(repeat):
                runs.append(bench.prefill(prefill))
                bar.advance(task)
            results.append(bench.prefill_result(prefill, runs))
        return results


class _Bench:
    def __init__(self, engine: Engine, context: int, temperature: float) -> None:
        self._engine = engine
        self._runner = cast(CpuRunner, engine.runner)
        self._context = context
        self._temperature = temperature
        self._rng = np.random.default_rng(0)

    def decode(self, count: int, steps: int) -> _Run:
        load = Streams(
            self._engine,
            self._rng,
            streams=count,
            context=self._context,
            tokens=steps + _WARM_UP_STEPS + 1,
            temperature=self._temperature,
        )
        for _ in range(_WARM_UP_STEPS):
            load.step()
        before = load.num_output_tokens
        self._runner.time_phases(True)
        start = time.perf_counter()
        for _ in range(steps):
            load.step()
        seconds = time.perf_counter() - start
        times = self._runner.phase_times()
        self._runner.time_phases(False)
        tokens = load.num_output_tokens - before
        load.stop()
        return _Run(seconds=seconds, tokens=tokens, times=times)

    def prefill(self, tokens: int) -> _Run:
        self._runner.time_phases(True)
        load = Streams(self._engine, self._rng, streams=1, context=tokens, tokens=1)
        times = self._runner.phase_times()
        self._runner.time_phases(False)
        load.stop()
        return _Run(seconds=load.prefill_seconds, tokens=tokens, times=times)

    def decode_result(self, count: int, runs: list[_Run]) -> PhaseResult:
        case = f"decode, {count} stream{'s' if count > 1 else ''} at {self._context}"
        read = count * self._kv_bytes()
        return self._result(case, count, self._context, runs, read, per="step")

    def prefill_result(self, tokens: int, runs: list[_Run]) -> PhaseResult:
        return self._result(f"prefill {tokens}", 1, tokens, runs, None, per="run")

    def _result(
        self,
        case: str,
        streams: int,
        context: int,
        runs: list[_Run],
        kv_bytes: float | None,
        *,
        per: str,
    ) -> PhaseResult:
        chosen = sorted(runs, key=lambda one: one.seconds)[len(runs) // 2]
        times = chosen.times
        parts = times.steps if per == "step" else 1
        threads = times.threads
        phases = {
            name: 1e3 * sum(thread[name] for thread in threads) / len(threads) / parts
            for name in threads[0]
        }
        step_ms = 1e3 * chosen.seconds / parts
        phases[HOST] = step_ms - 1e3 * times.seconds / parts
        probe = load_core().runtime.read_bandwidth(self._runner.threads, _PROBE_BYTES, 5) / 1e9
        rate = None
        if kv_bytes is not None:
            attention = max(thread["attention"] for thread in threads) / parts
            rate = kv_bytes / attention / 1e9
        return PhaseResult(
            case=case,
            isa=self._runner.isa,
            threads=self._runner.threads,
            streams=streams,
            context=context,
            steps=times.steps,
            step_ms=step_ms,
            tokens_per_second=chosen.tokens / chosen.seconds,
            phases=phases,
            attention_gbps=rate,
            probe_gbps=probe,
            attention_percent=None if rate is None else 100 * rate / probe,
            host_percent=100 * (phases[HOST] + phases["sample"]) / step_ms,
            runs=tuple(1e3 * one.seconds / parts for one in runs),
        )

    def _kv_bytes(self) -> float:
        """Bytes of keys and values that one stream reads in a step at the context."""
        config, block = self._runner.config, self._engine.config.block_size
        slots = max(len(group.layers) for group in self._runner.kv_groups)
        per_token = self._runner.kv_bytes_per_block(block) / block / slots  # of one layer
        return per_token * sum(
            min(self._context, window) if window else self._context
            for window in config.layer_windows
        )


def show(results: list[PhaseResult], *, as_json: bool) -> None:
    """Prints one column for each case."""
    if as_json:
        report.print_json([asdict(r) for r in results])
        return
    columns = ["ms (% of the step)", *(r.case for r in results)]
    rows: list[tuple[object, ...]] = []
    for phase in results[0].phases:
        rows.append((phase, *(_share(r, phase) for r in results)))
    rows.append(("step", *(f"{r.step_ms:.3f}" for r in results)))
    rows.append(("tokens/s", *(r.tokens_per_second for r in results)))
    rows.append(("attention, GB/s", *(_or_dash(r.attention_gbps) for r in results)))
    rows.append(("probe, GB/s", *(r.probe_gbps for r in results)))
    rows.append(("attention, % of probe", *(_or_dash(r.attention_percent) for r in results)))
    rows.append(("host + sample, %", *(r.host_percent for r in results)))
    first = results[0]
    report.print_table(f"phases, {first.threads} threads, {first.isa}", columns, rows)


def _share(result: PhaseResult, phase: str) -> str:
    value = result.phases[phase]
    return f"{value:.3f} ({100 * value / result.step_ms:.1f} %)"


def _or_dash(value: float | None) -> object:
    return "-" if value is None else value
