"""Another name for ``sagellm.protocol``: the same objects, the same submodules."""

import sys

from sagellm import protocol
from sagellm.protocol import *  # noqa: F403
from sagellm.protocol import __all__ as __all__
from sagellm.protocol import errors, kv_hooks, limits, sampling, timestamps, types

for _module in (errors, kv_hooks, limits, sampling, timestamps, types):
    sys.modules[_module.__name__.replace(protocol.__name__, __name__, 1)] = _module
