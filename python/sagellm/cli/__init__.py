"""The ``sagellm`` command."""

from __future__ import annotations

import sys

from sagellm.terminal import run_app


def main() -> None:
    """Entry point of the ``sagellm`` command."""
    sys.exit(run_app("sagellm.cli.app", prog_name="sagellm"))


__all__ = ["main"]
