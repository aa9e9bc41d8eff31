"""Whether the models move: the difference between a server that answers and one that works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from sagellm.engine.async_engine import AsyncEngine
    from sagellm.engine.embedding import Embedder


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """A verdict; ``reason`` says what is wrong, empty when nothing is."""

    is_alive: bool
    reason: str = ""


@runtime_checkable
class Progress(Protocol):
    """What an embedder with a thread of its own tells."""

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""

    @property
    def seconds_since_progress(self) -> float:
        """Since a batch ended or work came; 0 without work."""


def check_liveness(
    engine: AsyncEngine | None, embedder: Embedder | None, stall_timeout_s: float
) -> Liveness:
    """Looks at the models, without waiting for them.

    Args:
        engine: If there is one.
        embedder: If there is one; one that runs on the engine moves with it.
        stall_timeout_s: Seconds without a step while there is work that count as stuck.
    """
    if engine is not None:
        if not engine.is_alive:
            return Liveness(is_alive=False, reason="the engine has ended; restart the server")
        progress = engine.progress()
        if progress.has_work and progress.seconds_since_progress > stall_timeout_s:
            return Liveness(
                is_alive=False,
                reason=(
                    f"the engine has work and made no step for "
                    f"{progress.seconds_since_progress:.0f} seconds (after step "
                    f"{progress.num_steps}); restart the server"
                ),
            )
    watched: object = embedder
    if not isinstance(watched, Progress):
        return Liveness(is_alive=True)
    if not watched.is_alive:
        return Liveness(is_alive=False, reason="the embedding model has ended; restart the server")
    if watched.seconds_since_progress > stall_timeout_s:
        return Liveness(
            is_alive=False,
            reason=(
                f"the embedding model has had work for {watched.seconds_since_progress:.0f} "
                "seconds without a result; restart the server"
            ),
        )
    return Liveness(is_alive=True)
