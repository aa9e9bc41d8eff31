"""Matmul kernels in isolation: time, bandwidth and arithmetic per format and batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sagellm.bench import report
from sagellm.native import load_core

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32")
_PROBE_BYTES = 256 << 20  # more than any cache


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One measured case; one thread.

    Attributes:
        gbps: Packed weight bytes per second, in 10^9.
        gflops: Multiplications and additions per second, in 10^9.
        dram_percent: ``gbps`` as a share of what one thread reads from memory, measured beside the
            case; above 100 the weights came from a cache.
    """

    format: str
    isa: str
    precision: str
    tokens: int
    microseconds: float
    gbps: float
    gflops: float
    dram_percent: float


def run(
    *,
    rows: int,
    columns: int,
    tokens: tuple[int, ...],
    formats: tuple[str, ...],
    precision: str,
    repeat: int,
) -> list[KernelResult]:
    """Times ``W[rows, columns] @ x`` on one thread for every format and number of tokens.

    Raises:
        InvalidArgumentError: ``columns`` is not a whole number of a format's blocks.
        UnsupportedError: A format that cannot be made here.
    """
    core = load_core()
    isa = core.kernels.selected_isa()
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((rows, columns), dtype=np.float32)
    results: list[KernelResult] = []
    with report.progress() as bar:
        task = bar.add_task("kernels", total=len(formats) * len(tokens))
        for name in formats:
            packed = core.quant.pack(name, core.quant.quantize(name, weights), rows, columns)
            for count in tokens:
                probe = core.runtime.read_bandwidth(1, _PROBE_BYTES, 3)
                seconds = core.kernels.benchmark_matmul(isa, packed, count, repeat, precision)
                results.append(
                    KernelResult(
                        format=name,
                        isa=isa,
                        precision=precision,
                        tokens=count,
                        microseconds=seconds * 1e6,
                        gbps=packed.nbytes / seconds / 1e9,
                        gflops=2.0 * rows * columns * count / seconds / 1e9,
                        dram_percent=100 * packed.nbytes / seconds / probe,
                    )
                )
                bar.advance(task)
    return results


def show(results: list[KernelResult], *, as_json: bool) -> None:
    """Prints the results."""
    if as_json:
        report.print_json([asdict(r) for r in results])
        return
    report.print_table(
        f"matmul, one thread, {results[0].isa}, {results[0].precision}",
        ("format", "tokens", "us", "GB/s", "% of DRAM", "GFLOP/s"),
        [(r.format, r.tokens, r.microseconds, r.gbps, r.dram_percent, r.gflops) for r in results],
    )


def plot(results: list[KernelResult], path: Path) -> None:
    """Draws arithmetic and weight bandwidth against the batch size, one line per format."""
    tokens = sorted({r.tokens for r in results})
    with report.figure(path, columns=2) as (arithmetic, bandwidth):
        for name in dict.fromkeys(r.format for r in results):
            cases = [r for r in results if r.format == name]
            batches = [r.tokens for r in cases]
            arithmetic.plot(batches, [r.gflops for r in cases], "o-", label=name)
            bandwidth.plot(batches, [r.gbps for r in cases], "o-", label=name)
        for axes, unit in ((arithmetic, "GFLOP/s"), (bandwidth, "weights, GB/s")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(tokens, list(map(str, tokens)))
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens")
            axes.set_ylabel(unit)
            axes.grid(alpha=0.3)
        bandwidth.legend()
        bandwidth.figure.suptitle(f"matmul, one thread, {results[0].isa}, {results[0].precision}")
