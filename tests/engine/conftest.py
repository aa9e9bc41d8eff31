"""The runners that the engine's tests run on."""

from __future__ import annotations

from functools import partial

import pytest

from engine import support
from sagellm.backends.mock import MockRunner, QueueingMockRunner

RUNNERS = {
    "runner-without-queue": MockRunner,
    "runner-with-queue": QueueingMockRunner,
    "runner-with-queue-at-once": partial(QueueingMockRunner, at_once=True),
}


@pytest.fixture(params=list(RUNNERS))
def every_runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats a test with each kind of mock in place of ``MockRunner``."""
    for module in (support, request.module):
        if hasattr(module, "MockRunner"):
            monkeypatch.setattr(module, "MockRunner", RUNNERS[request.param])
