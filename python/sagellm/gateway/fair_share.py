"""What each client has at hand, counted in completions, so that no one fills the server."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sagellm.gateway.errors import RETRY_SOON_S, ApiError

if TYPE_CHECKING:
    from sagellm.engine.async_engine import AsyncEngine
    from sagellm.gateway.config import GatewayConfig
    from sagellm.gateway.context import RequestContext


class FairShare:
    """Counts the completions at hand of each API key, or address on a server without keys.

    A request counts as one from its arrival to the end of its answer, and as all of its
    completions (prompts times ``n``) once the engine gets them. Belongs to the event loop.
    """

    def __init__(self, limit: int | None) -> None:
        """Starts with nothing at hand.

        Args:
            limit: Most completions of one owner; None is any number.
        """
        self._limit = limit
        self._at_hand: Counter[str] = Counter()

    def enter(self, context: RequestContext) -> None:
        """Counts a request that arrives; ``leave`` must follow.

        Raises:
            ApiError: 429; nothing is counted then.
        """
        self._take(_owner(context), 1)

    def add(self, context: RequestContext, num_completions: int) -> None:
        """Counts completions of a request that has entered.

        Raises:
            ApiError: 429, or 400 for more than can ever be at hand; nothing is counted then.
        """
        wanted = context.num_completions + num_completions
        if self._limit is not None and wanted > self._limit:
            raise ApiError(
                400,
                f"this request asks for more than {self._limit} completions, and one client may "
                "not have more at hand; send fewer prompts or a smaller n",
                param="n",
            )
        self._take(_owner(context), max(1, wanted) - max(1, context.num_completions))
        context.num_completions = wanted

    def leave(self, context: RequestContext) -> None:
        """Gives back all that a request has counted."""
        owner = _owner(context)
        self._at_hand[owner] -= max(1, context.num_completions)
        if not self._at_hand[owner]:
            del self._at_hand[owner]

    def _take(self, owner: str, count: int) -> None:
        if self._limit is not None and self._at_hand[owner] + count > self._limit:
            raise ApiError(
                429,
                f"{self._at_hand[owner]} completions of yours are at hand, and at most "
                f"{self._limit} may be; wait for one of them",
                retry_after_s=RETRY_SOON_S,
            )
        self._at_hand[owner] += count


def share_of(config: GatewayConfig, engine: AsyncEngine | None) -> int | None:
    """Completions that one client may have at hand: as configured, else half of a shared engine."""
    if config.max_requests_per_key or len(config.api_keys) < 2 or engine is None:
        return config.max_requests_per_key
    limits = engine.engine.config
    return max(1, (limits.max_num_seqs + limits.max_queue) // 2)


def _owner(context: RequestContext) -> str:
    return context.client if context.key_number is None else f"key {context.key_number}"
