"""Single kernels against a roofline: time, bandwidth, arithmetic and percent of peak.

The roofs are measured on the same machine in the same run: read bandwidth of memory (beside every
case that reads from there) and of a core's L2 cache, and multiply-accumulates per second of the
instructions that the kernels use. A kernel cannot be faster than its bytes over the bandwidth, nor
than its operations over the arithmetic: the larger of the two times binds it, and its percentage of
the measured time is the percent of peak.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sagellm.bench import report
from sagellm.bench.kernel_cases import Arithmetic, Case, Selection, cases, count
from sagellm.native import load_core

_MIN_PROBE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One measured case.

    Attributes:
        microseconds: Median of ``rounds`` calls.
        best_microseconds: Of the fastest; what the kernel takes when nothing disturbs it.
        gbps: Bytes that the case must move, per second of the median, in 10^9.
        gops: Multiplications and additions per second, in 10^9.
        bound: What binds: ``memory``, ``cache``, or the instruction of the arithmetic peak.
        peak: What that gives, in 10^9 bytes or operations per second.
        peak_percent: Of it, reached by the median.
    """

    kernel: str
    case: str
    isa: str
    threads: int
    rounds: int
    microseconds: float
    best_microseconds: float
    gbps: float
    gops: float
    bound: str
    peak: float
    peak_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What limits a case: how long it takes at least, and why."""

    name: str
    peak: float
    seconds: float


class Roofs:
    """What the machine gives. The arithmetic and the cache are measured once for each team."""

    def __init__(self, isa: str, seconds: float, working_set: int) -> None:
        self._isa = isa
        self._working_set = working_set
        self._seconds = seconds
        self._arithmetic: dict[tuple[Arithmetic, int], tuple[str, float]] = {}
        self._cache: dict[int, float] = {}

    def arithmetic(self, kind: Arithmetic, threads: int) -> tuple[str, float]:
        """Instruction, and operations per second."""
        key = (kind, threads)
        if key not in self._arithmetic:
            peak = load_core().kernels.arithmetic_peak(self._isa, kind, threads, self._seconds)
            self._arithmetic[key] = (peak["instruction"], peak["ops_per_second"])
        return self._arithmetic[key]

    def cache(self, threads: int) -> float:
        """Bytes per second."""
        if threads not in self._cache:
            rate = load_core().kernels.cache_bandwidth(self._isa, threads, self._seconds)
            self._cache[threads] = rate
        return self._cache[threads]

    def memory(self, threads: int) -> float:
        """Bytes per second, now."""
        size = max(_MIN_PROBE_BYTES, self._working_set)
        kernels = load_core().kernels
        return float(kernels.memory_bandwidth(self._isa, threads, size, self._seconds))

    def bound(self, case: Case) -> Bound:
        """The roof over a case."""
        instruction, ops = self.arithmetic(case.arithmetic, case.threads)
        at_level = self.memory if case.level == "memory" else self.cache
        rate = at_level(case.threads)
        return max(
            Bound(name=instruction, peak=ops, seconds=case.ops / ops),
            Bound(name=case.level, peak=rate, seconds=case.bytes / rate),
            key=lambda bound: bound.seconds,
        )


def run(selection: Selection, *, seconds: float) -> list[KernelResult]:
    """Times every selected case for about ``seconds``.

    Raises:
        InvalidArgumentError: An unknown kernel or format, or sizes that it does not have.
    """
    isa = load_core().kernels.selected_isa()
    roofs = Roofs(isa, seconds, selection.working_set)
    results: list[KernelResult] = []
    with report.progress() as bar:
        task = bar.add_task("kernels", total=count(selection))
        for case in cases(selection, isa):
            bar.update(task, description=f"{case.kernel} {case.case}, {case.threads} threads")
            results.append(_measured(case, roofs, isa, seconds))
            bar.advance(task)
    return results


def _measured(case: Case, roofs: Roofs, isa: str, seconds: float) -> KernelResult:
    bound = roofs.bound(case)
    timing: dict[str, Any] = case.time(seconds)
    median = timing["median"]
    return KernelResult(
        kernel=case.kernel,
        case=case.case,
        isa=isa,
        threads=case.threads,
        rounds=timing["rounds"],
        microseconds=median * 1e6,
        best_microseconds=timing["best"] * 1e6,
        gbps=case.bytes / median / 1e9,
        gops=case.ops / median / 1e9,
        bound=bound.name,
        peak=bound.peak / 1e9,
        peak_percent=100 * bound.seconds / median,
    )


def show(results: list[KernelResult], *, as_json: bool) -> None:
    """Prints the results."""
    if as_json:
        report.print_json([asdict(r) for r in results])
        return
    columns = ("case", "threads", "us", "best us", "GB/s", "GOP/s", "% of peak", "bound", "peak")
    for kernel in dict.fromkeys(r.kernel for r in results):
        rows = [
            (
                r.case,
                r.threads,
                r.microseconds,
                r.best_microseconds,
                r.gbps,
                r.gops,
                r.peak_percent,
                r.bound,
                r.peak,
            )
            for r in results
            if r.kernel == kernel
        ]
        report.print_table(f"{kernel}, {results[0].isa}", columns, rows)


def plot(results: list[KernelResult], path: Path) -> None:
    """Draws GOP/s over operations per byte, one panel for each number of threads."""
    teams = sorted({r.threads for r in results})
    kernels = list(dict.fromkeys(r.kernel for r in results))
    with report.figure(path, columns=len(teams)) as drawn:
        for axes, threads in zip(drawn if len(teams) > 1 else [drawn], teams, strict=True):
            mine = [r for r in results if r.threads == threads]
            for kernel in kernels:
                points = [r for r in mine if r.kernel == kernel]
                intensity = [r.gops / r.gbps for r in points]
                axes.plot(intensity, [r.gops for r in points], "o", ms=4, label=kernel)
            _draw_roofs(axes, mine)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("operations per byte")
            axes.set_ylabel("GOP/s")
            axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}, {mine[0].isa}")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6, loc="lower right")


def _draw_roofs(axes: Any, results: list[KernelResult]) -> None:
    """Lines for what bound some case; a bandwidth is the mean of its probes."""
    intensities = [r.gops / r.gbps for r in results]
    left, right = min(intensities) / 2, max(intensities) * 2
    top = 2 * max([r.gops for r in results] + [r.peak for r in results if not _is_slope(r.bound)])
    for name in dict.fromkeys(r.bound for r in results):
        peaks = [r.peak for r in results if r.bound == name]
        peak = sum(peaks) / len(peaks)
        if _is_slope(name):
            ends = (left, min(right, top / peak))
            heights = (peak * ends[0], peak * ends[1])
        else:
            ends, heights = (left, right), (peak, peak)
        axes.plot(ends, heights, "--", lw=0.8, color="gray")
        axes.annotate(name, (ends[0], heights[0]), fontsize=6, color="gray")


def _is_slope(bound: str) -> bool:
    return bound in ("memory", "cache")
