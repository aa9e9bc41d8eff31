"""`sagellm.serving` under its original name: logging, random values, child processes."""

from sagellm.serving import SubprocessManager, arandint, arandstr, log, randint, randstr

__all__ = ["SubprocessManager", "arandint", "arandstr", "log", "randint", "randstr"]
