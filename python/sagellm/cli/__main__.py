"""``python -m sagellm.cli``: the ``sagellm`` command without its script."""

from sagellm.cli import main

main()
