"""``python -m sagellm.bench``: measures this machine with real models and kernels."""

from __future__ import annotations

import sys

from sagellm.terminal import run_app

if __name__ == "__main__":
    sys.exit(run_app("sagellm.bench.app", prog_name="python -m sagellm.bench"))
