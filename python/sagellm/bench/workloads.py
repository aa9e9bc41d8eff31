"""What is asked of a server: built-in workloads with exact prompt lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from sagellm.bench.serve_dialect import Content, Endpoint, Vocabulary, write
from sagellm.errors import InvalidArgumentError

Kind = Literal["random", "shared-prefix", "multi-turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The shape of requests.

    Attributes:
        prompt_tokens: Of each request, all included (chat template, BOS). Of a shared-prefix
            request: all but the prefix. Of a multi-turn conversation: the first turn.
        output_tokens: Of each answer.
        prefix_tokens: Of the prefix that all requests share.
        turns: Requests of a conversation, each of which holds all before it.
        requests, concurrency: What is run unless the user says otherwise.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    kind: Kind = "random"
    prefix_tokens: int = 0
    turns: int = 1
    requests: int = 32
    concurrency: int = 1


def _query(name: str, prompt: int, output: int, requests: int, concurrency: int = 1) -> Workload:
    return Workload(
        name=name,
        prompt_tokens=prompt,
        output_tokens=output,
        requests=requests,
        concurrency=concurrency,
    )


QUERIES = (
    _query("Q1", 32, 64, 5),
    _query("Q2", 512, 128, 3),
    _query("Q3", 128, 256, 3),
    _query("Q4", 256, 256, 3),
    _query("Q5", 32, 64, 10, 10),
    _query("Q6", 512, 256, 10, 10),
    _query("Q7", 256, 512, 3),
    _query("Q8", 192, 128, 4, 4),
)
OTHERS = (
    Workload(name="random", prompt_tokens=128, output_tokens=128),
    Workload(
        name="shared-prefix",
        kind="shared-prefix",
        prompt_tokens=64,
        output_tokens=64,
        prefix_tokens=1000,
    ),
    Workload(
        name="multi-turn",
        kind="multi-turn",
        prompt_tokens=128,
        output_tokens=64,
        turns=4,
        requests=8,
    ),
)
WORKLOADS = {workload.name: workload for workload in (*QUERIES, *OTHERS)}


def choose(
    names: str,
    *,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    prefix_tokens: int | None = None,
    turns: int | None = None,
) -> list[Workload]:
    """The workloads of a comma-separated list; "queries" stands for Q1 to Q8.

    Raises:
        InvalidArgumentError: An unknown name, or a size that the workload does not have.
    """
    chosen: list[Workload] = []
    for name in (part.strip() for part in names.split(",")):
        if name.lower() == "queries":
            chosen += QUERIES
            continue
        workload = WORKLOADS.get(name.upper() if name.lower().startswith("q") else name.lower())
        if workload is None:
            known = ", ".join(["queries", *WORKLOADS])
            raise InvalidArgumentError(f"--workload has {name!r}; known: {known}")
        chosen.append(workload)
    resized = any((prompt_tokens, output_tokens, prefix_tokens, turns))
    for workload in chosen:
        _check(workload, resized=resized, prefix_tokens=prefix_tokens, turns=turns)
    return [
        replace(
            workload,
            prompt_tokens=prompt_tokens or workload.prompt_tokens,
            output_tokens=output_tokens or workload.output_tokens,
            prefix_tokens=prefix_tokens or workload.prefix_tokens,
            turns=turns or workload.turns,
        )
        for workload in chosen
    ]


def _check(
    workload: Workload, *, resized: bool, prefix_tokens: int | None, turns: int | None
) -> None:
    if resized and workload in QUERIES:
        raise InvalidArgumentError(
            f"{workload.name} has fixed sizes; use --workload random for sizes of your own"
        )
    if prefix_tokens is not None and workload.kind != "shared-prefix":
        raise InvalidArgumentError("--prefix-tokens is for --workload shared-prefix")
    if turns is not None and workload.kind != "multi-turn":
        raise InvalidArgumentError("--turns is for --workload multi-turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One or more requests in a row, each holding those before it and their answers.

    Attributes:
        opening: The first request.
        follow_ups: What the user says next, once answered.
        prompt_tokens: Of the first request.
    """

    opening: Content
    follow_ups: tuple[str, ...]
    prompt_tokens: int
    output_tokens: int


def conversations(
    workload: Workload, vocabulary: Vocabulary, endpoint: Endpoint, *, seed: int | str
) -> Iterator[Conversation]:
    """Endless conversations, all different; the same for the same seed.

    Raises:
        InvalidArgumentError: The chat template alone is longer than the prompt.
    """
    rng = random.Random(f"{workload.name} {seed}")
    system = None
    overhead = vocabulary.overhead
    if workload.kind == "shared-prefix":
        system = vocabulary.text(rng, workload.prefix_tokens)
        overhead = vocabulary.system_overhead
    count = workload.prompt_tokens - overhead
    if count < 1:
        raise InvalidArgumentError(
            f"{workload.name} asks for prompts of {workload.prompt_tokens} tokens, and the server "
            f"adds {overhead} to every prompt; ask for more, or use --endpoint completions"
        )
    while True:
        texts = [vocabulary.text(rng, count) for _ in range(workload.turns)]
        yield Conversation(
            opening=write(endpoint, texts[0], system=system, separator=vocabulary.separator),
            follow_ups=tuple(texts[1:]),
            prompt_tokens=workload.prefix_tokens + workload.prompt_tokens,
            output_tokens=workload.output_tokens,
        )
