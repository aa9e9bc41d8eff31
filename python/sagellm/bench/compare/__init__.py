"""``sagellm bench compare``: this engine and others, interleaved on one model and machine."""
