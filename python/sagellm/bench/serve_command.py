"""The command ``bench serve``."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sagellm.bench import serve_report
from sagellm.bench import workloads as known
from sagellm.bench.serve import ServeOptions, run
from sagellm.bench.serve_client import require_aiohttp, server_root
from sagellm.bench.serve_contract import ContractName
from sagellm.bench.serve_dialect import Endpoint
from sagellm.bench.serve_load import Arrival, ClosedLoop, Load, OpenLoop
from sagellm.bench.serve_metrics import Objectives
from sagellm.bench.serve_process import serving
from sagellm.errors import InvalidArgumentError

_DEFAULT_URL = "http://127.0.0.1:8000"
_INTERRUPTED = 130

Option = typer.Option
Url = Annotated[str | None, Option(help=f"The server's address.  [default: {_DEFAULT_URL}]")]
Serve = Annotated[str | None, Option("--serve", metavar="MODEL", help="Start one for the time.")]
ServeArgs = Annotated[str, Option(metavar="OPTIONS", help="Options for the server of --serve.")]
Model = Annotated[str | None, Option(help="[default: the first of /v1/models]")]
AnyEndpoint = Annotated[
    Endpoint | None, Option(help="[default: completions; multi-turn takes chat]")
]
ApiKey = Annotated[str | None, Option(envvar="SAGELLM_API_KEY", help="Sent as a bearer token.")]
Workloads = Annotated[
    str, Option("--workload", help="Names, comma-separated; `queries` is Q1 to Q8.")
]
Tokens = Annotated[int | None, Option(min=1, help="[default: that of the workload]")]
Turns = Annotated[int | None, Option(min=1, help="Of a multi-turn chat.  [default: 4]")]
Clients = Annotated[
    str | None, Option(help="Closed loop: clients at once, e.g. 1,8,32.  [default: workload's]")
]
Rates = Annotated[str | None, Option(help="Open loop: requests per second, e.g. 0.5,1,2.")]
Arrivals = Annotated[Arrival, Option(help="Open loop: how the gaps are distributed.")]
Burstiness = Annotated[float, Option(help="Gamma arrivals: shape; below 1 comes in bursts.")]
Ramp = Annotated[float | None, Option(help="Open loop: the rate rises from here to --rate.")]
Requests = Annotated[int | None, Option(min=1, help="Per load.  [default: workload's]")]
Duration = Annotated[float | None, Option(min=0.001, help="Seconds of sending per load.")]
Warmup = Annotated[int, Option(min=0, help="Requests per workload before the measurement.")]
Timeout = Annotated[float, Option(min=0.001, help="Seconds for one request.")]
Seed = Annotated[int | None, Option(min=0, help="Prompts and arrivals.  [default: a new one]")]
Temperature = Annotated[float, Option(min=0.0, help="Sent with every request.")]
Goodput = Annotated[
    str | None, Option(metavar="BOUNDS", help="ms for a request to be good: ttft:200,tpot:20")
]
ContractOption = Annotated[
    ContractName | None, Option("--contract", help="Check it; exit status 1 when it fails.")
]
Save = Annotated[Path | None, Option(metavar="FOLDER", help="Write JSON, Markdown and plots here.")]
Json = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]


def serve(
    url: Url = None,
    serve_model: Serve = None,
    serve_args: ServeArgs = "",
    model: Model = None,
    endpoint: AnyEndpoint = None,
    api_key: ApiKey = None,
    workload: Workloads = "random",
    prompt_tokens: Tokens = None,
    output_tokens: Tokens = None,
    prefix_tokens: Tokens = None,
    turns: Turns = None,
    concurrency: Clients = None,
    rate: Rates = None,
    arrival: Arrivals = "poisson",
    burstiness: Burstiness = 1.0,
    ramp_from: Ramp = None,
    requests: Requests = None,
    duration: Duration = None,
    warmup: Warmup = 2,
    timeout: Timeout = 600.0,
    seed: Seed = None,
    temperature: Temperature = 0.0,
    goodput: Goodput = None,
    contract: ContractOption = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Latency and throughput of any OpenAI-compatible server, as its clients see them.

    Prompts have exactly the length asked, by the server's own count, and are new in every run, so
    that no prefix cache answers. Ctrl-C reports what is complete.

    \b
    Examples:
      sagellm bench serve --serve smollm2
      sagellm bench serve --url http://127.0.0.1:8000 --concurrency 1,8,32 --save results
      sagellm bench serve --rate 2 --duration 60 --goodput ttft:200,tpot:50
      sagellm bench serve --rate 4 --arrival gamma --burstiness 0.5 --requests 100
      sagellm bench serve --workload shared-prefix --prefix-tokens 1000
      sagellm bench serve --workload queries --contract year1

    \b
    Workloads (prompt -> output tokens):
      random         --prompt-tokens -> --output-tokens (128 -> 128)
      shared-prefix  the same --prefix-tokens before every prompt (1000 + 64 -> 64)
      multi-turn     a chat of --turns whose history grows by the server's answers
      Q1 32->64 x5    Q2 512->128 x3   Q3 128->256 x3            Q4 256->256 x3
      Q7 256->512 x3  Q5 32->64 x10    Q6 512->256 x10 (at once)  Q8 192->128 x4 (at once)

    What the figures mean is in docs/benchmarking.md.
    """  # noqa: D301
    require_aiohttp()
    if url is not None and serve_model is not None:
        raise InvalidArgumentError("--serve starts a server and --url names one; give one of them")
    if serve_args and serve_model is None:
        raise InvalidArgumentError("--serve-args are for the server of --serve; give both")
    options = ServeOptions(
        url=server_root(url or _DEFAULT_URL),
        workloads=known.choose(
            workload,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            prefix_tokens=prefix_tokens,
            turns=turns,
        ),
        model=model,
        endpoint=endpoint,
        api_key=api_key,
        loads=_loads(concurrency, rate, arrival, burstiness, ramp_from),
        requests=requests,
        duration_s=duration,
        warmup=warmup,
        timeout_s=timeout,
        seed=seed,
        temperature=temperature,
        objectives=None if goodput is None else Objectives.parse(goodput),
        contract=contract,
    )
    _measure(options, serve_model, serve_args, save, as_json=as_json)


def _measure(
    options: ServeOptions,
    serve_model: str | None,
    serve_args: str,
    save: Path | None,
    *,
    as_json: bool,
) -> None:
    if save is not None:
        serve_report.check_folder(save)
    server = (
        nullcontext(options.url)
        if serve_model is None
        else serving(serve_model, shlex.split(serve_args))
    )
    with server as url:
        result = run(replace(options, url=url))
    serve_report.show(result, as_json=as_json)
    if save is not None:
        serve_report.save(result, save)
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)
    if options.contract is not None and not result.passed:
        raise typer.Exit(1)


def _loads(
    concurrency: str | None,
    rate: str | None,
    arrival: Arrival,
    burstiness: float,
    ramp_from: float | None,
) -> list[Load]:
    if concurrency is not None and rate is not None:
        raise InvalidArgumentError(
            "--concurrency is a closed loop and --rate an open one; give one of them"
        )
    if rate is None and (arrival != "poisson" or burstiness != 1 or ramp_from is not None):
        raise InvalidArgumentError(
            "--arrival, --burstiness and --ramp-from shape an open loop; give --rate"
        )
    if concurrency is not None:
        numbers = _numbers("--concurrency", concurrency, int)
        if any(number > 1 << 16 for number in numbers):
            raise InvalidArgumentError(f"--concurrency is {concurrency}; at most 65536")
        return [ClosedLoop(concurrency=int(number)) for number in numbers]
    return [
        OpenLoop(rate=number, arrival=arrival, burstiness=burstiness, ramp_from=ramp_from)
        for number in _numbers("--rate", rate or "", float)
    ]


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    try:
        numbers = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [0]
    if not all(number > 0 for number in numbers):
        example = "1,8,32" if kind is int else "0.5,1,2"
        raise InvalidArgumentError(f"{option} is {text!r}; give numbers above 0, such as {example}")
    return list(map(float, numbers))
