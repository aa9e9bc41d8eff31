"""Carries out the plans of steps on a runner, one after another or the next behind the present."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sagellm.backends.interface import QueueingRunner
from sagellm.engine.step import build_batch, build_batch_ahead

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.backends.interface import ModelRunner, StepOutput
    from sagellm.engine.step import StepPlan
    from sagellm.kv.interface import KvCache


logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)  # not frozen: built for every step
class Launched:
    """A step under way.

    Attributes:
        plan: What it computes.
        copies: ``[n, 2]`` block copies that go before it.
        num_rows: Rows that it samples.
        error: Why it could not be queued.
    """

    plan: StepPlan
    copies: NDArray[np.int32]
    num_rows: int = 0
    error: Exception | None = None


class Executor:
    """The steps of one engine on its runner.

    A runner without a queue computes a step when it is finished.
    """

    def __init__(self, runner: ModelRunner, kv: KvCache) -> None:
        """Keeps both."""
        self._runner = runner
        self._queue = runner if isinstance(runner, QueueingRunner) else None
        self._kv = kv
        self._num_queued = 0

    @property
    def runs_ahead(self) -> bool:
        """Whether a second step can be launched before the first is finished."""
        return self._queue is not None

    def launch(self, plan: StepPlan) -> Launched:
        """Starts a step. What goes wrong is raised by ``finish``."""
        launched = Launched(plan=plan, copies=self._kv.take_copies())
        if self._queue is not None:
            try:
                if plan.sources:
                    batch, rows = build_batch_ahead(plan, self._kv)
                else:
                    batch, rows = build_batch(plan, self._kv, launched.copies)
                self._queue.launch(batch, rows)
                self._num_queued += 1
                launched.num_rows = len(rows)
            except Exception as error:
                launched.error = error
        return launched

    def finish(self, launched: Launched) -> StepOutput:
        """The result of the step that was launched first.

        Raises:
            Exception: It failed.
        """
        if launched.error is not None:
            raise launched.error
        if self._queue is None:
            return self.run(launched.plan, launched.copies)
        self._num_queued -= 1
        return _whole(self._queue.finish(), launched.num_rows)

    def drain(self) -> None:
        """Waits for what is queued and drops its results."""
        while self._queue is not None and self._num_queued > 0:
            self._num_queued -= 1
            try:
                self._queue.finish()
            except Exception as error:
                logger.error("a step whose result is dropped failed: %s", error)

    def run(self, plan: StepPlan, copies: NDArray[np.int32]) -> StepOutput:
        """Computes a step while no other is under way.

        Raises:
            Exception: It failed.
        """
        batch, rows = build_batch(plan, self._kv, copies)
        return _whole(self._runner.step(batch, rows), len(rows))


def _whole(output: StepOutput, num_rows: int) -> StepOutput:
    if len(output.rows) != num_rows:
        raise RuntimeError(f"the backend returned {len(output.rows)} of {num_rows} rows")
    return output
