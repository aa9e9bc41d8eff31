"""What everything around the kernels costs: blocks, the prefix index, Python and sampling."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sagellm.bench import kv, phases, report

# What a decode step can afford.
MAX_ALLOCATE_FREE_NS = 20.0
MAX_PREFIX_PATH_NS = 150.0
MAX_STEP_PERCENT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostResult:
    """Costs of the host side.

    Attributes:
        allocate_free_ns: One block taken and given back.
        prefix_path_ns: Match, reserve, publish and release, per block of a prompt.
        step_percent: Scheduler, batch, output and sampling, of a decode step.
        host_ms: Of that, outside of the native step.
        sample_ms: Of that, sampling inside, mean over the threads.
        step_ms: The whole step.
    """

    streams: int
    context: int
    threads: int
    allocate_free_ns: float
    prefix_path_ns: float
    step_percent: float
    host_ms: float
    sample_ms: float
    step_ms: float


def run(
    model: str,
    *,
    streams: int,
    context: int,
    steps: int,
    threads: int | None,
    repeat: int,
    temperature: float,
    blocks: int,
) -> HostResult:
    """Measures the bookkeeping alone, then decode steps of a model.

    Raises:
        SagellmError: The model cannot be loaded.
    """
    bookkeeping = kv.run(num_blocks=blocks)
    (step,) = phases.run(
        model,
        streams=(streams,),
        context=context,
        prefill=0,
        steps=steps,
        threads=threads,
        repeat=repeat,
        temperature=temperature,
    )
    return HostResult(
        streams=streams,
        context=context,
        threads=step.threads,
        allocate_free_ns=bookkeeping["allocate_free_ns"],
        prefix_path_ns=bookkeeping["prefix_path_ns"],
        step_percent=step.host_percent,
        host_ms=step.phases[phases.HOST],
        sample_ms=step.phases["sample"],
        step_ms=step.step_ms,
    )


def show(result: HostResult, *, as_json: bool) -> None:
    """Prints the costs beside what they may be."""
    if as_json:
        report.print_json(asdict(result))
        return
    limits = {
        "allocate_free_ns": MAX_ALLOCATE_FREE_NS,
        "prefix_path_ns": MAX_PREFIX_PATH_NS,
        "step_percent": MAX_STEP_PERCENT,
    }
    rows = [(name, value, limits.get(name, "")) for name, value in asdict(result).items()]
    report.print_table("host", ("figure", "value", "at most"), rows)
