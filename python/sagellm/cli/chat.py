"""``sagellm chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from sagellm.checkpoint.store import resolve_model
from sagellm.cli.options import Device, MaxTokens, Precision, Threads, request_for
from sagellm.cli.progress import pull_progress
from sagellm.engine.llm import LLM
from sagellm.errors import InvalidArgumentError
from sagellm.protocol import StreamEventDelta, StreamEventEnd


def chat(
    model: Annotated[
        str, typer.Argument(help="Catalogue name, Hugging Face repository, .gguf file or folder.")
    ] = "smollm2",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0, max=2)] = 0.7,
    threads: Threads = None,
    device: Device = "auto",
    precision: Precision = None,
) -> None:
    """Talk with a model.

    /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.
    """
    console = Console(stderr=True, highlight=False)
    with pull_progress() as progress:
        path = resolve_model(model, auto_pull=True, progress=progress)
    with LLM(path, device=device, threads=threads, precision=precision) as llm:
        if not llm.has_chat_template:
            raise InvalidArgumentError(
                f"{llm.model_name} has no chat template; use `sagellm run --raw` to continue a text"
            )
        first = [{"role": "system", "content": system}] if system is not None else []
        turns = list(first)
        console.print(f"[dim]{llm.model_name} - /clear, /exit[/]")
        while (text := _read()) is not None:
            if text in ("/exit", "/quit"):
                break
            if text == "/clear":
                turns = list(first)
            elif text:
                turns += _answer(llm, turns, text, max_tokens, temperature, console)


def _read() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(
    llm: LLM,
    turns: list[dict[str, str]],
    text: str,
    max_tokens: int,
    temperature: float,
    console: Console,
) -> list[dict[str, str]]:
    """Streams one answer; returns the two turns to remember (none when the request failed)."""
    request = request_for(
        llm,
        turns,
        text,
        raw=False,
        max_tokens=max_tokens,
        temperature=temperature or None,
        top_p=None,
        seed=None,
        stream=True,
    )
    answer = ""
    try:
        for event in llm.stream(request):
            if isinstance(event, StreamEventDelta):
                answer += event.chunk
                sys.stdout.write(event.chunk)
                sys.stdout.flush()
            elif isinstance(event, StreamEventEnd) and event.error is not None:
                console.print(f"[red]{event.error.message}[/] (/clear starts again)")
                return []
    except KeyboardInterrupt:
        console.print("[dim](stopped)[/]")
    sys.stdout.write("\n")
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
