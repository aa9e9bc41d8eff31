"""Random operations on the native and the reference KV cache in lock-step.

Three things are compared after every operation: the native cache with the reference (results,
errors, block ids, counters), each cache with its own invariants, and the *contents* of the pages
that both tables lead to. Contents are an oracle of their own: the machine plays the device, writes
into every page which exact prefix a token was computed after, runs the copies, and reads back all
that the next token could see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sagellm.errors import InvalidArgumentError
from sagellm.kv import ReferenceKvCache

core = pytest.importorskip("sagellm._core")

WINDOWS = [(0,), (0,), (1,), (4,), (0, 3), (0, 5, 5), (2, 7), (6, 0)]
INDEX = st.integers(0, 15)
TOKENS = st.lists(st.integers(0, 1), max_size=14)


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


class Machine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 16),
        block_size=st.integers(1, 4),
        windows=st.sampled_from(WINDOWS),
        caching=st.sampled_from([True, True, True, False]),
        hash_mask=st.sampled_from([0, 1, 2**64 - 1]),
    )
    def create(
        self,
        num_blocks: int,
        block_size: int,
        windows: tuple[int, ...],
        caching: bool,
        hash_mask: int,
    ) -> None:
        self.native = core.kv.KvCache(num_blocks, block_size, windows, caching, hash_mask=hash_mask)
        self.reference = ReferenceKvCache(num_blocks, block_size, windows, caching)
        self.num_blocks, self.block_size, self.windows = num_blocks, block_size, windows
        self.tokens: dict[int, list[int]] = {}  # live sequences: committed tokens
        self.salts: dict[int, int] = {}
        self.pinned: set[int] = set()  # live or released
        self.prompts: list[list[int]] = [[]]
        self.pages: dict[tuple[int, int], object] = {}  # (block, offset) -> what was computed there
        self.next_id = 0

    # -------------------------------------------------------------------------------- helpers

    def both(self, call: Callable[[Any], Any]) -> Any:
        """Runs `call` on both caches; they must agree on the result or on the error."""
        results = []
        for cache in (self.native, self.reference):
            try:
                result = call(cache)
                results.append(result.tolist() if isinstance(result, np.ndarray) else result)
            except InvalidArgumentError:
                results.append(InvalidArgumentError)
        assert results[0] == results[1]
        return results[0]

    def pick(self, index: int) -> int:
        return sorted(self.tokens)[index % len(self.tokens)]

    def snapshot(self) -> object:
        return self.both(lambda c: (c.block_tables(sorted(self.tokens)).tolist(), c.stats()))

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def run_copies(self) -> None:
        for source, destination in self.both(lambda c: c.take_copies()):
            for offset in range(self.block_size):
                self.pages[destination, offset] = self.pages.get((source, offset))
        self.check_contents()

    def page_of(self, tables: Any, group: int, position: int) -> tuple[int, int]:
        block = tables[group, 0, position // self.block_size]
        assert block != 0, "a visible position has no block"
        return int(block), position % self.block_size

    def check_contents(self) -> None:
        for sequence_id, tokens in self.tokens.items():
            tables = self.native.block_tables([sequence_id])
            end = len(tokens)
            for group, window in enumerate(self.windows):
                for position in range(max(0, end - window + 1) if window else 0, end):
                    expected = (group, self.salts[sequence_id], tuple(tokens[: position + 1]))
                    assert self.pages[self.page_of(tables, group, position)] == expected

    # ---------------------------------------------------------------------------------- rules

    def start(self, salt: int, tokens: list[int], *, match: bool) -> int:
        sequence_id = self.new_id()
        self.both(lambda c: c.add(sequence_id, salt))
        num_cached = 0
        if match:
            num_cached = self.both(lambda c: c.match_prefix(sequence_id, array(tokens)))
            assert num_cached % self.block_size == 0
            assert num_cached <= max(0, len(tokens) - 1)
        self.tokens[sequence_id] = tokens[:num_cached]
        self.salts[sequence_id] = salt
        return sequence_id

    @rule(salt=st.integers(0, 1), prompt=INDEX, cut=INDEX, more=TOKENS, match=st.booleans())
    def add(self, salt: int, prompt: int, cut: int, more: list[int], match: bool) -> None:
        tokens = self.prompts[prompt % len(self.prompts)][: cut * 2] + more
        self.start(salt, tokens, match=match)

    @rule(recent=INDEX, more=TOKENS, chunk=st.integers(1, 8), end=st.booleans())
    def request(self, recent: int, more: list[int], chunk: int, end: bool) -> None:
        """A recent prompt, as it was or longer, computed in chunks as far as there is room."""
        tokens = self.prompts[-1 - recent % len(self.prompts)] + more[:recent]
        sequence_id = self.start(0, tokens, match=True)
        while len(self.tokens[sequence_id]) < len(tokens):
            done = len(self.tokens[sequence_id])
            if not self.advance(sequence_id, tokens[done : done + chunk], 0):
                break
        if end:
            self.both(lambda c: c.release(sequence_id))
            del self.tokens[sequence_id]

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX, more=TOKENS, extra=st.integers(0, 5))
    def compute(self, index: int, more: list[int], extra: int) -> None:
        self.advance(self.pick(index), more, extra)

    def advance(self, sequence_id: int, more: list[int], extra: int) -> bool:
        """One engine step of one sequence, with `extra` positions reserved but not computed."""
        tokens = self.tokens[sequence_id] + more
        before = self.snapshot()
        if not self.both(lambda c: c.reserve(sequence_id, len(tokens) + extra)):
            assert self.snapshot() == before
            return False
        self.run_copies()
        tables = self.native.block_tables([sequence_id])
        for position in range(len(self.tokens[sequence_id]), len(tokens)):
            for group in range(len(self.windows)):
                contents = (group, self.salts[sequence_id], tuple(tokens[: position + 1]))
                self.pages[self.page_of(tables, group, position)] = contents
        self.both(lambda c: c.commit(sequence_id, array([*tokens, 7]), len(tokens)))
        self.tokens[sequence_id] = tokens
        self.prompts.append(tokens)
        self.check_contents()
        return True

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX, more=st.integers(0, 20))
    def reserve(self, index: int, more: int) -> None:
        """Leaves copies pending."""
        sequence_id = self.pick(index)
        before = self.snapshot()
        if not self.both(lambda c: c.reserve(sequence_id, len(self.tokens[sequence_id]) + more)):
            assert self.snapshot() == before

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX)
    def fork(self, index: int) -> None:
        parent, child = self.pick(index), self.new_id()
        self.both(lambda c: c.fork(parent, child))
        self.tokens[child] = list(self.tokens[parent])
        self.salts[child] = self.salts[parent]

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX, num_children=st.integers(1, 3), more=st.integers(1, 5))
    def sample(self, index: int, num_children: int, more: int) -> None:
        """Several samples of one prompt: forks that all reserve before copies are taken."""
        family = [self.pick(index)]
        for _ in range(num_children):
            self.fork(index)
            family.append(self.next_id)
        for sequence_id in family:
            target = len(self.tokens[sequence_id]) + more
            self.both(lambda c, i=sequence_id, n=target: c.reserve(i, n))

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX)
    def release(self, index: int) -> None:
        sequence_id = self.pick(index)
        self.both(lambda c: c.release(sequence_id))
        del self.tokens[sequence_id]

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX)
    def pin(self, index: int) -> None:
        sequence_id = self.pick(index)
        self.both(lambda c: c.pin(sequence_id))
        self.pinned.add(sequence_id)

    @precondition(lambda self: self.pinned)
    @rule(index=INDEX)
    def unpin(self, index: int) -> None:
        sequence_id = sorted(self.pinned)[index % len(self.pinned)]
        self.both(lambda c: c.unpin(sequence_id))
        self.pinned.discard(sequence_id)

    @rule()
    def take_copies(self) -> None:
        self.run_copies()

    @rule()
    def reset_prefix_index(self) -> None:
        self.both(lambda c: c.reset_prefix_index())

    @precondition(lambda self: self.tokens)
    @rule(index=INDEX, which=st.integers(0, 7))
    def misuse(self, index: int, which: int) -> None:
        """A call that must fail changes nothing."""
        sequence_id, gone = self.pick(index), self.next_id + 1
        tokens = array(self.tokens[sequence_id])
        room = self.native.block_tables([sequence_id]).shape[2] * self.block_size
        calls: list[Callable[[Any], Any]] = [
            lambda c: c.add(sequence_id),
            lambda c: c.fork(gone, gone + 1),
            lambda c: c.fork(sequence_id, sequence_id),
            lambda c: c.release(gone),
            lambda c: c.unpin(gone),
            lambda c: c.reserve(sequence_id, -1),
            lambda c: c.commit(sequence_id, np.zeros(room + 1, np.int32), room + 1),
            lambda c: c.commit(sequence_id, tokens, len(tokens) + 1),
        ]
        before = self.snapshot()
        assert self.both(calls[which]) is InvalidArgumentError
        assert self.snapshot() == before

    # ----------------------------------------------------------------------------- invariants

    @invariant()
    def caches_agree_and_are_intact(self) -> None:
        if not hasattr(self, "native"):
            return
        self.snapshot()
        for sequence_id, tokens in self.tokens.items():
            assert self.both(lambda c, i=sequence_id: c.num_tokens(i)) == len(tokens)
            self.both(lambda c, i=sequence_id: c.num_blocks_of(i))
        self.native.check_integrity()
        self.reference.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "native"):
            return
        self.run_copies()
        for sequence_id in list(self.tokens):
            self.both(lambda c, i=sequence_id: c.release(i))
        for sequence_id in self.pinned:
            self.both(lambda c, i=sequence_id: c.unpin(i))
        assert self.both(lambda c: c.stats()).free_blocks == self.num_blocks
        self.native.check_integrity()
        self.reference.check_integrity()


def test_native_and_reference_agree_over_random_operations() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=150,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
