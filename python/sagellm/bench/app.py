"""Command line of the benchmarks: ``sagellm bench`` and ``python -m sagellm.bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sagellm.bench import kv as kv_bench
from sagellm.bench import offline as offline_bench
from sagellm.bench import peers_command, report
from sagellm.bench.compare.command import compare
from sagellm.bench.kernels_command import kernels
from sagellm.bench.profile import profiled
from sagellm.bench.serve_command import serve
from sagellm.bench.step_commands import busy, host, phases, shape
from sagellm.engine.config import parse_speculation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw the result to this PNG file (pip install 'sagellm[plot]')."),
]
Profile = Annotated[
    Path | None,
    typer.Option("--profile", help="Write a CPU profile here (needs SAGE_ENABLE_GPERFTOOLS=1)."),
]


@app.callback(invoke_without_command=True)
def bench(context: typer.Context, profile: Profile = None) -> None:
    """Measure this machine. Close other programs first.

    `python -m sagellm.bench` is the same. Results go to standard output, progress to standard
    error.

    \b
    Examples:
      sagellm bench offline --model smollm2
      sagellm bench kernels --only matmul --formats Q4_1,BF16 --tokens 1,32
      sagellm bench phases --model smollm2
      sagellm bench host --model smollm2
      sagellm bench busy --model smollm2
      sagellm bench kv --json
      sagellm bench serve --serve smollm2 --concurrency 1,8,32
      sagellm bench compare --quick
      sagellm bench --profile out.prof      a profile of `offline`
    """  # noqa: D301
    if context.invoked_subcommand is None:
        offline(profile=profile)
    elif profile is not None:
        context.with_resource(profiled(profile))


@app.command()
def offline(
    model: Annotated[str, typer.Option(help="As for `sagellm run`.")] = "smollm2",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of every prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, help="Length of every answer.")] = 128,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.  [default: all of this process]")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measured runs; medians are reported.")] = 5,
    precision: Annotated[str | None, typer.Option(help="a8 or a15.  [default: a8]")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="bf16 or int8.  [default: bf16]")] = None,
    device: Annotated[str, typer.Option(help="As for `sagellm run`.")] = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="As for `sagellm run`.")
    ] = False,
    speculate: Annotated[
        str,
        typer.Option(help="auto, off or N, as for `sagellm run`; random prompts repeat soon."),
    ] = "off",
    plot: Plot = None,
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed of a real model, against the machine's read bandwidth.

    \b
    Examples:
      python -m sagellm.bench offline --model smollm2
      python -m sagellm.bench offline --model smollm2 --prompt-tokens 512 --output-tokens 128 \\
          --streams 8 --threads 2 --repeat 5 --json

    \b
    --json prints one object with these medians, and more:
      prefill_tps      prompt tokens per second, all streams
      decode_tps       output tokens per second, all streams
      ttft_ms          submission to the first token of the last stream
      startup_s        start of the process to a loaded model
      peak_mem_mb      largest resident set
      bytes_per_token  weight and KV bytes read for one output token
      decode_gbps      bytes_per_token * decode_tps, in GB/s
      probe_gbps       read bandwidth measured in the same minute
      logits_hash      equal hashes: equal logits, bit for bit
    """  # noqa: D301
    if plot is not None:
        report.check_plot(plot)
    with profiled(profile):
        result = offline_bench.run(
            model,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            streams=streams,
            threads=threads,
            repeat=repeat,
            precision=precision,
            kv_dtype=kv_dtype,
            device=device,
            deterministic=deterministic,
            speculation=parse_speculation(speculate),
        )
    offline_bench.show(result, as_json=as_json)
    if plot is not None:
        offline_bench.plot(result, plot)


@app.command()
def kv(
    blocks: Annotated[int, typer.Option(min=64, help="Blocks in the pool.")] = 131072,
    as_json: Json = False,
) -> None:
    """KV block allocation and the prefix index.

    \b
    Example:
      python -m sagellm.bench kv --blocks 8192
    """  # noqa: D301
    kv_bench.show(kv_bench.run(num_blocks=blocks), as_json=as_json)


app.command("kernels")(kernels)
app.command("phases")(phases)
app.command("host")(host)
app.command("busy")(busy)
app.command("shape")(shape)
app.command("serve")(serve)
app.command("compare")(compare)
app.add_typer(peers_command.app, name="peers")
