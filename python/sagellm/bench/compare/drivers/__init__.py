"""Scripts that run one engine each, by the interpreter that has it.

They are started as ``INTERPRETER drive.py SPEC`` and know nothing of sagellm, but for its own one.
"""
