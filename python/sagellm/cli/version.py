"""``sagellm version``, which loads nothing else."""

from __future__ import annotations

import sys

from sagellm import __version__


def version() -> None:
    """Print the version of sagellm."""
    sys.stdout.write(f"sagellm {__version__}\n")
