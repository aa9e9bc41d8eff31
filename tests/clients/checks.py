"""Runs the checks of one client and says what passed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence


def server_and_model() -> tuple[str, str]:
    """The two arguments of every script: the server's address and the model's name."""
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} URL MODEL")
    return sys.argv[1].rstrip("/"), sys.argv[2]


def embedding_model() -> str:
    """The name of the model for embeddings that the server has beside the other."""
    return os.environ["EMBEDDING_MODEL"]


def run(client: str, checks: Sequence[Callable[[], None]]) -> None:
    """Runs every check, prints a line for each, and exits with 1 when one failed."""
    failed = 0
    for check in checks:
        try:
            check()
        except Exception:
            failed += 1
            print(f"FAIL {client}: {check.__name__}", flush=True)
            traceback.print_exc()
        else:
            print(f"ok   {client}: {check.__name__}", flush=True)
    sys.exit(1 if failed else 0)
