"""Command line of the benchmarks: ``sagellm bench`` and ``python -m sagellm.bench``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sagellm.bench import kernels as kernel_bench
from sagellm.bench import kv as kv_bench
from sagellm.bench import offline as offline_bench
from sagellm.checkpoint.store import resolve_model
from sagellm.errors import InvalidArgumentError
from sagellm.native import load_core

app = typer.Typer(
    help="Measures this machine. Close other programs first; every figure comes with the memory "
    "bandwidth of the run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="Write a gperftools CPU profile here (needs SAGE_ENABLE_GPERFTOOLS=1)."
    ),
]


@app.command()
def offline(
    model: Annotated[str, typer.Option(help="Catalogue name or path.")] = "smollm2",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(min=2)] = 128,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measured runs; medians are reported.")] = 5,
    precision: Annotated[str | None, typer.Option(help="a8 or a15.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, reference, torch.")] = "auto",
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed of a real model, against the machine's read bandwidth."""
    path = resolve_model(model)
    with _profiled(profile):
        result = offline_bench.run(
            path,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            streams=streams,
            threads=threads,
            repeat=repeat,
            precision=precision,
            device=device,
        )
    offline_bench.show(result, as_json=as_json)


@app.command()
def kernels(
    rows: Annotated[int, typer.Option(min=1, help="Output rows of the matrix.")] = 4096,
    columns: Annotated[int, typer.Option(min=32, help="Columns, a multiple of 32.")] = 1536,
    tokens: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32,256",
    formats: Annotated[str, typer.Option(help="Weight formats; all by default.")] = "",
    precision: Annotated[str, typer.Option(help="a8 or a15.")] = "a8",
    repeat: Annotated[int, typer.Option(min=1)] = 20,
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Matmul kernels alone, on one thread."""
    with _profiled(profile):
        results = kernel_bench.run(
            rows=rows,
            columns=columns,
            tokens=tuple(int(t) for t in tokens.split(",")),
            formats=tuple(formats.upper().split(",")) if formats else kernel_bench.FORMATS,
            precision=precision,
            repeat=repeat,
        )
    kernel_bench.show(results, as_json=as_json)


@app.command()
def kv(
    blocks: Annotated[int, typer.Option(min=64, help="Blocks in the pool.")] = 131072,
    as_json: Json = False,
) -> None:
    """KV block allocation and the prefix index."""
    kv_bench.show(kv_bench.run(num_blocks=blocks), as_json=as_json)


@contextmanager
def _profiled(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    profiler = load_core().profiler
    if not profiler.available:
        raise InvalidArgumentError(
            "this build has no profiler; install gperftools (libgoogle-perftools-dev) and "
            "reinstall with SAGE_ENABLE_GPERFTOOLS=1"
        )
    profiler.start(str(path))
    try:
        yield
    finally:
        profiler.stop()
