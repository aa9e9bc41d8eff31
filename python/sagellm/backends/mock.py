"""A deterministic model without weights, for tests of everything above a backend.

The mock has real pages: a step writes every token with its position to its slot through the block
tables, and reads the visible past of each sampling row back through them. The logits are a hash of
what it reads. So a wrong block table, a lost copy, a block given away too early or a stale page
changes the output or raises, and a request's output depends on its own tokens alone.
"""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from sagellm.backends.interface import ForwardBatch, SamplingRow, StepOutput
from sagellm.backends.numpy_sampler import sample_rows
from sagellm.checkpoint.config import ModelConfig, RopeConfig
from sagellm.errors import InvalidArgumentError, UnsupportedError
from sagellm.kv import create_kv_cache
from sagellm.kv.interface import KvGroup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sagellm.backends.interface import SampledRow
    from sagellm.kv.interface import KvCache

BOS_ID = 256
EOS_ID = 257
VOCAB_SIZE = 258
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class MockTokenModel:
    """A ``sagellm.text.TokenModel``: every byte is a token; 256 begins a text and 257 ends it."""

    size = VOCAB_SIZE
    special_ids = frozenset({BOS_ID, EOS_ID})

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """UTF-8 bytes; special tokens have no spelling in text."""
        del parse_special
        return list(text.encode())

    def piece(self, token_id: int) -> str:
        """A stable name of each token."""
        names = {BOS_ID: "<bos>", EOS_ID: "<eos>"}
        return names.get(token_id) or f"<0x{token_id:02X}>"

    def find(self, piece: str) -> int | None:
        """The id of a name."""
        return next((i for i in range(VOCAB_SIZE) if self.piece(i) == piece), None)

    def piece_bytes(self, token_id: int) -> bytes:
        """The byte itself; the name of a special token."""
        return bytes([token_id]) if token_id < BOS_ID else self.piece(token_id).encode()


class MockRunner:
    """Implements ``ModelRunner``.

    Args:
        windows: One KV group per entry, 0 for full attention, else a sliding window.
        max_position: Longest context.
        fail_at_steps: Calls of ``step`` (counted from 0) that raise RuntimeError.
        fail_on_token: ``step`` raises whenever this token is among its input.
        nan_on_token: A row that follows this token reports non-finite logits.
        native_kv: Use the C++ KV cache instead of the Python one.
    """

    def __init__(
        self,
        *,
        windows: tuple[int, ...] = (0,),
        max_position: int = 4096,
        fail_at_steps: frozenset[int] = frozenset(),
        fail_on_token: int | None = None,
        nan_on_token: int | None = None,
        native_kv: bool = False,
    ) -> None:
        self._groups = tuple(KvGroup(window=w, layers=(i,)) for i, w in enumerate(windows))
        self._config = ModelConfig(
            architecture="mock",
            name="mock",
            vocab_size=VOCAB_SIZE,
            hidden_size=1,
            intermediate_size=1,
            num_layers=len(windows),
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            max_position=max_position,
            norm_eps=1e-5,
            rope=RopeConfig(theta=1e4, dim=2),
            layer_windows=windows,
        )
        self._fail_at_steps = fail_at_steps
        self._fail_on_token = fail_on_token
        self._nan_on_token = nan_on_token
        self._native_kv = native_kv
        self._block_size = 0
        self._pages = np.zeros((0, 0, 2), dtype=np.int64)  # [block, slot, (token + 1, position)]
        self.num_steps = 0
        self.largest_batch = 0

    @property
    def config(self) -> ModelConfig:
        """A one-head model of 258 tokens."""
        return self._config

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """One per window."""
        return self._groups

    @property
    def device(self) -> str:
        """``mock``."""
        return "mock"

    @property
    def memory(self) -> dict[str, int]:
        """Ledger of bytes."""
        return {"weights": 0, "kv": self._pages.nbytes, "workspace": 0}

    @property
    def kv_dtype(self) -> str:
        """``int64``."""
        return "int64"

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Two int64 per token."""
        return 16 * block_size

    def allocate_kv(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> KvCache:
        """Creates the pages and their cache."""
        self._block_size = block_size
        self._pages = np.zeros((num_blocks + 1, block_size, 2), dtype=np.int64)
        return create_kv_cache(
            num_blocks,
            block_size,
            tuple(group.window for group in self._groups),
            native=self._native_kv,
            enable_prefix_caching=enable_prefix_caching,
        )

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        *,
        return_logits: bool = False,
        return_hidden: bool = False,
    ) -> StepOutput:
        """Writes the tokens, reads the past back, and draws from hashed logits.

        Raises:
            InvalidArgumentError: A malformed batch.
            UnsupportedError: ``return_hidden``: there are none.
            RuntimeError: An injected failure, or a page that does not hold what its table promises.
        """
        if return_hidden:
            raise UnsupportedError("device mock has no hidden states; use a real model")
        number = self.num_steps
        self.num_steps += 1
        self.largest_batch = max(self.largest_batch, len(batch.query_starts) - 1)
        if number in self._fail_at_steps:
            raise RuntimeError(f"injected failure of step {number}")
        if self._fail_on_token is not None and self._fail_on_token in batch.token_ids:
            raise RuntimeError(f"injected failure on token {self._fail_on_token}")
        if sampling and len(sampling) != len(batch.logit_rows):
            raise InvalidArgumentError("sampling has not one entry per logit row")
        for source, destination in batch.block_copies:
            self._pages[destination] = self._pages[source]
        self._write(batch)
        owners = np.searchsorted(batch.query_starts, batch.logit_rows, side="right") - 1
        logits = np.empty((len(batch.logit_rows), VOCAB_SIZE), dtype=np.float32)
        for i, (row, owner) in enumerate(zip(batch.logit_rows, owners, strict=True)):
            logits[i] = self._logits(batch.block_tables[:, owner], int(batch.positions[row]))
            if int(batch.token_ids[row]) == self._nan_on_token:
                logits[i] = np.nan
        rows = sample_rows(logits, sampling) if sampling else ()
        return StepOutput(rows=rows, logits=logits if return_logits else None)

    def close(self) -> None:
        """Drops the pages."""
        self._pages = np.zeros((0, 0, 2), dtype=np.int64)

    def _write(self, batch: ForwardBatch) -> None:
        written: set[int] = set()
        for s in range(len(batch.query_starts) - 1):
            tokens = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
            positions = batch.positions[tokens].astype(np.int64)
            if len(positions) == 0 or np.any(np.diff(positions) != 1):
                raise InvalidArgumentError(f"positions of sequence {s} are not consecutive")
            for table in batch.block_tables[:, s]:
                blocks = table[positions // self._block_size]
                own = set(blocks.tolist())
                if 0 in own:
                    raise RuntimeError(f"sequence {s} writes to the padding block")
                if own & written:
                    raise RuntimeError(
                        f"sequence {s} writes to a block of another: {own & written}"
                    )
                written |= own
                slots = positions % self._block_size
                self._pages[blocks, slots, 0] = batch.token_ids[tokens].astype(np.int64) + 1
                self._pages[blocks, slots, 1] = positions

    def _logits(self, tables: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        """Hashes what the row at ``position`` sees through the tables of its groups."""
        digest = np.uint64(0)
        for group, table in zip(self._groups, tables, strict=True):
            first = max(0, position - group.window + 1) if group.window else 0
            visible = np.arange(first, position + 1)
            blocks = table[visible // self._block_size]
            seen = self._pages[blocks, visible % self._block_size]
            if np.any(blocks == 0) or np.any(seen[:, 0] == 0) or np.any(seen[:, 1] != visible):
                raise RuntimeError(f"the page of a position before {position} was lost")
            digest = _mix(digest + _mix(seen.astype(np.uint64) @ _WEIGHTS).sum(dtype=np.uint64))
        noise = _mix(digest + _IDS * _GOLDEN) >> np.uint64(40)
        return np.asarray(noise * (8.0 / (1 << 24)), dtype=np.float32)


class QueueingMockRunner(MockRunner):
    """A mock that implements ``QueueingRunner``.

    Args:
        at_once: Steps run when they are launched; else when they are waited for. A device does
            neither, but anything in between.
        fail_at_launches: Calls of ``launch`` (counted from 0) that raise RuntimeError.
        **options: Of ``MockRunner``. A step that fails there fails when it is finished.
    """

    def __init__(
        self,
        *,
        at_once: bool = False,
        fail_at_launches: frozenset[int] = frozenset(),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._at_once = at_once
        self._fail_at_launches = fail_at_launches
        self._num_launches = 0
        self._queue: deque[tuple[ForwardBatch, tuple[SamplingRow, ...]]] = deque()
        self._done: deque[StepOutput | Exception] = deque()
        self._chosen: tuple[SampledRow, ...] = ()  # by the step that ran last
        self.most_queued = 0

    def step(
        self,
        batch: ForwardBatch,
        sampling: tuple[SamplingRow, ...] = (),
        *,
        return_logits: bool = False,
        return_hidden: bool = False,
    ) -> StepOutput:
        """See ``MockRunner``.

        Raises:
            InvalidArgumentError: A step is queued.
        """
        if self._num_queued > 0:
            raise InvalidArgumentError("the step before this one has not been waited for")
        return super().step(
            batch, sampling, return_logits=return_logits, return_hidden=return_hidden
        )

    def launch(self, batch: ForwardBatch, sampling: tuple[SamplingRow, ...]) -> None:
        """See ``QueueingRunner``."""
        number = self._num_launches
        self._num_launches += 1
        if self._num_queued == 2:
            raise InvalidArgumentError("two steps are queued already; finish one")
        if batch.token_sources is not None and self._num_queued == 0:
            raise InvalidArgumentError("token_sources without a step to choose the tokens")
        if number in self._fail_at_launches:
            raise RuntimeError(f"injected failure of launch {number}")
        self._queue.append((deepcopy(batch), deepcopy(sampling)))
        self.most_queued = max(self.most_queued, self._num_queued)
        if self._at_once:
            self._run_oldest()

    def finish(self) -> StepOutput:
        """See ``QueueingRunner``."""
        if self._num_queued == 0:
            raise InvalidArgumentError("no step was launched")
        if not self._done:
            self._run_oldest()
        output = self._done.popleft()
        if isinstance(output, Exception):
            raise output
        return output

    @property
    def _num_queued(self) -> int:
        return len(self._queue) + len(self._done)

    def _run_oldest(self) -> None:
        batch, sampling = self._queue.popleft()
        if batch.token_sources is not None:
            for place, row in enumerate(batch.token_sources):
                if row >= 0:
                    chosen = self._chosen[row].token_id if row < len(self._chosen) else 0
                    batch.token_ids[place] = max(chosen, 0)
        try:
            output = super().step(batch, sampling)
        except Exception as error:
            self._chosen = ()
            self._done.append(error)
        else:
            self._chosen = output.rows
            self._done.append(output)


_WEIGHTS = np.array([0x2545F4914F6CDD1D, 0xD6E8FEB86659FD93], dtype=np.uint64)
_IDS = np.arange(1, VOCAB_SIZE + 1, dtype=np.uint64)


def _mix(values: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    mixed = np.atleast_1d(np.asarray(values, dtype=np.uint64))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
