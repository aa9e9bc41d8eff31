"""Waiting for what may hang, from a thread that nobody joins."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def run_in_daemon(function: Callable[[], T], name: str) -> T:
    """Runs a function on a daemon thread of its own.

    asyncio joins the threads of its pool when a loop ends, and so would wait for a step that hangs.

    Args:
        function: Goes on if the caller is cancelled.
        name: Of the thread.

    Raises:
        BaseException: Whatever ``function`` raises.
    """
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(done)
