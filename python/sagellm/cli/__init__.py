"""The ``sagellm`` command."""

from __future__ import annotations

from typing import NoReturn

from sagellm.terminal import run_process


def main() -> NoReturn:
    """Entry point of the ``sagellm`` command."""
    run_process("sagellm.cli.app", prog_name="sagellm")


__all__ = ["main"]
