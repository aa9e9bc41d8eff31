"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sagellm.engine.llm import new_request

if TYPE_CHECKING:
    from sagellm.engine.llm import LLM
    from sagellm.protocol import Request

MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; all by default.")
]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, reference, torch:DEVICE or ascend:N.")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="a8 (int8 activations) or a15 (15 bits)."),
]


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
    """Builds a request: chat turns with ``text`` as the user's, or bare text when ``raw``."""
    chat = not raw and llm.has_chat_template
    return new_request(
        prompt="" if chat else text,
        messages=[*turns, {"role": "user", "content": text}] if chat else None,
        model=llm.model_name,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stream=stream,
    )
