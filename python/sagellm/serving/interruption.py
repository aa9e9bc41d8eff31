"""Cancelling the work of a request from outside: its client left, or its time is over."""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType

from starlette.types import Receive


class Interruption:
    """Cancels the task inside its `with` block, once, when `fire` is called.

    The block's cancellation is swallowed at its end; ask `fired`. One from elsewhere goes on. The
    task is cancelled once, as asyncio does it, so its clean-up may await.
    """

    __slots__ = ("_active", "_task", "fired")

    def __init__(self) -> None:
        self._active = False
        self.fired = False

    def fire(self) -> None:
        """Cancel the block; without effect after its end."""
        if self.fired:
            return
        self.fired = True
        # The caller has the thread, so the block waits at an `await` inside it, or has ended: the
        # cancellation is raised at that `await`, never after the block.
        if self._active:
            self._task.cancel()

    def __enter__(self) -> Interruption:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an Interruption needs a running asyncio task")
        self._task = task
        self._active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._active = False
        if not self.fired:
            return False
        if sys.version_info >= (3, 11):
            others = self._task.uncancel()
            return kind is asyncio.CancelledError and others == 0
        return kind is asyncio.CancelledError


class DisconnectWatch(Interruption):
    """Fires when the client goes away: one background task reads `receive()`."""

    __slots__ = ("_receive", "_watcher")

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._receive = receive

    def __enter__(self) -> DisconnectWatch:
        super().__enter__()
        self._watcher = asyncio.create_task(self._watch())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._watcher.cancel()
        return super().__exit__(kind, error, traceback)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.fire()


class TimeLimit(Interruption):
    """Fires at `deadline`, a time of the event loop's clock in seconds; None: never."""

    __slots__ = ("_deadline", "_timer")

    def __init__(self, deadline: float | None) -> None:
        super().__init__()
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> TimeLimit:
        super().__enter__()
        if self._deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(self._deadline, self.fire)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self._timer is not None:
            self._timer.cancel()
        return super().__exit__(kind, error, traceback)


def deadline_in(seconds: float | None) -> float | None:
    """Return the loop's time in `seconds` from now; None for no limit."""
    return None if seconds is None else asyncio.get_running_loop().time() + seconds
