"""The synchronous engine: requests in, one ``step`` at a time, outputs out.

Not thread-safe but for ``prepare``; ``engine.thread`` drives it from one thread for everybody else.

Failures. A step that raises is tried again one sequence at a time, so that only the sequences
which raise on their own fail; that is safe because a step writes the same values to the same places
each time. A row whose logits are not finite fails its own request. Whatever else goes wrong inside
the step loop fails the requests that were running, and the engine goes on: every request is
answered once.

Where the device works on its own (``QueueingRunner``), a step is prepared and queued while the one
before is computed, as long as nothing has to be decided by the tokens that it chooses. A sequence
that turns out to have ended had one row too many; what it wrote nobody reads.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm.engine.config import EngineConfig
from sagellm.engine.executor import Executor
from sagellm.engine.input_processor import InputProcessor
from sagellm.engine.memory import peak_memory_mb, resolve_kv_plan
from sagellm.engine.output import Finished, SequenceOutput, measure, output_of, scored, stages
from sagellm.engine.positions import Wanted, read_positions
from sagellm.engine.request import Failure, RequestState, Sequence, Status
from sagellm.engine.scheduler import Scheduler
from sagellm.engine.speculation import create_drafter
from sagellm.engine.validation import Capacity, check_token_ids
from sagellm.errors import InvalidArgumentError, QueueFullError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from sagellm.backends.interface import ModelRunner, SampledRow
    from sagellm.engine.executor import Launched
    from sagellm.engine.speculation import Drafter
    from sagellm.engine.step import StepPlan
    from sagellm.kv.interface import KvStats
    from sagellm.protocol import FinishReason, Request
    from sagellm.text import ChatTemplate, Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A glance at the engine: gauges now, counters since the start."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_failed_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int
    kv: KvStats

    @property
    def spec_accept_rate(self) -> float | None:
        """Share of the drafted tokens that were accepted; None if there were none."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens


def monotonic_unix_clock() -> Callable[[], float]:
    """A clock in Unix seconds that never goes back."""
    offset = time.time() - time.perf_counter()
    return lambda: offset + time.perf_counter()


class Engine:
    """Serves many requests on one model.

    Attributes:
        config: As given.
        capacity: What fits, resolved at start.
        num_steps: Grows with every step; a health check watches it while there is work.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        chat_template: ChatTemplate | None = None,
        clock: Callable[[], float] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """Allocates the KV pool.

        Args:
            runner: A loaded model; the engine closes it.
            tokenizer: Of that model.
            config: Knobs; None takes the defaults.
            chat_template: For requests with ``messages``.
            clock: Unix seconds, never going back.
            drafter: Guesses tokens ahead; None takes what ``config.speculation`` says.

        Raises:
            ResourceExhaustedError: The KV pool does not fit in memory.
        """
        self.config = config or EngineConfig()
        self.runner = runner
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        plan = resolve_kv_plan(runner, self.config)
        self.kv = runner.allocate_kv(
            plan.num_blocks,
            self.config.block_size,
            enable_prefix_caching=self.config.enable_prefix_caching,
        )
        self.capacity = Capacity(
            vocab_size=runner.config.vocab_size,
            max_model_len=plan.max_model_len,
            groups=runner.kv_groups,
            block_size=self.config.block_size,
            num_blocks=plan.num_blocks,
            chunk_tokens=self.config.chunk_tokens,
        )
        self._inputs = InputProcessor(tokenizer, self.capacity, self.config.seed)
        self.num_steps = 0
        self._num_failed_steps = 0
        self._is_closed = False
        self._bytes_per_block = plan.bytes_per_block
        self._clock = clock or monotonic_unix_clock()
        self._scheduler = Scheduler(
            self.kv,
            runner.kv_groups,
            plan.num_blocks,
            self.config,
            drafter or create_drafter(self.config),
        )
        self._states: dict[int, RequestState] = {}
        self._executor = Executor(runner, self.kv)
        self._launched: Launched | None = None  # under way between two calls of ``step``
        self._held: list[SequenceOutput] = []  # for the next call to return

    # ---------------------------------------------------------------------- coming and going

    def encode_prompt(self, request: Request) -> list[int]:
        """Token ids of a request's prompt, or of its messages through the chat template.

        Raises:
            UnsupportedError: Messages for a model without a chat template.
        """
        if request.messages is None:
            return self.tokenizer.encode(request.prompt) if request.prompt else []
        if self.chat_template is None:
            raise UnsupportedError(
                f"{self.runner.config.name or 'this model'} has no chat template; send a prompt"
            )
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        text = self.chat_template.render(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special=False, parse_special=True)

    def prepare(
        self, request: Request, prompt_token_ids: Iterable[int] | None = None
    ) -> RequestState:
        """Validates and encodes a request. Safe on any thread; the engine does not know it yet.

        Args:
            request: From any front door.
            prompt_token_ids: Taken instead of ``request.prompt``.

        Raises:
            SagellmError: The request is invalid, not supported, or could never fit.
        """
        queued_at = self._clock()
        if prompt_token_ids is None:
            prompt_token_ids = self.encode_prompt(request)
        return self._inputs.process(request, prompt_token_ids, queued_at)

    def add(self, state: RequestState, *, has_place: bool = False) -> int:
        """Queues a prepared request and returns its key.

        Args:
            state: From ``prepare``.
            has_place: The caller has counted already and keeps a place in the queue for it.

        Raises:
            ResourceExhaustedError: The queue is full.
        """
        if not has_place and self._scheduler.num_waiting >= self.config.max_queue:
            raise queue_full(self.config.max_queue)
        self._states[state.key] = state
        self._scheduler.add(state)
        return state.key

    def add_request(self, request: Request, prompt_token_ids: Iterable[int] | None = None) -> int:
        """``prepare`` and ``add`` in one."""
        return self.add(self.prepare(request, prompt_token_ids))

    def cancel(self, key: int) -> bool:
        """Drops a request; its blocks are back at once and no output follows.

        Returns:
            Whether the request was still unanswered.
        """
        state = self._states.pop(key, None)
        if state is None:
            return False
        self._scheduler.abort(state)
        return True

    def answer(self, state: RequestState, failure: Failure) -> list[SequenceOutput]:
        """Makes the error answers of a request that the engine does not hold (any more)."""
        outputs: list[SequenceOutput] = []
        for sequence in state.sequences:
            if sequence.finish_reason is None:
                self._conclude(sequence, "error", failure, outputs)
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""
        return self._scheduler.has_work or self._launched is not None or bool(self._held)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return self._scheduler.num_waiting

    @property
    def unfinished(self) -> list[int]:
        """Keys of requests without a complete answer."""
        return list(self._states)

    def stats(self) -> EngineStats:
        """Gauges and counters."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_steps=self.num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_failed_steps=self._num_failed_steps,
            num_draft_tokens=self._scheduler.num_drafted,
            num_accepted_tokens=self._scheduler.num_accepted,
            kv=self.kv.stats(),
        )

    def close(self) -> None:
        """Drops every request and frees the model."""
        if not self._is_closed:
            self._is_closed = True
            for key in self.unfinished:
                self.cancel(key)
            self.runner.close()

    # -------------------------------------------------------------------------------- a step

    def step(self) -> list[SequenceOutput]:
        """Advances every running sequence; returns what is new. Never raises an ``Exception``."""
        return self._advance(may_run_ahead=self._executor.runs_ahead)

    def _advance(self, *, may_run_ahead: bool) -> list[SequenceOutput]:
        """Completes one step: the one under way, else a new one."""
        outputs, self._held = self._held, []
        launched, self._launched = self._launched, None
        try:
            if launched is None:
                launched = self._launch(outputs)
            if launched is not None:
                if may_run_ahead and launched.error is None:
                    self._launch_behind(launched)
                self._accept_all(self._complete(launched, outputs), outputs)
        except Exception as error:
            logger.exception("step %d failed outside of any one request", self.num_steps)
            self._num_failed_steps += 1
            self._drop_launched()
            self._fail_involved(Failure.from_exception(error), outputs)
        self.num_steps += 1
        return outputs

    def _launch(self, outputs: list[SequenceOutput]) -> Launched | None:
        plan = self._scheduler.schedule(self._clock())
        for state, failure in plan.failures:
            self._fail(state, failure, outputs)
        return self._executor.launch(plan) if plan.sequences else None

    def _launch_behind(self, launched: Launched) -> None:
        plan = self._scheduler.schedule_ahead(launched.plan, self._clock())
        if plan is not None:
            self._launched = self._executor.launch(plan)

    def _complete(
        self, launched: Launched, outputs: list[SequenceOutput]
    ) -> list[tuple[Sequence, list[SampledRow]]]:
        """Takes the result of a step; after an exception, computes each of its sequences alone."""
        plan = launched.plan
        try:
            output = self._executor.finish(launched)
        except Exception:
            self._num_failed_steps += 1
            logger.exception(
                "step %d failed with %d sequences", self.num_steps, len(plan.sequences)
            )
        else:
            return self._scheduler.commit(plan, output)
        self._drop_launched()  # it was built on the one that failed; it will be planned again
        return self._run_alone(plan, launched.copies, outputs)

    def _drop_launched(self) -> None:
        self._executor.drain()
        self._launched = None

    def _run_alone(
        self, plan: StepPlan, copies: NDArray[np.int32], outputs: list[SequenceOutput]
    ) -> list[tuple[Sequence, list[SampledRow]]]:
        """Computes the sequences of a plan one by one, without guesses; fails those that raise."""
        sampled: list[tuple[Sequence, list[SampledRow]]] = []
        for index, sequence in enumerate(plan.sequences):
            if sequence.status is not Status.RUNNING:
                continue  # cancelled, or another completion of its request failed
            alone = plan.alone(index)
            try:
                output = self._executor.run(alone, copies)
            except Exception as error:
                logger.error("sequence %d fails on its own: %s", sequence.sequence_id, error)
                self._fail(sequence.state, Failure.from_exception(error), outputs)
                continue
            copies = copies[:0]  # done; once more they would undo what was written since
            sampled += self._scheduler.commit(alone, output)
        return sampled

    def _accept_all(
        self, sampled: list[tuple[Sequence, list[SampledRow]]], outputs: list[SequenceOutput]
    ) -> None:
        now = self._clock()
        running = Status.RUNNING
        for sequence, rows in sampled:
            if sequence.status is not running:
                continue  # another completion of its request failed
            if rows[0].error is not None:
                self._fail(sequence.state, sequence.failure_of(rows[0].error), outputs)
                continue
            try:
                reason = sequence.accept(rows, now)
                if reason is not None:
                    self._finish(sequence, reason, None, outputs)
                elif sequence.state.request.stream:
                    text = sequence.text.take()
                    if text:
                        outputs.append(output_of(sequence, text))
            except InvalidArgumentError as error:  # such as a grammar that outgrows its limits
                logger.warning("request %d cannot go on: %s", sequence.state.key, error)
                self._fail(sequence.state, Failure.from_exception(error), outputs)
            except Exception as error:
                logger.exception("the output of request %d failed", sequence.state.key)
                self._fail(sequence.state, Failure.from_exception(error), outputs)

    # ------------------------------------------------------------------------------- endings

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        failure: Failure | None,
        outputs: list[SequenceOutput],
    ) -> None:
        self._scheduler.finish(sequence)
        self._conclude(sequence, reason, failure, outputs)
        if sequence.state.num_unfinished == 0:
            self._states.pop(sequence.state.key, None)

    def _conclude(
        self,
        sequence: Sequence,
        reason: FinishReason,
        failure: Failure | None,
        outputs: list[SequenceOutput],
    ) -> None:
        """Makes the last output of a sequence that is out of the scheduler."""
        sequence.finish_reason, sequence.failure = reason, failure
        sequence.state.num_unfinished -= 1
        finished = Finished(
            reason=reason,
            text=sequence.text.whole(),
            token_ids=sequence.output_tokens,
            logprobs=sequence.logprobs,
            failure=failure,
            metrics=measure(
                sequence,
                now=self._clock(),
                bytes_per_block=self._bytes_per_block,
                peak_mem_mb=peak_memory_mb(),
                caching=self.config.enable_prefix_caching,
            ),
            timestamps=stages(sequence),
            matched_stop=None if failure is not None else sequence.matched_stop,
            prompt_logprobs=scored(sequence.state),
        )
        outputs.append(output_of(sequence, sequence.text.take(), finished))

    def _fail(self, state: RequestState, failure: Failure, outputs: list[SequenceOutput]) -> None:
        """Answers every unfinished sequence of a request with an error."""
        self._scheduler.abort(state)
        for sequence in state.sequences:
            if sequence.finish_reason is None:
                self._finish(sequence, "error", failure, outputs)

    def _fail_involved(self, failure: Failure, outputs: list[SequenceOutput]) -> None:
        """Fails the requests that a broken step had touched; all of them if none can be told."""
        states = list(self._states.values())
        involved = [
            state
            for state in states
            if any(s.status is Status.RUNNING for s in state.sequences)
            or all(s.status is Status.FINISHED for s in state.sequences)
        ]
        for state in involved or states:
            self._fail(state, failure, outputs)

    # ------------------------------------------------------------------- every position at once

    def logits(self, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """Logits of every position, computed through ordinary paged steps.

        Args:
            token_ids: One sequence, at most ``max_model_len`` tokens.

        Returns:
            ``[tokens, vocab]`` float32.

        Raises:
            InvalidArgumentError: Empty, outside the vocabulary, or too long.
            ResourceExhaustedError: The KV pool has no room for them now.
        """
        return self._positions(token_ids, "logits")

    def hidden(self, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """Hidden states of every position after the final norm, through ordinary paged steps.

        Args:
            token_ids: One sequence, at most ``max_model_len`` tokens.

        Returns:
            ``[tokens, hidden]`` float32.

        Raises:
            InvalidArgumentError: Empty, outside the vocabulary, or too long.
            ResourceExhaustedError: The KV pool has no room for them now.
            UnsupportedError: The device has no hidden states.
        """
        return self._positions(token_ids, "hidden")

    def _positions(self, token_ids: Iterable[int], wanted: Wanted) -> NDArray[np.float32]:
        tokens = check_token_ids(token_ids, self.capacity.vocab_size)
        if len(tokens) > self.capacity.max_model_len:
            raise InvalidArgumentError(
                f"{len(tokens)} tokens are more than max_model_len ({self.capacity.max_model_len})"
            )
        if self._launched is not None:
            self._held = self._advance(may_run_ahead=False)
        sequence_id, chunk = self._inputs.next_sequence_id(), self.config.chunk_tokens
        return read_positions(self.runner, self.kv, sequence_id, tokens, chunk, wanted)


def queue_full(max_queue: int) -> QueueFullError:
    """The error of a queue that takes no more."""
    return QueueFullError(
        f"{max_queue} requests are waiting already; try again later, or raise max_queue"
    )
