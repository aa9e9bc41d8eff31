"""``python -m sagellm.cli``, the same as ``sagellm``."""

from __future__ import annotations

from sagellm.cli import main

if __name__ == "__main__":
    main()
