"""The one thread that drives an engine, and the mailboxes through which others hear of it."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sagellm.engine.engine import queue_full
from sagellm.engine.request import Failure
from sagellm.errors import UnavailableError
from sagellm.protocol import ErrorCode

if TYPE_CHECKING:
    from sagellm.engine.engine import Engine
    from sagellm.engine.output import SequenceOutput
    from sagellm.engine.request import RequestState

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Mailbox(Protocol):
    """Where the outputs of some requests go."""

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        """Takes new outputs, on the engine's thread; must not block.

        When it raises, nobody listens any more: the requests are cancelled.
        """


class EngineThread:
    """Runs ``Engine.step`` as long as there is work, and commands of other threads in between.

    Every request that ``submit`` accepted is answered once through its mailbox, unless it is
    cancelled: by the engine, or with ``unavailable`` when the thread ends before.
    """

    def __init__(self, engine: Engine) -> None:
        """Starts the thread; from now on only it may touch ``engine`` (but for ``prepare``)."""
        self._engine = engine
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._calls: set[Future[Any]] = set()
        self._requests: dict[int, tuple[RequestState, Mailbox]] = {}
        self._num_arriving = 0  # submitted, not yet in the engine's queue
        self._drain_until: float | None = None  # monotonic seconds; set when closing
        self._num_cut = 0
        self._end: Failure | None = None  # why the thread no longer takes requests
        self._thread = threading.Thread(target=self._run, name="sagellm-engine", daemon=True)
        self._thread.start()
        # A daemon thread inside native code must not meet the end of the interpreter.
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._end is None and self._thread.is_alive()

    def submit(self, state: RequestState, mailbox: Mailbox) -> None:
        """Hands a prepared request to the engine.

        Raises:
            ResourceExhaustedError: The queue is full.
            UnavailableError: The engine is closing or has failed.
        """
        limit = self._engine.config.max_queue
        with self._wake:
            self._require_open()
            if self._num_arriving + self._engine.num_waiting >= limit:
                raise queue_full(limit)
            self._num_arriving += 1
            self._requests[state.key] = (state, mailbox)
            self._commands.append(lambda: self._add(state))
            self._wake.notify()

    def cancel(self, key: int) -> None:
        """Drops a request before the next step. Unknown and finished ones are ignored."""
        with self._wake:
            if self._requests.pop(key, None) is not None and self._end is None:
                self._commands.append(lambda: _ignore(self._engine.cancel(key)))
                self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function between two steps, where it may use the engine.

        Raises:
            UnavailableError: The engine is closing or has failed.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            self._calls.discard(future)

        with self._wake:
            self._require_open()
            self._calls.add(future)
            self._commands.append(run)
            self._wake.notify()
        return future

    def close(self, drain_timeout: float = 0.0) -> int:
        """Stops taking requests, lets those at hand finish, and ends the thread.

        Args:
            drain_timeout: Seconds; what is unfinished then is answered ``unavailable``.

        Returns:
            How many requests were cut short (0 if the thread had ended before).
        """
        with self._wake:
            if self._drain_until is None:
                self._drain_until = time.monotonic() + drain_timeout
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        return self._num_cut

    # ------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        end = Failure(
            code=ErrorCode.UNAVAILABLE,
            message="the engine shut down before this request was complete; send it again",
            retryable=True,
        )
        try:
            while self._take_turn():
                pass
        except BaseException as error:
            logger.critical("the engine thread ends: %r", error, exc_info=True)
            end = Failure(
                code=ErrorCode.UNAVAILABLE,
                message=f"the engine has failed ({type(error).__name__}); restart it",
                retryable=True,
            )
        finally:
            self._end_with(end)

    def _take_turn(self) -> bool:
        """Runs waiting commands and one step; returns False when closing is complete."""
        engine = self._engine
        with self._wake:
            while not (self._commands or engine.has_work or self._drain_until is not None):
                self._wake.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        if engine.has_work:
            outputs = engine.step()
            if outputs:
                self._dispatch(outputs)
        if self._drain_until is None:
            return True
        with self._wake:
            working = bool(self._commands) or engine.has_work
        return working and time.monotonic() < self._drain_until

    def _add(self, state: RequestState) -> None:
        with self._wake:
            self._num_arriving -= 1
            wanted = state.key in self._requests
        if not wanted:
            return  # cancelled before it got here
        try:
            self._engine.add(state)
        except Exception as error:  # others came first and filled the queue
            self._dispatch(self._engine.answer(state, Failure.from_exception(error)))

    def _dispatch(self, outputs: list[SequenceOutput]) -> None:
        """Sorts outputs by mailbox: one delivery per mailbox and step."""
        bundles: dict[int, tuple[Mailbox, list[SequenceOutput]]] = {}
        with self._wake:
            for output in outputs:
                entry = self._requests.get(output.key)
                if entry is None:
                    continue  # cancelled meanwhile
                mailbox = entry[1]
                bundles.setdefault(id(mailbox), (mailbox, []))[1].append(output)
                if output.request_finished:
                    del self._requests[output.key]
        for mailbox, bundle in bundles.values():
            try:
                mailbox.deliver(bundle)
            except Exception:
                logger.exception("nobody takes the outputs of %d sequences", len(bundle))
                for output in bundle:
                    self.cancel(output.key)

    def _end_with(self, end: Failure) -> None:
        """Answers everyone who still waits."""
        with self._wake:
            self._end = end
            rest = [state for state, _ in self._requests.values()]
            calls, self._calls = list(self._calls), set()
            self._commands = []
            self._num_cut = len(rest)
        for state in rest:
            self._dispatch(self._engine.answer(state, end))
        for future in calls:
            if not future.done():
                future.set_exception(UnavailableError(end.message))

    def _require_open(self) -> None:
        if self._end is not None:
            raise UnavailableError(self._end.message)
        if self._drain_until is not None:
            raise UnavailableError("the engine is shutting down; send the request elsewhere")


def _ignore(_: object) -> None:
    """Makes a command of a call whose result nobody needs."""


def _close_at_exit(reference: weakref.ref[EngineThread]) -> None:
    thread = reference()
    if thread is not None:
        thread.close()
