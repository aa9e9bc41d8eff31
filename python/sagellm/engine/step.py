"""The plan of one step and the arrays that carry it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sagellm.backends.interface import ForwardBatch, SamplingRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.engine.request import Failure, RequestState, Sequence
    from sagellm.kv.interface import KvCache


@dataclass(slots=True, kw_only=True)  # not frozen: built for every step
class StepPlan:
    """Which tokens one step computes.

    Attributes:
        budget: Tokens that may be added.
        sequences: In the order of the batch.
        counts: Tokens of each, following its ``num_computed``.
        drafts: How many of them, the last ones, are guessed (see ``speculation``).
        failures: Requests that cannot go on, taken out of the scheduler already.
        sources: Of a step behind one that is still computed (``Scheduler.schedule_ahead``): the row
            of that one which chooses the token that each sequence computes here.
    """

    budget: int
    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    failures: list[tuple[RequestState, Failure]] = field(default_factory=list)
    sources: tuple[int, ...] = ()

    def take(self, sequence: Sequence, count: int) -> None:
        """Adds ``count`` tokens of a sequence, none of them guessed."""
        self.sequences.append(sequence)
        self.counts.append(count)
        self.drafts.append(0)
        self.budget -= count

    def alone(self, index: int) -> StepPlan:
        """The part of the plan that concerns one sequence, without guesses."""
        count = self.counts[index] - self.drafts[index]
        plan = StepPlan(budget=count)
        plan.take(self.sequences[index], count)
        return plan


def build_batch(
    plan: StepPlan, kv: KvCache, copies: NDArray[np.int32]
) -> tuple[ForwardBatch, tuple[SamplingRow, ...]]:
    """Builds the arrays of a plan. A sequence samples when the plan reaches its last token.

    It has a row then for that token and one for every drafted token. Rows of prompt tokens to be
    scored stand before the row that a sequence samples.

    Args:
        plan: At least one sequence.
        kv: Gives the block tables.
        copies: ``[n, 2]`` pending block copies.
    """
    # Lists, and one kind of call to make arrays of them: a step over all weights leaves the caches
    # empty, and then the first use of every NumPy function costs 10 to 60 us.
    token_ids: list[int] = []
    positions: list[int] = []
    query_starts = [0]
    logit_rows: list[int] = []
    rows: list[SamplingRow] = []
    for sequence, count, drafted in zip(plan.sequences, plan.counts, plan.drafts, strict=True):
        start, done = query_starts[-1], sequence.num_computed
        stop = start + count
        token_ids += sequence.ids(done, done + count)
        positions += range(done, done + count)
        query_starts.append(stop)
        if sequence.scores is not None:
            for position in sequence.scores.positions(done, done + count):
                logit_rows.append(start + position - done)
                rows.append(
                    SamplingRow(
                        forced_token=int(sequence.prompt[position + 1]),
                        num_logprobs=sequence.scores.num_logprobs,
                    )
                )
        if done + count - drafted == sequence.num_tokens:
            logit_rows += range(stop - 1 - drafted, stop)
            sampling = sequence.sampling
            tokens = sequence.slice(0, done + count) if sampling.needs_tokens else None
            rows += sampling.rows(done + count, tokens, drafted)
    batch = ForwardBatch(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        query_starts=np.array(query_starts, dtype=np.int32),
        block_tables=kv.block_tables([sequence.sequence_id for sequence in plan.sequences]),
        block_copies=copies,
        logit_rows=np.array(logit_rows, dtype=np.int32),
    )
    return batch, tuple(rows)


def build_batch_ahead(plan: StepPlan, kv: KvCache) -> tuple[ForwardBatch, tuple[SamplingRow, ...]]:
    """Builds the arrays of a step whose tokens, one per sequence, the step before is choosing.

    Args:
        plan: With ``sources``.
        kv: Gives the block tables. Blocks reserved behind a sequence's own need no copies.
    """
    count = len(plan.sequences)
    rows: list[SamplingRow] = []
    for sequence in plan.sequences:
        rows += sequence.sampling.rows(sequence.num_tokens + 1, None)
    batch = ForwardBatch(
        token_ids=np.zeros(count, dtype=np.int32),
        positions=np.array([sequence.num_tokens for sequence in plan.sequences], dtype=np.int32),
        query_starts=np.arange(count + 1, dtype=np.int32),
        block_tables=kv.block_tables([sequence.sequence_id for sequence in plan.sequences]),
        block_copies=np.empty((0, 2), dtype=np.int32),
        logit_rows=np.arange(count, dtype=np.int32),
        token_sources=np.array(plan.sources, dtype=np.int32),
    )
    return batch, tuple(rows)
