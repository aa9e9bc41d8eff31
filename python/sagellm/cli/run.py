"""``sagellm run``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sagellm.cli.options import (
    Deterministic,
    Device,
    KvCacheGb,
    KvDtype,
    MaxTokens,
    Model,
    Precision,
    Speculate,
    Threads,
    open_llm,
    request_for,
)
from sagellm.errors import InvalidArgumentError, SagellmError

if TYPE_CHECKING:
    from sagellm.engine.llm import LLM
    from sagellm.protocol import Metrics, Request, Response

DEFAULT_PROMPT = "Explain in two sentences why the sky is blue."


def run(
    model: Model = "smollm2",
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="The prompt; - reads it from standard input.")
    ] = DEFAULT_PROMPT,
    max_tokens: MaxTokens = 256,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the likeliest token: the same text each time.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Randomness, up to 2; 0 is the same as --greedy.")
    ] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Makes random sampling repeatable.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: continue the text.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
    threads: Threads = None,
    device: Device = "auto",
    precision: Precision = None,
    kv_dtype: KvDtype = None,
    kv_cache_gb: KvCacheGb = None,
    deterministic: Deterministic = False,
    speculate: Speculate = "auto",
) -> None:
    """Answer one prompt, printing the text as it is made.

    A model of the catalogue that is not on this machine yet is downloaded first. The text goes to
    standard output, everything else to standard error.

    \b
    Examples:
      sagellm run
      sagellm run smollm2 -p "Name three rivers." --seed 7
      sagellm run ./model.gguf --raw -p "Once upon a time" --temperature 1
      sagellm run smollm2 -p - --max-tokens 64 < question.txt
      sagellm run smollm2 -p "The capital of France is" --max-tokens 8 --greedy --raw --json

    \b
    --json prints one object:
      output_text, output_tokens, prompt_tokens (their number), finish_reason, metrics
    """  # noqa: D301
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InvalidArgumentError("the prompt is empty; give -p TEXT, or -p - for standard input")
    is_greedy = greedy or temperature == 0
    with open_llm(
        model,
        device=device,
        threads=threads,
        precision=precision,
        kv_dtype=kv_dtype,
        kv_cache_gb=kv_cache_gb,
        deterministic=deterministic,
        speculate=speculate,
    ) as llm:
        request = request_for(
            llm,
            [{"role": "system", "content": system}] if system is not None else [],
            text,
            raw=raw,
            max_tokens=max_tokens,
            temperature=None if is_greedy else temperature,
            top_p=None if is_greedy else top_p,
            seed=seed,
            stream=not as_json,
        )
        if as_json:
            _print_json(llm, request)
        else:
            _stream(llm, request)


def _print_json(llm: LLM, request: Request) -> None:
    (response,) = llm.generate([request])
    typer.echo(json.dumps(_facts(response, llm.count_prompt_tokens(request))))
    if response.error is not None:
        raise SagellmError(response.error.message)


def _facts(response: Response, prompt_tokens: int) -> dict[str, object]:
    return {
        "output_text": response.output_text,
        "output_tokens": response.output_tokens,
        "prompt_tokens": prompt_tokens,
        "finish_reason": response.finish_reason,
        "metrics": response.metrics.model_dump(mode="json"),
    }


def _stream(llm: LLM, request: Request) -> None:
    for event in llm.stream(request):
        if event.event == "delta":
            sys.stdout.write(event.chunk)
            sys.stdout.flush()
        elif event.event == "end":
            sys.stdout.write("\n")
            sys.stdout.flush()
            if event.error is not None:
                raise SagellmError(event.error.message)
            sys.stderr.write(_summary(event.metrics, len(event.output_tokens)))


def _summary(metrics: Metrics, tokens: int) -> str:
    start, end = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    pace = f"{1000 / metrics.tbt_ms:.1f} tok/s, " if metrics.tbt_ms else ""
    return (
        f"{start}{tokens} tokens, {pace}first token after {metrics.ttft_ms:.0f} ms, "
        f"peak memory {metrics.peak_mem_mb} MB{end}\n"
    )
