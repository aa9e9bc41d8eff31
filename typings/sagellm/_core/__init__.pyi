"""
The native core of sagellm: one submodule per C++ namespace.
"""
from __future__ import annotations
from . import runtime
from . import checkpoint
from . import quant
from . import kernels
from . import kv
from . import ops
from . import sample
from . import model
from . import encoder
from . import profiler
from . import text
__all__: list[str] = ['checkpoint', 'encoder', 'kernels', 'kv', 'model', 'ops', 'profiler', 'quant', 'runtime', 'sample', 'text']
__version__: str = '0.1.0.0'
