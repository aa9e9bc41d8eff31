"""Which sequences advance in a step, by how many tokens, and who gives way when memory runs out.

There is one rule: a sequence's computed tokens catch up with its tokens. A prompt, the rest of a
chunked prompt, a decode step and the recomputation after a preemption are all the same thing.

Policy, in the order of ``schedule``:

1. Requests past their deadline fail, waiting ones included.
2. Running sequences in order (priority, then arrival). Every one that lacks a single token (decode)
   has its place in the token budget before prompts take the rest in chunks.
3. When a running sequence finds no block, the last one in order is preempted: it gives its blocks
   back and waits at its old place in the queue. A sequence that is alone and finds no block fails.
4. If nobody was preempted, waiting sequences are admitted strictly in order, each with the longest
   cached prefix, as soon as the pool has room for all the tokens that it has so far.
5. What is left of the token budget may go to guesses (see ``speculation``), within blocks that
   their sequences hold anyway: no guess ever takes a block, a place or a first token from anyone.

``schedule_ahead`` plans a step behind one that is still computed, where none of this has anything
to decide: everybody decodes, and nobody can come in.

No sequence starves: the first in order is never preempted while another runs, and admission never
overtakes. Running and waiting sequences are kept in two sorted lists. Nothing here touches a model.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

from sagellm.engine.memory import blocks_needed
from sagellm.engine.request import Failure, RequestState, Sequence, Status
from sagellm.engine.step import StepPlan
from sagellm.protocol import ErrorCode

if TYPE_CHECKING:
    from sagellm.backends.interface import SampledRow, StepOutput
    from sagellm.engine.config import EngineConfig
    from sagellm.engine.speculation import Drafter
    from sagellm.kv.interface import KvCache, KvGroup

_ORDER = attrgetter("order")
_RUNNING = Status.RUNNING  # a member is looked up slowly, and once per token


class Scheduler:
    """Continuous batching over one KV cache."""

    def __init__(
        self,
        kv: KvCache,
        groups: tuple[KvGroup, ...],
        num_blocks: int,
        config: EngineConfig,
        drafter: Drafter | None = None,
    ) -> None:
        """Creates an idle scheduler.

        Args:
            kv: Empty; the scheduler is its only user.
            groups: Of the model.
            num_blocks: Usable blocks of ``kv``.
            config: Budgets.
            drafter: Guesses tokens ahead; None does without.
        """
        self._drafter = drafter
        self._kv = kv
        self._groups = groups
        self._num_blocks = num_blocks
        self._block_size = kv.block_size
        self._max_num_seqs = config.max_num_seqs
        self._max_batch_tokens = config.max_batch_tokens
        self._chunk_tokens = config.chunk_tokens
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._deadlines: list[tuple[float, int, RequestState]] = []
        self._num_releases = 0
        self._stalled: tuple[int, int] | None = (
            None  # (sequence id, releases when it found no room)
        )
        self.num_preemptions = 0
        self.num_drafted = self.num_accepted = 0  # tokens, as in ``Sequence``

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._waiting)

    @property
    def running_requests(self) -> list[RequestState]:
        """Requests with at least one running sequence, in order."""
        return list(dict.fromkeys(sequence.state for sequence in self._running))

    # ---------------------------------------------------------------------- coming and going

    def add(self, state: RequestState) -> None:
        """Queues a new request."""
        insort(self._waiting, state.sequences[0], key=_ORDER)
        if state.deadline is not None:
            heapq.heappush(self._deadlines, (state.deadline, state.key, state))
            if len(self._deadlines) > 64 + 2 * (self.num_waiting + self.num_running):
                self._deadlines = [entry for entry in self._deadlines if _is_live(entry[2])]
                heapq.heapify(self._deadlines)

    def finish(self, sequence: Sequence) -> None:
        """Ends one sequence, wherever it stands; its blocks are back at once."""
        if sequence.status is Status.RUNNING:
            self._running.pop(self._index(self._running, sequence))
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            index = bisect_left(self._waiting, sequence.order, key=_ORDER)
            if index < len(self._waiting) and self._waiting[index] is sequence:
                self._waiting.pop(index)
        sequence.status = Status.FINISHED
        sequence.children = ()

    def abort(self, state: RequestState) -> None:
        """Ends every sequence of a request."""
        for sequence in state.sequences:
            if sequence.status is not Status.FINISHED:
                self.finish(sequence)

    # -------------------------------------------------------------------------------- a step

    def schedule(self, now: float) -> StepPlan:
        """Plans the next step.

        Args:
            now: Unix seconds.

        Returns:
            A plan, possibly without sequences; its failures have left the scheduler.
        """
        plan = StepPlan(budget=self._max_batch_tokens)
        if self._deadlines:
            self._expire(now, plan)
        if not self._schedule_running(plan) and self._waiting:
            self._admit_waiting(now, plan)
        if self._drafter is not None:
            self._draft_ahead(plan, self._drafter)
        return plan

    def schedule_ahead(self, plan: StepPlan, now: float) -> StepPlan | None:
        """Plans the decode step behind one whose tokens are not known yet.

        Args:
            plan: The last one, launched but not committed.
            now: Unix seconds.

        Returns:
            A plan with ``sources``; None where the tokens must be known first: somebody may come in
            or has to leave, a grammar, penalty or guess depends on them, or memory is short.
        """
        if self._admits() or (self._deadlines and self._deadlines[0][0] <= now):
            return None
        ahead = StepPlan(budget=self._max_batch_tokens)
        sources: list[int] = []
        num_running = 0
        for row, sequence in enumerate(plan.sequences):  # each has one row, or there is no step
            if sequence.status is not _RUNNING:
                continue  # ended since it was launched
            num_running += 1
            done, end = sequence.num_computed, sequence.num_computed + plan.counts[row]
            if plan.drafts[row] > 0 or end < sequence.num_tokens or sequence.children:
                return None
            if sequence.sampling.needs_tokens:
                return None
            if sequence.scores is not None and sequence.scores.positions(done, end):
                return None
            if sequence.num_tokens + 1 >= sequence.max_length:
                continue  # ends with the token that is being chosen
            ahead.take(sequence, 1)
            sources.append(row)
        if num_running < len(self._running) or not ahead.sequences or ahead.budget < 0:
            return None
        if self._drafter is not None and self._has_guesses(ahead, self._drafter):
            return None
        for sequence in ahead.sequences:
            end = sequence.num_tokens + 1
            if end > sequence.num_reserved and not self._reserve(sequence, end):
                return None
        ahead.sources = tuple(sources)
        return ahead

    def commit(self, plan: StepPlan, output: StepOutput) -> list[tuple[Sequence, list[SampledRow]]]:
        """Takes the result of a step: tokens become computed, full blocks are published.

        Guesses are kept while each is the token that was drawn in its place. What was computed for
        the others is overwritten by the next step. Nothing is published of a sequence whose row
        carries an error, or that ended since the step was launched.

        Returns:
            The sequences that sampled, or whose prompt could not be scored, each with its rows;
            appending the tokens is the caller's, up to one that ends the sequence.
        """
        sampled: list[tuple[Sequence, list[SampledRow]]] = []
        rows = iter(output.rows)
        for sequence, count, drafted in zip(plan.sequences, plan.counts, plan.drafts, strict=True):
            if sequence.status is not _RUNNING:
                next(rows)  # only a step that was planned ahead meets this: one row each
                continue
            computed = sequence.num_computed + count - drafted
            scores = sequence.scores
            if scores is not None:
                scored = [next(rows) for _ in scores.positions(sequence.num_computed, computed)]
                failed = next((row for row in scored if row.error is not None), None)
                if failed is not None:
                    sampled.append((sequence, [failed]))
                    if computed == sequence.num_tokens:
                        next(rows)
                    continue
                scores.rows += scored
            sequence.num_computed = computed
            if computed == sequence.num_tokens:
                drawn = [next(rows)]
                if drafted > 0:
                    drawn = self._keep(sequence, [*drawn, *islice(rows, drafted)])
                sampled.append((sequence, drawn))
                if drawn[0].error is not None:
                    continue
                computed = sequence.num_computed
            # The cache acts on whole blocks only, so it need not hear of every token.
            if computed // self._block_size > sequence.num_committed // self._block_size:
                self._commit(sequence)
        return sampled

    def _keep(self, sequence: Sequence, rows: list[SampledRow]) -> list[SampledRow]:
        """Compares guesses with what was drawn; returns the rows up to the first that differs.

        A row with an error is given out alone: behind a guess it is left to the next step.
        """
        num_drafted, num_accepted = len(rows) - 1, 0
        draft = sequence.ids(sequence.num_tokens, sequence.num_tokens + num_drafted)
        for row, token_id, following in zip(rows, draft, rows[1:], strict=False):
            if (row.token_id, row.error, following.error) != (token_id, None, None):
                break
            num_accepted += 1
        sequence.num_computed += num_accepted
        sequence.num_drafted += num_drafted
        sequence.num_accepted += num_accepted
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        return rows[: num_accepted + 1]

    def _commit(self, sequence: Sequence) -> None:
        tokens = sequence.slice(0, sequence.num_computed)
        self._kv.commit(sequence.sequence_id, tokens, sequence.num_computed)
        sequence.num_committed = sequence.num_computed

    # ------------------------------------------------------------------------------- running

    def _schedule_running(self, plan: StepPlan) -> bool:
        """Plans the running sequences; returns whether one was preempted."""
        running = self._running
        before = self.num_preemptions
        decodes = 0  # single tokens still to be planned, whose places prompts must leave free
        for sequence in running:
            if sequence.num_tokens - sequence.num_computed == 1:
                decodes += 1
        index = 0
        while index < len(running) and plan.budget > 0:
            sequence = running[index]
            index += 1
            pending = sequence.num_tokens - sequence.num_computed
            decodes_now = pending == 1
            if sequence.children:
                if decodes_now:
                    decodes += self._fork(sequence)
                else:
                    pending -= 1  # the last prompt token comes after the fork
            if decodes_now:
                decodes -= 1
                count = 1
            else:
                count = min(pending, self._chunk_tokens, plan.budget - decodes)
                if count <= 0:
                    continue
            end = sequence.num_computed + count
            while end > sequence.num_reserved and not self._reserve(sequence, end):
                victim = running[-1]
                if victim is sequence and index == 1:
                    self._fail_alone(sequence, plan)
                    break
                if victim is not sequence and victim.num_tokens - victim.num_computed == 1:
                    decodes -= 1
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence.status is _RUNNING:
                plan.take(sequence, count)
        return self.num_preemptions > before

    def _draft_ahead(self, plan: StepPlan, drafter: Drafter) -> None:
        """Lets sequences that decode compute guesses behind their last token.

        No first token waits for guesses.
        """
        decodes = [
            index
            for index, sequence in enumerate(plan.sequences)
            if plan.counts[index] == 1
            and sequence.num_tokens - sequence.num_computed == 1
            and sequence.output_tokens
        ]
        num_tokens = self._max_batch_tokens - plan.budget
        for index in decodes:
            sequence = plan.sequences[index]
            room = min(
                plan.budget,
                self._chunk_tokens - 1,
                sequence.num_reserved - sequence.num_tokens,
                sequence.max_length - sequence.num_tokens - 1,
            )
            if room < 1:
                continue
            draft = drafter.draft(sequence, room, len(decodes), num_tokens)[:room]
            grammar = sequence.sampling.grammar
            if draft and grammar is not None:
                draft = draft[: grammar.num_permitted(draft)]
            if draft:
                sequence.set_draft(draft)
                plan.counts[index] += len(draft)
                plan.drafts[index] = len(draft)
                plan.budget -= len(draft)

    def _has_guesses(self, plan: StepPlan, drafter: Drafter) -> bool:
        """Whether guesses wait for the tokens that are being chosen."""
        count = len(plan.sequences)
        return any(drafter.draft(sequence, 1, count, count) for sequence in plan.sequences)

    def _reserve(self, sequence: Sequence, end: int) -> bool:
        """Makes positions ``< end`` writable, and the rest of their block at no cost."""
        end = -(-end // self._block_size) * self._block_size
        if not self._kv.reserve(sequence.sequence_id, end):
            return False
        sequence.num_reserved = end
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.pop(self._index(self._running, victim))
        self._release(victim)
        victim.status = Status.WAITING
        victim.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, victim, key=_ORDER)

    def _fork(self, parent: Sequence) -> int:
        """Lets the other completions share the computed prompt; returns how many now run.

        Those beyond ``max_num_seqs`` wait and find the prompt in the prefix cache later.
        """
        self._commit(parent)
        forked = 0
        for child in parent.children:
            child.num_cached = parent.num_cached
            if len(self._running) >= self._max_num_seqs:
                insort(self._waiting, child, key=_ORDER)
                continue
            self._kv.fork(parent.sequence_id, child.sequence_id)
            child.num_computed = child.num_committed = parent.num_computed
            child.num_reserved = parent.num_computed
            child.status = Status.RUNNING
            insort(self._running, child, key=_ORDER)
            forked += 1
        parent.num_reserved = parent.num_computed  # its last block is shared now: reserve copies it
        parent.children = ()
        return forked

    # ----------------------------------------------------------------------------- admission

    def _admits(self) -> bool:
        """Whether it is worth trying to admit the first that waits."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return False
        mark = (self._waiting[0].sequence_id, self._num_releases)
        # Nothing was given back since it found no room?
        return not self._running or self._stalled != mark

    def _admit_waiting(self, now: float, plan: StepPlan) -> None:
        while plan.budget > 0 and self._admits():
            sequence = self._waiting[0]
            count = self._admit(sequence, plan.budget)
            if count is None:
                if self._running:
                    self._stalled = (sequence.sequence_id, self._num_releases)
                    return
                self._fail_alone(sequence, plan)
                continue
            self._waiting.pop(0)
            insort(self._running, sequence, key=_ORDER)
            sequence.status = Status.RUNNING
            if sequence.state.scheduled_at is None:
                sequence.state.scheduled_at = now
            if count > 0:
                plan.take(sequence, count)

    def _admit(self, sequence: Sequence, budget: int) -> int | None:
        """Gives a sequence its cached prefix and its first blocks.

        Returns:
            Tokens to compute now (0 when a fork comes first), or None without any change when the
            pool has no room.
        """
        kv = self._kv
        kv.add(sequence.sequence_id, sequence.state.salt)
        scores = sequence.scores
        cached = 0  # a prompt that is to be scored must be computed
        if scores is None or scores.is_complete:
            cached = kv.match_prefix(sequence.sequence_id, sequence.tokens)
        pending = sequence.num_tokens - cached - (1 if sequence.children else 0)
        count = min(pending, self._chunk_tokens, budget)
        end = -(-(cached + count) // self._block_size) * self._block_size
        room = not self._running or self._has_room(sequence)
        if not room or (count > 0 and not kv.reserve(sequence.sequence_id, end)):
            kv.release(sequence.sequence_id)
            return None
        sequence.num_computed = sequence.num_committed = cached
        sequence.num_reserved = max(cached, end)
        if sequence.num_preemptions == 0 and sequence.index == 0:
            sequence.num_cached = cached
        return count

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the free blocks hold the whole sequence and leave the running ones some slack."""
        needed = blocks_needed(
            self._groups, self._block_size, sequence.num_tokens, self._chunk_tokens
        )
        held = self._kv.num_blocks_of(sequence.sequence_id)
        slack = max(1, self._num_blocks // 100)
        return needed - held + slack <= self._kv.stats().free_blocks

    # ------------------------------------------------------------------------------- endings

    def _expire(self, now: float, plan: StepPlan) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, state = heapq.heappop(self._deadlines)
            if not _is_live(state):
                continue
            waited = "while waiting" if state.scheduled_at is None else "while running"
            self._fail(
                state,
                Failure(
                    code=ErrorCode.DEADLINE_EXCEEDED,
                    message=(
                        f"the deadline of {state.request.deadline_ms:g} ms passed {waited}; allow "
                        "more time or ask for fewer tokens"
                    ),
                    retryable=True,
                ),
                plan,
            )

    def _fail_alone(self, sequence: Sequence, plan: StepPlan) -> None:
        needed = blocks_needed(
            self._groups, self._block_size, sequence.num_tokens, self._chunk_tokens
        )
        self._fail(
            sequence.state,
            Failure(
                code=ErrorCode.RESOURCE_EXHAUSTED,
                message=(
                    f"{sequence.num_tokens} tokens need {needed} KV blocks of {self._block_size}, "
                    f"and the pool of {self._num_blocks} has not that many free even with no other "
                    "request running; shorten the request or raise kv_cache_gb"
                ),
                retryable=False,
            ),
            plan,
        )

    def _fail(self, state: RequestState, failure: Failure, plan: StepPlan) -> None:
        self.abort(state)
        plan.failures.append((state, failure))

    def _release(self, sequence: Sequence) -> None:
        blocks = self._kv.num_blocks_of(sequence.sequence_id)
        sequence.peak_blocks = max(sequence.peak_blocks, blocks)
        computed = min(sequence.num_computed, sequence.num_tokens)  # without what follows a stop
        sequence.peak_tokens = max(sequence.peak_tokens, computed)
        self._kv.release(sequence.sequence_id)
        sequence.num_computed = sequence.num_reserved = sequence.num_committed = 0
        self._num_releases += 1

    @staticmethod
    def _index(sequences: list[Sequence], sequence: Sequence) -> int:
        return bisect_left(sequences, sequence.order, key=_ORDER)


def _is_live(state: RequestState) -> bool:
    return any(sequence.status is not Status.FINISHED for sequence in state.sequences)
