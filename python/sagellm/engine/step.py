"""The plan of one step and the arrays that carry it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sagellm.backends.interface import ForwardBatch, SamplingRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.engine.request import Failure, RequestState, Sequence
    from sagellm.kv.interface import KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Which tokens one step computes.

    Attributes:
        sequences: In the order of the batch.
        counts: Tokens of each, following its ``num_computed``.
        drafts: How many of them, the last ones, are guessed (see ``speculation``).
        failures: Requests that cannot go on, taken out of the scheduler already.
    """

    sequences: tuple[Sequence, ...] = ()
    counts: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    failures: tuple[tuple[RequestState, Failure], ...] = ()

    def alone(self, index: int) -> StepPlan:
        """The part of the plan that concerns one sequence, without guesses."""
        count = self.counts[index] - self.drafts[index]
        return StepPlan(sequences=(self.sequences[index],), counts=(count,), drafts=(0,))


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
    sequences, counts = plan.sequences, np.array(plan.counts, dtype=np.int32)
    query_starts = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_starts[1:])
    token_ids = np.empty(int(query_starts[-1]), dtype=np.int32)
    computed: list[int] = []
    logit_rows: list[int] = []
    rows: list[SamplingRow] = []
    start = 0
    for sequence, count, drafted in zip(sequences, plan.counts, plan.drafts, strict=True):
        done = sequence.num_computed
        stop = start + count
        token_ids[start:stop] = sequence.slice(done, done + count)
        computed.append(done)
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
            rows += sequence.sampling.rows(sequence.slice(0, done + count), drafted)
        start = stop
    offsets = np.array(computed, dtype=np.int32) - query_starts[:-1]
    positions = np.arange(start, dtype=np.int32) + np.repeat(offsets, counts)
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        query_starts=query_starts,
        block_tables=kv.block_tables([sequence.sequence_id for sequence in sequences]),
        block_copies=copies,
        logit_rows=np.array(logit_rows, dtype=np.int32),
    )
    return batch, tuple(rows)
