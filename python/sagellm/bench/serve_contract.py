"""The yearly contracts: bounds on what a load measured, each with a verdict.

A figure that was not measured fails its clause. Memory, prefix hits and accepted speculation are
read from the server's own ``/metrics``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sagellm.bench.serve_metrics import Distribution, LoadMetrics

ContractName = Literal["year1", "year2", "year3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """Bounds; None: no clause."""

    ttft_ms: float
    tbt_ms: float
    throughput_tps: float
    error_rate: float
    memory_mb: float
    prefix_hit_rate: float | None = None
    spec_accept_rate: float | None = None


CONTRACTS: dict[ContractName, Contract] = {
    "year1": Contract(ttft_ms=100, tbt_ms=20, throughput_tps=50, error_rate=0.05, memory_mb=32768),
    "year2": Contract(
        ttft_ms=50,
        tbt_ms=10,
        throughput_tps=100,
        error_rate=0.02,
        memory_mb=24576,
        prefix_hit_rate=0.70,
    ),
    "year3": Contract(
        ttft_ms=30,
        tbt_ms=5,
        throughput_tps=200,
        error_rate=0.01,
        memory_mb=16384,
        prefix_hit_rate=0.85,
        spec_accept_rate=0.60,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFigures:
    """What the server's ``/metrics`` say about one load; None: it does not say.

    Attributes:
        memory_mb: Largest resident set in MB of 2^20 bytes, since the server started; the resident
            set after the load where the server gives no peak.
        prefix_hit_rate: Prompt tokens taken from the prefix cache, of all looked up, in this load.
        spec_accept_rate: Drafted tokens accepted, of all drafted, in this load.
    """

    memory_mb: float | None = None
    prefix_hit_rate: float | None = None
    spec_accept_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One bound and its verdict.

    Attributes:
        measured: None when nothing measured it, which fails.
        reason: Empty when it passed.
    """

    name: str
    bound: str
    measured: float | None
    passed: bool
    reason: str


def judge(contract: Contract, metrics: LoadMetrics, server: ServerFigures) -> list[Clause]:
    """Every clause of a contract against one load. Latencies are means."""
    clauses = [
        _at_most("TTFT, mean, ms", _mean(metrics.ttft_ms), contract.ttft_ms),
        _at_most("TBT, mean, ms", _mean(metrics.itl_ms), contract.tbt_ms),
        _at_most("TPOT, mean, ms", _mean(metrics.tpot_ms), contract.tbt_ms),
        _at_least(
            "throughput, output tokens/s",
            metrics.output_throughput if metrics.completed else None,
            contract.throughput_tps,
        ),
        _at_most("error rate", metrics.error_rate, contract.error_rate),
        _at_most("memory, MB", server.memory_mb, contract.memory_mb),
    ]
    if contract.prefix_hit_rate is not None:
        clauses.append(
            _at_least("prefix hit rate", server.prefix_hit_rate, contract.prefix_hit_rate)
        )
    if contract.spec_accept_rate is not None:
        clauses.append(
            _at_least("speculation accepted", server.spec_accept_rate, contract.spec_accept_rate)
        )
    wrong = metrics.wrong_prompt_lengths + metrics.wrong_output_lengths
    clauses.append(_at_most("requests of other lengths", wrong if metrics.completed else None, 0))
    return clauses


def _mean(distribution: Distribution | None) -> float | None:
    return None if distribution is None else distribution.mean


def _at_most(name: str, measured: float | None, bound: float) -> Clause:
    passed = measured is not None and measured <= bound
    return _clause(name, f"<= {bound:g}", measured, passed)


def _at_least(name: str, measured: float | None, bound: float) -> Clause:
    passed = measured is not None and measured >= bound
    return _clause(name, f">= {bound:g}", measured, passed)


def _clause(name: str, bound: str, measured: float | None, passed: bool) -> Clause:
    reason = "" if passed else "not measured" if measured is None else "out of bounds"
    return Clause(name=name, bound=bound, measured=measured, passed=passed, reason=reason)


_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?[ \t]+([^ \t]+)(?:[ \t]+-?\d+)?")


def read_samples(text: str) -> dict[str, float]:
    """Samples in Prometheus' text format, each name summed over its labels."""
    samples: dict[str, float] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line.strip())
        if match is None or line.startswith("#"):
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        samples[match[1]] = samples.get(match[1], 0.0) + value
    return samples


def server_figures(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None
) -> ServerFigures:
    """Figures of a load from the samples before and after it."""
    if before is None or after is None:
        return ServerFigures()
    memory = after.get("sagellm:peak_memory_bytes", after.get("process_resident_memory_bytes"))

    def share(part: str, whole: str) -> float | None:
        if part not in after or whole not in after:
            return None
        total = after[whole] - before.get(whole, 0.0)
        return (after[part] - before.get(part, 0.0)) / total if total > 0 else None

    accepted = share(
        "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
    )
    return ServerFigures(
        memory_mb=None if memory is None else memory / 2**20,
        prefix_hit_rate=share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
        spec_accept_rate=after.get("sagellm:spec_accept_rate") if accepted is None else accepted,
    )
