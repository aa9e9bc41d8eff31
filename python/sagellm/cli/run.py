"""``sagellm run``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sagellm.checkpoint.store import resolve_model
from sagellm.cli.options import Device, MaxTokens, Precision, Threads, request_for
from sagellm.cli.progress import pull_progress
from sagellm.engine.llm import LLM
from sagellm.errors import SagellmError
from sagellm.protocol import Metrics, Response, StreamEventDelta, StreamEventEnd

if TYPE_CHECKING:
    from sagellm.protocol import Request

DEFAULT_PROMPT = "Explain in two sentences why the sky is blue."


def run(
    model: Annotated[
        str, typer.Argument(help="Catalogue name, Hugging Face repository, .gguf file or folder.")
    ] = "smollm2",
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="- reads it from standard input.")
    ] = DEFAULT_PROMPT,
    max_tokens: MaxTokens = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Randomness, above 0 up to 2.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Makes random sampling repeatable.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, no stream.")] = False,
    threads: Threads = None,
    device: Device = "auto",
    precision: Precision = None,
) -> None:
    """Answer one prompt, streaming the text as it is made.

    A catalogue model that is not on this machine yet is fetched first.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    with pull_progress() as progress:
        path = resolve_model(model, auto_pull=True, progress=progress)
    with LLM(path, device=device, threads=threads, precision=precision) as llm:
        request = request_for(
            llm,
            [{"role": "system", "content": system}] if system is not None else [],
            text,
            raw=raw,
            max_tokens=max_tokens,
            temperature=None if greedy else temperature,
            top_p=None if greedy else top_p,
            seed=seed,
            stream=not as_json,
        )
        if as_json:
            (response,) = llm.generate([request])
            typer.echo(json.dumps(_json(llm, request, response)))
            if response.error is not None:
                raise SagellmError(response.error.message)
            return
        _stream(llm, request)


def _json(llm: LLM, request: Request, response: Response) -> dict[str, object]:
    return {
        "output_text": response.output_text,
        "output_tokens": response.output_tokens,
        "prompt_tokens": llm.count_prompt_tokens(request),
        "finish_reason": response.finish_reason,
        "metrics": response.metrics.model_dump(),
    }


def _stream(llm: LLM, request: Request) -> None:
    for event in llm.stream(request):
        if isinstance(event, StreamEventDelta):
            sys.stdout.write(event.chunk)
            sys.stdout.flush()
        elif isinstance(event, StreamEventEnd):
            sys.stdout.write("\n")
            if event.error is not None:
                raise SagellmError(event.error.message)
            _summary(event.metrics, len(event.output_tokens))


def _summary(metrics: Metrics, tokens: int) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(
        f"[dim]{tokens} tokens, {metrics.throughput_tps:.1f} tok/s, first token after "
        f"{metrics.ttft_ms:.0f} ms, peak memory {metrics.peak_mem_mb} MB[/]"
    )
