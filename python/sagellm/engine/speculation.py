"""Speculative decoding by prompt lookup: what was written before is guessed to be written again.

A step may compute tokens that are only guessed, right behind a sequence's own last token. Each gets
the row that the sampler would have had without speculation: the same logits, history, position and
random number. Guesses are kept while the sampler draws exactly them, so the output is the same with
and without, sampled or greedy. What is left to decide is when a guess is worth its time.

The odds come from the length of the match: if the last L tokens stand further up as well, what
followed them there has predicted this text L times in a row. By Laplace's rule of succession the
next prediction holds with (L + 1) / (L + 2); recorded outputs follow L / (L + 2), which is what is
used, so that k guesses in a row hold with about L^2 / (L + k)^2. A guess costs a row of the step
and brings a token if all guesses before it hold, too: it pays while those odds are above
``break_even``. Where lookups keep failing although their matches are long, a sequence trusts them
less; that is learned from lookups alone, without computing any guess.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from sagellm.engine.prompt_lookup import MIN_MATCH, PromptLookup

if TYPE_CHECKING:
    from sagellm.engine.config import EngineConfig
    from sagellm.engine.request import Sequence

MAX_DRAFT = 15
"""Most guesses per sequence and step where the engine decides: steps grow linearly from there."""

ROW_COST = 0.2
"""Time of one more token in a step, in steps of one token.

Measured with two AVX2 threads on 135 M (Q4_1) and 270 M (Q4_K_M) parameters: 0.17 to 0.22. Where
rows are cheaper this forgoes some speed and never loses any.
"""

_MARGIN = 1.3  # odds are estimates: a guess must promise that much more than it costs


class Drafter(Protocol):
    """Guesses how sequences go on."""

    def draft(self, sequence: Sequence, room: int, num_decodes: int, num_tokens: int) -> list[int]:
        """Guesses the tokens behind a sequence's last one.

        Any guess is correct as to the output; a wrong one costs time.

        Args:
            sequence: It computes its last token in the coming step.
            room: Most guesses, at least 1.
            num_decodes: Sequences that sample in the step.
            num_tokens: Tokens of the step without guesses.
        """


class PromptLookupDrafter:
    """Guesses from each sequence's own tokens, as many as pay."""

    def __init__(self, max_draft: int | None = None) -> None:
        """Chooses who decides.

        Args:
            max_draft: Guess so many tokens wherever there is a match, at any cost; None guesses
                what pays.
        """
        self._max_draft = max_draft

    def draft(self, sequence: Sequence, room: int, num_decodes: int, num_tokens: int) -> list[int]:
        """See ``Drafter``."""
        odds = 0.0
        if self._max_draft is None:
            odds = _MARGIN * break_even(num_decodes, num_tokens)
            if odds >= 1.0:
                return []  # no match is that certain
        lookup = sequence.lookup
        if lookup is None:
            lookup = sequence.lookup = PromptLookup()
        lookup.extend(sequence.ids(len(lookup), sequence.num_tokens))
        if self._max_draft is not None:
            count = self._max_draft
        else:
            count = min(MAX_DRAFT, worthwhile(lookup.match * lookup.trust**2, odds))
        guesses = lookup.draft(min(count, room)) if count > 0 else []
        ends = sequence.text.stop_ids
        return guesses[: next((i for i, token in enumerate(guesses) if token in ends), None)]


def break_even(num_decodes: int, num_tokens: int) -> float:
    """The odds at which a guess earns what it costs.

    A step of ``num_tokens`` takes 1 + ROW_COST * (num_tokens - 1) and makes ``num_decodes`` tokens.
    """
    return ROW_COST * num_decodes / (1.0 + ROW_COST * (num_tokens - 1))


def worthwhile(match: float, odds: float) -> int:
    """Guesses that follow a match of a length and hold with at least some odds."""
    return 0 if match < MIN_MATCH else int(match * (1.0 / math.sqrt(odds) - 1.0))


def create_drafter(config: EngineConfig) -> Drafter | None:
    """The drafter that a configuration asks for; None without speculation."""
    if config.speculation in ("off", 0):
        return None
    return PromptLookupDrafter(None if config.speculation == "auto" else int(config.speculation))
