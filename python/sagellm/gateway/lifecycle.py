"""From SIGTERM to the end: announce, finish what is at hand, report what was cut."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TICK_S = 0.05

STOP_GRACE_S = 2.0
"""For answers to leave the process after their requests were cut."""


class Drain:
    """Drains a gateway on the first signal while the server still listens.

    So ``/ready`` and new requests get a 503 that balancers and clients understand, instead of a
    refused connection. When nothing is at hand, or after ``drain_timeout_s``, the server's own
    handling of the signal follows. A second signal goes there at once, twice: it cuts.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._server_handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._num_signals = 0

    def install(self) -> None:
        """Takes the signals over from the server that runs this event loop; main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._server_handlers[number] = handler
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        assert self._loop is not None
        if self._num_signals == 1:
            self._loop.call_soon_threadsafe(self._begin, number)
            return
        self._server_handlers[number](number, frame)
        if self._num_signals == 2:
            self._server_handlers[number](number, frame)

    def _begin(self, number: int) -> None:
        self._task = asyncio.create_task(self._drain(number))

    async def _drain(self, number: int) -> None:
        try:
            await drain(self._gateway)
        except Exception:
            logger.exception("draining failed")
        finally:
            self._server_handlers[number](number, None)


async def drain(gateway: Gateway) -> None:
    """Refuses new requests and waits for those at hand; cuts and logs what takes too long."""
    loop = asyncio.get_running_loop()
    config = gateway.config
    gateway.begin_drain()
    logger.info("draining: %d requests at hand", len(gateway.at_hand))
    begun = loop.time()
    while gateway.at_hand or loop.time() < begun + config.drain_notice_s:
        if gateway.at_hand and loop.time() >= begun + config.drain_timeout_s:
            break
        await asyncio.sleep(_TICK_S)
    if gateway.at_hand:
        ids = sorted(gateway.at_hand)
        logger.warning(
            "cutting %d requests after %g seconds: %s%s",
            len(ids),
            config.drain_timeout_s,
            ", ".join(ids[:32]),
            " and more" if len(ids) > 32 else "",
        )
        await gateway.close()
