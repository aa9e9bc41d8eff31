"""``sagellm bench phases``, ``host``, ``busy`` and ``shape``: what surrounds a decode step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sagellm.bench import busy as busy_bench
from sagellm.bench import host as host_bench
from sagellm.bench import phases as phase_bench
from sagellm.bench.kernels_command import numbers
from sagellm.bench.synthetic import SHAPES, write_model
from sagellm.errors import InvalidArgumentError

Model = Annotated[str, typer.Option(help="As for `sagellm run`.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.  [default: all of this process]")
]
Steps = Annotated[int, typer.Option(min=1, help="Decode steps of a run.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
Repeat = Annotated[int, typer.Option(min=1, help="Runs; the median one is reported.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def phases(
    model: Model = "smollm2",
    streams: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,32",
    context: Annotated[int, typer.Option(min=1, help="Prompt of the decode cases.")] = 256,
    prefill: Annotated[int, typer.Option(min=0, help="Prompt of the prefill case; 0: none.")] = 512,
    steps: Steps = 48,
    temperature: Temperature = 0.0,
    threads: Threads = None,
    repeat: Repeat = 5,
    precision: Annotated[str | None, typer.Option(help="a8 or a15.  [default: a8]")] = None,
    as_json: Json = False,
) -> None:
    """Where a step's time goes, phase by phase.

    \b
    Examples:
      python -m sagellm.bench phases --model smollm2
      python -m sagellm.bench phases --model smollm2 --streams 1 --context 4096 --prefill 0
    """  # noqa: D301
    results = phase_bench.run(
        model,
        streams=numbers("--streams", streams),
        context=context,
        prefill=prefill,
        steps=steps,
        threads=threads,
        repeat=repeat,
        precision=precision,
        temperature=temperature,
    )
    phase_bench.show(results, as_json=as_json)


def host(
    model: Model = "smollm2",
    streams: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 32,
    context: Annotated[int, typer.Option(min=1, help="Their prompts.")] = 128,
    steps: Steps = 48,
    temperature: Temperature = 0.0,
    threads: Threads = None,
    repeat: Repeat = 5,
    blocks: Annotated[int, typer.Option(min=64, help="Blocks of the bookkeeping alone.")] = 8192,
    as_json: Json = False,
) -> None:
    """Cost of everything around the kernels: blocks, prefix index, Python, sampling.

    \b
    Example:
      python -m sagellm.bench host --model smollm2 --streams 32
    """  # noqa: D301
    result = host_bench.run(
        model,
        streams=streams,
        context=context,
        steps=steps,
        threads=threads,
        repeat=repeat,
        temperature=temperature,
        blocks=blocks,
    )
    host_bench.show(result, as_json=as_json)


def busy(
    model: Model = "smollm2",
    streams: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 1,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=60, help="Of a window.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of three windows each.")] = 5,
    as_json: Json = False,
) -> None:
    """Decode speed while another process takes a core, as a share of the idle speed.

    \b
    Example:
      python -m sagellm.bench busy --model smollm2 --threads 2
    """  # noqa: D301
    result = busy_bench.run(model, threads=threads, streams=streams, seconds=seconds, rounds=rounds)
    busy_bench.show(result, as_json=as_json)


def shape(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(SHAPES)}.")],
    output: Annotated[Path, typer.Argument(help="GGUF file to write.")],
) -> None:
    """Writes a model with the sizes and formats of a real one and random weights.

    It can be timed like the real one, here and by other programs; its answers mean nothing.

    \b
    Examples:
      python -m sagellm.bench shape qwen2.5-0.5b qwen-shape.gguf
      python -m sagellm.bench offline --model qwen-shape.gguf
    """  # noqa: D301
    if name not in SHAPES:
        raise InvalidArgumentError(f"no shape {name!r}; choose from {', '.join(SHAPES)}")
    if not output.absolute().parent.is_dir():
        raise InvalidArgumentError(f"there is no folder {output.parent}; create it first")
    size = write_model(output, SHAPES[name])
    typer.echo(f"{output}: {size / 1e6:,.0f} MB")
