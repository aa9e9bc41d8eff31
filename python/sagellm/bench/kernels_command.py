"""``sagellm bench kernels``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sagellm.backends.cpu import available_threads
from sagellm.bench import kernels as kernel_bench
from sagellm.bench import report
from sagellm.bench.kernel_cases import FORMATS, HEADS, KERNELS, Selection
from sagellm.bench.profile import profiled
from sagellm.errors import InvalidArgumentError

_QUICK_FORMATS = ("Q4_1", "Q8_0", "Q4_K", "BF16")
_QUICK_SECONDS = 0.05


def kernels(
    only: Annotated[
        str, typer.Option(help="Kernels, comma-separated.", show_default="all")
    ] = ",".join(KERNELS),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer formats, sizes and repetitions.")
    ] = False,
    threads: Annotated[
        str | None, typer.Option(help="Team sizes, comma-separated.  [default: 1 and all]")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="matmul: output rows.")] = 4096,
    columns: Annotated[int, typer.Option(min=32, help="matmul: columns.")] = 1536,
    tokens: Annotated[
        str | None, typer.Option(help="matmul: batch sizes.  [default: 1,8,32,256]")
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help="matmul: weight formats.  [default: all]")
    ] = None,
    precision: Annotated[str, typer.Option(help="matmul: a8 or a15.")] = "a8",
    contexts: Annotated[
        str | None, typer.Option(help="attention: of decoding.  [default: 256,1024,4096]")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="attention: of prefill.  [default: 512,2048]")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.001, max=60, help="For each case and probe.  [default: 0.2]"),
    ] = None,
    working_set: Annotated[
        int, typer.Option(min=1, help="MiB that memory-bound cases read in turn.")
    ] = 128,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw a roofline to this PNG file."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Write a CPU profile here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Single kernels as percent of what the machine gives.

    The roofs (memory, L2 cache, arithmetic) are measured in the same run; "bound" says which one
    limits a case. SAGELLM_CPU_ISA forces an instruction set.

    \b
    Examples:
      python -m sagellm.bench kernels --quick
      python -m sagellm.bench kernels --only attention,matmul --plot roofline.png
      SAGELLM_CPU_ISA=avx2 python -m sagellm.bench kernels --only matmul --formats Q4_1 --json
    """  # noqa: D301
    if plot is not None:
        report.check_plot(plot)
    selection = Selection(
        only=_names(only),
        threads=_team_sizes(threads),
        rows=rows,
        columns=columns,
        tokens=numbers("--tokens", tokens or ("1,32" if quick else "1,8,32,256")),
        formats=_formats(formats, quick),
        precision=precision,
        contexts=numbers("--contexts", contexts or ("256,4096" if quick else "256,1024,4096")),
        prompts=numbers("--prompts", prompts or ("512" if quick else "512,2048")),
        heads=tuple(HEADS)[:2] if quick else tuple(HEADS),
        widths=(576,) if quick else (576, 4096),
        working_set=working_set << 20,
    )
    with profiled(profile):
        results = kernel_bench.run(selection, seconds=seconds or (_QUICK_SECONDS if quick else 0.2))
    kernel_bench.show(results, as_json=as_json)
    if plot is not None:
        kernel_bench.plot(results, plot)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _formats(text: str | None, quick: bool) -> tuple[str, ...]:
    if text is None:
        return _QUICK_FORMATS if quick else FORMATS
    return tuple(name.upper() for name in _names(text))


def _team_sizes(text: str | None) -> tuple[int, ...]:
    if text is None:
        return tuple(sorted({1, available_threads()}))
    return numbers("--threads", text)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Positive numbers from ``1,8,32``.

    Raises:
        InvalidArgumentError: Something else, or larger than a million.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1 << 20 for part in parts):
        raise InvalidArgumentError(f"{option} is {text!r}; give numbers, such as 1,8,32")
    return tuple(map(int, parts))
