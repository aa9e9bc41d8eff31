"""``python -m sagellm.bench``: measures this machine with real models and kernels."""

from __future__ import annotations

from sagellm.terminal import run_process

if __name__ == "__main__":
    run_process("sagellm.bench.app", prog_name="python -m sagellm.bench")
