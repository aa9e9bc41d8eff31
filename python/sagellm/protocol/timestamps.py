"""When a request passed each stage."""

from __future__ import annotations

from pydantic import model_validator
from typing_extensions import Self

from sagellm.protocol._model import NonNegative, ProtocolModel


class Timestamps(ProtocolModel):
    """Stages of a request in Unix seconds, each no earlier than the one before.

    Attributes:
        queued_at: The request arrived.
        scheduled_at: It was first given a place in a step.
        executed_at: Its first token was out.
        completed_at: Its last token was out.
    """

    queued_at: NonNegative
    scheduled_at: NonNegative
    executed_at: NonNegative
    completed_at: NonNegative

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.queued_at <= self.scheduled_at <= self.executed_at <= self.completed_at:
            raise ValueError(
                "timestamps must be ordered: queued_at <= scheduled_at <= executed_at"
                " <= completed_at"
            )
        return self

    @property
    def ttft_ms(self) -> float:
        """Time to first token as the user feels it: queue included."""
        return (self.executed_at - self.queued_at) * 1000.0

    @property
    def engine_ttft_ms(self) -> float:
        """Time to first token once scheduled: queue excluded."""
        return (self.executed_at - self.scheduled_at) * 1000.0

    @property
    def queue_ms(self) -> float:
        """Time spent waiting for a place in a step."""
        return (self.scheduled_at - self.queued_at) * 1000.0

    @property
    def total_time_ms(self) -> float:
        """Arrival to last token."""
        return (self.completed_at - self.queued_at) * 1000.0
