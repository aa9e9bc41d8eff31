"""Options that several commands share, and what they lead to."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Annotated

import typer

import sagellm  # its names load on first use: beside the weights, or after them
from sagellm.checkpoint.resolve import resolve_model
from sagellm.engine.config import engine_config, parse_speculation
from sagellm.engine.loading import load_engine, name_of
from sagellm.errors import InvalidArgumentError
from sagellm.terminal import pull_progress

if TYPE_CHECKING:
    from pathlib import Path

    from sagellm.engine.llm import LLM
    from sagellm.protocol import Request

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Name from `sagellm list`, .gguf file, folder, or ORG/REPO."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.  [default: all of this process]"),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, reference, torch:DEVICE, ...; `sagellm info` lists them."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="Activations on the CPU: a8 (int8) or a15 (15 bits, closer to float32).  "
        "[default: a8]",
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype",
        help="KV cache on the CPU: bf16, or int8 in about half of the memory.  [default: bf16]",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="No bit of an answer depends on what runs beside it, which costs speed on cuda; the "
        "CPU is always so.",
    ),
]
KvCacheGb = Annotated[
    float | None,
    typer.Option("--kv-cache-gb", help="Memory for the KV cache, in GiB.  [default: what fits]"),
]

Speculate = Annotated[
    str,
    typer.Option(
        "--speculate",
        metavar="auto|off|N",
        help="Guess tokens ahead from earlier text, which changes no output: auto where it pays, "
        "or up to N at a time.",
    ),
]


def open_llm(
    model: str,
    *,
    device: str,
    threads: int | None,
    precision: str | None,
    kv_dtype: str | None,
    kv_cache_gb: float | None,
    deterministic: bool = False,
    speculate: str = "auto",
) -> LLM:
    """Loads a model, and downloads it first if it is known but absent."""
    speculation = parse_speculation(speculate)
    path: str | Path = model
    if device != "mock":  # it has no files
        with pull_progress(model) as progress:
            path = resolve_model(model, auto_pull=True, progress=progress)
    engine = load_engine(
        path,
        engine_config(kv_cache_gb, None, {"speculation": speculation}),
        device=device,
        threads=threads,
        precision=precision,
        deterministic=deterministic or None,
        kv_dtype=kv_dtype,
    )
    llm = sagellm.LLM(engine, name=name_of(path))
    gc.freeze()  # vocabularies live to the end: no pass of the collector needs to see them
    return llm


def request_for(
    llm: LLM,
    turns: list[dict[str, str]],
    text: str,
    *,
    raw: bool,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stream: bool,
) -> Request:
    """Builds a request: the chat turns and ``text`` as the user's, or the bare text when ``raw``.

    A model without a chat template gets the bare text too.

    Raises:
        InvalidArgumentError: An illegal value, or turns for a model without a chat template.
    """
    chat = not raw and llm.has_chat_template
    if turns and not chat:
        reason = "--raw is given" if raw else f"{llm.model_name} has no chat template"
        raise InvalidArgumentError(
            f"a system message needs the chat template, but {reason}; leave out --system"
        )
    return sagellm.new_request(
        prompt="" if chat else text,
        messages=[*turns, {"role": "user", "content": text}] if chat else None,
        model=llm.model_name,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stream=stream,
    )
