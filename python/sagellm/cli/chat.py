"""``sagellm chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import importlib
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
    from sagellm.protocol import Request


def chat(
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Annotated[float, typer.Option(help="Randomness, up to 2; 0 is greedy.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Makes random sampling repeatable.")] = None,
    threads: Threads = None,
    device: Device = "auto",
    precision: Precision = None,
    kv_dtype: KvDtype = None,
    kv_cache_gb: KvCacheGb = None,
    deterministic: Deterministic = False,
    speculate: Speculate = "auto",
) -> None:
    """Talk with a model.

    /clear forgets the conversation; /exit or Ctrl-D ends it; Ctrl-C stops an answer.

    \b
    Examples:
      sagellm chat
      sagellm chat smollm2 --system "Answer in one sentence." --temperature 0.3
      sagellm chat smollm2 --temperature 0 < questions.txt
    """  # noqa: D301
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
        if not llm.has_chat_template:
            raise InvalidArgumentError(
                f"{llm.model_name} has no chat template; use `sagellm run --raw` to continue a text"
            )
        first = [{"role": "system", "content": system}] if system is not None else []
        turns = list(first)
        _say(f"{llm.model_name}: /clear forgets, /exit ends")
        with contextlib.suppress(ImportError):  # line editing and history, where Python has it
            importlib.import_module("readline")
        while (text := _read()) is not None:
            if text in ("/exit", "/quit"):
                break
            if text == "/clear":
                turns = list(first)
            elif text:
                request = request_for(
                    llm,
                    turns,
                    text,
                    raw=False,
                    max_tokens=max_tokens,
                    temperature=temperature or None,
                    top_p=None,
                    seed=seed,
                    stream=True,
                )
                answer = _answer(llm, request)
                if answer is not None:
                    turns.append({"role": "user", "content": text})
                    turns.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    """The next line of the user; None at the end. The prompt appears on terminals only."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return None


def _answer(llm: LLM, request: Request) -> str | None:
    """Streams one answer and returns it, as far as it came; None when the request failed."""
    parts: list[str] = []
    failure = ""
    try:
        for event in llm.stream(request):
            if event.event == "delta":
                parts.append(event.chunk)
                sys.stdout.write(event.chunk)
                sys.stdout.flush()
            elif event.event == "end" and event.error is not None:
                failure = event.error.message
    except KeyboardInterrupt:
        _say("(stopped)")
    except SagellmError as error:  # such as a conversation that outgrew the context
        failure = str(error)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if failure:
        _say(f"error: {failure} (/clear starts again)")
        return None
    return "".join(parts)


def _say(text: str) -> None:
    start, end = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    sys.stderr.write(f"{start}{text}{end}\n")
