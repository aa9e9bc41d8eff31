"""Threads for sync handlers: bounded in number, and never in the way of an exit."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar, cast

_T = TypeVar("_T")
_END: Any = object()

logger = logging.getLogger(__name__)


class ThreadPool:
    """Up to `max_threads` daemon threads, started when needed.

    The standard executors join their threads when the interpreter exits, so one stuck handler would
    keep the process alive after its drain; these threads end with the process.
    """

    def __init__(self, max_threads: int, name: str = "sagellm-handler") -> None:
        self._max_threads = max_threads
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = 0
        self._num_jobs = 0  # queued or running

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        """Queue `function`, to run in the caller's context variables."""
        future: Future[_T] = Future()
        context = contextvars.copy_context()
        with self._lock:
            self._num_jobs += 1
            if self._num_threads < min(self._num_jobs, self._max_threads):
                self._num_threads += 1
                name = f"{self._name}-{self._num_threads}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
        self._jobs.put((future, lambda: context.run(function)))
        return future

    async def run(self, function: Callable[[], _T]) -> _T:
        """Run `function` in a thread. Cancelled, it runs on unless it has not started yet."""
        return await asyncio.wrap_future(self.submit(function))

    def close(self) -> None:
        """Let the threads end after the work they have; later work starts new ones."""
        with self._lock:
            for _ in range(self._num_threads):
                self._jobs.put(None)
            self._num_threads = 0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _run(*job)
            del job  # hold no request while waiting for the next
            with self._lock:
                self._num_jobs -= 1


def _run(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except StopIteration as error:  # which no asyncio future can carry
        future.set_exception(RuntimeError(f"the handler raised StopIteration({error.value!r})"))
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class ThreadIterator(Generic[_T]):
    """An async iterator over a sync one, which runs in a pool's threads, one step at a time.

    `aclose()` while a step runs closes the generator as soon as that step is over.
    """

    def __init__(self, iterator: Iterator[_T], pool: ThreadPool) -> None:
        self._iterator = iterator
        self._pool = pool
        self._lock = threading.Lock()
        self._stepping = False
        self._closing = False

    def __aiter__(self) -> ThreadIterator[_T]:
        return self

    async def __anext__(self) -> _T:
        item = await self._pool.run(self._step)
        if item is _END:
            raise StopAsyncIteration
        return cast(_T, item)

    async def aclose(self) -> None:
        """Stop; waits for the generator's own clean-up unless a step is still running."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            stepping = self._stepping
        if not stepping:
            closed = asyncio.wrap_future(self._pool.submit(self._close))
            await asyncio.shield(closed)  # a cancelled caller does not keep it from running

    def _step(self) -> Any:
        with self._lock:
            if self._closing:
                return _END
            self._stepping = True
        try:
            return next(self._iterator, _END)
        finally:
            if self._end_step():
                self._close()

    def _end_step(self) -> bool:
        with self._lock:
            self._stepping = False
            return self._closing

    def _close(self) -> None:
        close = getattr(self._iterator, "close", None)
        try:
            if close is not None:
                close()
        except Exception:
            logger.exception("a sync generator failed while it was closed")
