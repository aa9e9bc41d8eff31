"""The one thread that runs an encoder: what waits is cut into batches, fairly among requests."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from sagellm.backends.encoder import EncoderBatch
from sagellm.errors import InvalidArgumentError, QueueFullError, UnavailableError

if TYPE_CHECKING:
    from sagellm.backends.encoder import EncoderRunner

logger = logging.getLogger(__name__)

Task = Literal["embed", "score"]
Floats = NDArray[np.float32]
Input = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and token types."""


class _Job:
    """One request: inputs of one task, and their results as batches bring them."""

    __slots__ = ("future", "inputs", "num_done", "num_taken", "rows", "task")

    def __init__(self, task: Task, inputs: Sequence[Input], width: int) -> None:
        self.task = task
        self.inputs = inputs
        self.num_taken = 0  # inputs that went into batches, in their order
        self.num_done = 0
        shape = (len(inputs), width) if task == "embed" else (len(inputs),)
        self.rows: Floats = np.empty(shape, dtype=np.float32)
        self.future: Future[Floats] = Future()

    @property
    def num_waiting(self) -> int:
        return len(self.inputs) - self.num_taken


class EncoderThread:
    """Runs an encoder on a thread of its own.

    A batch takes inputs of one task in turn from the requests that wait, up to the runner's token
    limit, so a small request does not wait for a large one to end. A batch that fails is run again
    one input at a time, so that only the requests which fail on their own do.
    """

    def __init__(self, runner: EncoderRunner, max_queue: int) -> None:
        """Starts the thread; ``runner`` belongs to it from now on.

        Args:
            runner: The encoder.
            max_queue: Most inputs that may wait.
        """
        self._runner = runner
        self._max_queue = max_queue
        self._wake = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._num_waiting = 0
        self._running: list[tuple[_Job, int]] = []  # the batch at hand
        self._num_batches = 0
        self._moved_at = 0.0
        self._closing = False
        self._end: str | None = None  # why nothing is taken any more
        self._thread = threading.Thread(target=self._run, name="sagellm-encoder", daemon=True)
        self._thread.start()
        # A daemon thread inside native code must not meet the end of the interpreter.
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._end is None and not self._closing

    @property
    def num_batches(self) -> int:
        """Since the start; grows while there is work."""
        return self._num_batches

    @property
    def num_waiting(self) -> int:
        """Inputs that are in no batch yet."""
        return self._num_waiting

    @property
    def seconds_since_progress(self) -> float:
        """Since a batch ended or work came to an idle thread; 0 without work."""
        with self._wake:
            busy = self._num_waiting > 0 or bool(self._running)
            return time.monotonic() - self._moved_at if busy else 0.0

    def submit(self, task: Task, inputs: Sequence[Input]) -> Future[Floats]:
        """Queues a request of valid inputs.

        Args:
            task: ``embed`` or ``score``.
            inputs: At least one.

        Returns:
            One row per input. Cancelling it takes the request out of the queue.

        Raises:
            InvalidArgumentError: More inputs than the queue has places.
            QueueFullError: Too many are waiting.
            UnavailableError: The thread has ended.
        """
        if len(inputs) > self._max_queue:
            raise InvalidArgumentError(
                f"{len(inputs)} inputs in one request; at most {self._max_queue} are taken"
            )
        job = _Job(task, inputs, self._runner.config.hidden_size)
        job.future.add_done_callback(lambda _: self._forget(job))
        with self._wake:
            if not self.is_alive:
                raise UnavailableError(self._end or "the embedding model is shutting down")
            if self._num_waiting + len(inputs) > self._max_queue:
                raise QueueFullError(
                    f"{self._num_waiting} inputs are waiting for the embedding model already, at "
                    f"most {self._max_queue} may; try again later, or raise max_queue"
                )
            if not self._num_waiting and not self._running:
                self._moved_at = time.monotonic()
            self._jobs.append(job)
            self._num_waiting += len(inputs)
            self._wake.notify()
        return job.future

    def close(self) -> None:
        """Ends the thread after the batch at hand; requests that still wait get an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _forget(self, job: _Job) -> None:
        """Takes a request that was answered or cancelled out of the queue."""
        with self._wake:
            if job in self._jobs:
                self._jobs.remove(job)
                self._num_waiting -= job.num_waiting

    # ------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        end = "the embedding model shut down before this request was complete; send it again"
        try:
            while batch := self._take():
                self._run_batch(batch)
                with self._wake:
                    self._running = []
                    self._num_batches += 1
                    self._moved_at = time.monotonic()
        except BaseException as error:
            logger.critical("the encoder thread ends: %r", error, exc_info=True)
            end = f"the embedding model has failed ({type(error).__name__}); restart it"
        finally:
            with self._wake:
                self._end = end
                rest = [*self._jobs, *(job for job, _ in self._running)]
            for job in rest:
                _answer(job, UnavailableError(end))

    def _take(self) -> list[tuple[_Job, int]]:
        """The next batch: one input of every request in turn; empty when closing."""
        with self._wake:
            while not self._jobs and not self._closing:
                self._wake.wait()
            if self._closing:
                return []
            task = self._jobs[0].task
            room = self._runner.max_batch_tokens
            batch: list[tuple[_Job, int]] = []
            passed_over: list[_Job] = []  # these come first in the next batch
            while self._jobs and room > 0:
                job = self._jobs.popleft()
                size = len(job.inputs[job.num_taken][0])
                if job.task != task or size > room:
                    passed_over.append(job)
                    continue
                batch.append((job, job.num_taken))
                job.num_taken += 1
                room -= size
                if job.num_waiting:
                    self._jobs.append(job)
            self._jobs.extendleft(reversed(passed_over))
            self._num_waiting -= len(batch)
            self._running = list(batch)
        return batch

    def _run_batch(self, batch: list[tuple[_Job, int]]) -> None:
        batch = [(job, index) for job, index in batch if not job.future.done()]
        if not batch:
            return
        try:
            inputs = [job.inputs[index] for job, index in batch]
            packed = EncoderBatch.of([ids for ids, _ in inputs], [types for _, types in inputs])
            scores = batch[0][0].task == "score"
            rows = self._runner.score(packed) if scores else self._runner.embed(packed)
        except Exception as error:
            if len(batch) > 1:
                for item in batch:
                    self._run_batch([item])
            else:
                logger.exception("an input of the encoder failed")
                _answer(batch[0][0], error)
            return
        for (job, index), row in zip(batch, rows, strict=True):
            job.rows[index] = row
            job.num_done += 1
            if job.num_done == len(job.inputs):
                _answer(job, _broken(job.rows))


def _broken(rows: Floats) -> Exception | None:
    if np.isfinite(rows).all():
        return None
    return UnavailableError("the embedding is not finite; check the model file")


def _answer(job: _Job, error: Exception | None) -> None:
    """Ends a request, unless it was cancelled or has ended."""
    if job.future.done() or not job.future.set_running_or_notify_cancel():
        return
    if error is None:
        job.future.set_result(job.rows)
    else:
        job.future.set_exception(error)


def _close_at_exit(reference: weakref.ref[EncoderThread]) -> None:
    thread = reference()
    if thread is not None:
        thread.close()
